"""Which pages were written: WP_ASYNC with PAGEMAP_SCAN, in each kind of memory; and what it does not see.

Clean means write-protected by the kernel's own hand: the first write lifts that without an event.
"""

import errno
import os
import tempfile

import pytest

from migrate.uffd import Feature, Mode, PagemapScanError
from migrate.uffd.pagemap import Category, Region, ScanResult, scan

from .cases import case
from .guest import Guest, Told
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MADV_DONTNEED,
    MADV_REMOVE,
    PAGES,
    SHARED,
    SHMEM,
    SHMEM_PRIVATE,
    SMALL_PAGE_BYTES,
    Kind,
    Memory,
    byte_at,
    libc,
)
from .pinned import Pinned

NEEDED = ("wp-async", "pagemap-scan")
ASYNC = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED
WRITTEN = Category.WRITTEN
NOBODY = 65534
EVERYTHING = frozenset(range(PAGES))


class Tracker:
    """Reads a process's pagemap, opened by or for it."""

    def __init__(self, memory: Memory, pagemap: int) -> None:
        self.memory, self.pagemap = memory, pagemap

    @classmethod
    def of_this_process(cls, memory: Memory) -> "Tracker":
        return cls(memory, os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))

    def written(self, *, clears: bool) -> set[int]:
        """Pages written since they were last cleared."""
        found = scan(
            self.pagemap,
            self.memory.address,
            self.memory.address + self.memory.size_bytes,
            category_mask=WRITTEN,
            return_mask=WRITTEN,
            write_protect_matching=clears,
            check_wpasync=True,
        )
        assert found.walk_end == self.memory.address + self.memory.size_bytes
        size_bytes, begin = self.memory.page_bytes, self.memory.address
        return {
            page for one in found.regions for page in range((one.start - begin) // size_bytes, (one.end - begin) // size_bytes)
        }


def armed(kind: Kind) -> tuple[Memory, Tracker]:
    """Every page written, then all clean."""
    memory = Memory(kind)
    memory.open(ASYNC)
    memory.register(Mode.WP)
    libc.memset(memory.address, 1, memory.size_bytes)
    tracker = Tracker.of_this_process(memory)
    assert tracker.written(clears=True) == EVERYTHING
    assert tracker.written(clears=False) == set()
    return memory, tracker


@case(ALL, requires=NEEDED)
def test_writes_are_seen_and_reads_are_not(kind: Kind) -> None:
    """The writer goes on without an event; looking clears nothing, clearing gives what it cleared."""
    memory, tracker = armed(kind)
    byte_at(memory.at(1))
    libc.memset(memory.at(2), 9, 1)
    assert tracker.written(clears=False) == {2}
    assert tracker.written(clears=True) == {2}
    assert tracker.written(clears=True) == set()
    libc.memset(memory.at(0), 9, 1)
    libc.memset(memory.at(2), 9, 1)
    assert tracker.written(clears=True) == {0, 2}
    assert memory.events() == []


@case(
    {ANON: EVERYTHING, SHMEM: EVERYTHING, SHMEM_PRIVATE: EVERYTHING, HUGETLB: {0}, HUGETLB_PRIVATE: {0}},
    requires=NEEDED,
)
def test_first_scan(kind: Kind, pages: set[int]) -> None:
    """It arms; all reads as written, the absent too. Of hugetlbfs the absent are left out, and stay unarmed."""
    memory = Memory(kind)
    memory.open(ASYNC)
    memory.register(Mode.WP)
    libc.memset(memory.at(0), 1, 1)
    tracker = Tracker.of_this_process(memory)
    assert tracker.written(clears=True) == pages
    libc.memset(memory.at(3), 1, 1)
    assert tracker.written(clears=True) == {3}


@case({ANON: set(), SHMEM: set(), SHMEM_PRIVATE: set(), HUGETLB: {1}, HUGETLB_PRIVATE: {1}}, requires=NEEDED)
def test_first_read_of_an_absent_page(kind: Kind, pages: set[int]) -> None:
    """Of hugetlbfs it reads as written, for it was not armed."""
    memory = Memory(kind)
    memory.open(ASYNC)
    memory.register(Mode.WP)
    tracker = Tracker.of_this_process(memory)
    tracker.written(clears=True)
    byte_at(memory.at(1))
    assert tracker.written(clears=True) == pages


@case(ALL, requires=NEEDED)
def test_fills_over_armed_pages(kind: Kind) -> None:
    """A plain fill reads as written, one with WP as clean."""
    memory = Memory(kind)
    memory.open(ASYNC)
    memory.register(Mode.WP | memory.all_modes)
    tracker = Tracker.of_this_process(memory)
    tracker.written(clears=True)
    assert memory.copy(0, 7)
    assert memory.copy(1, 7, wp=True)
    if kind is ANON:
        assert tracker.written(clears=False) == {0}
        return
    memory.put(2, 7)
    memory.put(3, 7)
    assert memory.continue_(2)
    assert memory.continue_(3, wp=True)
    assert tracker.written(clears=False) == {0, 2}


@case(ALL, requires=NEEDED)
def test_lifting_by_hand_reads_as_written(kind: Kind) -> None:
    memory, tracker = armed(kind)
    assert memory.unprotect(1)
    assert tracker.written(clears=False) == {1}
    assert memory.protect(1)
    assert tracker.written(clears=False) == set()


@case(ALL, requires=NEEDED)
def test_range_that_is_not_registered(kind: Kind) -> None:
    """An error with check_wpasync, else all of it reads as written."""
    memory = Memory(kind)
    libc.memset(memory.address, 1, memory.size_bytes)
    tracker = Tracker.of_this_process(memory)
    for clears in (False, True):
        with pytest.raises(PagemapScanError, match="registered WP with WP_ASYNC") as raised:
            tracker.written(clears=clears)
        assert raised.value.error_number == errno.EPERM
    end = memory.address + memory.size_bytes
    everything = ScanResult((Region(memory.address, end, WRITTEN),), end)
    assert scan(tracker.pagemap, memory.address, end, category_mask=WRITTEN, return_mask=WRITTEN) == everything


@case(ALL, requires=[*NEEDED, "root"])
def test_another_process_without_privilege(kind: Kind) -> None:
    """By a descriptor that the guest opened and passed: nobody gets and clears, atomically."""

    def writes(memory: Memory, told: Told) -> None:
        told()
        libc.memset(memory.at(2), 9, 1)
        told()

    memory = Memory(kind)
    guest = Guest(memory, writes, Mode.WP, ASYNC)
    guest.stops()
    tracker = Tracker(memory, os.open(f"/proc/{guest.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with pytest.raises(PermissionError):
        os.open(f"/proc/{guest.pid}/pagemap", os.O_RDONLY)
    tracker.written(clears=True)
    guest.tell()
    guest.stops()
    assert tracker.written(clears=True) == {2}
    assert tracker.written(clears=True) == set()
    guest.tell()
    guest.ends()
    with pytest.raises(PagemapScanError) as raised:
        tracker.written(clears=False)
    assert raised.value.error_number == errno.ESRCH


# --- what it does not see -------------------------------------------------------------------------------------------


@case(FILES, requires=NEEDED)
def test_blind_to_other_ways_into_the_file(kind: Kind) -> None:
    """Another mapping; pwrite(2), which hugetlbfs does not have."""
    memory, tracker = armed(kind)
    memory.put(0, 9)
    if not kind.is_hugetlb:
        os.pwrite(memory.file, b"\x09", memory.page_bytes)
    assert tracker.written(clears=False) == set()


@case({SHMEM: 0, SHMEM_PRIVATE: 1, HUGETLB: 0, HUGETLB_PRIVATE: 0}, requires=NEEDED)
def test_blind_to_holes(kind: Kind, seen: int) -> None:
    """Not even after the zeroes were read; a private page of shmem is the mapping's own and stays, hugetlbfs takes it too."""
    memory, tracker = armed(kind)
    memory.punch_hole(1)
    assert tracker.written(clears=False) == set()
    assert byte_at(memory.at(1)) == seen
    assert tracker.written(clears=False) == set()
    libc.memset(memory.at(1), 9, 1)
    assert tracker.written(clears=False) == {1}


@case(SHARED, requires=NEEDED)
def test_blind_to_remove(kind: Kind) -> None:
    memory, tracker = armed(kind)
    assert memory.advise(1, MADV_REMOVE) == 0
    assert byte_at(memory.at(1)) == 0
    assert tracker.written(clears=False) == set()


@case(
    {ANON: (0, {1}), SHMEM: (1, set()), SHMEM_PRIVATE: (0, set()), HUGETLB: (1, set()), HUGETLB_PRIVATE: (0, set())},
    requires=NEEDED,
)
def test_dontneed_of_a_clean_page(kind: Kind, expected: tuple[int, set[int]]) -> None:
    """Anonymous memory tells that its content is gone, a private mapping of a file does not."""
    memory, tracker = armed(kind)
    byte, pages = expected
    assert memory.advise(1, MADV_DONTNEED) == 0
    assert tracker.written(clears=False) == pages
    assert byte_at(memory.at(1)) == byte
    assert tracker.written(clears=False) == pages


@case(ALL, requires=[*NEEDED, "io-uring"])
def test_blind_to_pages_pinned_for_io(kind: Kind) -> None:
    """What a device writes passes no page table: pause it first, then count its pages as written."""
    with tempfile.TemporaryFile() as file:
        file.write(b"\x09" * 512)
        file.flush()
        memory = Memory(kind)
        memory.open(ASYNC)
        memory.register(Mode.WP)
        libc.memset(memory.address, 1, memory.size_bytes)
        tracker = Tracker.of_this_process(memory)
        with Pinned(memory.at(1), memory.page_bytes) as pinned:
            assert tracker.written(clears=True) == EVERYTHING
            pinned.read_into(file.fileno(), 512)
            assert byte_at(memory.at(1)) == 9
            assert tracker.written(clears=True) == set()


# --- the scan itself ------------------------------------------------------------------------------------------------


@case(ALL, requires=NEEDED)
def test_bounds_of_a_scan(kind: Kind) -> None:
    """max_regions and max_pages end the walk before the next page that matches; max_pages counts small pages."""
    memory, tracker = armed(kind)
    for page in (0, 2):
        libc.memset(memory.at(page), 9, 1)
    end = memory.address + memory.size_bytes

    def written(start: int, **bounds: int) -> ScanResult:
        return scan(tracker.pagemap, start, end, category_mask=WRITTEN, return_mask=WRITTEN, **bounds)

    first, second = (Region(memory.at(page), memory.at(page + 1), WRITTEN) for page in (0, 2))
    for bounds in ({"max_regions": 1}, {"max_pages": memory.page_bytes // SMALL_PAGE_BYTES}):
        bounded = written(memory.address, **bounds)
        assert bounded.regions == (first,)
        assert memory.at(1) <= bounded.walk_end <= memory.at(2)
        assert written(bounded.walk_end) == ScanResult((second,), end)
    protect_only = scan(
        tracker.pagemap,
        memory.address,
        end,
        category_mask=WRITTEN,
        write_protect_matching=True,
        check_wpasync=True,
        max_regions=0,
    )
    assert protect_only == ScanResult((), end)
    assert written(memory.address) == ScanResult((), end)


OF_SMALL_FILE = Category.WPALLOWED | Category.WRITTEN | Category.FILE | Category.PRESENT


@case(
    {
        ANON: OF_SMALL_FILE & ~Category.FILE,
        SHMEM: OF_SMALL_FILE,
        SHMEM_PRIVATE: OF_SMALL_FILE & ~Category.FILE,
        HUGETLB: OF_SMALL_FILE | Category.HUGE,
        HUGETLB_PRIVATE: (OF_SMALL_FILE & ~Category.FILE) | Category.HUGE,
    },
    requires=NEEDED,
)
def test_categories(kind: Kind, of_a_written_page: Category) -> None:
    """A private page that was written is not the file's any more."""
    memory = Memory(kind)
    memory.open(ASYNC)
    memory.register(Mode.WP)
    libc.memset(memory.at(1), 1, 1)
    tracker = Tracker.of_this_process(memory)
    asked = OF_SMALL_FILE | Category.HUGE | Category.SWAPPED | Category.PFNZERO
    end = memory.address + memory.size_bytes
    present = scan(tracker.pagemap, memory.address, end, category_mask=Category.PRESENT, return_mask=asked)
    assert present.regions == (Region(memory.at(1), memory.at(2), of_a_written_page),)
    absent = scan(
        tracker.pagemap,
        memory.address,
        end,
        category_mask=Category.PRESENT,
        category_inverted=Category.PRESENT,
        return_mask=WRITTEN,
    )
    assert [(one.start, one.end) for one in absent.regions] == [(memory.at(0), memory.at(1)), (memory.at(2), end)]
    some = scan(tracker.pagemap, memory.address, end, category_anyof_mask=Category.SWAPPED | Category.PRESENT, return_mask=asked)
    assert some == present


@case([SHMEM], requires=NEEDED)
def test_scan_of_what_it_cannot(kind: Kind) -> None:
    memory, tracker = armed(kind)
    end = memory.address + memory.size_bytes
    for descriptor, start, mask, error_number in (
        (tracker.pagemap, memory.address + 1, WRITTEN, errno.EINVAL),
        (tracker.pagemap, memory.address, Category(1 << 40), errno.EINVAL),
        (memory.file, memory.address, WRITTEN, errno.ENOTTY),
    ):
        with pytest.raises(PagemapScanError, match="page-aligned addresses") as raised:
            scan(descriptor, start, end, return_mask=mask)
        assert raised.value.error_number == error_number
