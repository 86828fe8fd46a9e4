"""fork(2) of a registered process, in each kind of memory: events, their descriptors, and what the child inherits."""

import errno
import os
import resource
import signal
from collections.abc import Callable

import pytest

from migrate.uffd import (
    Feature,
    Fork,
    Mode,
    PageFault,
    PageFaultFlag,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    UserfaultfdError,
    events,
)
from migrate.uffd import descriptor as descriptor_module

from .cases import case
from .guest import Guest, Told
from .memory import (
    ALL,
    MADV_DONTNEED,
    MADV_PAGEOUT,
    MADV_REMOVE,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGES,
    Kind,
    Memory,
    aligned_place,
    byte_at,
    kernel_reads,
    libc,
)
from .pinned import Pinned

WP = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
FORK = Feature.EVENT_FORK
MISSING = PageFaultFlag(0)


def in_a_child(body: Callable[[], int]) -> int:
    """Its exit status."""
    child = os.fork()
    if child == 0:
        os._exit(body())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def next_fork(memory: Memory) -> Fork:
    event = memory.next_event()
    assert isinstance(event, Fork)
    return event


def fork_and_touch(memory: Memory, _: Told) -> int:
    return in_a_child(lambda: byte_at(memory.at(0)))


# --- the event and its descriptor -----------------------------------------------------------------------------------


@case(ALL, requires=["root"])
def test_fork_waits_and_its_child_has_a_userfaultfd(kind: Kind) -> None:
    """Who reads the event gets the child's, with the features and flags of the parent's; it is as registered as the parent."""
    memory = Memory(kind)
    guest = Guest(memory, fork_and_touch, Mode.MISSING, FORK | Feature.THREAD_ID)
    with Userfaultfd.adopt(next_fork(memory).descriptor) as childs:
        assert childs.features == FORK | Feature.THREAD_ID
        assert not os.get_blocking(childs.fileno())
        assert not os.get_inheritable(childs.fileno())
        parents, memory.userfaultfd = memory.userfaultfd, childs
        event = memory.next_event()
        assert isinstance(event, PageFault)
        assert event.thread_id != guest.pid
        assert memory.copy(0, 7)
        assert guest.ends() == 7
    parents.close()


@case(ALL, requires=["root"])
def test_closing_the_childs_reads_zeroes(kind: Kind) -> None:
    memory = Memory(kind)
    guest = Guest(memory, fork_and_touch, Mode.MISSING, FORK)
    childs = Userfaultfd.adopt(next_fork(memory).descriptor)
    parents, memory.userfaultfd = memory.userfaultfd, childs
    assert memory.next_event() == PageFault(memory.at(0), MISSING, None)
    childs.close()
    assert guest.ends() == 0
    parents.close()


@case(requires=["root"])
def test_no_descriptor_left() -> None:
    """The event stays unread, and the fork waits: nothing is lost."""
    memory = Memory(Kind.SHMEM)
    guest = Guest(memory, fork_and_touch, Mode.MISSING, FORK)
    memory.wait_for_events()
    used = len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    kept = [os.dup(0) for _ in range(highest + 2 - used)]  # fill the gaps below
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    with pytest.raises(UserfaultfdError) as raised:
        memory.events()
    assert raised.value.error_number == errno.EMFILE
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for descriptor in kept:
        os.close(descriptor)
    os.close(next_fork(memory).descriptor)
    assert guest.ends() == 0


@case(requires=["root"])
def test_event_that_was_read_is_not_lost() -> None:
    """Something raises between the read and the caller (a signal's handler, memory): it comes first the next time."""
    memory = Memory(Kind.SHMEM)
    guest = Guest(memory, fork_and_touch, Mode.MISSING, FORK)
    memory.wait_for_events()

    def interrupted(message: object, features: Feature) -> events.Event:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descriptor_module, "event_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.events()
    [event] = memory.events()
    assert isinstance(event, Fork)
    os.close(event.descriptor)
    assert guest.ends() == 0


# --- write protection across fork -----------------------------------------------------------------------------------


@case(ALL, requires=["root", "uffd-wp"])
def test_child_inherits_protection_with_the_event_alone(kind: Kind) -> None:
    """Of a page that is mapped, and of one whose page table entry was taken away: a marker, or paged out."""
    for features, inherits in ((WP, False), (WP | FORK, True)):

        def forks(memory: Memory, told: Told) -> list[bool]:
            seen = []
            libc.memset(memory.at(0), 1, 1)
            told()
            seen.append(bool(in_a_child(lambda: memory.is_protected(0))))
            if memory.kind.is_shared:
                assert memory.advise(0, MADV_DONTNEED) == 0
            else:
                memory.advise(0, MADV_PAGEOUT)  # hugetlbfs has none
            seen.append(memory.is_protected(0))
            seen.append(bool(in_a_child(lambda: memory.is_protected(0))))
            told()
            seen.append(memory.is_protected(0))
            libc.memset(memory.at(0), 2, 1)
            return seen

        memory = Memory(kind)
        guest = Guest(memory, forks, Mode.WP, features)
        guest.stops()
        assert memory.protect(0)
        guest.tell()
        if inherits:
            childrens = [next_fork(memory) for _ in range(2)]  # kept open: closing one would lift the protection there
            assert len({fork.descriptor for fork in childrens}) == 2
        guest.stops()
        assert memory.unprotect(0)
        guest.tell()
        assert guest.ends() == [inherits, True, inherits, False]


