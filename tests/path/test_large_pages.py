"""A guest with pages of 4 KiB, 2 MiB and 1 GiB: it moves whole, the large ones in pieces that it never sees."""

import pytest

from migrate.pair import Pair

from .commuter import Commuter

HOT_BYTES_MAX = 64 << 20


def anonymous_bytes(pid: int) -> int:
    """The daemon's own memory: buffers, not what it maps of its guests'."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.requires("uffd", "hugetlb", "gigantic")
@pytest.mark.timeout(120)  # two pages of 1 GiB may be fresh: seconds each, in a virtual machine
def test_guest_of_three_page_sizes_there_and_back() -> None:
    """There while it writes flat out, and back with precopy; verified word by word each time. No buffer holds a large page."""
    options = ("--threads", "2", "--write-ratio", "0.5")
    with Pair() as pair:
        before = [anonymous_bytes(daemon.pid) for daemon in (pair.source, pair.destination)]
        commuter = Commuter(pair, "sizes", "1G:hugetlb-1g", "16M:hugetlb", "8M", options=options)
        there = commuter.move(precopy="off")
        assert sum(there.pages.values()) >= there.pages_total == 1 + 8 + 2048
        assert there.faults["remote"].count > 1
        back = commuter.move(precopy=1)
        assert back.pages["precopy"] == back.pages_total
        after = [anonymous_bytes(daemon.pid) for daemon in (pair.source, pair.destination)]
        assert max(later - earlier for later, earlier in zip(after, before, strict=True)) < HOT_BYTES_MAX
        commuter.end()
