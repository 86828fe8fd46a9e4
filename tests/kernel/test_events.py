"""What read(2) tells, in each kind of memory: faults with their flags, and changes of the address space."""

import errno
import os

from migrate.uffd import Feature, Mode, Outcome, PageFault, PageFaultFlag, Remap, Remove, Unmap

from .cases import case
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MADV_DONTNEED,
    MADV_REMOVE,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    SHARED,
    SHMEM,
    SHMEM_PRIVATE,
    Calling,
    Kind,
    Memory,
    Touch,
    aligned_place,
    byte_at,
    call,
    libc,
)

MISSING, MINOR, WRITE = PageFaultFlag(0), PageFaultFlag.MINOR, PageFaultFlag.WRITE
CHANGES = Feature.EVENT_REMOVE | Feature.EVENT_REMAP | Feature.EVENT_UNMAP


def populated(kind: Kind, features: Feature) -> Memory:
    """Every page mapped, page n holding n + 1."""
    memory = Memory(kind)
    memory.open(features)
    memory.register(memory.all_modes)
    for page in range(memory.pages):
        if kind is ANON:
            assert memory.copy(page, page + 1)
        else:
            memory.put(page, page + 1)
            assert memory.continue_(page)
    return memory


def discarding(memory: Memory, advice: int) -> Calling:
    """madvise(2) of pages 1 and 2 by a thread, which waits until its event is read."""
    thread = Calling(memory.advise, 1, advice, 2)
    memory.wait_for_events()
    return thread


# --- page faults ----------------------------------------------------------------------------------------------------


@case({ANON: -1, SHMEM: 9, SHMEM_PRIVATE: 1, HUGETLB: 9, HUGETLB_PRIVATE: 1})
def test_flags(kind: Kind, written_to_the_file: int) -> None:
    """0 and 1: nothing there; 4 and 5: the file has the page. A private mapping's write stays its own."""
    memory = Memory(kind)
    memory.open()
    memory.register(memory.all_modes)
    assert (int(PageFaultFlag.WRITE), int(PageFaultFlag.WP), int(PageFaultFlag.MINOR)) == (1, 2, 4)
    for page, value, flags in ((0, None, MISSING), (1, 9, WRITE)):
        touch, got = memory.fault(page, value)
        assert got == flags
        assert memory.copy(page, 1)
        assert touch.ends() == (value or 1)
    if kind is ANON:
        return
    for page, value, flags in ((2, None, MINOR), (3, 9, MINOR | WRITE)):
        memory.put(page, 1)
        touch, got = memory.fault(page, value)
        assert got == flags
        assert memory.continue_(page)
        assert touch.ends() == (value or 1)
    assert memory.in_file(3) == written_to_the_file


@case(ALL)
def test_address_is_of_the_page(kind: Kind) -> None:
    """Of hugetlbfs the huge page's; the exact byte only if asked for."""
    for features, offset_bytes in ((Feature(0), 0), (Feature.EXACT_ADDRESS, -3)):
        memory = Memory(kind)
        memory.open(features)
        memory.register(Mode.MISSING)
        touch = Touch(memory.at(2) - 3)
        page_begins = memory.at(1) if not offset_bytes else memory.at(2)
        assert memory.next_event() == PageFault(page_begins + offset_bytes, MISSING, None)
        assert memory.copy(1, 7)
        assert touch.ends() == 7


