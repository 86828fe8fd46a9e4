"""The source's half of a migration: offer, connect, switch over, serve pages until the destination has them all.

Not handled yet: more than one bulk connection, recovery of a lost connection. A migration that loses one after the
switchover is STALLED: the guest stays paused here, its pages kept.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import asdict

from migrate import __version__
from migrate.clock import PINGS, SAME_CLOCK, clock_id
from migrate.connections import DATA_KINDS, DataConnections
from migrate.control import ControlConnection
from migrate.dataplane import PEER_FAULTS, LoopResult, SourcePlane
from migrate.errors import (
    AbortedError,
    GuestGoneError,
    NotCancellableError,
    PauseFailedError,
    PeerRefusedError,
    PostcopyError,
)
from migrate.guest_link import GuestLink, GuestState
from migrate.network import Address, connect, greet
from migrate.precopy import AUTO, PrecopyPolicy
from migrate.region import populated_bytes
from migrate.rounds import PEER_REASON_SECONDS, Rounds, lost
from migrate.session import Migration, PrecopyInfo, RoundInfo
from migrate.switchover import Quiet, rehearse
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
    Released,
    Resume,
    Running,
    Switchover,
)
from proto.preamble import NO_TOKEN, ConnectionKind, Preamble
from proto.states import CANCELLABLE, Event, Role, State

ANSWER_DEADLINE_SECONDS = 10.0
HUGE_BYTES_A_SECOND = 128 << 20
"""Huge pages are allocated before the guest is accepted, at this rate at least: a third of the slowest that was seen."""
PAUSE_DEADLINE_SECONDS = 1.0
FIRST_STEP_SECONDS = 0.005
"""How long bulk waits for word of the guest's first step at the destination, where the guest does not ask for more (wake_ms)."""


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
        self._rounds = Rounds(self, guest, precopy)
        self._stale_window_ns: int | None = None
        self._congestion_control, self._poll_ns = congestion_control, poll_ns
        self._address = address
        self._quiet = quiet
        self._control: ControlConnection | None = None
        self._plane: SourcePlane | None = None
        self._figures: dict[str, int] = {}
        self._connections = DataConnections()
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
        if self.bulk and self.precopy.rounds != 0:
            await self._rounds.track(self._plane)
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
                machine=self.guest.hello.machine,
            )
        )
        huge_bytes = sum(region.size_bytes for region in regions if region.page_bytes > 4096)
        accept_seconds = ANSWER_DEADLINE_SECONDS + huge_bytes / HUGE_BYTES_A_SECOND
        accept = await self._control.receive(Accept, deadline_seconds=accept_seconds)
        self.advance(Event.ACCEPTED)
        self._token = accept.token
        if self._rounds.tracked and not accept.precopy:
            self._rounds.give_up("the destination does not take part")
        if accept.clock_id != our_clock:
            self._clock = await self._control.measure_clock(PINGS, ANSWER_DEADLINE_SECONDS)

    async def _attach(self) -> None:
        assert self._control is not None
        assert self._plane is not None
        plane = self._plane
        for kind in DATA_KINDS:
            self._connections.add(kind, await self._dial(kind, self._token))
        urgent = self._connections.urgent
        self.start_loop("serve", lambda: plane.serve_loop(urgent.fileno()))
        await self._control.receive(Ready, deadline_seconds=ANSWER_DEADLINE_SECONDS)
        self.advance(Event.ATTACHED)

    async def _precopy(self) -> None:
        if not self._rounds.tracked:
            return
        assert self._plane is not None
        assert self._control is not None
        self.advance(Event.PRECOPY)
        await self._rounds.run(self._plane, self._control, self._connections)

    def _begin_stream(self) -> None:
        assert self._plane is not None
        plane, bulk = self._plane, self._connections.bulk
        self.start_loop("stream", lambda: plane.stream_loop(bulk.fileno()))

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
            if self.bulk and not wake_seconds:
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
        self._connections.close()
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
        zero = sum(figures.get(f"pages_zero_{path}", 0) for path in ("urgent", "readahead", "bulk"))
        precopy = figures.get("pages_precopy", 0) + figures.get("pages_zero_precopy", 0)  # copies, one a round
        by_path = {path: figures.get(f"pages_{path}", 0) for path in ("urgent", "readahead", "bulk")}
        return {**by_path, "zero": zero, "precopy": precopy}

    def precopy_info(self) -> PrecopyInfo | None:
        if State.PRECOPY not in self._timeline:
            return None
        figures = self.figures()
        return PrecopyInfo(
            rounds_begun=len(self._rounds.done) + (self.state is State.PRECOPY),
            rounds=[RoundInfo(**asdict(one)) for one in self._rounds.done],
            bytes_moved=figures.get("bytes_precopy", 0),
            stale_pages=figures.get("pages_stale", 0),
            stale_window_seconds=None if self._stale_window_ns is None else self._stale_window_ns / 1e9,
            faults_held=None,
            faults_after=None,
            stale_pages_touched=None,
        )

    def faults_count(self) -> int:
        return max(self._faults_there, self.figures().get("requests", 0))
