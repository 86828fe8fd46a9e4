"""The source's state machine, in this process, under sequences of what a destination, guest, operator and network may do.

As in test_destination_machine.py a sequence is a seed: mostly the next legal step is taken, now and then anything at all is. Two
migrations run at once here, in one loop, and to one of them only what is legal happens: it completes, whatever is done to the
other. That one ends, typed, and its guest is resumed here exactly where it cannot run there (P4, P5).
"""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import cast

import pytest

from migrate import rounds, source
from migrate.clock import clock_id
from migrate.control import ControlConnection
from migrate.dataplane import MemoryRegion
from migrate.errors import DeadlineError, GuestGoneError, PostcopyError
from migrate.greeting import DataSocket
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guest_link import GuestLink, GuestState
from migrate.network import Address
from migrate.precopy import PrecopyPolicy
from migrate.source import SourceMigration
from migrate.switchover import Quiet
from proto.errors import ProtocolError
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import (
    ClockPing,
    GuestReleased,
    Heartbeat,
    Hello,
    Message,
    Offer,
    PageRange,
    Pause,
    Paused,
    PauseFailed,
    Prepare,
    Recover,
    Resume,
    Switchover,
)
from proto.preamble import ConnectionKind
from proto.states import SETTLED, State

from ..proto.test_messages import CONTROL, wire
from .in_process import Transport, quiet_log

pytestmark = [
    pytest.mark.requires("uffd", "wp-async", "pagemap-scan"),
    pytest.mark.usefixtures(quiet_log.__name__, "_soon_instead_of_later"),
]
PAGES = 8
PAGE_BYTES = 4096
DEADLINE_SECONDS = 10.0
TURNS = 12
REQUEST = Frame(FrameKind.REQUEST, 0, 3, PAGE_BYTES).encode()
LACKS = Frame(FrameKind.LACKS, 0, 0, PAGES * PAGE_BYTES).encode() + b"\xff"


class StubGuest:
    """A running guest as the migration sees it; what it answers is the dice's. ``said``: what it was told."""

    def __init__(self, name: str, memory: GuestMemory, dice: random.Random, *, good: bool) -> None:
        self.guest_id, self.machine = name, None
        self.hello = Hello(
            major=1, minor=0, guest_id=name, role="running", regions=memory.regions, memory_files=1, offers=["tracking"]
        )
        self.regions_by_file = memory.regions
        self.regions = [
            MemoryRegion(one.guest_address, one.size_bytes, one.offset_bytes, one.page_bytes, memory.files[one.memory_file])
            for one in memory.regions
        ]
        self.files = [(os.fstat(one).st_dev, os.fstat(one).st_ino) for one in memory.files]
        self.state, self.gone, self.released = GuestState.RUNNING, False, False
        self.on_failed = self.on_discard = None
        self.untrackable: str | None = None
        self.pagemap_fd = -1
        self.said: list[Message] = []
        self._dice, self._good = dice, good

    def _fails(self, share: float) -> bool:
        return not self._good and self._dice.random() < share

    async def track(self, deadline_seconds: float) -> str | None:
        await asyncio.sleep(0)
        if self._fails(0.1):
            return "it cannot"
        self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return None

    def untrack(self) -> None:
        if self.pagemap_fd >= 0:
            os.close(self.pagemap_fd)
        self.pagemap_fd = -1

    async def prepare(self, deadline_seconds: float) -> None:
        await asyncio.sleep(0)
        if self._fails(0.03):
            raise GuestGoneError("guest", expected="to stay", got="its end")

    async def request(self, message: Message, *_: type[Message], deadline_seconds: float) -> Message:
        assert isinstance(message, Pause)
        self.said.append(message)
        await asyncio.sleep(0)
        if self._fails(0.05):
            return PauseFailed(reason="no")
        if self._fails(0.05):
            raise DeadlineError("guest", expected="paused", got="nothing")
        return Paused(state=b"a state", last_step_ns=1)

    def send(self, message: Message) -> None:
        self.said.append(message)

    def punch(self, pages: PageRange) -> None:
        pass

    def release(self) -> None:
        self.untrack()
        self.released = True

    def close(self) -> None:
        self.gone = True

    def was_told(self, kind: type[Message]) -> int:
        return sum(isinstance(one, kind) for one in self.said)


