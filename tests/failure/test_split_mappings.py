"""A guest that gives parts of its memory other properties (mlock, madvise) while it arrives: one region, several mappings."""

import pytest

from migrate.pair import Pair
from proto.messages import GuestComplete

from .fakes import FakeSource
from .precopy_fakes import TouchedGuest, content_of, pages

pytestmark = pytest.mark.requires("uffd")
PAGES = 256
SPLIT = (1, 100, 101, 254)
MAPPINGS = 7  # [0, 1) [1, 2) [2, 100) [100, 102) [102, 254) [254, 255) [255, 256)


def test_runs_over_several_mappings(pair: Pair) -> None:
    """They come in one frame, are mapped in one piece where they can be, and the guest has each of them."""
    with TouchedGuest("split") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        assert max(guest.child.does("split", page) for page in SPLIT) == MAPPINGS
        source.bulk.sendall(pages(0, b"".join(content_of(page) for page in range(PAGES))))
        guest.connection.receive(GuestComplete)
        for page in (0, *SPLIT, 2, 102, PAGES - 1):
            assert guest.child.does("read", page) == page + 1
