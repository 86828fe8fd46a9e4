"""The destination's state machine, in this process, under sequences of what a source, a guest and the network may do.

A sequence is a seed. Mostly the next legal step is taken, so that all states are reached; now and then anything at all is: a
message out of order or out of its bounds, garbage, an end of a connection, frames that are wrong, a guest that fails, an operator
that gives up. The plane is the real one, with memory that nobody touches. Whatever was done, the migration ends, typed, and the
guest runs in one place (P4).
"""

import asyncio
import contextlib
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import cast

import pytest

from migrate import uffd
from migrate.control import ControlConnection
from migrate.dataplane import MemoryRegion
from migrate.destination import DestinationMigration
from migrate.errors import DeadlineError, GuestGoneError, PostcopyError
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guest_link import GuestLink, GuestState
from migrate.room import Room
from migrate.switchover import Quiet
from proto.frame import Frame, FrameKind
from proto.messages import Aborted, Message, Resume, ResumeFailed, Running
from proto.messages import Complete as ControlComplete
from proto.preamble import ConnectionKind
from proto.states import SETTLED, State

from ..proto.test_messages import CONTROL, wire
from .in_process import Transport, quiet_log

pytestmark = [pytest.mark.requires("uffd"), pytest.mark.usefixtures(quiet_log.__name__)]
PAGES = 8
PAGE_BYTES = 4096
DEADLINE_SECONDS = 10.0
TURNS = 12
OFFER = {
    **CONTROL["offer"],
    "regions": [{"size_bytes": PAGES * PAGE_BYTES, "page_bytes": PAGE_BYTES}],
    "machine": None,
    "streams": 1,
}


class StubGuest:
    """A waiting guest as the migration sees it; what it answers is the dice's."""

    def __init__(self, memory: GuestMemory, userfaultfd: int, dice: random.Random) -> None:
        self.guest_id, self.hello, self.machine = "stub", None, None
        self.state, self.gone, self.released = GuestState.WAITING, False, False
        self.userfaultfd = userfaultfd
        self.regions = [
            MemoryRegion(one.guest_address, one.size_bytes, one.offset_bytes, one.page_bytes, memory.files[one.memory_file])
            for one in memory.regions
        ]
        self.files = [(os.fstat(one).st_dev, os.fstat(one).st_ino) for one in memory.files]
        self.states_fd = -1
        self.on_stepped = self.on_failed = self.on_discard = None
        self.ran: list[bool] = []  # of each resume, whether it was answered so that the guest may run
        self._dice = dice

    def keep(self, states_fd: int) -> bool:
        return self._dice.random() < 0.9

    async def prepare(self, deadline_seconds: float) -> None:
        await asyncio.sleep(0)
        if self._dice.random() < 0.03:
            raise GuestGoneError("guest", expected="to stay", got="its end")

    async def request(self, message: Message, *_: type[Message], deadline_seconds: float) -> Message:
        assert isinstance(message, Resume)
        await asyncio.sleep(0)
        drawn = self._dice.random()
        self.ran.append(drawn >= 0.05)
        if drawn < 0.05:
            return ResumeFailed(epoch=message.epoch, reason="no")
        if drawn < 0.08:
            raise DeadlineError("guest", expected="running", got="nothing")
        return Running(epoch=message.epoch)

    def send(self, message: Message) -> None:
        pass

    def became_running(self) -> None:
        self.state = GuestState.RUNNING

    def release(self) -> None:
        self.released = True


