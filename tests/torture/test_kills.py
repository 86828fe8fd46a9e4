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

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
BUSY = ("--write-ratio", "0.5", "--threads", "2", "--rate", "50000")
"""Not flat out: two threads on two CPUs would leave nothing for daemons that start, and 100 kills would take most of an hour."""
AFTER_SECONDS = 0.15
"""Of the request: a move of this guest takes about as long, so that moments of every phase are met."""


@pytest.fixture(scope="module")
def guest() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "slain", "16M", options=BUSY)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "who",
    [
        pytest.param((True, False), id="source"),
        pytest.param((False, True), id="destination"),
        pytest.param((True, True), id="both"),
    ],
)
def test_kills(guest: Commuter, who: tuple[bool, bool], scale: Scale, ledger: Ledger) -> None:
    dice = random.Random(scale.seed + 2 * who[0] + who[1])
    seen: Counter[str] = Counter()
    slowest_seconds = 0.0
    wanted = scale.of(suite=2, torture=100)
    while seen["kills"] < wanted:
        with KilledMove(guest, precopy=dice.choice(("off", 1, 2)), streams=dice.randint(1, 3), bulk=dice.random() < 0.7) as move:
            time.sleep(dice.random() ** 2 * AFTER_SECONDS)  # time itself: a random moment
            for _ in range(1 + (dice.random() < 0.2)):
                move.kill(source=who[0], destination=who[1])
                seen["kills"] += 1
            seen[move.ends()] += 1
            slowest_seconds = max(slowest_seconds, move.service_seconds)
    assert guest.move().state == "complete"
    names = [name for name, killed in zip(("source", "destination"), who, strict=True) if killed]
    note = f"{seen['complete']} moves completed, {seen['here']} ran on at the source; "
    note += f"served again {slowest_seconds * 1000:.0f} ms after the daemons were back, at most"
    ledger.add(f"SIGKILL of {' and '.join(names)}", runs=seen["kills"], note=note)
