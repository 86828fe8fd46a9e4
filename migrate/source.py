"""The source's half of a migration: offer, connect, switch over, serve pages until the destination has them all.

A migration that loses a connection after the switchover is PAUSED until others have been made (recovery.py): the guest stays
paused here, its pages are kept. One that is STALLED stays so until a person has it dial again or decides: it is not the path
that is wrong.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial

from migrate import __version__
from migrate.clock import PINGS, SAME_CLOCK, clock_id
from migrate.connections import DataConnections
from migrate.control import ControlConnection
from migrate.dataplane import PEER_FAULTS, LoopResult, SourcePlane
from migrate.departure import Departure
from migrate.errors import (
    AbandonedError,
    AbortedError,
    ConnectionLostError,
    DaemonEndingError,
    GuestGoneError,
    NotCancellableError,
    NotLimitableError,
    NotRecoverableError,
    NotResolvableError,
    PauseFailedError,
    PeerRefusedError,
    PostcopyError,
)
from migrate.greeting import DataSocket, dial_control, dial_data
from migrate.guest_link import GuestLink, GuestState
from migrate.network import Address, connect
from migrate.precopy import AUTO, PrecopyPolicy
from migrate.record import Record
from migrate.recovery import DIAL_DEADLINE_SECONDS, delays_seconds, is_lost, may_pass, may_pass_here
from migrate.region import populated_bytes
from migrate.rounds import PEER_REASON_SECONDS, lost
from migrate.session import Migration, error_facts
from migrate.switchover import Quiet, rehearse
from migrate.tls import Tls
from proto.errors import ProtocolError
from proto.messages import (
    Accept,
    Cancel,
    Complete,
    GuestReleased,
    Offer,
    OfferedRegion,
    PageRange,
    Pause,
    Paused,
    PauseFailed,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Recover,
    Recovered,
    Released,
    Resume,
    Running,
    Switchover,
)
from proto.preamble import NO_TOKEN, ConnectionKind, Preamble
from proto.states import AFTER_SWITCHOVER, CANCELLABLE, Event, State

ANSWER_DEADLINE_SECONDS = 10.0
HUGE_BYTES_A_SECOND = 128 << 20
"""Huge pages are allocated before the guest is accepted, at this rate at least: a third of the slowest that was seen."""
PAUSE_DEADLINE_SECONDS = 1.0
FIRST_STEP_SECONDS = 0.005
"""How long bulk waits for word of the guest's first step at the destination, where the guest does not ask for more (wake_ms)."""


