"""UFFDIO_WRITEPROTECT: writes are told before they happen, in each kind of memory."""

import errno
import signal

import pytest

from migrate.uffd import Feature, Mode, Outcome, PageFaultFlag, UserfaultfdError

from .cases import case, dies_here
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MADV_DONTNEED,
    MADV_PAGEOUT,
    SHMEM,
    SHMEM_PRIVATE,
    Kind,
    Memory,
    byte_at,
    kernel_reads,
    libc,
)

WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
WP_WRITE = PageFaultFlag.WP | PageFaultFlag.WRITE


def written(kind: Kind, features: Feature = WP) -> Memory:
    """Registered WP; page 0 was written before it was protected."""
    memory = Memory(kind)
    memory.open(features)
    memory.register(Mode.WP)
    libc.memset(memory.at(0), 7, 1)
    assert memory.protect(0)
    assert memory.is_protected(0)
    return memory


@case(ALL, requires=["uffd-wp"])
def test_write_waits_until_it_is_allowed(kind: Kind) -> None:
    memory = written(kind)
    assert memory.touch(0).ends() == 7  # reading is free
    touch, flags = memory.fault(0, 9)
    assert flags == WP_WRITE
    assert touch.waits
    assert memory.unprotect(0, dontwake=True)
    assert touch.waits
    memory.wake(0)
    assert touch.ends() == 9
    assert not memory.is_protected(0)
    assert memory.events() == []


@case(ALL, requires=["uffd-wp"])
def test_lifting_wakes(kind: Kind) -> None:
    memory = written(kind)
    touch, _ = memory.fault(0, 9)
    assert memory.unprotect(0)
    assert not touch.waits
    assert touch.ends() == 9


@case(ALL, requires=["uffd-wp"])
def test_protecting_wakes_nobody(kind: Kind) -> None:
    """So DONTWAKE with it is refused."""
    memory = written(kind)
    touch, _ = memory.fault(0, 9)
    assert memory.protect(0)
    assert touch.waits
    with pytest.raises(UserfaultfdError, match="WP") as raised:
        memory.userfaultfd.writeprotect(memory.at(0), memory.page_bytes, protect=True, dontwake=True)
    assert raised.value.error_number == errno.EINVAL


