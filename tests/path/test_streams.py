"""Moves by several bulk connections between two real daemons: verified by the guest, and counted."""

from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from .commuter import Commuter

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.parametrize(
    "memory",
    [("12M",), pytest.param(("4M:hugetlb", "3M:tmpfs"), marks=pytest.mark.requires("hugetlb"))],
    ids=["one", "two-kinds"],
)
def test_guest_that_writes_flat_out(pair: Pair, memory: tuple[str, ...]) -> None:
    """There and back, with zero pages that come and go. Each arrival is checked page by page, and all connections together have
    brought each page once, whatever was touched meanwhile."""
    guest = Commuter(
        pair, f"busy-{len(memory)}", *memory, options=("--threads", "2", "--write-ratio", "1", "--zero-ratio", "0.2")
    )
    for streams, rounds in ((2, 3), (8, "auto"), (3, "off")):
        reaches = guest.goes_to
        status = guest.move(streams=streams, precopy=rounds)
        with reaches.client() as client:
            there = client.status(status.id)
        assert status.streams == there.streams == streams
        assert rounds != 3 or (status.precopy is not None and len(status.precopy.rounds) == 3)
        assert sum(there.pages.values()) == there.pages_total
    guest.end()
