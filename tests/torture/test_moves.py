"""A guest that writes flat out, moved there and back with precopy ended at random moments; it verifies itself after each move.

Both page sizes, all patterns. The suite makes two moves of each kind, `make torture` twenty; SEED is in every guest's name."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from migrate.pair import Pair
from migrate.session import MigrationStatus

from ..path.commuter import Commuter
from .ledger import Ledger, Scale

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
PATTERNS = ("sequential", "random", "zipf", "chase", "permute")
MEMORY = [pytest.param("12M"), pytest.param("24M:hugetlb", marks=pytest.mark.requires("hugetlb"))]
FLAT_OUT = ("--threads", "2", "--write-ratio", "0.7", "--zero-ratio", "0.1", "--rate", "0")


@dataclass
class Seen:
    """Of the moves of one guest."""

    moves: int = 0
    stale_pages: int = 0
    rounds: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, status: MigrationStatus) -> None:
        assert status.precopy is not None
        self.moves += 1
        self.stale_pages += status.precopy.stale_pages
        self.rounds[len(status.precopy.rounds)] += 1
        self.faults.update({kind: summary.count for kind, summary in status.faults.items()})


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def any_precopy(dice: random.Random) -> dict[str, str | int | float]:
    """So many rounds, or until a random moment of them."""
    if dice.random() < 0.5:
        return {"precopy": dice.randint(1, 5)}
    return {"precopy": "auto", "deadline_seconds": dice.uniform(0.0, 0.05), "max_stale_bytes": 0}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("memory", MEMORY)
def test_flat_out(pair: Pair, scale: Scale, ledger: Ledger, memory: str, pattern: str) -> None:
    seed = f"{scale.seed}-{pattern}-{memory.replace(':', '-')}"
    dice, seen = random.Random(seed), Seen()
    # a discard in fifty steps, of pages that can be discarded by pieces
    discards = () if memory.endswith(":hugetlb") else ("--discard-ratio", "0.02")
    options = (*FLAT_OUT, "--pattern", pattern, "--seed", str(scale.seed), *discards)
    guest = Commuter(pair, f"flat-out-{seed}", memory, options=options)
    try:
        for _ in range(scale.of(suite=2, torture=20)):
            seen.add(guest.move(**any_precopy(dice)))
    finally:
        guest.end()
    assert seen.stale_pages > 0
    ledger.add(
        f"flat out, {pattern}, {memory}",
        runs=seen.moves,
        note=f"{seen.stale_pages} stale pages, {min(seen.rounds)} to {max(seen.rounds)} rounds, "
        f"faults {', '.join(f'{count} {kind}' for kind, count in sorted(seen.faults.items()))}",
    )