class Dialled(SourceMigration):
    """Its connections lead to the sequence instead of an address."""

    sequence: "Sequence"

    async def _dial_control(self, token: bytes) -> ControlConnection:
        await asyncio.sleep(0)
        return self.sequence.answered_control(self.epoch)

    async def _dial_data(self, kind: ConnectionKind, stream: int) -> DataSocket:
        await asyncio.sleep(0)
        return self.sequence.answered_data(kind)


class Sequence:
    """One migration from its first connection to its end. ``wild``: how often anything at all happens."""

    def __init__(self, name: str, dice: random.Random, memory: GuestMemory, quiet: Quiet, wild: float) -> None:
        self.dice, self.wild = dice, wild
        self.guest = StubGuest(name, memory, dice, good=wild == 0)
        self.said: list[Message] = []
        self.transport: Transport | None = None
        self.control: ControlConnection | None = None
        self.heard: set[str] = set()
        self.decided_here = False
        self.done: set[tuple[int, object]] = set()
        """What has been answered, by epoch."""
        self.ends: dict[ConnectionKind, socket.socket] = {}
        self.came = b""
        self.accepts_precopy = dice.random() < 0.7
        self.migration = Dialled(
            cast(GuestLink, self.guest),
            Address("fuzz", 1),
            quiet,
            lambda _: None,
            bulk=dice.random() < 0.9,
            precopy=PrecopyPolicy(rounds=dice.choice((0, 1, 2, None))),
            pacing=dice.random() < 0.5,
            bulk_limit_bytes_per_second=dice.choice((None, 1 << 20)),
        )
        self.migration.sequence = self

    # --- what a destination does ------------------------------------------------------------------------------------

    def answered_control(self, epoch: int) -> ControlConnection:
        """Or it is not there, or says no. In time it is: a sequence is to come to its end."""
        if self.dice.random() < self.wild:
            raise self.dice.choice(
                (
                    ConnectionRefusedError("nobody"),
                    ProtocolError("busy", "answer", expected="welcome", got="busy"),
                    ProtocolError("version-unsupported", "answer", expected="welcome", got="no"),
                )
            )
        self.control = ControlConnection()
        self.transport = Transport(self.control)
        self.transport.said = self.said  # of all epochs
        return self.control

    def answered_data(self, kind: ConnectionKind) -> DataSocket:
        if self.dice.random() < self.wild / 2:
            raise ConnectionResetError("cut")
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        if (before := self.ends.get(kind)) is not None:
            before.close()
        self.ends[kind] = ours
        self.came = b""
        return theirs

    def say(self, name: str, **changed: object) -> None:
        self.heard.add(name)
        self.hear(wire({"type": name, **CONTROL[name], **changed}))

    def hear(self, data: bytes) -> None:
        if self.control is not None and self.transport is not None and not self.transport.is_closing():
            self.control.data_received(data)

    def data(self, kind: ConnectionKind, data: bytes) -> None:
        if kind in self.ends:
            with contextlib.suppress(OSError):
                self.ends[kind].send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def read_all(self) -> None:
        """All pages are holes: what comes by bulk are headers."""
        for kind, end in self.ends.items():
            with contextlib.suppress(OSError):
                data = end.recv(1 << 16, socket.MSG_DONTWAIT)
                self.came += data if kind is ConnectionKind.BULK else b""

    def marked(self) -> bool:
        kinds = [self.came[start + 2] for start in range(0, len(self.came) - FRAME_HEADER_BYTES + 1, FRAME_HEADER_BYTES)]
        return FrameKind.MARK in kinds

    def last_said(self) -> Message | None:
        """But for heartbeats, and once."""
        said = [one for one in self.said if not isinstance(one, Heartbeat)]
        return said[-1] if said and self.first_time(len(said)) else None

    def first_time(self, what: object) -> bool:
        """In this epoch."""
        before = len(self.done)
        self.done.add((self.migration.epoch, what))
        return len(self.done) > before

    def legal(self) -> None:
        """The next step of a destination that means well, if it is its turn."""
        self.read_all()
        migration, said = self.migration, self.last_said()
        state = migration.state
        if state is State.CONNECTING and isinstance(said, Offer):
            clock = clock_id() if self.dice.random() < 0.5 else "another"
            self.say("accept", clock_id=clock, precopy=said.precopy and self.accepts_precopy, streams=1)
        elif isinstance(said, ClockPing) and state is State.ATTACHING:
            self.say("clock_pong", sent_ns=said.sent_ns)
        elif state is State.ATTACHING and len(self.ends) == 2 and self.first_time("ready"):
            self.say("ready")
        elif state is State.PRECOPY and self.marked() and self.first_time("quiesced"):
            self.came = b""
            self.say("quiesced")
        elif state is State.PREPARING and isinstance(said, Prepare):
            self.say("prepared")
        elif state is State.SWITCHOVER and isinstance(said, Switchover):
            self.say("running", epoch=migration.epoch)
        elif state is State.POSTCOPY:
            self.in_postcopy()
        elif state is State.PAUSED and isinstance(said, Recover):
            self.say("recovered", epoch=migration.epoch, settled=self.dice.random() < 0.5)

    def in_postcopy(self) -> None:
        drawn = self.dice.random()
        if drawn < 0.3:
            self.data(ConnectionKind.URGENT, REQUEST)
        elif drawn < 0.5:
            self.data(ConnectionKind.BULK, LACKS)
        elif drawn < 0.7:
            self.say("progress")
        else:
            self.say("complete")

    def anything(self) -> None:
        dice, migration = self.dice, self.migration
        actions = (
            lambda: self.say(dice.choice(sorted(CONTROL))),
            lambda: self.say(dice.choice(("running", "aborted", "recovered")), epoch=migration.epoch),
            lambda: self.say(dice.choice(("refused", "complete", "cancel"))),
            lambda: self.hear(dice.randbytes(dice.randint(1, 40))),
            lambda: self.hear(wire({"type": dice.choice(sorted(CONTROL)), "epoch": dice.choice((-1, None, 7, "x"))})),
            lambda: [self.say("clock_ping") for _ in range(70)] and None,
            lambda: self.cut(),
            lambda: self.data(dice.choice(list(ConnectionKind)), dice.randbytes(dice.randint(1, 60))),
            lambda: self.data(dice.choice((ConnectionKind.URGENT, ConnectionKind.BULK)), self.any_frame()),
            lambda: [end.close() for end in self.ends.values()] and None,
            lambda: migration.guest_gone(),
            lambda: self.guest.on_failed and self.guest.on_failed(PostcopyError("it failed", code="guest-failed")),
            lambda: self.discard(),
            lambda: migration.recover(None),
            lambda: migration.limit_bulk(dice.choice((None, 1, 1 << 30))),
            lambda: migration.cancel("asked to"),
            lambda: self.resolve(here=dice.random() < 0.5),
            lambda: migration.task and dice.random() < 0.2 and migration.task.cancel(),
        )
        with contextlib.suppress(PostcopyError, ProtocolError):  # what an operator or a guest is told
            dice.choice(actions)()

    def any_frame(self) -> bytes:
        dice = self.dice
        kind = dice.choice(list(FrameKind))
        return Frame(
            kind, dice.randint(0, 1), dice.randint(0, PAGES), dice.choice((PAGE_BYTES, 0, PAGES * PAGE_BYTES))
        ).encode() + bytes(dice.randint(0, 3))

    def cut(self) -> None:
        if self.control is not None and self.transport is not None:
            if self.dice.random() < 0.5:
                self.control.connection_lost(ConnectionResetError("cut"))
            else:
                self.transport.close()

    def discard(self) -> None:
        if self.guest.on_discard is not None:
            self.guest.on_discard(PageRange(region=0, page_index=self.dice.randint(0, PAGES - 1), page_count=1))

    def resolve(self, *, here: bool) -> None:
        self.migration.resolve(here=here)
        self.decided_here = self.decided_here or here

    # --- and what must come of it -----------------------------------------------------------------------------------

    async def run(self) -> State:
        task = self.migration.task = asyncio.get_running_loop().create_task(self.migration.run())
        await asyncio.sleep(0)  # it has begun
        deadline = time.monotonic() + DEADLINE_SECONDS
        steps = itertools.count() if self.wild == 0 else range(self.dice.randint(5, 80))
        for _ in steps:
            if task.done() or time.monotonic() > deadline:
                break
            undecided = self.migration.state in (State.SWITCHOVER, State.PAUSED)  # where the guest runs; states soon left
            self.anything() if self.dice.random() < self.wild * (1 + 2 * undecided) else self.legal()
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if self.wild == 0 or self.migration.state in (State.PRECOPY, State.POSTCOPY, State.PAUSED):
                await asyncio.sleep(0.0002)  # a loop of the plane may take longer, and is met by the next step
        if not task.done():
            self.cut()
            task.cancel()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(task, return_exceptions=True)
        self.check()
        for end in self.ends.values():
            end.close()
        self.guest.release()
        return self.migration.state

    def check(self) -> None:
        migration, guest = self.migration, self.guest
        state, resumed = migration.state, guest.was_told(Resume)
        assert state in SETTLED, state
        assert migration.told
        assert migration.error is None or migration.error.code != "internal", migration.error
        assert resumed == (guest.was_told(Pause) > 0 and state in (State.FAILED, State.CANCELLED)), "resumed, or not"
        assert (guest.state is GuestState.RUNNING) == (state in (State.FAILED, State.CANCELLED)), guest.state
        assert (guest.was_told(GuestReleased) == 1) == (state is State.COMPLETE)
        if resumed and any(isinstance(one, Switchover) for one in self.said):
            assert "aborted" in self.heard or self.decided_here, "it may run there"
            assert not migration._ran_there, "it runs there"
        if self.wild == 0:
            assert state is State.COMPLETE, (state, migration.error, self.said)