@case(ALL)
def test_thread_id(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(Feature.THREAD_ID)
    memory.register(Mode.MISSING)
    touches = [memory.touch(page) for page in range(memory.pages)]
    told: dict[int, int | None] = {}
    while len(told) < len(touches):
        memory.wait_for_events()
        told |= {event.address: event.thread_id for event in memory.events() if isinstance(event, PageFault)}
    assert told == {touch.address: touch.native_id for touch in touches}


@case(ALL)
def test_one_read_gives_many(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    touches = []
    for page in range(memory.pages):
        touches.append(memory.touch(page))
        while memory.pending_faults() <= page:
            os.sched_yield()
    assert memory.userfaultfd.read_events(1) == [PageFault(memory.at(0), MISSING, None)]  # in order of arrival
    assert memory.events() == [PageFault(memory.at(page), MISSING, None) for page in (1, 2, 3)]
    assert memory.copy(0, 7, memory.pages)
    assert [touch.ends() for touch in touches] == [7] * memory.pages


@case(ALL)
def test_two_threads_give_two_messages_and_one_fill_wakes_both(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(memory.all_modes)
    first, _ = memory.fault(0)
    second, _ = memory.fault(0)
    if kind is ANON:
        assert memory.copy(0, 7)
    else:
        memory.put(0, 7)
        assert memory.continue_(0)
    assert (first.ends(), second.ends()) == (7, 7)
    assert memory.events() == []


@case(ALL)
def test_message_once_read_is_not_sent_again(kind: Kind) -> None:
    """A new handler wakes the range: who waits there faults anew."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    touch, _ = memory.fault(0)
    assert touch.waits
    assert memory.events() == []
    memory.wake(0)
    assert memory.next_event() == PageFault(memory.at(0), MISSING, None)
    assert memory.copy(0, 7)
    assert touch.ends() == 7


# --- discards -------------------------------------------------------------------------------------------------------


@case({ANON: MISSING, SHMEM: MINOR, SHMEM_PRIVATE: MINOR, HUGETLB: MINOR, HUGETLB_PRIVATE: MINOR})
def test_dontneed_keeps_what_the_file_has(kind: Kind, next_fault: PageFaultFlag) -> None:
    """It waits until its event is read. Of anonymous memory the page is gone, of a file only the mapping."""
    memory = populated(kind, CHANGES)
    thread = discarding(memory, MADV_DONTNEED)
    assert thread.is_alive()
    assert memory.events() == [Remove(memory.at(1), memory.at(3))]
    assert thread.ends() == 0
    touch, flags = memory.fault(1)
    assert flags == next_fault
    assert memory.continue_(1) if next_fault else memory.zeropage(1)
    assert touch.ends() == (2 if next_fault else 0)


@case(SHARED)
def test_remove_makes_a_hole_and_tells_the_same(kind: Kind) -> None:
    """The event of MADV_REMOVE is that of MADV_DONTNEED: the next fault tells them apart. It comes before the hole."""
    memory = populated(kind, CHANGES)
    thread = discarding(memory, MADV_REMOVE)
    assert memory.in_file(1) == 2
    assert memory.events() == [Remove(memory.at(1), memory.at(3))]
    assert thread.ends() == 0
    assert memory.in_file(1) == 0
    touch, flags = memory.fault(1)
    assert flags == MISSING
    assert memory.continue_(1).outcome is Outcome.NO_PAGE
    assert memory.copy(1, 7)
    assert touch.ends() == 7


@case({ANON: errno.EINVAL, SHMEM_PRIVATE: errno.EACCES, HUGETLB_PRIVATE: errno.EACCES})
def test_remove_is_for_shared_memory(kind: Kind, error_number: int) -> None:
    memory = populated(kind, CHANGES)
    assert memory.advise(1, MADV_REMOVE) == error_number
    assert memory.events() == []
    assert byte_at(memory.at(1)) == 2


@case(FILES)
def test_hole_punched_tells_nothing(kind: Kind) -> None:
    """fallocate(2) on the file takes the page from under the mapping; only the next fault tells."""
    memory = populated(kind, CHANGES)
    memory.punch_hole(1)
    assert memory.events() == []
    _, flags = memory.fault(1)
    assert flags == MISSING


@case(ALL)
def test_without_the_feature_nothing_waits(kind: Kind) -> None:
    memory = populated(kind, Feature(0))
    assert memory.advise(1, MADV_DONTNEED) == 0
    assert memory.events() == []


@case(ALL, requires=["uffd-wp", "uffd-poison", "uffd-move"])
def test_while_an_event_is_unread_every_fill_is_eagain(kind: Kind) -> None:
    """In the result field too (WRITEPROTECT has none). Read events, then retry."""
    memory = populated(kind, CHANGES)
    memory.userfaultfd.register(memory.address, memory.size_bytes, memory.all_modes | Mode.WP)
    thread = discarding(memory, MADV_DONTNEED)
    fills = {
        "copy": lambda: memory.copy(1, 7),
        "zeropage": lambda: memory.zeropage(1),
        "continue": lambda: memory.continue_(1),
        "poison": lambda: memory.poison(1),
        "move": lambda: memory.userfaultfd.move(memory.at(1), memory.at(3), memory.page_bytes),
    }
    for name, fill in fills.items():
        filled = fill()
        assert (filled.outcome, filled.field, filled.bytes_done) == (Outcome.AGAIN, -errno.EAGAIN, 0), name
    assert memory.protect(3).outcome is Outcome.AGAIN
    assert memory.events() == [Remove(memory.at(1), memory.at(3))]
    assert thread.ends() == 0
    assert memory.copy(1, 7).outcome is (Outcome.ALREADY_MAPPED if kind.is_shared else Outcome.DONE)


@case(ALL)
def test_fault_is_read_before_an_older_event(kind: Kind) -> None:
    """Faults come first whatever the order: a fault may be of a page whose discard is told only after it."""
    memory = Memory(kind)
    memory.open(CHANGES)
    memory.register(Mode.MISSING)
    thread = discarding(memory, MADV_DONTNEED)
    touch = memory.touch(3)
    while not memory.pending_faults():
        os.sched_yield()
    assert memory.events() == [PageFault(memory.at(3), MISSING, None), Remove(memory.at(1), memory.at(3))]
    assert thread.ends() == 0
    assert memory.copy(3, 7)
    assert touch.ends() == 7


# --- the address space ----------------------------------------------------------------------------------------------


@case(ALL)
def test_remap_moves_the_registration(kind: Kind) -> None:
    """Told before the old place's unmapping; faults come from the new place."""
    memory = populated(kind, CHANGES)
    to = aligned_place(memory.size_bytes)
    thread = Calling(libc.mremap, memory.address, memory.size_bytes, memory.size_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to)
    seen = []
    while thread.is_alive():
        if memory.has_events(1):
            seen += memory.events()
    assert thread.ends() == to
    old = memory.address
    assert seen == [Remap(old, to, memory.size_bytes), Unmap(old, old + memory.size_bytes)]
    assert byte_at(to) == 1
    memory.address = to
    discard = discarding(memory, MADV_DONTNEED)
    assert memory.events() == [Remove(memory.at(1), memory.at(3))]
    assert discard.ends() == 0
    memory.fault(1)


@case(ALL)
def test_remap_without_the_feature_ends_the_registration(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    to = aligned_place(memory.size_bytes)
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    assert libc.mremap(memory.address, memory.size_bytes, memory.size_bytes, flags, to) == to
    assert Touch(to).ends() == 0
    assert memory.events() == []


@case(ALL)
def test_unmap(kind: Kind) -> None:
    """The rest stays registered; a fill of what is gone says so."""
    memory = Memory(kind)
    memory.open(CHANGES)
    memory.register(Mode.MISSING)
    thread = Calling(call, libc.munmap, memory.at(1), memory.page_bytes)
    assert memory.next_event() == Unmap(memory.at(1), memory.at(2))
    assert thread.ends() == 0
    gone = memory.copy(1, 7)
    assert (gone.outcome, gone.field) == (Outcome.RANGE_GONE, -errno.ENOENT)
    across = memory.copy(0, 7, 2)
    assert (across.outcome, across.bytes_done) == (Outcome.RANGE_GONE, 0)
    assert memory.copy(0, 7)
