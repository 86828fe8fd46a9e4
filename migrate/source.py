"""The source's half of a migration: offer, connect, switch over, serve pages until the destination has them all.

Not handled yet: more than one bulk connection, recovery of a lost connection. A migration that loses one after the
switchover is STALLED: the guest stays paused here, its pages kept.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from migrate import __version__
from migrate.clock import PINGS, SAME_CLOCK, clock_id
from migrate.control import ControlConnection
from migrate.dataplane import PEER_FAULTS, LoopResult, SourcePlane
from migrate.errors import (
    AbortedError,
    ConnectionLostError,
    GuestGoneError,
    NotCancellableError,
    PauseFailedError,
    PeerRefusedError,
    PostcopyError,
)
from migrate.guest_link import GuestLink, GuestState
from migrate.network import Address, connect, greet, has_ended
from migrate.precopy import AUTO, PrecopyPolicy, RoundFigures, reason_to_switch
from migrate.region import populated_bytes
from migrate.session import Migration, PrecopyInfo, RoundInfo
from migrate.switchover import Quiet, rehearse
from proto.errors import ProtocolError
from proto.messages import (
    Accept,
    Cancel,
    Complete,
    GuestReleased,
    Message,
    Offer,
    OfferedRegion,
    PageRange,
    Pause,
    Paused,
    PauseFailed,
    Prepare,
    Prepared,
    Progress,
    Quiesced,
    Ready,
    Released,
    Resume,
    Round,
    Running,
    Switchover,
)
from proto.preamble import NO_TOKEN, ConnectionKind, Preamble
from proto.states import CANCELLABLE, Event, Role, State

ANSWER_DEADLINE_SECONDS = 10.0
HUGE_BYTES_A_SECOND = 128 << 20
"""Huge pages are allocated before the guest is accepted, at this rate at least: a third of the slowest that was seen."""
PAUSE_DEADLINE_SECONDS = 1.0
PEER_REASON_SECONDS = 1.0
"""How long the word on the control connection may come after the end of a data connection."""


class SourceMigration(Migration):
    """Drives one guest away. ``run`` ends when the migration has ended or is STALLED."""

    role = Role.SOURCE

    def __init__(
        self,
        guest: GuestLink,
        address: Address,
        quiet: Quiet,
        on_end: Callable[[Migration], None],
        *,
        bulk: bool = True,
        precopy: PrecopyPolicy = AUTO,
        congestion_control: str | None = None,
        poll_ns: int = 0,
    ) -> None:
        super().__init__(os.urandom(16), guest.guest_id, str(address), on_end)
        self.guest = guest
        guest.state = GuestState.LEAVING  # at once: a second migration of this guest is refused from here on
        self.bulk = bulk
        self.precopy = precopy
        self.rounds: list[RoundFigures] = []
        self._stale_window_ns: int | None = None
        self._tracked = False
        self._congestion_control, self._poll_ns = congestion_control, poll_ns
        self._address = address
        self._quiet = quiet
        self._control: ControlConnection | None = None
        self._plane: SourcePlane | None = None
        self._figures: dict[str, int] = {}
        self._sockets: list[socket.socket] = []
        self._clock = SAME_CLOCK
        self._paused = False
        self._cancel_reason: str | None = None
        self._faults_there = 0

    # --- the way of a migration -------------------------------------------------------------------------------------

    async def run(self) -> None:
        error: Exception | None = None
        try:
            await self._connect()
            await self._attach()
            if self._tracked:
                await self._precopy()
            self._begin_stream()
            await self._switch_over()
            await self._serve_until_complete()
        except asyncio.CancelledError:
            error = self._cancelled()
        except Exception as raised:
            error = self.typed(raised)
            self._failed(error)
        finally:
            self._close()
            self.end(error)

    async def _connect(self) -> None:
        self.guest.on_failed, self.guest.on_discard = self._guest_failed, self._discarded
        self.advance(Event.CONNECT)
        self._plane = SourcePlane(self.guest.regions)
        self._plane.poll(self._poll_ns)
        self.pages_total = self._plane.figures()["pages_total"]
        sock = await self._dial(ConnectionKind.CONTROL, NO_TOKEN)
        _, self._control = await self._loop.create_connection(ControlConnection, sock=sock)
        assert self.guest.hello is not None
        await self._track()
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
                precopy=self._tracked,
                machine=self.guest.hello.machine,
            )
        )
        huge_bytes = sum(region.size_bytes for region in regions if region.page_bytes > 4096)
        accept_seconds = ANSWER_DEADLINE_SECONDS + huge_bytes / HUGE_BYTES_A_SECOND
        accept = await self._control.receive(Accept, deadline_seconds=accept_seconds)
        self.advance(Event.ACCEPTED)
        self._token = accept.token
        if self._tracked and not accept.precopy:
            self._no_precopy("the destination does not take part")
        if accept.clock_id != our_clock:
            self._clock = await self._control.measure_clock(PINGS, ANSWER_DEADLINE_SECONDS)

    async def _attach(self) -> None:
        assert self._control is not None
        assert self._plane is not None
        plane = self._plane
        for kind in (ConnectionKind.URGENT, ConnectionKind.BULK):
            self._sockets.append(await self._dial(kind, self._token))
        urgent, _ = self._sockets
        self.start_loop("serve", lambda: plane.serve_loop(urgent.fileno()))
        await self._control.receive(Ready, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        self.advance(Event.ATTACHED)

    def _begin_stream(self) -> None:
        assert self._plane is not None
        plane, bulk = self._plane, self._sockets[1]
        self.start_loop("stream", lambda: plane.stream_loop(bulk.fileno()))

    # --- precopy ----------------------------------------------------------------------------------------------------

    async def _track(self) -> None:
        """Whether there is precopy, and if it was wanted and cannot be, why; said once."""
        if self.precopy.rounds == 0 or not self.bulk:
            self.switched_because = (
                "no precopy was asked for" if self.bulk else "no precopy: without bulk only touched pages cross"
            )
            return
        why = self.guest.untrackable or await self.guest.track(ANSWER_DEADLINE_SECONDS) or await self._untracked()
        if why is not None:
            self._no_precopy(why)
        else:
            self._tracked = True

    async def _untracked(self) -> str | None:
        assert self._plane is not None
        plane = self._plane
        result = await self.on_own_thread("precopy", lambda: plane.precopy_check(self.guest.pagemap_fd))
        return None if result.reason == "finished" else str(result.error())

    def _no_precopy(self, why: str) -> None:
        self._tracked = False
        self.guest.untrack()
        self.switched_because = f"no precopy: {why}"
        self.log.warning("no precopy: every page is fetched or streamed after the switchover", reason=why)

    async def _precopy(self) -> None:
        """Rounds while the guest runs on, until another one is not worth it; then no precopied page is in flight any more."""
        assert self._plane is not None
        assert self._control is not None
        plane, bulk = self._plane, self._sockets[1]
        self.advance(Event.PRECOPY)
        plane.track(self.guest.pagemap_fd)
        begun = time.monotonic()
        await self._precopy_call(plane.precopy_arm)
        while True:
            pages = plane.figures()["pages_pending"]
            populated = populated_bytes(self.guest.regions)
            self._control.send(Round(number=len(self.rounds) + 1, pages=pages, populated_bytes=populated))
            await self._precopy_call(lambda: plane.precopy_send(bulk.fileno()))
            await self._precopy_call(plane.precopy_count)
            figures = plane.figures()
            written = figures["pages_written"], figures["bytes_written"]
            self.rounds.append(RoundFigures(len(self.rounds) + 1, pages, *written, time.monotonic() - begun))
            why = reason_to_switch(self.precopy, self.rounds[-1])
            if why is not None:
                break
            await self._precopy_call(plane.precopy_collect)
        self.switched_because = why
        await self._precopy_call(lambda: plane.precopy_end(bulk.fileno()), awaited=Quiesced)
        self._loop.add_reader(bulk, self._bulk_ended)  # nothing comes by it now, and nobody else looks
        try:
            await self._control.receive(Quiesced)  # behind megabytes on a slow link: no deadline
        finally:
            self._loop.remove_reader(bulk)

    def _bulk_ended(self) -> None:
        assert self._control is not None
        self._loop.remove_reader(self._sockets[1])
        lost = ConnectionLostError("bulk connection", expected="to stay", got="its end before quiesced")
        self._loop.call_later(PEER_REASON_SECONDS, self._control.fail, lost)

    async def _precopy_call(self, call: Callable[[], LoopResult], *, awaited: type[Message] | None = None) -> None:
        """One step of a round on a thread of its own, given up as soon as the peer or the guest ends the migration, or the peer
        says anything but what is ``awaited``: quiesced too early would leave precopied pages in flight."""
        assert self._control is not None
        step = self._loop.create_task(self.on_own_thread("precopy", call))
        watch = self._loop.create_task(self._control.watch(awaited))
        try:
            await asyncio.wait({step, watch}, return_when="FIRST_COMPLETED")
            if not step.done():
                watch.result()
            result = step.result()
            if result.reason != "finished":
                await asyncio.wait({watch}, timeout=PEER_REASON_SECONDS if result.reason == "peer-closed" else 0)
                self._control.check()
                raise _lost("bulk", result) if result.reason == "peer-closed" else result.error()
        finally:
            for task in (step, watch):
                task.cancel()
            await asyncio.gather(step, watch, return_exceptions=True)

    # --- switchover -------------------------------------------------------------------------------------------------

    async def _switch_over(self) -> None:
        """Pause here, run there: the guest stands still between the first and the last line of the block."""
        assert self._control is not None
        assert self._plane is not None
        if self.before_switchover is not None:
            await self.before_switchover()
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
            self.advance(Event.SWITCHOVER_RECORDED)
            self._control.send(Switchover(epoch=self.epoch, state=paused.state, last_step_ns=paused.last_step_ns))
            self._plane.open()
            await self._control.receive(Running, deadline_seconds=ANSWER_DEADLINE_SECONDS)  # or AbortedError
        self.advance(Event.RUNNING)

    def _check_data_connections(self) -> None:
        """Their loops are parked and do not see that one has ended. The peer's own words come first, if they are here."""
        assert self._control is not None
        for name, sock in zip(("urgent", "bulk"), self._sockets, strict=True):
            if has_ended(sock):
                self._control.check()
                raise ConnectionLostError(f"{name} connection", expected="to stay", got="its end before the switchover")

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
        if self.bulk:
            # Bulk would compete with the demand faults of the guest's first step; it begins behind it.
            assert self.guest.hello is not None
            self._loop.call_later(self.guest.hello.first_step_ms / 1000, self._open_bulk)
        while True:
            message = await self._control.receive(Progress, Complete)
            if self.bulk:
                self._open_bulk()
            self.downtime_ns, self.downtime_uncertainty_ns = message.downtime_ns, message.downtime_uncertainty_ns
            if isinstance(message, Complete):
                break
            self._faults_there = message.faults
        self.faults = dict(message.faults)
        self._stale_window_ns = message.stale_window_ns
        self._faults_there = sum(summary.count for summary in message.faults.values())
        self.advance(Event.COMPLETE)
        self._control.send(Released())
        self._stop_loops()  # before the memory files are closed
        self.guest.send(GuestReleased())
        self.guest.close()
        self.guest.release()
        self.log.info("migration complete", peer=self.peer, downtime_ns=self.downtime_ns)

    def _open_bulk(self) -> None:
        if self._plane is not None:
            self._plane.open_bulk()

    async def _dial(self, kind: ConnectionKind, token: bytes) -> socket.socket:
        sock = await connect(self._address, deadline_seconds=ANSWER_DEADLINE_SECONDS, congestion_control=self._congestion_control)
        await greet(sock, Preamble(kind, self.migration_id, self.epoch, token=token), ANSWER_DEADLINE_SECONDS)
        return sock

    # --- what can go wrong ------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """Raises NotCancellableError once the guest has been told to pause."""
        if self.state not in CANCELLABLE or self.task is None:
            raise NotCancellableError(f"migration {self.id}", expected="a state before the switchover", got=str(self.state))
        self._cancel_reason = reason
        self.task.cancel()

    def loop_ended(self, result: LoopResult) -> None:
        if result.reason in ("stopped", "finished") or self._control is None:
            return
        error = result.error()
        if result.reason in PEER_FAULTS:
            self._control.refuse(error)
        elif result.reason != "peer-closed":
            self._control.fail(error)
        else:  # the destination closes data connections only after `released`; its reason may be on the way by control
            self._loop.call_later(PEER_REASON_SECONDS, self._control.fail, _lost(result.loop, result))

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
            ending = PostcopyError(reason, code="daemon-ended")
            self._failed(ending)
            return ending
        self.advance(Event.CANCEL)
        if self._control is not None:
            self._control.send(Cancel(reason=reason))
        self._guest_runs_on()
        self.log.info("migration cancelled", reason=reason)
        return PostcopyError(f"cancelled: {reason}", code="cancelled")

    def _failed(self, error: Exception) -> None:
        aborted = isinstance(error, AbortedError) and self.state is State.SWITCHOVER
        if self.state in (State.SWITCHOVER, State.POSTCOPY) and not aborted:
            self.advance(Event.LOST)
            if self._control is not None and isinstance(error, ProtocolError):
                self._control.refuse(error)
            self.log.error("migration stalled: the guest stays paused here, its pages kept", reason=str(error), peer=self.peer)
            return
        if self._control is not None and not isinstance(error, PeerRefusedError):
            self._control.refuse(error)
        self.advance(Event.ABORT if aborted else Event.FAILURE)
        self._guest_runs_on()
        self.log.warning("migration failed: the guest runs on here", reason=str(error), peer=self.peer)

    def _guest_runs_on(self) -> None:
        if self._paused:
            self.guest.send(Resume(epoch=self.epoch, state=None))
        self._paused = False
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

    def _close(self) -> None:
        self._stop_loops()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.close()
        if self._control is not None:
            self._control.close()

    # --- figures ----------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, int]:
        return self._plane.figures() if self._plane is not None else self._figures

    def pages_done(self) -> int:
        figures = self.figures()
        if self.state is State.PRECOPY:
            return self.pages_total - figures.get("pages_pending", 0)
        return self.pages_total if self.state is State.COMPLETE else figures.get("pages_sent", 0)

    def pages_by_path(self) -> dict[str, int]:
        figures = self.figures()
        zero = figures.get("pages_zero_urgent", 0) + figures.get("pages_zero_bulk", 0)
        precopy = figures.get("pages_precopy", 0) + figures.get("pages_zero_precopy", 0)  # copies, one a round
        return {"urgent": figures.get("pages_urgent", 0), "bulk": figures.get("pages_bulk", 0), "zero": zero, "precopy": precopy}

    def precopy_info(self) -> PrecopyInfo | None:
        if State.PRECOPY not in self._timeline:
            return None
        figures = self.figures()
        return PrecopyInfo(
            rounds_begun=len(self.rounds) + (self.state is State.PRECOPY),
            rounds=[RoundInfo(**asdict(one)) for one in self.rounds],
            bytes_moved=figures.get("bytes_precopy", 0),
            stale_pages=figures.get("pages_stale", 0),
            stale_window_seconds=None if self._stale_window_ns is None else self._stale_window_ns / 1e9,
            faults_held=None,
        )

    def faults_count(self) -> int:
        return max(self._faults_there, self.figures().get("requests", 0))


def _lost(connection: str, result: LoopResult) -> ConnectionLostError:
    return ConnectionLostError(f"{connection} connection", expected="to stay", got=str(result.error()))
