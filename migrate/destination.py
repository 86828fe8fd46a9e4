"""The destination's half of a migration: take a waiting guest, resume it, resolve its faults until all pages are here.

A migration that loses a connection after the switchover is PAUSED until the source has made others (recovery.py): the guest
waits for pages that are not here, for nothing else, and nothing is unregistered (P3). One that is STALLED, its guest waiting
likewise, goes on when a source dials that a person has told to; by itself it does not, as it is not the path that is wrong. In
both the operator may give the source up: ABANDONED (dataplane/abandon.c), also while the source is dialling. That is recorded
before the first page is lost: a daemon that is killed then, or later, gives up the rest when it is back.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from migrate import __version__
from migrate.arrival import Arrival
from migrate.backing import back, empty, give_back
from migrate.clock import clock_id, monotonic_ns
from migrate.connections import DataConnections
from migrate.control import ControlConnection
from migrate.dataplane import PEER_FAULTS, DestinationPlane, LoopResult
from migrate.errors import (
    AbandonedError,
    CancelledByPeerError,
    ConnectionLostError,
    DaemonEndingError,
    GuestGoneError,
    NotAbandonableError,
    PeerRefusedError,
    PostcopyError,
)
from migrate.greeting import DataSocket
from migrate.guest_link import GuestLink, GuestState
from migrate.network import host_of
from migrate.record import Record
from migrate.recovery import delays_seconds, is_lost, may_pass_here
from migrate.room import Room
from migrate.session import LostPages, Migration, error_facts
from migrate.switchover import Quiet, rehearse
from proto.errors import ProtocolError
from proto.messages import (
    STREAMS_MAX,
    Aborted,
    Accept,
    Cancel,
    Complete,
    GuestComplete,
    Offer,
    PageRange,
    Prepare,
    Prepared,
    Quiesced,
    Ready,
    Recover,
    Recovered,
    Released,
    Resume,
    ResumeFailed,
    Round,
    Running,
    Switchover,
)
from proto.preamble import ConnectionKind
from proto.states import Event, State

ATTACH_DEADLINE_SECONDS = 10.0
PREPARED_DEADLINE_SECONDS = 10.0
RESUME_DEADLINE_SECONDS = 5.0
RELEASED_DEADLINE_SECONDS = 5.0
PROGRESS_SECONDS = 0.25
LOST_RUNS_MAX = 256  # that are told one by one


class DestinationMigration(Arrival):
    """Takes one guest in. ``run`` ends when the migration has ended or is STALLED."""

    def __init__(
        self,
        migration_id: bytes,
        peer: str,
        control: ControlConnection,
        take_guest: Callable[[Offer], GuestLink],
        quiet: Quiet,
        room: Room,
        on_end: Callable[[Migration], None],
        *,
        poll_ns: int = 0,
        streams_max: int = STREAMS_MAX,
        record: Record | None = None,
        guest: GuestLink | None = None,
    ) -> None:
        """``record``, ``guest``: of an earlier life of this daemon, brought back by a guest that has been resumed here."""
        super().__init__(migration_id, peer, on_end)
        self.token = os.urandom(16) if record is None else bytes.fromhex(record.token)
        self.record = record
        self.guest: GuestLink | None = guest
        self._control = control
        self._take_guest = take_guest
        self._poll_ns, self._streams_max = poll_ns, streams_max
        self._quiet = quiet
        self._room = room
        self._connections = DataConnections()
        self._again: asyncio.Future[tuple[ControlConnection, int]] | None = None  # while it waits for another epoch
        self._final: asyncio.Future[None] = self._loop.create_future()
        self._asked: AbandonedError | None = None  # to give the source up, until that holds or has failed
        self._last_step_ns = 0
        self._clock_offset_ns = 0

    # --- the way of a migration -------------------------------------------------------------------------------------

    async def run(self) -> None:
        error: Exception | None = None
        try:
            if self.record is not None:
                await self._take_back(self.record)
            else:
                await self._accept()
                await self._switch_over()
            await self._until_whole()
            await self._finish()
        except asyncio.CancelledError:
            error = self._failed(_ending())
        except AbandonedError as asked:
            error = await self._give_up(asked)
        except Exception as raised:
            error = self._failed(self.typed(raised))
        finally:
            try:
                await self._close()
            finally:  # also when the daemon ends meanwhile
                self.end(error)

    async def _accept(self) -> None:
        offer = await self._control.receive(Offer, deadline_seconds=ATTACH_DEADLINE_SECONDS)
        self.guest_id = offer.guest_id
        self.log = self.log.bind(guest=offer.guest_id)
        self.guest = self._take_guest(offer)
        self._precopy = offer.precopy
        plane = self._make_plane(self.guest, min(offer.streams, self._streams_max))
        self._keep_states(self.guest, plane)
        await empty(self, plane)
        await self._make_room(offer)
        self.advance(Event.OFFERED)
        self._control.send(
            Accept(
                token=self.token,
                waiting_guest_id=self.guest.guest_id,
                clock_id=clock_id(),
                software=f"postcopy {__version__}",
                precopy=offer.precopy,
                streams=self.streams,
            )
        )
        await self._connections.all_here(self._control.closed, ATTACH_DEADLINE_SECONDS)
        self.advance(Event.ATTACHED)
        self._control.send(Ready())
        self._control.keep_alive()
        if self._precopy:
            self.advance(Event.PRECOPY)
            await self._hold_pages()

    def _make_plane(self, guest: GuestLink, streams: int) -> DestinationPlane:
        guest.state = GuestState.ARRIVING
        guest.on_stepped, guest.on_failed, guest.on_discard = self._stepped, self._fail, self._discarded
        plane = self._plane = DestinationPlane(guest.regions, guest.userfaultfd)
        if guest.hello is not None and guest.hello.remove_means == "zero":
            plane.removed_is_zero()
        plane.poll(self._poll_ns)
        self.streams = streams
        self._connections = DataConnections(streams)
        plane.streams(streams)
        self.pages_total = plane.figures()["pages_total"]
        self._loop.add_reader(plane.final_fd, self._pages_final)
        return plane

    def _keep_states(self, guest: GuestLink, plane: DestinationPlane) -> None:
        if not guest.keep(plane.states_fd):
            self.log.warning("guest would not survive the end of this daemon", reason="it keeps no page states for another one")

    def taken_back(self, record: Record) -> None:
        """Before anything can fail: a failure before the switchover would empty its memory."""
        assert self.guest is not None
        self.advance(Event.TAKEN_BACK)
        self.guest.discards_wait = True
        self.epoch, self.guest_id, self._precopy = record.epoch, self.guest.guest_id, record.precopy
        self.log = self.log.bind(guest=self.guest_id)

    async def _take_back(self, record: Record) -> None:
        """Of an earlier life: the guest runs here, on what was here; the source will dial again (P6)."""
        assert self.guest is not None
        self._control.fail(ConnectionLostError("control connection", expected="to stay", got="a restart of this daemon"))
        plane = await self._restore(self.guest, record)
        self.guest.take_discards()
        plane.open()
        plane.wake()
        self.start_loop("fault", lambda: plane.fault_loop(-1))
        if record.verdict == "abandoned":  # its markers are in the guest's page table still, but for what was dropped
            self._asked = abandoned(self.guest_id)
            raise self._asked
        restored = plane.figures()["pages_restored"]
        self.log.warning("migration taken back", peer=self.peer, pages_here=restored, pages=self.pages_total)
        if self.before_switchover is not None:
            await self.before_switchover()

    async def _restore(self, guest: GuestLink, record: Record) -> DestinationPlane:
        """Once this host has what it takes. Raises what no other attempt would mend."""
        for delay_seconds in delays_seconds():
            await asyncio.sleep(delay_seconds)
            if guest.gone:
                raise GuestGoneError(f"guest {self.guest_id}", expected="to be taken back", got="its socket ended")
            try:
                plane = self._make_plane(guest, record.streams)
                result = await self.on_own_thread("restore", partial(plane.restore, guest.states_fd))
                if result.reason != "finished":
                    raise result.error()
                break
            except Exception as error:
                if not may_pass_here(error):
                    raise
                self._drop_plane()  # half restored: its counters say nothing
                self.cannot_take_back(error)
        kept = guest.keep(plane.states_fd)
        if not kept and guest.hello is not None and guest.hello.role == "arriving":
            # it has older ones, by which the next life would take what is placed from now on for lacking
            raise PostcopyError(f"guest {self.guest_id}", expected="to keep page states", got="it does not", code="guest-refused")
        self.error = None
        return plane

    def _drop_plane(self) -> None:
        plane, self._plane = self._plane, None
        if plane is not None:
            self._loop.remove_reader(plane.final_fd)
            plane.close()

    @property
    def answers_later(self) -> bool:
        """Its guest cannot be taken back for the moment: the source had better dial again."""
        return self.state is State.PAUSED and self._plane is None and self.error is not None

    def _begin_record(self) -> None:
        """Before the source is told that it may switch over: one who is started anew must know that this guest never ran here."""
        assert self.guest is not None
        self.record = Record(
            role=self.role,
            migration_id=self.id,
            guest_id=self.guest.guest_id,
            files=self.guest.files,
            peer=self.peer,
            token=self.token.hex(),
            epoch=self.epoch,
            streams=self.streams,
            precopy=self._precopy,
        )
        self.keep_record()
        self.stage_record(may_run_there=True)

    async def _hold_pages(self) -> None:
        """Rounds come as long as the source finds them worth it; after its mark nothing is in flight."""
        assert self._plane is not None
        marked = asyncio.Event()
        descriptor = self._plane.marked_fd
        self._loop.add_reader(descriptor, marked.set)
        rounds = self._loop.create_task(self._follow_rounds())
        mark = self._loop.create_task(marked.wait())
        try:
            await asyncio.wait({rounds, mark}, return_when="FIRST_COMPLETED")
            if rounds.done():
                rounds.result()
        finally:
            self._loop.remove_reader(descriptor)
            for task in (rounds, mark):
                task.cancel()
            await asyncio.gather(rounds, mark, return_exceptions=True)
        self._control.send(Quiesced())

    async def _follow_rounds(self) -> None:
        """Raises what ends the migration meanwhile."""
        while True:
            await self._receive_or_cancel(Round)

    async def _make_room(self, offer: Offer) -> None:
        """All that the guest needs can be had, its huge pages are here. Raises NoRoomError, or what ended the migration."""
        assert self._plane is not None
        assert self.guest is not None
        await self._quiet.wait()  # looking takes most of a millisecond, which may be another guest's downtime
        self._room.claim(self.migration_id, self.guest.regions, [region.populated_bytes for region in offer.regions])
        await back(self, self._plane, self.guest, self._control)

    def reserve(self, kind: ConnectionKind, stream: int) -> bool:
        """Whether that data connection is awaited; ``attach`` is next, and any other of that number is not awaited any more."""
        return self.state in (State.ATTACHING, State.PAUSED) and self._connections.reserve(kind, stream)

    def attach(self, kind: ConnectionKind, stream: int, sock: DataSocket) -> None:
        """A data connection that has proven itself and is reserved."""
        if self.state not in (State.ATTACHING, State.PAUSED) or self._plane is None:  # lost while its welcome was on the way
            sock.close()
            return
        plane = self._plane
        self._connections.add(kind, stream, sock)
        if self.state is State.PAUSED:
            pass  # all at once, when all are here: until then the fault loop goes on without
        elif kind is ConnectionKind.URGENT:
            self.start_loop("fault", lambda: plane.fault_loop(sock.fileno()))
        elif self._precopy:
            self.start_loop("receive", lambda: plane.receive_loop(sock.fileno(), stream, precopy=True))

    async def _switch_over(self) -> None:
        if self.before_switchover is not None:
            await self.before_switchover()
        message = await self._receive_or_cancel(Prepare, deadline_seconds=PREPARED_DEADLINE_SECONDS)
        assert isinstance(message, Prepare)
        self._clock_offset_ns, self.downtime_uncertainty_ns = message.clock_offset_ns, message.clock_uncertainty_ns
        await self._quiet.wait()
        self._room.check(self.migration_id, message.populated_bytes)  # the last moment at which it can be refused
        self._begin_record()
        async with self._quiet:
            self.advance(Event.PREPARE)
            assert self.guest is not None
            await self.guest.prepare(PREPARED_DEADLINE_SECONDS)
            rehearse(self.epoch)
            self._control.send(Prepared())
            switchover = await self._receive_or_cancel(Switchover, deadline_seconds=PREPARED_DEADLINE_SECONDS)
            assert isinstance(switchover, Switchover)
            self._check_switchover(switchover)
            assert self.guest is not None
            self._last_step_ns = switchover.last_step_ns
            assert self._plane is not None
            if switchover.foreseen:
                self._plane.foresee(switchover.foreseen)
            # Recorded before the act: from here on the guest may run here, so `aborted` is no longer ours to say.
            self.commit_record()
            self.advance(Event.RESUME_RECORDED)
            answer = await self.guest.request(
                Resume(epoch=self.epoch, state=switchover.state), Running, ResumeFailed, deadline_seconds=RESUME_DEADLINE_SECONDS
            )
            if isinstance(answer, ResumeFailed):  # the agent, the authority on who runs, says that it never will
                self._abort(answer.reason)
                raise PostcopyError(f"guest {self.guest.guest_id}", expected="to be resumed", got=answer.reason, code="aborted")
            self._resumed_ns = monotonic_ns()
            self.advance(Event.RUNNING)
            self._plane.open()  # before `running` is said: the answer to it may be pages
            self._control.send(Running(epoch=self.epoch))
        if self.downtime_ns is not None:  # the guest's first step came in one piece with its `running`
            self._control.send(self._progress())
        self._begin_bulk()

    def _begin_bulk(self) -> None:
        """Only now (P2): a page that came before the guest was paused is not final, and would stay in a guest that waits on."""
        if not self._precopy:
            self._receive_final()

    def _receive_final(self) -> None:
        assert self._plane is not None
        for stream, sock in enumerate(self._connections.bulk):
            self.start_loop("receive", partial(self._plane.receive_loop, sock.fileno(), stream, precopy=False))

    def _check_switchover(self, switchover: Switchover) -> None:
        """The last moment at which this side may say no; it is recorded before it is said (P4)."""
        if switchover.epoch != self.epoch:
            self._abort(f"epoch {switchover.epoch}, not {self.epoch}")
            raise ProtocolError("epoch-stale", "switchover epoch", expected=self.epoch, got=switchover.epoch)
        if self.guest is None or self.guest.gone:
            self._abort("the waiting guest is gone")
            raise GuestGoneError("waiting guest", expected="to be here", got="its socket ended")
        lost = self._connections.lost()
        if lost is not None:
            self._abort(f"the {lost.what} has ended")
            raise lost

    def _abort(self, reason: str) -> None:
        with contextlib.suppress(OSError):  # of a daemon that is started anew the guest itself says that it never ran
            self.keep_record(verdict="aborted")
        self.advance(Event.ABORT)
        self._control.send(Aborted(epoch=self.epoch, reason=reason))

    async def _receive_or_cancel(
        self, kind: type[Round] | type[Prepare] | type[Switchover], deadline_seconds: float | None = None
    ) -> object:
        while True:
            message: object
            if self.state is State.PRECOPY:  # a round may be told behind its own pages, and behind the mark: they come by bulk
                message = await self._control.receive(kind, Cancel, Round, deadline_seconds=deadline_seconds)
            else:
                message = await self._control.receive(kind, Cancel, deadline_seconds=deadline_seconds)
            if isinstance(message, Cancel):
                raise CancelledByPeerError("cancelled by the source", expected="a switchover", got=message.reason)
            if isinstance(message, Round):
                self.rounds_begun = message.number
                await self._quiet.wait()
                self._room.check(self.migration_id, message.populated_bytes)
            if isinstance(message, kind):
                return message

    async def _until_final(self) -> None:
        """Every page is final, or the control connection says why that will not be."""
        peer = self._loop.create_task(self._control.receive(Released))
        waited: set[asyncio.Future[Any]] = {self._final, peer}
        try:
            while not self._final.done():
                await asyncio.wait(waited, timeout=PROGRESS_SECONDS, return_when="FIRST_COMPLETED")
                if peer.done():
                    peer.result()
                    raise ProtocolError(
                        "message-unexpected", "control message", expected="nothing before complete", got="released"
                    )
                self._control.send(self._progress())
        finally:
            peer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await peer

    # --- another epoch ----------------------------------------------------------------------------------------------

    async def _until_whole(self) -> None:
        """Every page is final. A connection that is lost meanwhile is the source's to make again (P5)."""
        while not self._final.done():
            try:
                await (self._until_recovered() if self.state is State.PAUSED else self._until_final())
            except Exception as error:
                if not is_lost(error):
                    raise
                self._pause(error)

    def _pause(self, error: Exception) -> None:
        """Its connections end, its loops return; what is here is resolved on, what is not waits."""
        assert self._plane is not None
        plane = self._plane
        self._end_epoch()
        self.start_loop("fault", lambda: plane.fault_loop(-1))
        if self.state is not State.PAUSED:
            self.error = error_facts(error)
            self.advance(Event.LOST)
            self.log.warning("migration paused: the guest waits for what is not here", reason=str(error), peer=self.peer)

    def _loops_return(self) -> None:
        """They may begin anew then, with other connections or none."""
        assert self._plane is not None
        self._plane.stop()
        self.join_loops()
        self._plane.next_epoch()

    def _end_epoch(self) -> None:
        self._loops_return()
        self._connections.close()
        self._control.close()

    def _awaits_epoch(self) -> bool:
        return self.state is State.PAUSED and self._again is not None and not self._again.done()

    async def _until_recovered(self) -> None:
        """The source has dialled again and all of its connections stand; or nothing more is needed of it."""
        assert self._plane is not None
        self._heed_request()
        again = self._again = self._loop.create_future()
        self.wake()
        await asyncio.wait({again, self._final}, return_when="FIRST_COMPLETED")
        if self._final.done():
            return
        self._control, self.epoch = again.result()
        self._heed_request()
        with contextlib.suppress(OSError):  # one that is older only makes the source dial more often
            self.keep_record(epoch=self.epoch)
        self._connections.close()  # of those that came for the last epoch, late
        self._connections = DataConnections(self.streams)
        self._control.send(Recovered(epoch=self.epoch, settled=self._plane.settled))
        await self._connections.all_here(self._control.closed, ATTACH_DEADLINE_SECONDS)
        self._heed_request()  # the last moment: from here on it has recovered, in one step
        self._loops_return()
        self.start_loop("fault", partial(self._plane.fault_loop, self._connections.urgent.fileno()))
        self._receive_final()
        self._control.send(Ready())
        self._control.keep_alive()
        self.error = None
        self.reconnects += 1
        self.advance(Event.RUNNING)
        self.log.info("migration recovered", epoch=self.epoch, peer=self.peer)

    @property
    def can_go_on(self) -> bool:
        """Stalled, and its guest has run here and lives: with another connection it goes on, as after a restart."""
        ran_here = not self._timeline.keys().isdisjoint((State.POSTCOPY, State.PAUSED))
        lives = self.guest is not None and not self.guest.gone
        return (
            self.state is State.STALLED
            and self.told
            and ran_here
            and lives
            and self._asked is None
            and self._plane is not None
            and self.record is not None
        )

    def leave(self) -> tuple[GuestLink, Record]:
        """Once it ``can_go_on``: what another one begins with, as if the guest had just brought its page states back."""
        assert self._plane is not None
        assert self.guest is not None
        assert self.record is not None
        states_fd = os.dup(self._plane.states_fd)
        self._let_go()
        self.guest.takes_back(states_fd)
        record, self.record = self.record, None
        return self.guest, record

    async def reconnect(self, control: ControlConnection, epoch: int) -> None:
        """The source has dialled again, in a newer epoch, and has proven itself: it is told how things stand."""
        recover = await control.receive(Recover, deadline_seconds=ATTACH_DEADLINE_SECONDS)
        if recover.epoch != epoch:
            raise ProtocolError("epoch-stale", "recover epoch", expected=epoch, got=recover.epoch)
        if not self._awaits_epoch():  # before the switchover this ends the migration: the guest runs on at the source
            self._control.fail(ConnectionLostError("control connection", expected="to stay", got=f"epoch {epoch} in its place"))
            self._control.close()
        async with asyncio.timeout(ATTACH_DEADLINE_SECONDS):
            while not (self.told or self._awaits_epoch() or self.answers_later):
                await self.changed()
        if self._awaits_epoch() and self._again is not None:
            self._again.set_result((control, epoch))
            return
        if (
            self.state is State.ABANDONED or self._asked is not None
        ):  # the guest runs here: the source must not resume its own (P4)
            control.refuse(abandoned(self.guest_id))
        elif self.state is State.COMPLETE:
            await self._say_whole(control)
        elif self.answers_later:
            pass  # the end of this connection: who is refused does not dial again
        elif self.ended:
            control.send(Aborted(epoch=0, reason=self.error.what if self.error else str(self.state)))
        else:
            got = f"{self.state}: {self.error.what}, {self.error.got}" if self.error else str(self.state)
            code = "guest-gone" if self.guest is None or self.guest.gone else "not-recoverable"
            control.refuse(PostcopyError(f"guest {self.guest_id}", expected="one that can go on", got=got, code=code))
        control.close()

    # --- without the source -----------------------------------------------------------------------------------------

    async def abandon(self) -> None:
        """What has not come never will: a touch of it is SIGBUS. Returns when that holds. Raises NotAbandonableError, also where
        the source has come back or the guest is whole first."""
        self._check_abandonable()
        assert self._plane is not None
        if not self._plane.can_abandon:
            raise NotAbandonableError("UFFDIO_POISON", expected="Linux 6.6 or later", got="a kernel without it")
        try:
            self.keep_record(verdict="abandoned")
        except OSError as error:
            raise NotAbandonableError(f"record of migration {self.id}", expected="to be written", got=error) from error
        asked = self._asked = abandoned(self.guest_id)
        if self.state is State.STALLED:
            self.task = self._loop.create_task(self._give_up_stalled(asked))
            await asyncio.shield(self.task)
        else:
            if self._awaits_epoch() and self._again is not None:
                self._again.set_exception(asked)
            self._control.refuse(asked)  # of an attempt that waits for its data connections
            await self._settled.wait()
        if self.state is not State.ABANDONED:
            got = self.error.what if self.error else str(self.state)
            raise NotAbandonableError(f"guest {self.guest_id}", expected="to lack pages still, and to take it", got=got)

    def _check_abandonable(self) -> None:
        """Its guest waits, for a source that may be dialling this moment. Raises NotAbandonableError."""
        waits = (self.state is State.PAUSED and self._again is not None) or (self.state is State.STALLED and self.told)
        got = str(self.state)
        if self.guest is not None and self.guest.gone:
            got = f"{self.state}, its guest gone"
        elif self.answers_later:
            got = f"{self.state}, its guest not taken back yet"
        if self._asked is not None:
            got = "one that is being given up"
        elif self._final.done():
            got = "one whose pages are all here"
        elif waits and self._plane is not None:
            return
        raise NotAbandonableError(f"migration {self.id}", expected="paused or stalled, its guest here", got=got)

    def _heed_request(self) -> None:
        """Raises AbandonedError where the operator has given the source up, and pages are lacking still."""
        if self._asked is not None and not self._final.done():
            raise self._asked

    async def _give_up_stalled(self, asked: AbandonedError) -> None:
        self.error = error_facts(await self._give_up(asked) or asked)
        self.wake()

    async def _give_up(self, asked: AbandonedError) -> Exception | None:
        """Beside the fault loop without a connection, which stays: a page that the guest drops is poisoned anew."""
        assert self._plane is not None
        plane = self._plane
        self._control.refuse(asked)  # in the words that let no source resume its guest (P4)
        try:
            result = await self.on_own_thread("abandon", plane.abandon)
        except asyncio.CancelledError:
            return self._failed(_ending()) if self.state is State.PAUSED else _ending()
        # Gone, perhaps since it touched a lost page: it is given up all the same. One that dies loses its mappings first.
        if result.reason not in ("finished", "guest-gone") or self._plane is None:
            error = result.error()
            self._asked = None  # it may be asked for again; some pages may be lost: its record stays, the next life tries anew
            return self._failed(error) if self.state is State.PAUSED else error
        runs, run_count = plane.lost(LOST_RUNS_MAX)
        self.lost = LostPages(pages=plane.figures()["pages_lost"], runs=runs, runs_left_off=run_count - len(runs))
        if self.guest is not None:
            self.guest.state = GuestState.LOST
        self.log.warning("migration abandoned: a touch of what is lost is SIGBUS", pages_lost=self.lost.pages, runs=run_count)
        self._room.forget(self.migration_id)
        self.advance(Event.ABANDON)
        return asked

    def _resolve_on(self) -> None:
        """For as long as the guest lives: what is here and was dropped from its page table comes back, what is lost is SIGBUS."""
        if self._plane is not None:
            self._plane.next_epoch()
            self.start_loop("fault", partial(self._plane.fault_loop, -1))

    def _let_go(self) -> None:
        """Nobody faults any more."""
        if self._plane is None:
            return
        self._plane.stop()
        self.join_loops()
        self._summarize()
        self._plane.close()
        self._plane = None

    async def _finish(self) -> None:
        """Stop the loops, map what is only PRESENT, unregister; the guest is whole here."""
        assert self._plane is not None
        assert self.guest is not None
        plane = self._plane
        plane.stop()
        self.join_loops()
        result = await self.on_own_thread("finish", plane.finish)
        if result.reason != "finished":
            raise result.error()
        with contextlib.suppress(OSError):  # the guest itself says that it is whole
            self.keep_record(verdict="complete")
        self.guest.became_running()
        self.guest.on_discard = self.guest.on_failed = None
        self.guest.send(GuestComplete())
        self._summarize()
        self.error = None
        self.advance(Event.COMPLETE)
        self.log.info("migration complete", peer=self.peer, downtime_ns=self.downtime_ns)
        await self._say_whole(self._control)

    async def _say_whole(self, control: ControlConnection) -> None:
        control.send(self._whole())
        with contextlib.suppress(PostcopyError, ProtocolError):  # the guest is whole: what the source does now is its own
            await control.receive(Released, deadline_seconds=RELEASED_DEADLINE_SECONDS)
            self.end_record()

    def _whole(self) -> Complete:
        return Complete(
            downtime_ns=self.downtime_ns,
            downtime_uncertainty_ns=self.downtime_uncertainty_ns,
            faults=self.faults,
            pages=self.pages_by_path(),
            stale_window_ns=self.stale_window_ns(),
        )

    # --- events -----------------------------------------------------------------------------------------------------

    def _pages_final(self) -> None:
        assert self._plane is not None
        self._loop.remove_reader(self._plane.final_fd)
        if not self._final.done():
            self._final.set_result(None)

    def _stepped(self, first_step_ns: int) -> None:
        if self._last_step_ns:  # 0: the guest had made no step at the source, or cannot tell
            self.downtime_ns = first_step_ns - (self._last_step_ns + self._clock_offset_ns)
        if self.state is State.POSTCOPY:
            self._control.send(self._progress())

    def _discarded(self, pages: PageRange) -> None:
        """Of a guest that has been resumed here: zero, wherever they are by now. Before that what it holds is nobody's."""
        if self.state not in (State.SWITCHOVER, State.POSTCOPY, State.PAUSED) or self._plane is None:
            raise ProtocolError("message-unexpected", "discard", expected="none of a guest that waits", got="one")
        result = self._plane.discard(pages.region, pages.page_index, pages.page_count)
        if result.reason != "finished":
            raise result.error()

    def give_way(self) -> None:
        """It has offered nothing yet, and others come."""
        got = "too many that have offered nothing"
        self._control.refuse(ProtocolError("busy", "control connection", expected="an offer at once", got=got))
        self._control.fail(ConnectionLostError("control connection", expected="an offer at once", got=got))

    def guest_gone(self) -> None:
        if self.state in (State.STALLED, State.ABANDONED) and self.guest is not None:
            self._let_go()
            self._room.forget(self.migration_id)
            self.guest.release()  # nobody is left to whom its pages could come
        self._fail(GuestGoneError(f"guest {self.guest_id}", expected="to stay", got="its socket ended"))

    def _fail(self, error: PostcopyError) -> None:
        """Whatever the migration waits for now, a message or another connection, it gets this error."""
        if self._awaits_epoch() and self._again is not None:
            self._again.set_exception(error)
        self._control.fail(error)

    def loop_ended(self, result: LoopResult) -> None:
        if result.reason in ("stopped", "finished") or self._final.done() or self.told:
            return
        if result.reason in PEER_FAULTS:
            self._control.refuse(result.error())
        else:
            self._fail(result.error())

    # --- the end ----------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> Exception | None:
        """The error that the migration ended with; None when it had been completed before."""
        if self.state is State.COMPLETE:
            return None
        if self.state in (State.SWITCHOVER, State.POSTCOPY, State.PAUSED):
            self.advance(Event.STALL)
            if self.guest is not None:
                self.guest.state = GuestState.LOST
            if not isinstance(error, PeerRefusedError | DaemonEndingError):
                self._control.refuse(error)
            if isinstance(error, GuestGoneError):
                self.log.error("migration stalled: its guest has ended here", reason=str(error), peer=self.peer)
                return error
            what = "migration stalled: the guest waits for pages that are still at the source"
            hint = f"once the reason is gone, at the source: postcopy recover {self.id[:8]}"
            self.log.error(what, reason=str(error), peer=self.peer, hint=hint)
            return error
        if isinstance(error, CancelledByPeerError):
            self.advance(Event.CANCEL)
        elif self.state is not State.ABORTED:
            if self.state is State.PREPARING:  # the switchover may be on its way: say that it comes to nothing (P4)
                self._abort(str(error)[:400])
            else:
                self.advance(Event.FAILURE)
            self._control.refuse(error)
        if self.guest is not None:
            self.guest.on_stepped = self.guest.on_failed = self.guest.on_discard = None
        who = host_of(self.peer) if self.guest is None else f"{host_of(self.peer)} {self.guest.guest_id}"
        self.refusals.tell(self.log.warning, "migration did not happen", error, who, peer=self.peer)
        return error

    async def _close(self) -> None:
        if self._plane is not None:
            self._loop.remove_reader(self._plane.final_fd)
            self._plane.stop()
            self.join_loops()
            self._summarize()
        try:
            if self.guest is not None and self.state in (State.FAILED, State.CANCELLED, State.ABORTED):
                await give_back(self, self._plane, self.guest)
        finally:
            self._let_all_go()

    def _let_all_go(self) -> None:
        if self.state in (State.FAILED, State.CANCELLED):
            self.end_record()
        if self.state is not State.STALLED:  # whose pages are still to come
            self._room.forget(self.migration_id)
        if (
            self.state in (State.STALLED, State.ABANDONED)
            and self._plane is not None
            and self.guest is not None
            and not self.guest.gone
        ):
            self._resolve_on()
        else:
            self._let_go()
        self._connections.close()
        self._control.close()


def abandoned(guest_id: str) -> AbandonedError:
    return AbandonedError(f"guest {guest_id}", expected="its missing pages to come", got="given up by the operator")


def _ending() -> DaemonEndingError:
    return DaemonEndingError("the daemon is ending", code="cancelled")
