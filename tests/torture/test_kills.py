"""SIGKILL of either daemon and of both at seeded random moments of a move, once or again while it is being taken back. The guest
verifies itself after each move, and runs at exactly one place, whatever happened."""

import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..failure.killing import KilledMove
from ..path.commuter import Commuter
from .ledger import Ledger, Scale

pytestmark = [pytest.mark.requires("uffd", "wp-async", "pagemap-scan"), pytest.mark.timeout(3000)]
BUSY = ("--write-ratio", "0.5", "--threads", "2", "--rate", "50000")
"""Not flat out: two threads on two CPUs would leave nothing for daemons that start, and 100 kills would take most of an hour."""
AFTER_SECONDS = 0.15
"""Of the request: a move of this guest takes about as long, so that moments of every phase are met."""
SLOWLY_BYTES_PER_SECOND = 10_000_000
OTHERS = [
    # so few pages that a faster guest would have touched them all before anybody is killed
    pytest.param("workload", "64M:hugetlb", (*BUSY[:-1], "100"), id="hugetlb", marks=pytest.mark.requires("hugetlb")),
    pytest.param(
        "kvm",
        "8M",
        ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
        id="kvm",
        marks=pytest.mark.requires("uffd-kernel", "kvm"),
    ),
]


class Killings:
    """Moves of one guest; what was killed, and what became of it, is counted."""

    def __init__(self, guest: Commuter, dice: random.Random) -> None:
        self.guest, self._dice = guest, dice
        self.seen: Counter[str] = Counter()
        self._slowest_seconds = 0.0

    def at_a_random_moment(self, *, source: bool, destination: bool) -> None:
        dice = self._dice
        precopy, streams = dice.choice(("off", 1, 2)), dice.randint(1, 3)
        with KilledMove(self.guest, precopy=precopy, streams=streams, bulk=dice.random() < 0.7) as move:
            time.sleep(dice.random() ** 2 * AFTER_SECONDS)  # time itself: a random moment
            for _ in range(1 + (dice.random() < 0.2)):
                self._kill(move, source=source, destination=destination)
            self._ends(move)

    def in_postcopy(self, *, source: bool, destination: bool) -> None:
        """Bulk is slow enough for nothing to end before."""
        with KilledMove(self.guest, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND) as move:
            move.reaches("postcopy")
            self._kill(move, source=source, destination=destination)
            assert self._ends(move) == "complete"

    def _kill(self, move: KilledMove, *, source: bool, destination: bool) -> None:
        move.kill(source=source, destination=destination)
        self.seen["kills"] += 1

    def _ends(self, move: KilledMove) -> str:
        came_to = move.ends()
        self.seen[came_to] += 1
        self._slowest_seconds = max(self._slowest_seconds, move.service_seconds)
        return came_to

    def tell(self, ledger: Ledger, what: str) -> None:
        seen = f"{self.seen['complete']} moves completed, {self.seen['here']} ran on at the source"
        served = f"served again {self._slowest_seconds * 1000:.0f} ms after the daemons were back, at most"
        ledger.add(what, runs=self.seen["kills"], note=f"{seen}; {served}")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: Pair) -> Iterator[Commuter]:
    guest = Commuter(pair, "slain", "16M", options=BUSY)
    yield guest
    guest.end()


@pytest.mark.parametrize(
    "who",
    [
        pytest.param((True, False), id="source"),
        pytest.param((False, True), id="destination"),
        pytest.param((True, True), id="both"),
    ],
)
def test_kills(guest: Commuter, who: tuple[bool, bool], scale: Scale, ledger: Ledger) -> None:
    killings = Killings(guest, random.Random(scale.seed + 2 * who[0] + who[1]))
    wanted = scale.of(suite=2, torture=100)
    while killings.seen["kills"] < wanted:
        killings.at_a_random_moment(source=who[0], destination=who[1])
    assert guest.move().state == "complete"
    names = [name for name, killed in zip(("source", "destination"), who, strict=True) if killed]
    killings.tell(ledger, f"SIGKILL of {' and '.join(names)}")


@pytest.fixture(scope="module")
def other_pair() -> Iterator[Pair]:
    """Whose daemons nobody else's guest knows by an older process."""
    with Pair() as pair:
        yield pair


@pytest.mark.parametrize(("kind", "memory", "options"), OTHERS)
def test_other_guests(other_pair: Pair, kind: str, memory: str, options: tuple[str, ...], scale: Scale, ledger: Ledger) -> None:
    """Large pages of which a part is here, and virtual CPUs that wait within the kernel: in postcopy on the way there and on the
    way back, and then at any moment."""
    dice = random.Random(scale.seed)
    guest = Commuter(other_pair, f"slain-{memory.lower().replace(':', '-')}", memory, options=options, kind=kind)
    killings = Killings(guest, dice)
    try:
        killings.in_postcopy(source=True, destination=True)
        killings.in_postcopy(source=False, destination=True)
        while killings.seen["kills"] < scale.of(suite=2, torture=40):
            source = dice.random() < 0.6
            killings.at_a_random_moment(source=source, destination=not source or dice.random() < 0.5)
        assert not scale.long or guest.move().state == "complete"
    finally:
        guest.end()
    killings.tell(ledger, f"SIGKILL of either or both, {kind} guest, {memory}")