class SourceMigration(Departure):
    """Drives one guest away. ``run`` ends when the migration has ended or is STALLED."""

    def __init__(
        self,
        guest: GuestLink,
        address: Address,
        quiet: Quiet,
        on_end: Callable[[Migration], None],
        *,
        bulk: bool = True,
        precopy: PrecopyPolicy = AUTO,
        streams: int = 1,
        congestion_control: str | None = None,
        poll_ns: int = 0,
        pacing: bool = True,
        bulk_limit_bytes_per_second: int | None = None,
        tls: Tls | None = None,
        record: Record | None = None,
    ) -> None:
        """``record``: of an earlier life of this daemon, which had paused the guest."""
        migration_id = os.urandom(16) if record is None else bytes.fromhex(record.migration_id)
        super().__init__(migration_id, guest, str(address), precopy, on_end)
        guest.state = GuestState.LEAVING  # at once: a second migration of this guest is refused from here on
        self.bulk, self.bulk_limit_bytes_per_second = bulk, bulk_limit_bytes_per_second
        self.precopy = precopy
        self._congestion_control, self._poll_ns = congestion_control, poll_ns
        self._pacing, self._tls = pacing, tls
        self._address = address
        self._quiet = quiet
        self._control: ControlConnection | None = None
        self.streams = streams if bulk else 1
        self.record = record
        self._connections = DataConnections()
        self._clock = SAME_CLOCK
        self._paused = False
        self._ran_there = False
        self._without_guest = guest.gone  # taken up from what the service manager has kept
        self._stand_ins: list[GuestLink] = []  # whose memory files the plane may read, since the guest has come back
        self._runs_here: bool | None = None  # as a person has decided
        self._retry = asyncio.Event()
        self._cancel_reason: str | None = None

    # --- the way of a migration -------------------------------------------------------------------------------------

    async def run(self) -> None:
        error: Exception | None = None
        try:
            if self.record is not None:
                await self._take_back()
                await self._leave(self._recover)
            else:
                await self._connect()
                await self._attach()
                self.advance(Event.ATTACHED)
                await self._precopy()
                self._begin_stream()
                await self._leave(self._switch_over)
        except asyncio.CancelledError:
            error = self._cancelled()
        except Exception as raised:
            error = self.typed(raised)
            self._failed(error)
        finally:
            self._close()
            self.end(error)

    async def _take_back(self) -> None:
        """Of an earlier life: the guest is paused, and may have been resumed at the destination, which is asked (P6)."""
        await self._make_plane_again()
        if self.state is State.COMPLETE:
            return
        if self.before_switchover is not None:
            await self.before_switchover()
        self.log.warning("migration taken back, dialling its destination", peer=self.peer, epoch=self.epoch)

    def taken_back(self, record: Record) -> None:
        """Before anything can fail: a failure before the switchover would resume the guest."""
        self.advance(Event.TAKEN_BACK)
        self.epoch, self._token = record.epoch, bytes.fromhex(record.token)
        self._paused, self._ran_there = True, record.ran_there

    async def _make_plane_again(self) -> None:
        """Once this host has what it takes, or a person has decided meanwhile (``_heed_decision``)."""
        for delay_seconds in delays_seconds():
            await self._wait_for_attempt(delay_seconds)
            if self.state is State.COMPLETE:
                return
            try:
                plane = self._make_plane()
            except Exception as error:
                if not may_pass_here(error):
                    raise
                self.cannot_take_back(error)
            else:
                plane.streams(self.streams)
                plane.restarted()
                self.error = None
                return

    def _make_plane(self) -> SourcePlane:
        self.guest.on_failed, self.guest.on_discard = self._guest_failed, self._discarded
        plane = self._plane = SourcePlane(self.guest.regions)
        plane.poll(self._poll_ns)
        if not self._pacing:
            plane.unpaced()
        plane.limit(self.bulk_limit_bytes_per_second)
        self.pages_total = plane.figures()["pages_total"]
        return plane

    async def _connect(self) -> None:
        self.advance(Event.CONNECT)
        plane = self._make_plane()
        self._control = await self._dial_control(NO_TOKEN)
        assert self.guest.hello is not None
        if self.bulk and self.precopy.rounds != 0:
            await self._rounds.track(plane)
        else:
            self.switched_because = (
                "no precopy was asked for" if self.bulk else "no precopy: without bulk only touched pages cross"
            )
        regions = [
            OfferedRegion(size_bytes=region.size_bytes, page_bytes=region.page_bytes, populated_bytes=populated)
            for region, populated in zip(self.guest.hello.regions, populated_bytes(self.guest.regions), strict=True)
        ]
        our_clock = clock_id()
        self._control.send(
            Offer(
                guest_id=self.guest_id,
                regions=regions,
                clock_id=our_clock,
                software=f"postcopy {__version__}",
                precopy=self._rounds.tracked,
                streams=self.streams,
                machine=self.guest.hello.machine,
            )
        )
        huge_bytes = sum(region.size_bytes for region in regions if region.page_bytes > 4096)
        accept_seconds = ANSWER_DEADLINE_SECONDS + huge_bytes / HUGE_BYTES_A_SECOND
        accept = await self._control.receive(Accept, deadline_seconds=accept_seconds)
        self.advance(Event.ACCEPTED)
        self._token = accept.token
        self._agree_on_streams(accept)
        if self._rounds.tracked and not accept.precopy:
            self._rounds.give_up("the destination does not take part")
        if accept.clock_id != our_clock:
            self._clock = await self._control.measure_clock(PINGS, ANSWER_DEADLINE_SECONDS)

    def _agree_on_streams(self, accept: Accept) -> None:
        """As many as it takes, and no more than were offered. Raises ProtocolError."""
        if accept.streams > self.streams:
            raise ProtocolError("message-invalid", "accept streams", expected=f"<= {self.streams}", got=accept.streams)
        assert self._plane is not None
        self.streams = accept.streams
        self._connections = DataConnections(self.streams)
        self._plane.streams(self.streams)

    async def _attach(self) -> None:
        assert self._control is not None
        assert self._plane is not None
        plane = self._plane
        for kind, stream in self._connections.wanted:
            self._connections.add(kind, stream, await self._dial_data(kind, stream))
        urgent = self._connections.urgent
        self.start_loop("serve", lambda: plane.serve_loop(urgent.fileno()))
        await self._control.receive(Ready, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        self._control.keep_alive()

    async def _precopy(self) -> None:
        if not self._rounds.tracked:
            return
        assert self._plane is not None
        assert self._control is not None
        self.advance(Event.PRECOPY)
        await self._rounds.run(self._plane, self._control, self._connections)

    def _begin_stream(self) -> None:
        assert self._plane is not None
        for stream, sock in enumerate(self._connections.bulk):
            self.start_loop("stream", partial(self._plane.stream_loop, sock.fileno(), stream))

    async def _leave(self, step: Callable[[], Awaitable[None]]) -> None:
        """The switchover, or recovery, and all that comes after it. A connection that is lost then is made again (P5)."""
        while self.state is not State.COMPLETE:
            try:
                await step()
            except Exception as error:
                if not self._may_be_asked_again(error):
                    raise
                self._end_epoch()
                self.error = error_facts(error)
                self.advance(Event.LOST)
                self.log.warning("migration paused: the path is lost, dialling again", reason=str(error), peer=self.peer)
                step = self._recover
            else:
                step = self._serve_until_complete

    def _may_be_asked_again(self, error: Exception) -> bool:
        """The path is lost; or the destination, whatever it has answered, has not said where the guest runs."""
        if self.state is State.SWITCHOVER:
            return not isinstance(error, AbortedError)
        return self.state is State.POSTCOPY and is_lost(error)

    # --- switchover -------------------------------------------------------------------------------------------------

    async def _switch_over(self) -> None:
        """Pause here, run there: the guest stands still between the first and the last line of the block."""
        assert self._control is not None
        assert self._plane is not None
        if self.before_switchover is not None:
            await self.before_switchover()
        self._begin_record()
        async with self._quiet:
            self.advance(Event.PREPARE)
            await self.guest.prepare(ANSWER_DEADLINE_SECONDS)
            self._control.send(
                Prepare(
                    clock_offset_ns=self._clock.offset_ns,
                    clock_uncertainty_ns=self._clock.uncertainty_ns,
                    populated_bytes=populated_bytes(self.guest.regions),
                )
            )
            await self._control.receive(Prepared, deadline_seconds=ANSWER_DEADLINE_SECONDS)
            rehearse(self.epoch)
            await self.guest.prepare(ANSWER_DEADLINE_SECONDS)
            if self._cancel_reason is not None:  # came in one tick with the answer that was awaited
                raise asyncio.CancelledError
            self._check_data_connections()
            self.advance(Event.PAUSE)
            paused = await self._pause_guest()
            self._control.check()
            self._check_data_connections()  # the last moment at which a failure leaves the guest here (P5)
            # From here on the message may have been sent: this guest is never resumed here (P4) unless by `aborted`.
            self.commit_record()
            self.advance(Event.SWITCHOVER_RECORDED)
            state, last_step_ns, foreseen = paused.state, paused.last_step_ns, paused.foreseen
            self._control.send(Switchover(epoch=self.epoch, state=state, last_step_ns=last_step_ns, foreseen=foreseen))
            self._plane.open()
            await self._control.receive(Running, deadline_seconds=ANSWER_DEADLINE_SECONDS)  # or AbortedError
        self._ran_there = True
        self.advance(Event.RUNNING)

    def _record_that_it_ran(self) -> None:
        """Behind the guest's first step: the destination has said that it runs there, and nobody decides otherwise any more."""
        if self.record is not None and not self.record.ran_there:
            with contextlib.suppress(OSError):  # then a person is believed, who has been told to make sure
                self.keep_record(ran_there=True)

    def _begin_record(self) -> None:
        """Before the pause: a daemon that is started anew finds the guest paused, and must know that it may be resumed here."""
        self.record = Record(
            role=self.role,
            migration_id=self.id,
            guest_id=self.guest_id,
            files=self.guest.files,
            regions=self.guest.regions_by_file,
            peer=self.peer,
            token=self._token.hex(),
            epoch=self.epoch,
            streams=self.streams,
            bulk=self.bulk,
        )
        self.keep_record()
        self.stage_record(may_run_there=True)

    def _check_data_connections(self) -> None:
        """Their loops are parked and do not see that one has ended. The peer's own words come first, if they are here."""
        assert self._control is not None
        lost_one = self._connections.lost()
        if lost_one is not None:
            self._control.check()
            raise lost_one

    async def _pause_guest(self) -> Paused:
        self._paused = True  # from when it may be: undone by resume
        request = Pause(deadline_ms=int(PAUSE_DEADLINE_SECONDS * 1000))
        answer = await self.guest.request(request, Paused, PauseFailed, deadline_seconds=2 * PAUSE_DEADLINE_SECONDS)
        if isinstance(answer, PauseFailed):
            raise PauseFailedError(f"guest {self.guest_id}", expected="to pause", got=answer.reason)
        return answer

    async def _serve_until_complete(self) -> None:
        assert self._control is not None
        assert self._plane is not None
        assert self.guest.hello is not None
        wake_seconds = self.guest.hello.wake_ms / 1000
        if self.bulk:
            # Bulk would compete with the demand faults of the guest's first step; it begins behind it.
            self._loop.call_later(wake_seconds or FIRST_STEP_SECONDS, self._open_bulk)
        while True:
            message = await self._control.receive(Progress, Complete)
            self._record_that_it_ran()
            if self.bulk and not wake_seconds:
                self._open_bulk()
            if isinstance(message, Complete):
                break
            self.downtime_ns, self.downtime_uncertainty_ns = message.downtime_ns, message.downtime_uncertainty_ns
            self._faults_there = message.faults
        self._completed(message)

    def _completed(self, message: Complete) -> None:
        assert self._control is not None
        self.downtime_ns, self.downtime_uncertainty_ns = message.downtime_ns, message.downtime_uncertainty_ns
        self.faults = dict(message.faults)
        self._stale_window_ns = message.stale_window_ns
        self._faults_there = sum(summary.count for summary in message.faults.values())
        self.error = None
        self.advance(Event.COMPLETE)
        with contextlib.suppress(OSError):
            self.keep_record(verdict="complete")  # before the destination forgets it
        self._control.send(Released())
        self._let_go_of_guest()
        self.log.info("migration complete", peer=self.peer, downtime_ns=self.downtime_ns)

    def _let_go_of_guest(self) -> None:
        self._stop_loops()  # before the memory files are closed
        self.guest.release()  # first: who is told may ask for the same huge pages at once
        self.guest.send(GuestReleased())
        self.guest.on_failed = self.guest.on_discard = None
        self._end_record_of_guest()
        self.guest.close()

    def _open_bulk(self) -> None:
        if self._plane is not None:
            self._plane.open_bulk()

    # --- another epoch ----------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Dial until the destination answers: the guest runs there, or is whole, or (AbortedError) never will."""
        told = ""
        for delay_seconds in delays_seconds():
            await self._wait_for_attempt(delay_seconds)
            if self.state is State.COMPLETE:
                return
            try:
                await self._dial_again()
                return
            except Exception as error:
                self._end_epoch()
                if not may_pass(error):
                    raise
                if told != str(error):
                    told = str(error)
                    self.log.warning("not recovered yet, dialling again", reason=told, peer=self.peer)

    async def _wait_for_attempt(self, delay_seconds: float) -> None:
        """So long, or until it is asked for. Raises AbortedError where a person has decided so; it may be complete as well."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_seconds):
                await self._retry.wait()
        self._retry.clear()
        self._heed_decision()

    async def _dial_again(self) -> None:
        assert self._plane is not None
        self.epoch += 1
        self.keep_record(epoch=self.epoch, peer=self.peer)
        self._control = await self._dial_control(self._token)
        self._control.send(Recover(epoch=self.epoch))
        answer = await self._control.receive(Recovered, Complete, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        if isinstance(answer, Complete):
            self._completed(answer)
            return
        if answer.epoch != self.epoch:
            raise ProtocolError("epoch-stale", "recovered epoch", expected=self.epoch, got=answer.epoch)
        self._ran_there, self._runs_here = True, None
        self._record_that_it_ran()
        self._plane.next_epoch(settled=answer.settled)
        self._plane.open()  # it runs there: what is here is final
        self._connections = DataConnections(self.streams)
        await self._attach()
        self._begin_stream()
        self.error = None
        self.reconnects += 1
        self.advance(Event.RUNNING)
        self.log.info("migration recovered", epoch=self.epoch, peer=self.peer)

    def recover(self, address: Address | None) -> None:
        """Dial at once, and from now on there. Raises NotRecoverableError unless it is paused."""
        if self.state is not State.PAUSED:
            raise NotRecoverableError(f"migration {self.id}", expected="a paused one", got=str(self.state))
        if address is not None:
            self._address, self.peer = address, str(address)
        self._retry.set()

    def resolve(self, *, here: bool) -> None:
        """A person has decided where the guest runs, and answers for it (P4). Raises NotResolvableError unless it is paused."""
        self.check_resolvable(here=here)
        self._decide(here=here)

    def check_resolvable(self, *, here: bool) -> None:
        """Raises NotResolvableError."""
        if self.state not in (State.PAUSED, State.STALLED):
            raise NotResolvableError(f"migration {self.id}", expected="a paused or stalled one", got=str(self.state))
        if here and self.guest.gone:
            raise NotResolvableError(f"guest {self.guest_id}", expected="one that is here to run", got="its process has ended")
        if here and self._ran_there:
            what = f"guest {self.guest_id}"
            raise NotResolvableError(what, expected="one that may never have run there", got="its destination says it runs")

    def leave(self) -> Record:
        """Once it has stalled: what another one begins with. Raises NotRecoverableError."""
        record, self.record = self.record, None
        if record is None or not self.told or self.guest.released:
            raise NotRecoverableError(f"migration {self.id}", expected="one that can go on", got="one that is being ended")
        return record.changed(ran_there=self._ran_there)

    def _decide(self, *, here: bool) -> None:
        self._runs_here = here
        self._retry.set()
        if self._control is not None:  # of an attempt that waits for its answer
            self._control.fail(ConnectionLostError("control connection", expected="to stay", got="a decision"))

    def _heed_decision(self) -> None:
        """Raises AbortedError where the guest runs on here; else it is let go of."""
        if self._runs_here:
            raise AbortedError("guest", expected="the destination's word", got="a person's: it runs on here")
        if self._runs_here is False:
            self._complete_with(PostcopyError("guest", expected="the destination's word", got="a person's: it runs there"))

    def _complete_with(self, error: PostcopyError) -> None:
        self.advance(Event.COMPLETE)
        self.error = error_facts(error)
        with contextlib.suppress(OSError):
            self.keep_record(verdict="complete")  # for a guest that comes back
        self._let_go_of_guest()
        self.log.warning("migration ended by a person's word: the guest runs there", peer=self.peer)

    def _end_epoch(self) -> None:
        """Its connections are closed, its loops have returned; what they have counted stays."""
        if self._plane is not None:
            self._plane.stop()
        self.join_loops()
        self._connections.close()
        if self._control is not None:
            self._control.close()

    async def _dial_control(self, token: bytes) -> ControlConnection:
        preamble = Preamble(ConnectionKind.CONTROL, self.migration_id, self.epoch, 0, token)
        return await dial_control(await self._dial(), preamble, self._tls, ANSWER_DEADLINE_SECONDS)

    async def _dial_data(self, kind: ConnectionKind, stream: int) -> DataSocket:
        preamble = Preamble(kind, self.migration_id, self.epoch, stream, self._token)
        return await dial_data(await self._dial(), preamble, self._tls, ANSWER_DEADLINE_SECONDS)

    async def _dial(self) -> socket.socket:
        seconds = ANSWER_DEADLINE_SECONDS if self.epoch == 0 else DIAL_DEADLINE_SECONDS
        return await connect(self._address, deadline_seconds=seconds, congestion_control=self._congestion_control)

    # --- without its guest's process --------------------------------------------------------------------------------

    @property
    def lacks_guest(self) -> bool:
        return self.guest.gone and (self._without_guest or self.state in AFTER_SWITCHOVER) and not self.ended

    @property
    def holds_memory_alone(self) -> bool:
        """Its guest's process has ended, in this life or before it."""
        return self.guest.gone and self.state in (State.PAUSED, State.STALLED)

    def guest_returns(self, link: GuestLink) -> None:
        """Its process has outlived the daemon too. Its files are those that are read already."""
        if self._plane is None:  # it has stalled: nobody reads these files
            self.guest.release()
        else:
            self._stand_ins.append(self.guest)
        self.guest = link
        link.state = GuestState.LEAVING
        link.on_failed, link.on_discard = self._guest_failed, self._discarded
        self.log.info("guest is back, its migration is under way", peer=self.peer)
        resumed_here = link.hello is not None and link.hello.role == "running"  # the agent is the authority on that (P4)
        if resumed_here and self.state is State.PAUSED and not self._ran_there:
            self._decide(here=True)

    def _end_record_of_guest(self) -> None:
        """Kept for a guest that has not come back, and may: it is told then how this has ended."""
        if self._without_guest and self.guest.gone and self.record is not None:
            self.records.earlier[self.id], self.record = self.record, None
        self.end_record()

    # --- what can go wrong ------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """Raises NotCancellableError once the guest has been told to pause."""
        if self.state not in CANCELLABLE or self.task is None:
            raise NotCancellableError(f"migration {self.id}", expected="a state before the switchover", got=str(self.state))
        self._cancel_reason = reason
        self.task.cancel()

    def limit_bulk(self, bytes_per_second: int | None) -> None:
        if self.settled:
            raise NotLimitableError(f"migration {self.id}", expected="one under way", got=str(self.state))
        self.bulk_limit_bytes_per_second = bytes_per_second
        if self._plane is not None:
            self._plane.limit(bytes_per_second)

    def loop_ended(self, result: LoopResult) -> None:
        if result.reason in ("stopped", "finished") or self._control is None:
            return
        error = result.error()
        if result.reason in PEER_FAULTS:
            self._control.refuse(error)
        elif result.reason != "peer-closed":
            self._control.fail(error)
        else:  # the destination closes data connections only after `released`; its reason may be on the way by control
            self._loop.call_later(PEER_REASON_SECONDS, self._control.fail, lost(result.loop, result))

    def guest_gone(self) -> None:
        """Before the switchover this ends the migration; after it the daemon still holds the memory."""
        if self._control is not None and self.state in CANCELLABLE:
            self._control.fail(GuestGoneError(f"guest {self.guest_id}", expected="to stay", got="its socket ended"))

    def _guest_failed(self, error: PostcopyError) -> None:
        if self._control is not None and self.state in CANCELLABLE:
            self._control.fail(error)

    def _discarded(self, pages: PageRange) -> None:
        """Punched, then marked: what has been sent of them is stale, and no scan finds that."""
        if self.state not in CANCELLABLE and self.state is not State.PAUSING:
            raise ProtocolError("message-unexpected", "discard", expected="none of a guest that is paused", got="one")
        self.guest.punch(pages)
        if self._plane is not None:
            self._plane.discarded(pages.region, pages.page_index, pages.page_count)

    def _cancelled(self) -> PostcopyError:
        reason = self._cancel_reason or "the daemon is ending"
        if self.state not in CANCELLABLE:  # the daemon ends at once (second SIGTERM) in the middle of a switchover or later
            ending = DaemonEndingError(reason)
            self._failed(ending)
            return ending
        self.advance(Event.CANCEL)
        if self._control is not None:
            self._control.send(Cancel(reason=reason))
        self._guest_runs_on()
        self.log.info("migration cancelled", reason=reason)
        return PostcopyError(f"cancelled: {reason}", code="cancelled")

    def _failed(self, error: Exception) -> None:
        if isinstance(error, PeerRefusedError) and error.code == AbandonedError.code:  # it has run there, whatever was lost
            self._ran_there = True
            self._record_that_it_ran()
        undecided = self.state in (State.SWITCHOVER, State.PAUSED) and not self._ran_there
        aborted = isinstance(error, AbortedError) and undecided
        if self.state in AFTER_SWITCHOVER and not aborted:
            self.advance(Event.STALL)
            if self._control is not None and not isinstance(error, PeerRefusedError | DaemonEndingError):
                self._control.refuse(error)
            what = "migration stalled: the guest stays paused here, its pages kept"
            decide = f"postcopy resolve {self.guest_id} {'--there' if self._ran_there else '--here or --there'}"
            hint = f"once the reason is gone: postcopy recover {self.id[:8]}; if that cannot be: {decide}"
            self.log.error(what, reason=str(error), peer=self.peer, hint=hint)
            return
        if self._control is not None and not isinstance(error, PeerRefusedError):
            self._control.refuse(error)
        self.advance(Event.ABORT if aborted else Event.FAILURE)
        self._guest_runs_on()
        self.log.warning("migration failed: the guest runs on here", reason=str(error), peer=self.peer)

    def _guest_runs_on(self) -> None:
        if self._paused:
            with contextlib.suppress(OSError):  # who is started anew finds it running all the same, once it has read this
                self.keep_record(may_run_there=False)
            self.guest.send(Resume(epoch=self.epoch, state=None))
        self._paused = False
        self._end_record_of_guest()
        self._stop_loops()  # before the pagemap is closed
        self.guest.untrack()
        self.guest.on_failed = self.guest.on_discard = None
        self.guest.state = GuestState.RUNNING

    def _stop_loops(self) -> None:
        if self._plane is not None:
            self._plane.stop()
            self.join_loops()
            self._figures = self._plane.figures()
            self._plane.close()
            self._plane = None
        for stand_in in self._stand_ins:
            stand_in.release()
        self._stand_ins.clear()

    def _close(self) -> None:
        self._stop_loops()
        self._connections.close()
        if self._control is not None:
            self._control.close()
            self._control = None
