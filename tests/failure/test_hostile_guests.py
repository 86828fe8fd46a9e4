"""What a guest does to its own memory, its userfaultfd and its agent's word while it moves between two real daemons: its own
migration ends, typed, and another guest's, which goes on beside it in the same daemons, is complete and verified.

What is refused at `hello` already (lies about regions and descriptors, events of forks): test_bad_guests.py; want of huge pages:
tests/control/test_room.py; in rounds of precopy: test_precopy_guests.py.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from migrate.clock import monotonic_ns
from migrate.dataplane import MemoryRegion, discard
from migrate.pair import Pair
from migrate.session import MigrationStatus
from proto.messages import Discard, Discarded, PageRange, Paused, encode

from ..path.commuter import Commuter, until
from .fakes import FakeGuest
from .precopy_fakes import TouchedGuest

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
PAGES = 2048
SIZE_BYTES = PAGES * 4096
BESIDE_SECONDS = 0.25


@dataclass
class Move:
    """Of a guest whose two agents are the test's: it fills its memory, leaves, and arrives unless it has better things to do."""

    pair: Pair
    here: FakeGuest
    there: FakeGuest
    id: str

    def at_source(self) -> MigrationStatus:
        with self.pair.source.client() as client:
            return client.status(self.id)

    def at_destination(self) -> MigrationStatus:
        with self.pair.destination.client() as client:
            return client.status(self.id)

    def told_to_resume(self) -> None:
        while not self.there.connection.unread_messages:
            assert self.there.answer_prepare() or self.there.connection.unread_messages

    def runs_there(self) -> None:
        self.told_to_resume()
        assert self.there.resumed() is not None


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def good(pair: Pair) -> Commuter:
    return Commuter(pair, "good", "16M", options=("--rate", "5000", "--write-ratio", "0.3"))


def fill(guest: FakeGuest) -> None:
    os.pwrite(guest.memory.files[0], b"x" * SIZE_BYTES, 0)


def punch(guest: FakeGuest) -> None:
    file, region = guest.memory.files[0], guest.memory.regions[0]
    discard(MemoryRegion(region.guest_address, region.size_bytes, 0, region.page_bytes, file), 0, PAGES)


def never_answers_pause(move: Move) -> None:
    move.here.told_to_pause()


def truncates_at_the_source(move: Move) -> None:
    move.here.told_to_pause()
    os.ftruncate(move.here.memory.files[0], 4096)
    paused(move)
    move.runs_there()


def paused(move: Move) -> None:
    move.here.connection.send(Paused(state=b"a state", last_step_ns=monotonic_ns()))


def punches_at_the_source(move: Move) -> None:
    move.here.told_to_pause()
    punch(move.here)
    paused(move)
    move.runs_there()


def truncates_at_the_destination(move: Move) -> None:
    move.here.told_to_pause()
    paused(move)
    move.told_to_resume()
    os.ftruncate(move.there.memory.files[0], 4096)
    move.there.resumed()


def punches_at_the_destination(move: Move) -> None:
    move.here.told_to_pause()
    paused(move)
    move.runs_there()
    for _ in range(20):
        punch(move.there)


def blocks(move: Move) -> None:
    """O_NONBLOCK of the userfaultfd that it shares with its daemon; a fault is what makes the daemon look."""
    assert isinstance(move.there, TouchedGuest)
    os.set_blocking(move.there.child.descriptor, True)
    move.there.child.begins("read", 5)


def makes_it_block_before(move: Move) -> None:
    move.here.told_to_pause()
    blocks(move)
    until(lambda: move.at_destination().settled, "the daemon has seen it")
    paused(move)


def makes_it_block_after(move: Move) -> None:
    move.here.told_to_pause()
    paused(move)
    move.runs_there()
    blocks(move)


def goes_when_resumed(move: Move) -> None:
    move.here.told_to_pause()
    paused(move)
    move.told_to_resume()
    move.there.connection.close()


