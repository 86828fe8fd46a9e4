"""The fill ioctls and what wakes, in each kind of memory. What the data plane relies on (resolve.c) is in the first part."""

import errno
import os
import signal

import pytest

from migrate.uffd import Feature, Filled, Mode, Outcome, PageFault, PageFaultFlag, UserfaultfdError

from .cases import case, dies_here
from .guest import Guest, Told
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MADV_DONTNEED,
    SHMEM,
    SHMEM_PRIVATE,
    Kind,
    Memory,
    byte_at,
    kernel_reads,
    libc,
)

POISONED = (errno.EFAULT, -1)
"""What the kernel's own read of a poisoned page gives."""


def registered(kind: Kind) -> Memory:
    memory = Memory(kind)
    memory.open()
    memory.register(memory.all_modes)
    return memory


def ends_with(filled: Filled, outcome: Outcome, error_number: int, bytes_done: int = 0) -> None:
    """The result field is signed: where nothing was done it is the errno, negative."""
    assert (filled.outcome, filled.error_number, filled.bytes_done) == (outcome, error_number, bytes_done)
    assert filled.field == -error_number


# --- CONTINUE -------------------------------------------------------------------------------------------------------


@case(FILES)
def test_continue_maps_and_wakes(kind: Kind) -> None:
    memory = registered(kind)
    memory.put(0, 7)
    touch, _ = memory.fault(0)
    assert touch.waits
    assert memory.continue_(0) == Filled(memory.page_bytes, Outcome.DONE, 0, memory.page_bytes)
    assert not touch.waits
    assert touch.ends() == 7


@case(FILES)
def test_continue_of_a_hole(kind: Kind) -> None:
    memory = registered(kind)
    touch, _ = memory.fault(0)
    ends_with(memory.continue_(0), Outcome.NO_PAGE, errno.EFAULT)
    assert touch.waits


@case(FILES)
def test_continue_of_a_mapped_page_wakes_nobody(kind: Kind) -> None:
    """EEXIST, and who waits goes on waiting: UFFDIO_WAKE then."""
    memory = registered(kind)
    memory.put(0, 7)
    touch, _ = memory.fault(0)
    assert memory.continue_(0, dontwake=True)
    assert touch.waits
    ends_with(memory.continue_(0), Outcome.ALREADY_MAPPED, errno.EEXIST)
    assert touch.waits
    memory.wake(0)
    assert not touch.waits
    assert touch.ends() == 7
    assert memory.events() == []


@case(FILES)
def test_range_that_ends_early(kind: Kind) -> None:
    """EAGAIN with the bytes that were mapped: progress. The errno of what stopped it comes with the next call, from there."""
    memory = registered(kind)
    for page in (0, 1):
        memory.put(page, 7)
    done_bytes = 2 * memory.page_bytes
    one_call = memory.continue_(0, 4, one_call=True)
    assert one_call == Filled(done_bytes, Outcome.PARTIAL, errno.EAGAIN, done_bytes)
    ends_with(memory.continue_(2, 2, one_call=True), Outcome.NO_PAGE, errno.EFAULT)
    for page in (2, 3):
        memory.put(page, 7)
    libc.madvise(memory.address, memory.size_bytes, MADV_DONTNEED)
    memory.punch_hole(3)
    ends_with(memory.continue_(0, 4), Outcome.NO_PAGE, errno.EFAULT, 3 * memory.page_bytes)  # stepped on


@case(FILES)
def test_range_over_a_mapped_page_ends_before_it(kind: Kind) -> None:
    memory = registered(kind)
    for page in range(3):
        memory.put(page, 7)
    assert memory.continue_(1)
    ends_with(memory.continue_(0, 3), Outcome.ALREADY_MAPPED, errno.EEXIST, memory.page_bytes)


@case(FILES)
def test_page_allocated_and_never_written_continues_as_zeroes(kind: Kind) -> None:
    """A fallocate()d page is there for the kernel (5.19; a hole before): never a substitute for data."""
    memory = registered(kind)
    os.posix_fallocate(memory.file, 0, memory.page_bytes)
    touch, flags = memory.fault(0)
    assert flags == PageFaultFlag.MINOR
    assert memory.continue_(0)
    assert touch.ends() == 0


@case({ANON: False, SHMEM: True, SHMEM_PRIVATE: True, HUGETLB: True, HUGETLB_PRIVATE: True})
def test_continue_is_for_files(kind: Kind, allowed: bool) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    if kind is not ANON:
        memory.put(0, 7)
    if allowed:
        assert memory.continue_(0)  # MINOR need not be registered for it
        return
    with pytest.raises(UserfaultfdError, match="shmem or hugetlbfs") as raised:
        memory.continue_(0)
    assert raised.value.error_number == errno.EINVAL


