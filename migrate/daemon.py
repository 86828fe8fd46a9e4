"""The daemon: guests that attach, migrations in both roles, the sockets. One process, one event loop.

``postcopy source`` and ``postcopy destination`` are this daemon; a destination also listens for migrations. Any guest
that runs as a whole on either can be moved away. Guests of other users attach where ``--socket-group`` lets them.
"""

import asyncio
import contextlib
import gc
import hmac
import json
import os
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import structlog

from migrate import returning
from migrate.config import make_private, share_with_group, socket_group_id
from migrate.control import ControlConnection
from migrate.daemon_paths import API_SOCKET, GUEST_SOCKET, INFO_FILE
from migrate.dataplane import prefer_latency
from migrate.descriptor_store import DescriptorStore
from migrate.destination import DestinationMigration
from migrate.errors import (
    GuestBusyError,
    GuestRefusedError,
    ListenRefusedError,
    NotFoundError,
    NotRecoverableError,
    PostcopyError,
)
from migrate.events import EventLog
from migrate.greeting import Incoming, incoming
from migrate.guest_link import GuestLink, GuestState
from migrate.half_open import HalfOpen
from migrate.http import HttpServers
from migrate.metrics import Totals
from migrate.network import Address, accept, host_of, listen, require_explicit, require_loopback, tune
from migrate.notify import extend_timeout, notify, reloading, watchdog_period_seconds
from migrate.precopy import AUTO, PrecopyPolicy
from migrate.record import Record, RecordBook
from migrate.refusals import Refusals, code_of
from migrate.region import fit_text, shape_of
from migrate.room import Room
from migrate.session import Migration
from migrate.source import SourceMigration
from migrate.switchover import Quiet
from migrate.tls import Tls, utc_text
from proto.errors import ProtocolError
from proto.messages import STREAMS_MAX, Offer
from proto.preamble import AnswerCode, ConnectionKind, Preamble
from proto.states import AFTER_SWITCHOVER, CANCELLABLE, Role, State

log = structlog.get_logger("postcopy.daemon")
ENDED_MIGRATIONS_KEPT = 64
HALF_OPEN_MAX = 64
PREAMBLE_DEADLINE_SECONDS = 5.0
TOO_MANY_SILENT = ProtocolError("busy", "connection", expected="to say at once who it is", got="nothing, and too many others")
EXTENSION_SECONDS = 30.0  # of the service manager's patience with an end that waits for pages