@pytest.fixture
def _soon_instead_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts to dial again, and the peer's reason, in time for a thousand sequences."""
    monkeypatch.setattr(source, "delays_seconds", lambda: itertools.chain([0.0], itertools.repeat(0.0005)))
    for module in (source, rounds):
        monkeypatch.setattr(module, "PEER_REASON_SECONDS", 0.002)


@pytest.fixture(scope="module")
def memories() -> Iterator[list[GuestMemory]]:
    """Of two guests, whose writes can be seen."""
    both = [GuestMemory([MemorySpec.parse("32K")]) for _ in range(2)]
    tracked = [memory.track() for memory in both]
    yield both
    for tracking in tracked:
        tracking.close()
    for memory in both:
        memory.close()


@pytest.mark.timeout(24 * 3600)
def test_any_sequence_ends_typed(memories: list[GuestMemory], fuzz_runs: int, fuzz_seed: int) -> None:
    reached: Counter[State] = Counter()
    before = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    unheard: list[dict[str, object]] = []
    for seed in range(fuzz_seed * 1_000_000, fuzz_seed * 1_000_000 + max(fuzz_runs // 10, 100)):

        async def both(seed: int = seed) -> State:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
            dice, quiet = random.Random(seed), Quiet()
            wild = dice.choice((0.03, 0.1, 0.3))
            one = Sequence("wild", dice, memories[0], quiet, wild)
            other = Sequence("good", random.Random(-seed), memories[1], quiet, 0)
            return (await asyncio.gather(one.run(), other.run()))[0]

        try:
            reached[asyncio.run(both())] += 1
            assert not unheard
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert {State.COMPLETE, State.FAILED, State.STALLED, State.CANCELLED} <= reached.keys(), reached
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