@case(ALL, requires=["uffd-wp"])
def test_range_without_wp(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(WP)
    memory.register(memory.all_modes)
    assert memory.protect(0).outcome is Outcome.RANGE_GONE
    for fill in (memory.copy, memory.continue_) if kind is not ANON else (memory.copy,):
        if fill == memory.continue_:
            memory.put(1, 7)
            arguments = (1,)
        else:
            arguments = (0, 7)
        with pytest.raises(UserfaultfdError, match="wp=True only where WP is registered") as raised:
            fill(*arguments, wp=True)
        assert raised.value.error_number == errno.EINVAL


@case(ALL, requires=["uffd-wp"])
def test_copy_can_protect(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(WP)
    memory.register(memory.all_modes | Mode.WP)
    touch, flags = memory.fault(0, 9)
    assert flags == PageFaultFlag.WRITE
    assert memory.copy(0, 7, wp=True)  # the write that waits is told again, as one to a protected page
    assert memory.next_flags() == WP_WRITE
    assert memory.is_protected(0)
    assert memory.unprotect(0)
    assert touch.ends() == 9


@case(FILES, requires=["uffd-wp"])
def test_continue_can_protect(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(WP | Feature.WP_UNPOPULATED)
    memory.register(memory.all_modes | Mode.WP)
    memory.put(0, 7)
    touch, flags = memory.fault(0)
    assert flags == PageFaultFlag.MINOR
    assert memory.continue_(0, wp=True)
    assert touch.ends() == 7
    touch, flags = memory.fault(0, 9)
    assert flags == WP_WRITE
    assert memory.unprotect(0)
    assert touch.ends() == 9


@case({ANON: False, SHMEM: True, SHMEM_PRIVATE: True, HUGETLB: True, HUGETLB_PRIVATE: True}, requires=["uffd-wp"])
def test_page_that_is_not_there(kind: Kind, is_protected: bool) -> None:
    """Of a file a marker stands in its place; of anonymous memory only with WP_UNPOPULATED, else it is skipped in silence."""
    for features, expected in ((WP, is_protected), (WP | Feature.WP_UNPOPULATED, True)):
        memory = Memory(kind)
        memory.open(features)
        memory.register(Mode.WP)
        assert memory.protect(0)
        assert memory.is_protected(0) == expected
        if expected:
            touch, flags = memory.fault(0, 9)
            assert flags == WP_WRITE
            assert memory.unprotect(0)
            assert touch.ends() == 9
        else:
            assert memory.touch(0, 9).ends() == 9
        assert not memory.is_protected(0)


@case([ANON], requires=["uffd-wp"])
def test_marker_of_anonymous_memory(kind: Kind) -> None:
    """It goes by being lifted and by MADV_DONTNEED, and stays when a read puts the zero page there."""
    memory = Memory(kind)
    memory.open(WP | Feature.WP_UNPOPULATED)
    memory.register(Mode.WP)
    assert memory.protect(0)
    assert memory.unprotect(0)
    assert not memory.is_protected(0)
    assert memory.protect(0)
    assert memory.advise(0, MADV_DONTNEED) == 0
    assert not memory.is_protected(0)
    libc.memset(memory.at(0), 7, 1)
    assert not memory.is_protected(0)
    assert memory.advise(0, MADV_DONTNEED) == 0
    assert memory.protect(0)
    assert byte_at(memory.at(0)) == 0
    assert memory.is_protected(0)


@case({ANON: False, SHMEM: True, SHMEM_PRIVATE: True, HUGETLB: True, HUGETLB_PRIVATE: True}, requires=["uffd-wp"])
def test_dontneed_keeps_protection_of_files(kind: Kind, is_protected: bool) -> None:
    """The page table entry goes, a marker stays."""
    memory = written(kind)
    assert memory.advise(0, MADV_DONTNEED) == 0
    assert memory.is_protected(0) == is_protected


@case({ANON: 0, SHMEM: 0, SHMEM_PRIVATE: 0, HUGETLB: errno.EINVAL, HUGETLB_PRIVATE: errno.EINVAL}, requires=["uffd-wp"])
def test_pageout_keeps_protection(kind: Kind, error_number: int) -> None:
    """Swapped out or not (without swap anonymous pages stay); hugetlbfs has no MADV_PAGEOUT."""
    memory = written(kind)
    assert memory.advise(0, MADV_PAGEOUT) == error_number
    assert memory.is_protected(0)
    touch, flags = memory.fault(0, 9)
    assert flags == WP_WRITE
    assert memory.unprotect(0)
    assert touch.ends() == 9


@case(ALL, requires=["uffd-wp"])
def test_unregistering_lifts_protection(kind: Kind) -> None:
    memory = written(kind)
    memory.unregister()
    assert not memory.is_protected(0)
    assert memory.touch(0, 9).ends() == 9


# --- SIGBUS instead of events ---------------------------------------------------------------------------------------


@case(ALL, requires=["uffd-wp"])
def test_sigbus_feature_tells_nothing(kind: Kind) -> None:
    """The kernel's own touch is EFAULT; a fill before the touch, or after it, is as ever."""
    memory = Memory(kind)
    memory.open(WP | Feature.SIGBUS)
    memory.register(Mode.MISSING | Mode.WP)
    assert kernel_reads(memory.at(0)) == (errno.EFAULT, -1)
    assert memory.copy(0, 7, wp=True)
    assert memory.touch(0).ends() == 7
    assert memory.unprotect(0)
    assert memory.touch(0, 9).ends() == 9
    assert memory.events() == []


@case(ALL, requires=["uffd-wp"], dies_of=signal.SIGBUS)
def test_sigbus_of_an_absent_page(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(WP | Feature.SIGBUS)
    memory.register(Mode.MISSING | Mode.WP)
    dies_here()
    byte_at(memory.at(0))


@case(ALL, requires=["uffd-wp"], dies_of=signal.SIGBUS)
def test_sigbus_of_a_protected_page(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(WP | Feature.SIGBUS)
    memory.register(Mode.MISSING | Mode.WP)
    assert memory.copy(0, 7, wp=True)
    assert byte_at(memory.at(0)) == 7
    dies_here()
    libc.memset(memory.at(0), 9, 1)
