"""UFFDIO_MOVE: pages change their place without being copied. Private anonymous memory only, Linux 6.8 and later."""

import errno
import os

import pytest

from migrate.uffd import Filled, Mode, Outcome, PageFaultFlag, UserfaultfdError
from migrate.uffd.pagemap import Category, scan

from .cases import case
from .memory import (
    ALL,
    ANON,
    HUGE_PAGE_BYTES,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    SMALL_PAGE_BYTES,
    Kind,
    Memory,
    byte_at,
    libc,
)

OTHERS = tuple(kind for kind in ALL if kind is not ANON)
PAGES_OF_A_PMD = HUGE_PAGE_BYTES // SMALL_PAGE_BYTES


def anonymous(pages: int = 4, written: int = 4) -> Memory:
    """Page n of the first ``written`` holds n + 1."""
    memory = Memory(ANON, pages)
    for page in range(written):
        libc.memset(memory.at(page), page % 255 + 1, memory.page_bytes)
    return memory


def registered(pages: int = 4) -> Memory:
    memory = Memory(ANON, pages)
    memory.open()
    memory.register(Mode.MISSING)
    return memory


def huge_regions(memory: Memory) -> int:
    """Bytes mapped by entries of 2 MiB."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        found = scan(pagemap.fileno(), memory.address, memory.address + memory.size_bytes, category_mask=Category.HUGE)
    return sum(region.end - region.start for region in found.regions)


@case(requires=["uffd-move"])
def test_move_takes_the_page_away() -> None:
    memory, source = registered(), anonymous()
    touch, flags = memory.fault(0)
    assert flags == PageFaultFlag(0)
    assert memory.userfaultfd.move(memory.at(0), source.at(1), memory.page_bytes) == Filled(4096, Outcome.DONE, 0, 4096)
    assert touch.ends() == 2
    assert [byte_at(source.at(page)) for page in range(4)] == [1, 0, 3, 4]


@case(requires=["uffd-move"])
def test_move_of_a_range() -> None:
    memory, source = registered(), anonymous()
    touch, _ = memory.fault(3)
    assert memory.userfaultfd.move(memory.at(0), source.at(0), memory.size_bytes, dontwake=True)
    assert touch.waits
    memory.wake(3)
    assert touch.ends() == 4
    assert [byte_at(memory.at(page)) for page in range(4)] == [1, 2, 3, 4]


@case(requires=["uffd-move"])
def test_move_onto_a_page_that_is_there() -> None:
    memory, source = registered(), anonymous()
    assert memory.copy(1, 9)
    filled = memory.userfaultfd.move(memory.at(0), source.at(0), 3 * memory.page_bytes)
    assert (filled.outcome, filled.bytes_done, filled.field) == (Outcome.ALREADY_MAPPED, 4096, -errno.EEXIST)
    assert [byte_at(source.at(page)) for page in range(3)] == [0, 2, 3]


@case(requires=["uffd-move"])
def test_holes_of_the_source() -> None:
    """ENOENT, unless they are allowed: then they stay absent at the destination too."""
    memory, source = registered(), anonymous(written=1)
    filled = memory.userfaultfd.move(memory.at(0), source.at(0), memory.size_bytes)
    assert (filled.outcome, filled.bytes_done, filled.error_number) == (Outcome.RANGE_GONE, 4096, errno.ENOENT)
    assert memory.userfaultfd.move(memory.at(1), source.at(1), 3 * memory.page_bytes, allow_src_holes=True)
    touch, _ = memory.fault(1)
    assert touch.waits


@case(requires=["uffd-move"])
def test_source_that_a_fork_child_shares() -> None:
    """Not this process's alone: EBUSY, and after the child's end still, until the page is written again."""
    memory, source = registered(), anonymous()
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writes)
        os.read(reads, 1)
        os._exit(0)
    filled = memory.userfaultfd.move(memory.at(0), source.at(0), memory.page_bytes)
    assert (filled.outcome, filled.error_number) == (Outcome.BUSY, errno.EBUSY)
    os.close(writes)
    os.waitpid(child, 0)
    assert memory.userfaultfd.move(memory.at(0), source.at(0), memory.page_bytes).outcome is Outcome.BUSY
    libc.memset(source.at(0), 9, 1)
    assert memory.userfaultfd.move(memory.at(0), source.at(0), memory.page_bytes)
    assert byte_at(memory.at(0)) == 9


@case(OTHERS, requires=["uffd-move"])
def test_other_memory_is_einval(kind: Kind) -> None:
    """As destination and as source."""
    destination, source = registered(HUGE_PAGE_BYTES // 4096), Memory(kind)
    other = Memory(kind)
    other.open()
    other.register(Mode.MISSING)
    libc.memset(source.at(0), 7, 1)
    same = Memory(kind)
    libc.memset(same.at(0), 7, 1)
    for memory, to, from_ in ((other, other.at(0), same.at(0)), (destination, destination.at(0), source.at(0))):
        with pytest.raises(UserfaultfdError, match="private anonymous memory") as raised:
            memory.userfaultfd.move(to, from_, source.page_bytes)
        assert raised.value.error_number == errno.EINVAL


@case(requires=["uffd-move", "pagemap-scan", "thp"])
def test_huge_page_moves_whole() -> None:
    memory, source = registered(PAGES_OF_A_PMD), Memory(ANON, PAGES_OF_A_PMD)
    for one in (memory, source):
        assert libc.madvise(one.address, one.size_bytes, MADV_HUGEPAGE) == 0
    libc.memset(source.address, 7, source.size_bytes)
    assert huge_regions(source) == HUGE_PAGE_BYTES
    touch, _ = memory.fault(100)
    assert memory.userfaultfd.move(memory.address, source.address, HUGE_PAGE_BYTES)
    assert touch.ends() == 7
    assert huge_regions(memory) == HUGE_PAGE_BYTES
    assert byte_at(source.at(100)) == 0


@case(requires=["uffd-move", "pagemap-scan", "thp"])
def test_huge_page_is_split_where_it_must() -> None:
    """The destination begins in the middle of one: the source's page is split, and moves page by page."""
    memory, source = registered(2 * PAGES_OF_A_PMD), Memory(ANON, PAGES_OF_A_PMD)
    assert libc.madvise(source.address, source.size_bytes, MADV_HUGEPAGE) == 0
    assert libc.madvise(memory.address, memory.size_bytes, MADV_NOHUGEPAGE) == 0
    libc.memset(source.address, 7, source.size_bytes)
    assert huge_regions(source) == HUGE_PAGE_BYTES
    touch, _ = memory.fault(100)
    assert memory.userfaultfd.move(memory.at(100), source.address, HUGE_PAGE_BYTES)
    assert touch.ends() == 7
    assert huge_regions(memory) == 0
    assert {byte_at(memory.at(100 + page)) for page in range(PAGES_OF_A_PMD)} == {7}
    assert {byte_at(source.at(page)) for page in range(PAGES_OF_A_PMD)} == {0}