@case(FILES)
def test_writing_through_the_alias_wakes_nobody(kind: Kind) -> None:
    memory = registered(kind)
    touch, _ = memory.fault(0)
    memory.put(0, 7)
    assert touch.waits
    assert memory.events() == []
    memory.wake(0)
    assert memory.next_event() == PageFault(memory.at(0), PageFaultFlag.MINOR, None)
    assert memory.continue_(0)
    assert touch.ends() == 7


@case({SHMEM: 7, SHMEM_PRIVATE: 9, HUGETLB: 7, HUGETLB_PRIVATE: 9})
def test_late_copy_through_the_alias(kind: Kind, seen: int) -> None:
    """Nothing refuses it, and in a shared mapping it destroys what the guest wrote: a page is written by one owner, once."""
    memory = registered(kind)
    touch, _ = memory.fault(0, 9)
    memory.put(0, 7)
    assert memory.continue_(0)
    assert touch.ends() == 9
    memory.put(0, 7)
    assert byte_at(memory.at(0)) == seen


# --- COPY and ZEROPAGE ----------------------------------------------------------------------------------------------


@case({ANON: None, SHMEM: 7, SHMEM_PRIVATE: 0, HUGETLB: 7, HUGETLB_PRIVATE: 0})
def test_copy(kind: Kind, in_the_file: int | None) -> None:
    """Into the file where the mapping is shared. It refuses a page that is there, and wakes nobody then."""
    memory = registered(kind)
    touch, _ = memory.fault(0)
    assert memory.copy(0, 7, dontwake=True) == Filled(memory.page_bytes, Outcome.DONE, 0, memory.page_bytes)
    ends_with(memory.copy(0, 8), Outcome.ALREADY_MAPPED, errno.EEXIST)
    assert touch.waits
    memory.wake(0)
    assert touch.ends() == 7
    if in_the_file is not None:
        assert memory.in_file(0) == in_the_file


@case({ANON: True, SHMEM: False, SHMEM_PRIVATE: True, HUGETLB: False, HUGETLB_PRIVATE: True})
def test_copy_where_the_file_has_a_page(kind: Kind, is_done: bool) -> None:
    """A shared mapping has one content, and it is there; a private one gets a page of its own."""
    memory = registered(kind)
    if kind is not ANON:
        memory.put(0, 7)
    if is_done:
        assert memory.copy(0, 8)
        assert byte_at(memory.at(0)) == 8
    else:
        ends_with(memory.copy(0, 8), Outcome.ALREADY_MAPPED, errno.EEXIST)


@case(ALL)
def test_copy_steps_on(kind: Kind) -> None:
    memory = registered(kind)
    assert memory.copy(2, 7)
    two_pages = 2 * memory.page_bytes
    assert memory.copy(0, 8, 4, one_call=True) == Filled(two_pages, Outcome.PARTIAL, errno.EAGAIN, two_pages)
    libc.madvise(memory.address, two_pages, MADV_DONTNEED)
    if kind.is_shared:
        memory.punch_hole(0)
        memory.punch_hole(1)
    ends_with(memory.copy(0, 8, 4), Outcome.ALREADY_MAPPED, errno.EEXIST, two_pages)
    assert [byte_at(memory.at(page)) for page in range(3)] == [8, 8, 7]


@case(ALL)
def test_copy_from_nowhere(kind: Kind) -> None:
    """A source that cannot be read is no outcome but an error, which says what it expects and how far it came."""
    memory = registered(kind)
    source = Memory(kind)
    libc.memset(source.address, 7, source.page_bytes)
    libc.munmap(source.at(1), source.page_bytes)
    with pytest.raises(UserfaultfdError) as raised:
        memory.userfaultfd.copy(memory.at(0), source.at(0), 2 * memory.page_bytes)
    assert (raised.value.error_number, raised.value.bytes_done) == (errno.EFAULT, memory.page_bytes)
    assert "a source that can be read" in raised.value.expected


@case({ANON: True, SHMEM: True, SHMEM_PRIVATE: True, HUGETLB: False, HUGETLB_PRIVATE: False})
def test_zeropage(kind: Kind, exists: bool) -> None:
    """hugetlbfs has none: there fallocate(2) clears a page, and CONTINUE maps it."""
    memory = registered(kind)
    touch, _ = memory.fault(0)
    if exists:
        assert memory.zeropage(0)
        ends_with(memory.zeropage(0), Outcome.ALREADY_MAPPED, errno.EEXIST)
    else:
        with pytest.raises(UserfaultfdError, match="not hugetlbfs") as raised:
            memory.zeropage(0)
        assert raised.value.error_number == errno.EINVAL
        os.posix_fallocate(memory.file, 0, memory.page_bytes)
        assert memory.continue_(0)
    assert touch.ends() == 0