# What it does, its memory at the destination; how that ends at the source and at the destination, and the code of the error there
OUTCOMES: dict[str, tuple[Callable[[Move], None], str, set[str], set[str], set[str | None]]] = {
    "never answers pause": (never_answers_pause, "memfd", {"failed"}, {"aborted"}, {"deadline"}),
    "truncates its file at the source": (
        truncates_at_the_source,
        "memfd",
        {"stalled"},
        {"stalled"},
        {"memory-failed"},  # as the source says
    ),
    "punches its file at the source": (punches_at_the_source, "memfd", {"complete"}, {"complete"}, {None}),
    "truncates its file at the destination": (
        truncates_at_the_destination,
        "tmpfs",
        {"complete", "paused", "stalled"},
        {"complete", "stalled"},
        {None, "memory-failed", "userfaultfd-failed"},
    ),
    "punches its file at the destination": (punches_at_the_destination, "memfd", {"complete"}, {"complete"}, {None}),
    "clears O_NONBLOCK before": (makes_it_block_before, "touched", {"failed"}, {"aborted"}, {"userfaultfd-failed"}),
    "clears O_NONBLOCK after": (makes_it_block_after, "touched", {"paused", "stalled"}, {"stalled"}, {"userfaultfd-failed"}),
    "goes when it is resumed": (goes_when_resumed, "memfd", {"paused", "stalled"}, {"stalled"}, {"guest-gone"}),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_guest_that(pair: Pair, good: Commuter, name: str) -> None:
    does, kind, at_source, at_destination, codes = OUTCOMES[name]
    with (
        FakeGuest("bad", "running", "8M") as here,
        TouchedGuest("bad", "8M") if kind == "touched" else FakeGuest("bad", "waiting", f"8M:{kind}") as there,
    ):
        fill(here)
        here.attach(pair.source.runtime_dir / "guests.sock")
        there.attach(pair.destination.runtime_dir / "guests.sock")
        with pair.source.client() as client:
            begun = client.migrate("bad", pair.destination.address, precopy="off", bulk=kind != "touched")
        move = Move(pair, here, there, begun.id)
        here.connection.beside = there
        does(move)
        if good.is_at is pair.destination:
            good.move()
        good.move()
        until(lambda: str(move.at_source().state) in at_source, f"{at_source} at the source")
        until(lambda: str(move.at_destination().state) in at_destination, f"{at_destination} at the destination")
        error = move.at_destination().error
        assert (error.code if error else None) in codes, error
    for daemon in (pair.source, pair.destination):
        assert daemon.returncode is None
        with daemon.client() as client:
            until(lambda client=client: all(one["id"] != "bad" for one in client.guests()), "it is gone")
    good.move()


def test_sealed_memory_cannot_be_truncated(pair: Pair) -> None:
    """A memfd is sealed when a migration takes it: what is written through an alias cannot be SIGBUS in the daemon."""
    with FakeGuest("bad", "running", "8M") as here, FakeGuest("bad", "waiting", "8M") as there:
        here.attach(pair.source.runtime_dir / "guests.sock")
        there.attach(pair.destination.runtime_dir / "guests.sock")
        with pair.source.client() as client:
            client.migrate("bad", pair.destination.address, precopy="off")
        here.connection.beside = there
        here.told_to_pause()
        with pytest.raises(PermissionError):
            os.ftruncate(there.memory.files[0], 4096)


def test_flood_of_discards(pair: Pair) -> None:
    """As large as they may be, as many as go in: other requests are answered between them."""
    with FakeGuest("floods", "running", "16M") as guest, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        one = encode(Discard(ranges=[PageRange(region=0, page_index=0, page_count=4096)]))
        begun = time.monotonic()
        client.guests()
        alone_seconds = time.monotonic() - begun
        guest.send(one * 2000)
        slowest_seconds = 0.0
        for _ in range(20):
            begun = time.monotonic()
            client.guests()
            slowest_seconds = max(slowest_seconds, time.monotonic() - begun)
        answered = 0
        while answered < 2000:
            assert isinstance(guest.connection.receive(Discarded), Discarded)
            answered += 1
        assert slowest_seconds < BESIDE_SECONDS + alone_seconds, slowest_seconds