class Daemon:
    """``await serve()`` runs it until SIGTERM or SIGINT."""

    def __init__(
        self,
        role: str,
        runtime_dir: Path,
        *,
        listen_at: Address | None,
        metrics_at: Address | None,
        insecure: bool,
        congestion_control: str | None = None,
        poll_ns: int = 0,
        pacing: bool = True,
        socket_group: str | None = None,
        streams_max: int = STREAMS_MAX,
        tls: Tls | None = None,
    ) -> None:
        self.role = role
        self.runtime_dir = runtime_dir
        self.guests: dict[str, GuestLink] = {}
        self.migrations: OrderedDict[str, SourceMigration | DestinationMigration] = OrderedDict()
        self.store = DescriptorStore()
        self.records = RecordBook(runtime_dir)
        self.totals = Totals()
        self.quiet = Quiet()
        self.room = Room()
        self.events = EventLog(self.quiet)
        self.addresses: dict[str, str] = {}
        self.insecure, self.tls = insecure, tls
        self.started_ns, self.started_wall_ns = time.monotonic_ns(), time.time_ns()
        self.stopping = asyncio.Event()
        self._changed = asyncio.Event()  # a migration has settled, or a signal has come
        self._listen_at, self._metrics_at = listen_at, metrics_at
        self._congestion_control, self._socket_group, self._poll_ns = congestion_control, socket_group, poll_ns
        self._streams_max = streams_max
        self._pacing = pacing
        self._links: dict[GuestLink, None] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self.refusals = Refusals()
        self._half_open = HalfOpen(HALF_OPEN_MAX, lambda peer: self._refuse(TOO_MANY_SILENT, peer))
        self._terminations = 0

    # --- guests -----------------------------------------------------------------------------------------------------

    def _guest_hello(self, link: GuestLink) -> Callable[[], object] | None:
        if link.guest_id in self.guests:
            raise GuestRefusedError(
                "guest id", expected="one that no attached guest has", got=link.guest_id, code="guest-id-taken"
            )
        self.guests[link.guest_id] = link
        self._guest_event(link, "attached")
        if self.store.let_go(link):
            self._tell_held()
        log.info("guest attached", guest=link.guest_id, state=str(link.state), size_bytes=link.size_bytes, pid=link.pid)
        return returning.go_on(self, link)

    def _guest_gone(self, link: GuestLink) -> None:
        self._links.pop(link, None)
        if self.guests.get(link.guest_id) is link:
            del self.guests[link.guest_id]
            self._guest_event(link, "detached")
            log.info("guest detached", guest=link.guest_id, state=str(link.state))
        migration = self.migration_of(link)
        if migration is None:
            link.release()
        else:
            migration.guest_gone()
            if migration.settled:
                self._let_go_of_guest(migration)
        self._changed.set()

    def _guest_event(self, link: GuestLink, change: str) -> None:
        facts: dict[str, object] = {"guest_id": link.guest_id, "change": change, "state": str(link.state), "pid": link.pid}
        self.events.append("guest", "", facts)

    def migration_of(self, link: GuestLink) -> SourceMigration | DestinationMigration | None:
        """The migration that has not ended, or was abandoned, and that this guest is part of."""
        return next((m for m in self.migrations.values() if m.guest is link and (not m.ended or self._faults_on(m))), None)

    @staticmethod
    def _faults_on(migration: SourceMigration | DestinationMigration) -> bool:
        """Its source was given up, its guest runs on here and needs this daemon for as long as it lives."""
        return migration.state is State.ABANDONED and migration.guest is not None and not migration.guest.released

    def take_waiting(self, offer: Offer) -> GuestLink:
        """A waiting guest that fits: the one of that name, else any. Raises GuestRefusedError saying why none does."""
        waiting = [guest for guest in self.guests.values() if guest.state is GuestState.WAITING]
        wanted = shape_of(offer.regions)
        fitting = [guest for guest in waiting if guest.shape == wanted and guest.machine == offer.machine]
        if fitting:
            return next((guest for guest in fitting if guest.guest_id == offer.guest_id), fitting[0])
        there = "; ".join(f"{guest.guest_id}: {fit_text(guest.shape, guest.machine)}" for guest in waiting)
        expected = fit_text(wanted, offer.machine)
        raise GuestRefusedError("waiting guest", expected=expected, got=there or "no waiting guest at all", code="no-guest-fits")

    # --- migrations -------------------------------------------------------------------------------------------------

    def migrate(
        self,
        guest_id: str,
        address: Address,
        *,
        bulk: bool = True,
        precopy: PrecopyPolicy = AUTO,
        streams: int = 1,
        bulk_limit_bytes_per_second: int | None = None,
    ) -> SourceMigration:
        """Start moving a guest away. Raises NotFoundError, GuestBusyError, ListenRefusedError."""
        guest = self.guests.get(guest_id)
        if guest is None:
            raise self.no_such_guest(guest_id)
        if guest.state is not GuestState.RUNNING:
            raise GuestBusyError(f"guest {guest_id}", expected="running here as a whole", got=str(guest.state))
        if self.stopping.is_set():
            raise GuestBusyError("this daemon", expected="to run on", got="it is ending", code="daemon-ending")
        self._require_safe(address, "destination")
        migration = SourceMigration(
            guest,
            address,
            self.quiet,
            self._migration_ended,
            bulk=bulk,
            precopy=precopy,
            streams=streams,
            congestion_control=self._congestion_control,
            poll_ns=self._poll_ns,
            pacing=self._pacing,
            bulk_limit_bytes_per_second=bulk_limit_bytes_per_second,
            tls=self.tls,
        )
        self._start(migration)
        return migration

    def take_back_source(
        self, guest: GuestLink, record: Record, bulk_limit_bytes_per_second: int | None = None
    ) -> SourceMigration:
        """A migration of an earlier life, or one that has stalled, goes on: the guest is paused here, and the destination will be
        asked."""
        migration = SourceMigration(
            guest,
            Address.parse(record.peer),
            self.quiet,
            self._migration_ended,
            bulk=record.bulk,
            streams=record.streams,
            congestion_control=self._congestion_control,
            poll_ns=self._poll_ns,
            pacing=self._pacing,
            bulk_limit_bytes_per_second=bulk_limit_bytes_per_second,
            tls=self.tls,
            record=record,
        )
        self._start(migration)
        migration.taken_back(record)
        return migration

    def take_back_destination(self, guest: GuestLink, record: Record) -> DestinationMigration:
        """The same of a guest that runs here and lacks pages."""
        migration = DestinationMigration(
            bytes.fromhex(record.migration_id),
            record.peer,
            ControlConnection(),
            self.take_waiting,
            self.quiet,
            self.room,
            self._migration_ended,
            poll_ns=self._poll_ns,
            streams_max=self._streams_max,
            record=record,
            guest=guest,
        )
        self._start(migration)
        migration.taken_back(record)
        return migration

    def recover(self, migration: SourceMigration | DestinationMigration, address: Address | None) -> SourceMigration:
        """Have a paused or stalled migration dial at once, from now on there. Raises NotRecoverableError, ListenRefusedError."""
        if not isinstance(migration, SourceMigration):
            got = f"the destination; {migration.peer} is the source"
            raise NotRecoverableError(f"migration {migration.id}", expected="to be asked at its source", got=got)
        if address is not None:
            self._require_safe(address, "destination")
        if migration.state is State.STALLED:
            migration = returning.go_on_at_source(self, migration)
        migration.recover(address)
        return migration

    def _require_safe(self, address: Address, what: str) -> None:
        """Raises ListenRefusedError."""
        require_loopback(address, what, insecure=self.insecure or self.tls is not None)

    def no_such_guest(self, guest_id: str) -> NotFoundError:
        there = ", ".join(self.guests) or "those attached (none: start one with `postcopy guest`, or name another --daemon)"
        return NotFoundError(f"guest {guest_id[:64]}", expected=f"one of {there}", got="no such guest")

    def resolve(self, guest_id: str, *, here: bool) -> GuestLink:
        """A person decides where a paused guest runs. Raises NotFoundError, NotResolvableError."""
        attached, kept = self.guests.get(guest_id), returning.guest_that_lacks(self, guest_id)
        guest = attached or kept
        if attached is not None and kept is not None and attached.state is GuestState.RUNNING:  # another one of that name
            guest = kept
        if guest is None:
            raise self.no_such_guest(guest_id)
        returning.resolve(self, guest, here=here)
        return guest

    def migration(self, migration_id: str) -> SourceMigration | DestinationMigration:
        """By id or an unambiguous beginning of it. Raises NotFoundError."""
        found = [m for key, m in self.migrations.items() if key.startswith(migration_id)]
        if len(found) != 1:
            got = f"{len(found)}; `postcopy list` has their ids"
            raise NotFoundError(f"migration {migration_id}", expected="one migration", got=got)
        return found[0]

    def _start(self, migration: SourceMigration | DestinationMigration) -> None:
        self.migrations[migration.id] = migration
        migration.first_event = self.events.newest + 1
        migration.on_advance = self._migration_advanced
        migration.records, migration.refusals = self.records, self.refusals
        self._migration_advanced(migration)
        migration.before_switchover = lambda: self._store(migration)
        migration.task = asyncio.get_running_loop().create_task(migration.run())
        self._keep(migration.task)

    def _migration_advanced(self, migration: Migration) -> None:
        """Within a switchover too: nothing here may take longer than an append."""
        facts: dict[str, object] = {"role": migration.role, "guest_id": migration.guest_id, "state": migration.state}
        self.events.append("state", migration.id, facts)

    async def _store(self, migration: SourceMigration | DestinationMigration) -> None:
        if migration.guest is not None:
            await self.store.save(migration.role, migration.id, migration.guest)

    def _let_go_of_guest(self, migration: SourceMigration | DestinationMigration) -> None:
        """As soon as no page is owed: a migration has ended, or the guest of one that cannot go on is gone."""
        if not self._owes_pages(migration):
            self.store.forget(migration.id)
            if migration.guest is not None and migration.guest.gone:
                migration.guest.release()

    def _migration_ended(self, migration: Migration) -> None:
        assert isinstance(migration, SourceMigration | DestinationMigration)
        self.events.append("settled", migration.id, {"migration": migration.status()})
        self.totals.add(migration)
        migration.counted = True
        self._changed.set()
        self._let_go_of_guest(migration)
        # What nobody ever offered goes first: whoever dials and says nothing is not to push out what was.
        settled = [(m.role is Role.SOURCE or m.guest is not None, key) for key, m in self.migrations.items() if m.settled]
        ended = [key for _, key in sorted(settled, key=lambda one: one[0])]
        for key in ended[: max(0, len(ended) - ENDED_MIGRATIONS_KEPT)]:
            if self.migrations[key].ended and not self._faults_on(self.migrations[key]):
                del self.migrations[key]

    # --- connections ------------------------------------------------------------------------------------------------

    async def _accept_peers(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, place = await accept(listener, self._cannot_accept)
            peer = str(Address(*place[:2]))
            task = loop.create_task(self._greet_peer(sock, peer))
            self._keep(task)
            self._half_open.admit(task, sock, peer, answers=self.tls is None)

    def _cannot_accept(self, error: OSError) -> None:
        hint = "raise the limit of open files (LimitNOFILE)"
        self.refusals.tell(log.error, "no connection can be accepted", error, "", hint=hint)

    def _refuse(self, error: Exception, peer: str) -> None:
        self.refusals.count("migration", code_of(error))
        self.refusals.tell(log.warning, "connection refused", error, host_of(peer), peer=peer)

    async def _greet_peer(self, sock: socket.socket, peer: str) -> None:
        try:
            tune(sock, self._congestion_control)
            came = await incoming(sock, self.tls, PREAMBLE_DEADLINE_SECONDS)
            try:
                preamble = await came.preamble(PREAMBLE_DEADLINE_SECONDS)
                self._half_open.known()
                if preamble.kind is ConnectionKind.CONTROL:
                    await self._greet_control(came, preamble, peer)
                else:
                    await self._greet_data(came, preamble)
            except BaseException:
                came.close()
                raise
        except (ProtocolError, PostcopyError, OSError) as error:
            self._refuse(error, peer)
            sock.close()
        except asyncio.CancelledError:  # it gave way, or the daemon ends
            sock.close()
            raise

    async def _greet_control(self, came: Incoming, preamble: Preamble, peer: str) -> None:
        migration_id = preamble.migration_id.hex()
        known = self.migrations.get(migration_id)
        if isinstance(known, DestinationMigration) and preamble.epoch > known.epoch:
            await self._greet_again(came, preamble, known)
            return
        if known is not None:
            await came.answer(AnswerCode.EPOCH_STALE)
            raise ProtocolError(
                "epoch-stale", "control connection", expected="a new migration, epoch 0", got=f"epoch {preamble.epoch}"
            )
        if preamble.epoch != 0:
            if returning.can_answer(self, preamble):
                await returning.answer_source(self, came, preamble)
                return
            await came.answer(AnswerCode.MIGRATION_UNKNOWN)
            raise ProtocolError(
                "migration-unknown", "control connection", expected="a migration of this daemon", got=migration_id
            )
        if self.stopping.is_set():
            await came.answer(AnswerCode.BUSY)
            raise ProtocolError("busy", "control connection", expected="none while this daemon is ending", got=migration_id)
        self._make_way()
        await came.answer(AnswerCode.WELCOME)
        control = await came.control()
        self._start(
            DestinationMigration(
                preamble.migration_id,
                peer,
                control,
                self.take_waiting,
                self.quiet,
                self.room,
                self._migration_ended,
                poll_ns=self._poll_ns,
                streams_max=self._streams_max,
            )
        )

    def _make_way(self) -> None:
        """Of those that have offered nothing yet the oldest goes when there are too many (half_open.py)."""
        silent = [m for m in self.migrations.values() if isinstance(m, DestinationMigration) and m.state is State.NEW]
        if len(silent) >= HALF_OPEN_MAX:
            silent[0].give_way()

    async def _greet_again(self, came: Incoming, preamble: Preamble, migration: DestinationMigration) -> None:
        """The source of a migration that has lost a connection: whoever has its token is that source."""
        if not hmac.compare_digest(preamble.token, migration.token):
            await came.answer(AnswerCode.TOKEN_WRONG)
            raise ProtocolError("token-wrong", "control connection", expected="the migration's token", got="another")
        if migration.can_go_on:
            migration = returning.go_on_at_destination(self, migration)
        if migration.answers_later:
            await came.answer(AnswerCode.BUSY)
            raise ProtocolError("busy", "control connection", expected="a guest that has been taken back", got="not yet")
        await came.answer(AnswerCode.WELCOME)
        control = await came.control()
        now = self.migrations.get(migration.id)  # another dial may have come between
        migration = now if isinstance(now, DestinationMigration) else migration
        try:
            await migration.reconnect(control, preamble.epoch)
        except (PostcopyError, ProtocolError, TimeoutError) as error:
            log.warning("not recovered", migration=migration.id, epoch=preamble.epoch, reason=str(error))
            control.refuse(error)

    async def _greet_data(self, came: Incoming, preamble: Preamble) -> None:
        migration = self.migrations.get(preamble.migration_id.hex())
        if not isinstance(migration, DestinationMigration) or migration.ended:
            code, got = AnswerCode.MIGRATION_UNKNOWN, preamble.migration_id.hex()
        elif preamble.epoch != migration.epoch:
            code, got = AnswerCode.EPOCH_STALE, str(preamble.epoch)
        elif not hmac.compare_digest(preamble.token, migration.token):
            code, got = AnswerCode.TOKEN_WRONG, "another token"
        elif not migration.reserve(preamble.kind, preamble.stream_index):
            code, got = AnswerCode.KIND_UNEXPECTED, f"{preamble.kind.name.lower()} {preamble.stream_index}"
        else:
            await came.answer(AnswerCode.WELCOME)
            migration.attach(preamble.kind, preamble.stream_index, came.data())
            return
        await came.answer(code)
        name = code.name.lower().replace("_", "-")
        raise ProtocolError(name, "data connection", expected="urgent or bulk of a migration that waits for it", got=got)

    async def _accept_guests(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await accept(listener, self._cannot_accept)
            strangers = [link for link in self._links if link.hello is None]
            if len(strangers) >= HALF_OPEN_MAX:
                strangers[0].gives_way(TOO_MANY_SILENT)
            self._links[GuestLink(sock, self._guest_hello, self._guest_gone, self.refusals)] = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        prefer_latency()
        self.store.take_back()
        group_id = None if self._socket_group is None else socket_group_id(self._socket_group)
        make_private(self.runtime_dir, group_id)
        info: dict[str, object] = {"role": self.role, "pid": os.getpid()}
        guests = unix_listener(
            self.runtime_dir / GUEST_SOCKET, group_id
        )  # before the records: refused where a daemon answers already
        api = unix_listener(self.runtime_dir / API_SOCKET, group_id)
        self.records.open()
        returning.decide(self)
        returning.take_up(self)
        self._keep(loop.create_task(self._accept_guests(guests)))
        if self._listen_at is not None:
            self._require_safe(self._listen_at, "migration")
            listener = listen(self._listen_at)
            info["migration_address"] = self.addresses["migration"] = str(Address(*listener.getsockname()[:2]))
            self._keep(loop.create_task(self._accept_peers(listener)))
        http = HttpServers(self)
        await http.start_api(api)
        if self._metrics_at is not None:
            require_explicit(self._metrics_at, "metrics", insecure=self.insecure)
            metrics = listen(self._metrics_at)
            info["metrics_address"] = self.addresses["metrics"] = str(Address(*metrics.getsockname()[:2]))
            await http.start_metrics(metrics)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._keep(loop.create_task(self._read_anew())))
        gc.collect()
        gc.freeze()
        write_info(self.runtime_dir / INFO_FILE, info)
        notify("READY=1")
        if (period_seconds := watchdog_period_seconds()) is not None:
            self._keep(loop.create_task(self._say_alive(period_seconds)))
        if self.store.held:
            self._tell_held()
        log.info("ready", runtime_dir=str(self.runtime_dir), **info)
        try:
            await self.stopping.wait()
            await self._settle()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await http.stop()  # last: whoever watches a migration is told how it settled, not only that the daemon ends
            for link in list(self._links):
                link.close()
            for name in (GUEST_SOCKET, API_SOCKET, INFO_FILE):
                (self.runtime_dir / name).unlink(missing_ok=True)
            self.records.close()
            self.refusals.close()
            log.info("ended")

    def _tell_held(self) -> None:
        guests = ", ".join(held.guest_id for held in self.store.held)
        notify(f"STATUS=holding memory of guests from before a restart: {guests}" if guests else "STATUS=")

    async def _say_alive(self, period_seconds: float) -> None:
        """From the loop that everything here runs in: when this stops coming, the daemon hangs. Not in a switchover, unless
        that has lasted too long already to be spared."""
        while True:
            await self.quiet.wait()
            notify("WATCHDOG=1")
            await asyncio.sleep(period_seconds)

    def _terminate(self) -> None:
        self._terminations += 1
        self.stopping.set()
        self._changed.set()
        if self._terminations > 1:
            log.warning("ending now: guests in postcopy stall until a daemon takes them back")

    async def _read_anew(self) -> None:
        """SIGHUP: the files of TLS; there is nothing else that a daemon has read."""
        await self.quiet.wait()
        if self.stopping.is_set():
            return
        reloading()
        if self.tls is None:
            log.warning("nothing to read anew", hint="certificates are read: this daemon has no --tls-dir")
        else:
            try:
                self.tls.reload()
            except (ListenRefusedError, OSError) as error:  # OSError: no descriptor is left, say
                hint = "mend them and send SIGHUP again (systemctl reload)"
                log.error("TLS files not taken, the earlier stay in use", reason=str(error), hint=hint, **self._certificate())
            else:
                log.info("TLS files read anew: new connections use them", **self._certificate())
        notify("READY=1")

    def _certificate(self) -> dict[str, object]:
        """Of this daemon, as it is in use."""
        assert self.tls is not None
        return {"names": self.tls.data.names, "expires_at": utc_text(self.tls.data.valid_until_seconds)}

    async def _settle(self) -> None:
        """What has not switched over is cancelled; a guest in postcopy is not abandoned: wait for its pages, and say so."""
        notify("STOPPING=1")
        for migration in list(self.migrations.values()):
            if isinstance(migration, SourceMigration) and migration.state in CANCELLABLE:
                migration.cancel("the daemon is ending")
        said: list[str] = []
        while self._terminations < 2:
            self._changed.clear()
            waiting = [m.guest_id for m in self.migrations.values() if self._owes_pages(m)]
            if not waiting:
                return
            if waiting != said:
                status = f"waiting for guests in postcopy: {', '.join(waiting)}"
                notify(f"STATUS={status}")
                log.warning(status, hint="a second SIGTERM ends at once; their missing pages then stay at the source")
                said = waiting
            if any(m.state not in (State.PAUSED, State.STALLED) for m in self.migrations.values() if self._owes_pages(m)):
                extend_timeout(EXTENSION_SECONDS)  # not for those that wait for a path or a person: that has no end of its own
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXTENSION_SECONDS / 2):
                    await self._changed.wait()

    @staticmethod
    def _owes_pages(migration: SourceMigration | DestinationMigration) -> bool:
        """A guest in postcopy hangs on this daemon; one whose guest has gone from the destination no longer does."""
        gone = isinstance(migration, DestinationMigration) and migration.guest is not None and migration.guest.gone
        return migration.state in AFTER_SWITCHOVER and not gone

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("internal error", exc_info=task.exception())


def unix_listener(path: Path, group_id: int | None = None) -> socket.socket:
    """A 0600 socket in our directory, 0660 for a group. Raises ListenRefusedError when a daemon already answers there,
    HostLacksError for a group that is not ours."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
    except OSError:
        path.unlink(missing_ok=True)
    else:
        sock.close()
        raise ListenRefusedError(f"socket {path}", expected="no other daemon", got="one answers: choose another --runtime-dir")
    sock.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        raise ListenRefusedError(f"socket {path}", expected="a path of at most 107 bytes that can be made", got=error) from error
    finally:
        os.umask(mask)
    if group_id is not None:
        share_with_group(path, group_id, 0o660)
    sock.listen(64)
    sock.setblocking(False)
    return sock


def write_info(path: Path, info: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(info) + "\n")
    part.rename(path)