@case(ALL)
def test_not_whole_pages(kind: Kind) -> None:
    memory = registered(kind)
    wrong = 1 if not kind.is_hugetlb else 4096
    for fill in (memory.userfaultfd.continue_, memory.userfaultfd.zeropage, memory.userfaultfd.poison):
        with pytest.raises(UserfaultfdError) as raised:
            fill(memory.address + wrong, memory.page_bytes)
        assert raised.value.error_number == errno.EINVAL
        assert "page-aligned address and size_bytes > 0" in raised.value.expected


@case((ANON, SHMEM, SHMEM_PRIVATE))
def test_zeropage_without_waking(kind: Kind) -> None:
    memory = registered(kind)
    touch, _ = memory.fault(0)
    assert memory.zeropage(0, dontwake=True)
    assert touch.waits
    memory.wake(0)
    assert touch.ends() == 0


# --- POISON ---------------------------------------------------------------------------------------------------------


@case(ALL, requires=["uffd-poison"])
def test_poison_wakes_into_an_error(kind: Kind) -> None:
    """Who touches the mapping gets SIGBUS, the kernel EFAULT; the next page is as it was."""
    memory = registered(kind)
    assert memory.poison(0) == Filled(memory.page_bytes, Outcome.DONE, 0, memory.page_bytes)
    ends_with(memory.poison(0), Outcome.ALREADY_MAPPED, errno.EEXIST)
    assert memory.copy(1, 0)
    assert kernel_reads(memory.at(0)) == POISONED
    assert kernel_reads(memory.at(1)) == (0, 0)
    assert memory.events() == []


@case(ALL, requires=["uffd-poison"], dies_of=signal.SIGBUS)
def test_poison_without_waking(kind: Kind) -> None:
    """Who waits lives on until it is woken."""
    memory = registered(kind)
    touch, _ = memory.fault(0)
    assert memory.poison(0, dontwake=True)
    assert touch.waits
    dies_here()
    memory.wake(0)
    touch.ends()


@case(ALL, requires=["uffd-poison"], dies_of=signal.SIGBUS)
def test_touch_of_poison_is_sigbus(kind: Kind) -> None:
    """Also of a thread that waits there already."""
    memory = registered(kind)
    touch, _ = memory.fault(0)
    dies_here()
    assert memory.poison(0)
    touch.ends()


@case(FILES, requires=["uffd-poison"])
def test_continue_replaces_poison(kind: Kind) -> None:
    """Of a page that has arrived after all."""
    memory = registered(kind)
    assert memory.poison(0)
    memory.put(0, 7)
    assert memory.continue_(0)
    assert byte_at(memory.at(0)) == 7


@case(ALL, requires=["uffd-poison"])
def test_copy_replaces_poison(kind: Kind) -> None:
    memory = registered(kind)
    assert memory.poison(0)
    assert memory.copy(0, 7)
    assert byte_at(memory.at(0)) == 7


# --- the process is not there any more ------------------------------------------------------------------------------


@case(FILES)
def test_after_the_process_ended(kind: Kind) -> None:
    memory = Memory(kind)
    guest = Guest(memory, lambda _memory, _told: None, memory.all_modes, Feature(0))
    guest.ends()
    memory.put(0, 7)
    for fill in (memory.continue_(0), memory.copy(1, 7)):
        assert (fill.outcome, fill.error_number, fill.bytes_done) == (Outcome.PROCESS_GONE, errno.ESRCH, 0)
    with pytest.raises(UserfaultfdError) as raised:
        memory.unregister()
    assert raised.value.error_number == errno.ENOMEM


@case(FILES)
def test_after_the_range_was_unmapped(kind: Kind) -> None:
    """By a guest that did not ask for events: only the fill tells."""

    def unmap(memory: Memory, told: Told) -> int:
        failed = libc.munmap(memory.address, memory.size_bytes)
        told()
        return int(failed)

    memory = Memory(kind)
    guest = Guest(memory, unmap, memory.all_modes, Feature(0))
    guest.stops()
    memory.put(0, 7)
    ends_with(memory.continue_(0), Outcome.RANGE_GONE, errno.ENOENT)
    guest.tell()
    assert guest.ends() == 0