@case(ALL, requires=["root", "uffd-wp", "io-uring"])
def test_pinned_pages_and_fork(kind: Kind) -> None:
    """A page pinned for I/O is copied at once for a child; one that a child shares is made its own when the child pins it to
    read. Neither changes what the child inherits."""
    for features, inherits in ((WP, False), (WP | FORK, True)):

        def forks(memory: Memory, told: Told) -> list[bool]:
            libc.memset(memory.at(0), 1, 1)
            with Pinned(memory.at(0), memory.page_bytes):
                told()
                early_copy = in_a_child(lambda: memory.is_protected(0))

            def pin_and_look() -> int:
                assert kernel_reads(memory.at(0)) == (0, 1)
                return memory.is_protected(0)

            return [bool(early_copy), bool(in_a_child(pin_and_look))]

        memory = Memory(kind)
        guest = Guest(memory, forks, Mode.WP, features)
        guest.stops()
        assert memory.protect(0)
        guest.tell()
        if inherits:
            childrens = [next_fork(memory) for _ in range(2)]  # kept open: closing one would lift the protection there
            assert len({fork.descriptor for fork in childrens}) == 2
        assert guest.ends() == [inherits, inherits]


@case(ALL, requires=["root", "uffd-wp"])
def test_sigbus_in_a_child(kind: Kind) -> None:
    """With the event the child is registered, and has no events but the signal."""

    def fork(memory: Memory, _: Told) -> int:
        return in_a_child(lambda: byte_at(memory.at(0)))

    for features, status in ((Feature.SIGBUS, 0), (Feature.SIGBUS | FORK, -signal.SIGBUS)):
        memory = Memory(kind)
        guest = Guest(memory, fork, Mode.MISSING, features)
        if FORK in features:
            with Userfaultfd.adopt(next_fork(memory).descriptor) as childs:
                assert guest.ends() == status
                assert childs.read_events() == []
        else:
            assert guest.ends() == status


# --- a guest that does it all ---------------------------------------------------------------------------------------


def wander(memory: Memory, told: Told) -> bytes:
    """In a child: half of the pages here, move the range, the other half there, discard all and look again."""
    reads, writes = os.pipe()

    def child() -> int:
        half = memory.pages // 2
        seen = [read_and_write(memory, page) for page in range(half)]
        to = aligned_place(memory.size_bytes)
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        assert libc.mremap(memory.address, memory.size_bytes, memory.size_bytes, flags, to) == to
        memory.address = to
        seen += [read_and_write(memory, page) for page in range(half, memory.pages)]
        assert memory.advise(0, MADV_REMOVE if memory.kind.is_shared else MADV_DONTNEED, memory.pages) == 0
        os.write(writes, bytes(seen + [byte_at(memory.at(page)) for page in range(memory.pages)]))
        return 0

    assert in_a_child(child) == 0
    return os.read(reads, 2 * memory.pages)


def read_and_write(memory: Memory, page: int) -> int:
    seen = byte_at(memory.at(page))
    libc.memset(memory.at(page), seen, 1)
    return seen


def follow(memory: Memory, wp: bool) -> dict[str, int]:
    """Handle the child's events to its end; how many there were of each. After a discard the range is let go."""
    seen = dict.fromkeys(("missing", "protected", "remap", "remove", "unmap"), 0)
    while not seen["remove"] or memory.has_events():
        memory.wait_for_events()
        for event in memory.events():
            match event:
                case PageFault(address, flags) if flags & PageFaultFlag.WP:
                    assert memory.userfaultfd.writeprotect(address, memory.page_bytes, protect=False)
                    seen["protected"] += 1
                case PageFault() if seen["remove"]:
                    pass  # it was on its way when the range was let go
                case PageFault(address):
                    page = (address - memory.address) // memory.page_bytes
                    assert memory.copy(page, page + 1, wp=wp)
                    seen["missing"] += 1
                case Remap(_, to):
                    memory.address = to
                    seen["remap"] += 1
                case Remove(start, end):
                    memory.userfaultfd.unregister(start, end - start)
                    memory.userfaultfd.wake(start, end - start)  # unregistering can miss one: see migrate/dataplane/resolve.c
                    seen["remove"] += 1
                case Unmap():
                    seen["unmap"] += 1
    return seen


@case(ALL, requires=["root", "uffd-wp"])
def test_guest_that_forks_moves_and_discards(kind: Kind) -> None:
    """Every page is asked for once, wherever it lies; with write protection each write once more."""
    changes = FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE
    for wp in (False, True):
        memory = Memory(kind)
        address = memory.address
        modes = Mode.MISSING | Mode.WP if wp else Mode.MISSING
        guest = Guest(memory, wander, modes, changes | WP if wp else changes)
        parents = memory.userfaultfd
        memory.userfaultfd = Userfaultfd.adopt(next_fork(memory).descriptor)
        seen = follow(memory, wp)
        assert guest.ends() == bytes([1, 2, 3, 4, 0, 0, 0, 0])
        assert seen == {"missing": PAGES, "protected": PAGES if wp else 0, "remap": 1, "remove": 1, "unmap": 0}
        assert memory.address != address
        memory.userfaultfd.close()
        parents.close()