class Sequence:
    """One migration from its control connection to its end."""

    def __init__(self, seed: int, memory: GuestMemory, userfaultfd: int) -> None:
        self.dice = random.Random(seed)
        self.guest = StubGuest(memory, userfaultfd, self.dice)
        self.control = ControlConnection()
        self.transport = Transport(self.control)
        self.ends: dict[ConnectionKind, socket.socket] = {}
        self.precopy = self.dice.random() < 0.3
        self.migration = self._migration()
        self.unsent = list(range(PAGES))
        self.told_of_marks = False

    def _migration(self) -> DestinationMigration:
        def take_guest(_: object) -> GuestLink:
            return cast(GuestLink, self.guest)

        return DestinationMigration(
            os.urandom(16), "fuzz:1", self.control, take_guest, Quiet(), Room(), lambda _: None, streams_max=1
        )

    # --- what a source does -----------------------------------------------------------------------------------------

    def say(self, name: str, **changed: object) -> None:
        self.hear(wire({"type": name, **CONTROL[name], **changed}))

    def hear(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.control.data_received(data)

    def dial(self, kind: ConnectionKind) -> None:
        if self.migration.reserve(kind, 0):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            if (before := self.ends.get(kind)) is not None:
                before.close()
            self.ends[kind] = ours
            self.migration.attach(kind, 0, theirs)

    def bulk(self, *frames: tuple[Frame, bytes]) -> None:
        self.data(ConnectionKind.BULK, b"".join(frame.encode() + payload for frame, payload in frames))

    def data(self, kind: ConnectionKind, data: bytes) -> None:
        if kind in self.ends:
            with contextlib.suppress(OSError):
                self.ends[kind].send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def legal(self) -> None:
        state = self.migration.state
        if state is State.NEW:
            self.hear(wire({"type": "offer", **OFFER, "precopy": self.precopy}))
        elif state is State.ATTACHING:
            self.dial(self.dice.choice((ConnectionKind.URGENT, ConnectionKind.BULK)))
        elif state is State.PRECOPY and not self.told_of_marks:
            self.told_of_marks = True
            self.bulk((Frame(FrameKind.PAGES, 0, 1, PAGE_BYTES), bytes(PAGE_BYTES)), (Frame(FrameKind.MARK, 0, 0, 0), b""))
        elif state in (State.READY, State.PRECOPY):
            self.say("prepare", populated_bytes=None)
        elif state is State.PREPARING:
            self.say("switchover", epoch=self.migration.epoch)
        elif state is State.POSTCOPY and self.precopy and self.told_of_marks:
            self.told_of_marks = False
            self.bulk((Frame(FrameKind.STALE, 0, 0, PAGES * PAGE_BYTES), b"\xff"))
        elif state is State.POSTCOPY and self.unsent:
            page = self.unsent.pop()
            self.bulk((Frame(FrameKind.ZERO, 0, page, PAGE_BYTES), b""))
        elif state is State.COMPLETE:
            self.say("released")
        elif state is State.PAUSED:
            self.begin_again()

    def begin_again(self) -> None:
        """Another epoch of the same migration."""
        self.control = ControlConnection()
        before, self.transport = self.transport.said, Transport(self.control)
        self.transport.said = before
        self.unsent = list(range(PAGES))
        epoch = self.migration.epoch + 1
        task = asyncio.get_running_loop().create_task(self.migration.reconnect(self.control, epoch))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.say("recover", epoch=epoch)

    def anything(self) -> None:
        dice = self.dice
        actions = (
            lambda: self.say(dice.choice(sorted(CONTROL))),
            lambda: self.hear(dice.randbytes(dice.randint(1, 40))),
            lambda: self.hear(wire({"type": dice.choice(sorted(CONTROL)), "epoch": dice.choice((-1, None, 7, "x"))})),
            lambda: self.control.connection_lost(ConnectionResetError("cut")) if dice.random() < 0.5 else self.transport.close(),
            lambda: self.dial(dice.choice((ConnectionKind.URGENT, ConnectionKind.BULK))),
            lambda: self.data(dice.choice(list(ConnectionKind)), dice.randbytes(dice.randint(1, 60))),
            lambda: self.bulk(
                (Frame(dice.choice(list(FrameKind)), dice.randint(0, 1), dice.randint(0, PAGES), PAGE_BYTES), bytes(9))
            ),
            lambda: [end.close() for end in self.ends.values()] and None,
            lambda: self.migration.guest_gone(),
            lambda: self.guest.on_stepped and self.guest.on_stepped(dice.randint(0, 1 << 62)),
            lambda: self.guest.on_failed and self.guest.on_failed(PostcopyError("it failed", code="guest-failed")),
            lambda: self.begin_again(),
            lambda: self.migration.task and dice.random() < 0.3 and self.migration.task.cancel(),
            lambda: self.give_up(),
        )
        dice.choice(actions)()

    def give_up(self) -> None:
        task = asyncio.get_running_loop().create_task(self.migration.abandon())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    # --- and what must come of it -----------------------------------------------------------------------------------

    async def run(self) -> State:
        task = self.migration.task = asyncio.get_running_loop().create_task(self.migration.run())
        await asyncio.sleep(0)  # it has begun
        wild = self.dice.choice((0.0, 0.03, 0.1, 0.3))
        for _ in range(self.dice.randint(5, 60)):
            self.anything() if self.dice.random() < wild else self.legal()
            for _ in range(TURNS):  # what it leads to; a loop of the plane may take longer, and is met by the next step
                await asyncio.sleep(0)
            if self.migration.state in (State.ATTACHING, State.PRECOPY, State.POSTCOPY):
                await asyncio.sleep(0.0002)
            if task.done():
                break
        self.control.connection_lost(None)
        task.cancel()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        self.check()
        self.guest.gone = True
        self.migration.guest_gone()
        for end in self.ends.values():
            end.close()
        return self.migration.state

    def check(self) -> None:
        migration, said = self.migration, self.transport.said
        assert migration.state in SETTLED, migration.state
        assert migration.told
        assert migration.error is None or migration.error.code != "internal", migration.error
        assert len(self.guest.ran) <= 1, "resumed twice"
        if any(isinstance(one, Aborted) for one in said) or migration.state in (State.FAILED, State.CANCELLED, State.ABORTED):
            assert not any(self.guest.ran), "may run at both places"
        if any(isinstance(one, Running | ControlComplete) for one in said):
            assert self.guest.ran == [True]
        assert (migration.state is State.COMPLETE) == (self.guest.state is GuestState.RUNNING)


@pytest.fixture(scope="module")
def waiting() -> Iterator[tuple[GuestMemory, uffd.Userfaultfd]]:
    memory = GuestMemory([MemorySpec.parse("32K")])
    userfaultfd = uffd.Userfaultfd.adopt(memory.register())
    yield memory, userfaultfd
    userfaultfd.close()
    memory.close()


@pytest.mark.timeout(24 * 3600)
def test_any_sequence_ends_typed(waiting: tuple[GuestMemory, uffd.Userfaultfd], fuzz_runs: int, fuzz_seed: int) -> None:
    memory, userfaultfd = waiting
    reached: Counter[State] = Counter()
    before = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    for seed in range(fuzz_seed * 1_000_000, fuzz_seed * 1_000_000 + max(fuzz_runs // 10, 100)):
        for region in memory.regions:  # one that was complete has unregistered it
            uffd.register_for_postcopy(userfaultfd, region.guest_address, region.size_bytes)

        async def sequence(seed: int = seed) -> State:
            return await Sequence(seed, memory, userfaultfd.fileno()).run()

        try:
            reached[asyncio.run(sequence())] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert {State.COMPLETE, State.FAILED, State.STALLED} <= reached.keys(), reached
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
