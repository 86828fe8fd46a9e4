"""The life of a page as a destination knows it: content into the file, then mapped, in shared memory."""

import ctypes
import errno
import os

from migrate.uffd import Feature, Mode, PageFault, PageFaultFlag
from migrate.uffd.pagemap import Category, scan

from .cases import case
from .memory import (
    HUGE_PAGE_BYTES,
    MADV_COLLAPSE,
    MADV_PAGEOUT,
    SHARED,
    SHMEM,
    SMALL_PAGE_BYTES,
    Calling,
    Kind,
    Memory,
    byte_at,
    libc,
)

WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


def in_memory(memory: Memory) -> int:
    """How many of its pages, as mincore(2) says."""
    there = ctypes.create_string_buffer(memory.pages)
    assert libc.mincore(ctypes.c_void_p(memory.alias), ctypes.c_size_t(memory.size_bytes), there) == 0
    return sum(byte & 1 for byte in there.raw)


def reads_all(memory: Memory) -> list[int]:
    return [byte_at(memory.at(page)) for page in range(memory.pages)]


@case(SHARED)
def test_every_page_faults_once_and_minor(kind: Kind) -> None:
    """The handler changes the content before it maps it: the reader sees the change, never what was before."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    for page in range(memory.pages):
        memory.put(page, page + 1)
    assert memory.events() == []
    reader = Calling(reads_all, memory)
    for page in range(memory.pages):
        assert memory.next_event() == PageFault(memory.at(page), PageFaultFlag.MINOR, None)
        memory.put(page, 255 - page)
        assert memory.continue_(page)
    assert reader.ends() == [255, 254, 253, 252]
    assert memory.events() == []


@case(SHARED, requires=["uffd-wp"])
def test_mapped_write_protected(kind: Kind) -> None:
    """Minor faults first; then each first write is told."""
    memory = Memory(kind)
    memory.open(WP)
    memory.register(Mode.MINOR | Mode.WP)
    for page in range(memory.pages):
        memory.put(page, page + 1)
    reader = Calling(reads_all, memory)
    for page in range(memory.pages):
        assert memory.next_event() == PageFault(memory.at(page), PageFaultFlag.MINOR, None)
        assert memory.continue_(page, wp=True)
    assert reader.ends() == [1, 2, 3, 4]
    for page in range(memory.pages):
        touch, flags = memory.fault(page, 9)
        assert flags == PageFaultFlag.WP | PageFaultFlag.WRITE
        assert memory.unprotect(page)
        assert touch.ends() == 9


@case([SHMEM], requires=["zram"])
def test_swapped_page_faults_as_minor(kind: Kind) -> None:
    """A page of the file that is in swap is one that is there: CONTINUE brings it back with its content. One that was mapped
    faults again when it has been swapped out. st_blocks counts it all the while."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    for page in range(memory.pages):
        memory.put(page, page + 1)
    for _ in range(2):
        while in_memory(memory):  # again for a page that another CPU has not put on its list yet; the case has its deadline
            for address in (memory.alias, memory.address):
                assert libc.madvise(address, memory.size_bytes, MADV_PAGEOUT) == 0
        assert os.fstat(memory.file).st_blocks * 512 == memory.size_bytes
        for page in range(memory.pages):
            touch, flags = memory.fault(page)
            assert flags == PageFaultFlag.MINOR
            assert memory.continue_(page)
            assert touch.ends() == page + 1


@case([SHMEM], requires=["pagemap-scan", "thp"])
def test_collapsing_keeps_content(kind: Kind) -> None:
    """MADV_COLLAPSE of small pages that are all mapped gives one of 2 MiB, without an event."""
    memory = Memory(kind, HUGE_PAGE_BYTES // SMALL_PAGE_BYTES)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    for page in range(memory.pages):
        memory.put(page, page % 255 + 1)
    touch, flags = memory.fault(7)
    assert flags == PageFaultFlag.MINOR
    assert memory.continue_(0, memory.pages)
    assert touch.ends() == 8
    for _ in range(20):  # the pages may be on their way to the lists that collapsing takes them from
        if (error_number := memory.advise(0, MADV_COLLAPSE, memory.pages)) != errno.EAGAIN:
            break
    assert error_number == 0
    byte_at(memory.at(0))
    with open("/proc/self/pagemap", "rb") as pagemap:
        huge = scan(pagemap.fileno(), memory.address, memory.address + memory.size_bytes, category_mask=Category.HUGE)
    assert sum(one.end - one.start for one in huge.regions) == HUGE_PAGE_BYTES
    assert reads_all(memory) == [page % 255 + 1 for page in range(memory.pages)]
    assert memory.events() == []


@case([SHMEM])
def test_collapsing_while_pages_are_absent(kind: Kind) -> None:
    """It does not take the faults away from a range with holes: what was absent still faults."""
    memory = Memory(kind, HUGE_PAGE_BYTES // SMALL_PAGE_BYTES)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    for page in range(1, memory.pages):
        memory.put(page, 7)
    assert memory.continue_(1, memory.pages - 1)
    memory.advise(0, MADV_COLLAPSE, memory.pages)
    touch, _ = memory.fault(0)
    assert touch.waits
    libc.memset(memory.alias, 9, 1)
    assert memory.continue_(0)
    assert touch.ends() == 9
