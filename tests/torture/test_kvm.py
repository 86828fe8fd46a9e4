"""A KVM guest of two vCPUs, moved there and back; it verifies itself after each move.

Two regions, so that it works on both sizes of pages at once; with and without precopy. The suite makes 5 moves, `make torture`
50."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..path.commuter import Commuter
from .ledger import Ledger, Scale

pytestmark = pytest.mark.requires("uffd", "uffd-kernel", "kvm", "hugetlb", "wp-async", "pagemap-scan")
PAGES = 8 + 4096
AT_WORK = ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.timeout(600)
def test_two_vcpus(pair: Pair, scale: Scale, ledger: Ledger) -> None:
    dice = random.Random(scale.seed)
    guest = Commuter(pair, f"kvm-{scale.seed}", "16M:hugetlb", "16M", options=(*AT_WORK, "--seed", str(scale.seed)), kind="kvm")
    moves, steps, faults = scale.of(suite=5, torture=50), 0, Counter[str]()
    try:
        for number in range(moves):
            precopy = ("off", "auto", dice.randint(1, 5))[number % 3]
            status = guest.move(precopy=precopy)
            assert status.pages_total == PAGES
            assert (status.pages["precopy"] > 0) == (precopy != "off")
            assert guest.verified["steps"] > steps + PAGES // 2  # what it had done before, and a pass besides
            steps = guest.verified["steps"]
            faults.update({kind: summary.count for kind, summary in status.faults.items()})
    finally:
        guest.end()
    assert faults["remote"] > 0
    ledger.add(
        "KVM guest, 16M:hugetlb and 16M",
        runs=moves,
        note=f"{steps} steps, faults {', '.join(f'{count} {kind}' for kind, count in sorted(faults.items()))}",
    )
