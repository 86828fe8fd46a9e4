"""How a registration ends, and what is left where pages were absent or poisoned: silent zeroes, most of the time."""

import errno
import os
import signal

from migrate.uffd import Feature, Mode, PageFault, PageFaultFlag, Userfaultfd

from .cases import case, dies_here
from .guest import Guest, Told
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MADV_DONTNEED,
    MAP_SHARED,
    SHMEM,
    SHMEM_PRIVATE,
    Kind,
    Memory,
    Touch,
    byte_at,
    kernel_reads,
    map_memory,
)

MISSING = PageFaultFlag(0)


def with_a_waiting_thread(kind: Kind) -> tuple[Memory, Touch]:
    memory = Memory(kind)
    memory.open()
    memory.register(memory.all_modes)
    touch, _ = memory.fault(0)
    assert touch.waits
    return memory, touch


@case(ALL)
def test_unregistering_wakes_and_reads_zeroes(kind: Kind) -> None:
    memory, touch = with_a_waiting_thread(kind)
    memory.unregister()
    assert touch.ends() == 0
    assert memory.touch(1).ends() == 0


@case(ALL, requires=["uffd-wp"])
def test_unregistering_without_missing_wakes_nobody(kind: Kind) -> None:
    """Who waits for a write-protected page goes on waiting: UFFDIO_WAKE works on the range that is not registered any more."""
    memory = Memory(kind)
    memory.open(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
    memory.register(Mode.WP)
    assert memory.touch(0, 7).ends() == 7
    assert memory.protect(0)
    touch, _ = memory.fault(0, 9)
    memory.unregister()
    assert touch.waits
    memory.wake(0)
    assert touch.ends() == 9


@case(FILES)
def test_unregistering_minor_alone_wakes_nobody(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MINOR)
    memory.put(0, 7)
    touch, _ = memory.fault(0)
    memory.unregister()
    assert touch.waits
    memory.wake(0)
    assert touch.ends() == 7


@case(ALL)
def test_closing_the_last_descriptor_reads_zeroes(kind: Kind) -> None:
    memory, touch = with_a_waiting_thread(kind)
    memory.userfaultfd.close()
    assert touch.ends() == 0
    assert memory.touch(1).ends() == 0


@case(ALL)
def test_duplicate_keeps_threads_waiting(kind: Kind) -> None:
    """Why a guest keeps one of its own."""
    memory, touch = with_a_waiting_thread(kind)
    kept = memory.userfaultfd.duplicate()
    memory.userfaultfd.close()
    assert touch.waits
    memory.userfaultfd = kept
    assert memory.copy(0, 7)
    assert touch.ends() == 7


@case(ALL)
def test_borrowed_one_stays_open(kind: Kind) -> None:
    memory, touch = with_a_waiting_thread(kind)
    with Userfaultfd.borrow(memory.userfaultfd.fileno()) as borrowed:
        assert borrowed.fileno() == memory.userfaultfd.fileno()
    assert touch.waits
    assert memory.copy(0, 7)
    assert touch.ends() == 7


@case(ALL)
def test_new_handler_takes_over(kind: Kind) -> None:
    """The handler that had read the fault is killed; the guest waits; the next one wakes it and is told again."""

    def touch(memory: Memory, told: Told) -> int:
        told()
        return byte_at(memory.at(0))

    memory = Memory(kind)
    guest = Guest(memory, touch, Mode.MISSING, Feature(0))
    guest.stops()
    handler = os.fork()
    if handler == 0:
        memory.wait_for_events()
        memory.events()
        os.kill(os.getpid(), signal.SIGKILL)
    guest.tell()
    os.waitpid(handler, 0)
    assert guest.waits_in_a_fault
    assert memory.events() == []
    memory.wake(0)
    assert memory.next_event() == PageFault(memory.at(0), MISSING, None)
    assert memory.copy(0, 7)
    assert guest.ends() == 7


@case(FILES)
def test_reads_past_the_mapping_tell_nothing(kind: Kind) -> None:
    """pread(2) of the file and another mapping: zeroes or what the file has, no event."""
    memory = Memory(kind)
    memory.open()
    memory.register(memory.all_modes)
    assert memory.in_file(0) == 0
    assert byte_at(memory.alias) == 0
    memory.put(1, 7)
    assert memory.in_file(1) == 7
    assert memory.events() == []


@case(ALL)
def test_fork_child_reads_zeroes(kind: Kind) -> None:
    """It is not registered (without EVENT_FORK)."""

    def fork(memory: Memory, told: Told) -> int:
        child = os.fork()
        if child == 0:
            os._exit(byte_at(memory.at(0)))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    memory = Memory(kind)
    guest = Guest(memory, fork, memory.all_modes, Feature(0))
    assert guest.ends() == 0
    assert memory.events() == []


# --- poison ---------------------------------------------------------------------------------------------------------


@case(ALL, requires=["uffd-poison"])
def test_poison_outlives_the_registration(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    assert memory.poison(0)
    memory.unregister()
    memory.userfaultfd.close()
    assert kernel_reads(memory.at(0)) == (errno.EFAULT, -1)


@case(ALL, requires=["uffd-poison"], dies_of=signal.SIGBUS)
def test_touch_of_poison_after_unregistering(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    assert memory.poison(0)
    memory.unregister()
    dies_here()
    byte_at(memory.at(0))


@case(ALL, requires=["uffd-poison"])
def test_dontneed_takes_poison_away(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    assert memory.poison(0)
    memory.unregister()
    assert memory.advise(0, MADV_DONTNEED) == 0
    assert byte_at(memory.at(0)) == 0


@case(FILES, requires=["uffd-poison"])
def test_poison_is_of_one_mapping(kind: Kind) -> None:
    """The file has a hole there: a second mapping and pread(2) give zeroes."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    assert memory.poison(0)
    assert byte_at(map_memory(memory.size_bytes, MAP_SHARED, memory.file)) == 0
    assert memory.in_file(0) == 0


@case(
    {ANON: errno.EFAULT, SHMEM: 0, SHMEM_PRIVATE: errno.EFAULT, HUGETLB: 0, HUGETLB_PRIVATE: errno.EFAULT},
    requires=["uffd-poison"],
)
def test_poison_in_a_fork_child(kind: Kind, error_number: int) -> None:
    """The page table of a shared mapping is not copied, and the poison with it: zeroes there."""

    def poison_and_fork(memory: Memory, told: Told) -> int:
        assert memory.poison(0)
        child = os.fork()
        if child == 0:
            os._exit(kernel_reads(memory.at(0))[0])
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    memory = Memory(kind)
    guest = Guest(memory, poison_and_fork, Mode.MISSING, Feature(0))
    assert guest.ends() == error_number
