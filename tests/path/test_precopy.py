"""Precopy between two real daemons: counted exactly, verified by the guest, and what is left of it when it comes to nothing."""

from collections.abc import Iterator

import pytest

from migrate.pair import Pair, wait_settled
from migrate.precopy import AUTO, PrecopyPolicy, RoundFigures, reason_to_switch
from migrate.session import MigrationStatus

from .commuter import Commuter

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def moved(guest: Commuter) -> tuple[MigrationStatus, MigrationStatus]:
    """As the source and as the destination tell it at the end."""
    reaches = guest.goes_to
    status = guest.move()
    with reaches.client() as client:
        return status, client.status(status.id)


def test_idle_guest_crosses_while_it_runs(pair: Pair) -> None:
    """One page is written between two steps: nothing is left to fetch but what was written last."""
    guest = Commuter(pair, "idle", "16M", options=("--rate", "20"))
    for _ in range(2):
        status, there = moved(guest)
        assert status.precopy is not None
        assert there.precopy is not None
        assert status.precopy.rounds[0].pages_sent == 4096
        assert len(status.precopy.rounds) == 1
        assert "are few enough" in status.switched_because
        assert status.precopy.stale_pages <= 40
        assert status.precopy.stale_window_seconds is not None
        assert status.pages["precopy"] == 4096
        fetched = sum(there.pages[path] for path in ("urgent", "readahead", "bulk"))
        assert fetched <= status.precopy.stale_pages + there.precopy.faults_held
    guest.end()


def test_clean_page_is_a_local_fault(pair: Pair) -> None:
    """Reads alone, from the first step on: no page is stale, so the source is asked only before that is known."""
    guest = Commuter(pair, "reader", "64M", options=("--write-ratio", "0", "--pattern", "permute"))
    local = 0
    for _ in range(4):  # how many are touched before they are mapped ahead is a race
        status, there = moved(guest)
        assert there.precopy is not None
        assert there.precopy.stale_pages == 0
        assert there.faults["remote"].count <= there.precopy.faults_held
        assert there.pages["precopy"] == status.pages_total - there.pages["urgent"]
        local += there.faults["local"].count
    assert local > 0
    guest.end()


@pytest.mark.parametrize("memory", ["4M", pytest.param("16M:hugetlb", marks=pytest.mark.requires("hugetlb"))])
def test_guest_that_writes_flat_out(pair: Pair, memory: str) -> None:
    """There and back, with zero pages that come and go; each arrival is checked page by page."""
    guest = Commuter(pair, f"busy-{memory[-1]}", memory, options=("--threads", "2", "--write-ratio", "1", "--zero-ratio", "0.2"))
    for rounds in (1, 2, 3, "auto"):
        status = guest.move(precopy=rounds)
        assert status.precopy is not None
        assert rounds == "auto" or len(status.precopy.rounds) == rounds
    guest.end()


def test_two_kinds_of_memory(pair: Pair) -> None:
    guest = Commuter(pair, "both", "8M:tmpfs", "4M", options=("--threads", "2"))
    for _ in range(2):
        assert guest.move().precopy is not None
    guest.end()


def test_cancelled_precopy_leaves_the_guest_running_and_the_other_empty(pair: Pair) -> None:
    """Again and again at the same pair of guests: then it succeeds, and nothing of the attempts is in the way."""
    guest = Commuter(pair, "wavering", "64M", options=("--threads", "2", "--write-ratio", "1"))
    with guest.is_at.client() as client:
        for _ in range(3):
            begun = client.migrate(guest.guest_id, guest.goes_to.address, precopy=1000)
            while client.status(begun.id).state not in ("precopy", "cancelled", "failed"):
                pass
            client.cancel(begun.id)
            assert wait_settled(client, begun.id).state == "cancelled"
    guest.move()
    guest.end()


FIGURES = RoundFigures(number=2, pages_sent=1000, pages_written=500, bytes_written=500 * 4096, elapsed_seconds=1.0)


@pytest.mark.parametrize(
    ("policy", "last", "why"),
    [
        (AUTO, FIGURES, None),
        (AUTO, RoundFigures(2, 1000, 100, 100 * 4096, 1.0), "are few enough"),
        (
            AUTO,
            RoundFigures(2, 1000, 800, 800 * 4096, 1.0),
            "would not shrink the stale set: 800 pages were written while 1000 went out",
        ),
        (AUTO, RoundFigures(30, 1000, 500, 500 * 4096, 1.0), "30 rounds are the most"),
        (PrecopyPolicy(rounds_max=2), FIGURES, "2 rounds are the most"),
        (PrecopyPolicy(stale_bytes_max=500 * 4096), FIGURES, "are few enough"),
        (PrecopyPolicy(deadline_seconds=1.0), FIGURES, "the deadline of 1 s has passed"),
        (PrecopyPolicy(deadline_seconds=1.1), FIGURES, None),
        (PrecopyPolicy(rounds=2), FIGURES, "2 rounds were asked for"),
        (PrecopyPolicy(rounds=3), RoundFigures(2, 1000, 1000, 1, 1.0), None),
        (PrecopyPolicy(rounds=3, deadline_seconds=0.5), FIGURES, "the deadline"),
    ],
)
def test_when_another_round_is_worth_it(policy: PrecopyPolicy, last: RoundFigures, why: str | None) -> None:
    said = reason_to_switch(policy, last)
    assert said is None if why is None else said is not None and why in said
