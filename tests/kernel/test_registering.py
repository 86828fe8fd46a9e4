"""What UFFDIO_REGISTER does and refuses, in each kind of memory."""

import errno
import itertools
import os
from collections.abc import Callable

import pytest

from migrate.uffd import Feature, Ioctl, Mode, PageFaultFlag, Userfaultfd, UserfaultfdError

from .cases import case
from .memory import (
    ALL,
    ANON,
    FILES,
    HUGETLB,
    HUGETLB_PRIVATE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    SHMEM,
    SHMEM_PRIVATE,
    SMALL_PAGE_BYTES,
    Kind,
    Memory,
    byte_at,
    libc,
    map_memory,
)

WP_EVERYWHERE = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
SMALL_IOCTLS = Ioctl.WAKE | Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.MOVE | Ioctl.POISON
HUGE_IOCTLS = Ioctl.WAKE | Ioctl.COPY | Ioctl.POISON


def refused(register: Callable[[], object]) -> int:
    """The errno."""
    try:
        register()
    except UserfaultfdError as error:
        return error.error_number
    raise AssertionError("registered")


@case(
    {ANON: SMALL_IOCTLS, SHMEM: SMALL_IOCTLS, SHMEM_PRIVATE: SMALL_IOCTLS, HUGETLB: HUGE_IOCTLS, HUGETLB_PRIVATE: HUGE_IOCTLS},
    requires=["uffd-wp", "uffd-poison", "uffd-move"],
)
def test_advertised_ioctls(kind: Kind, of_missing: Ioctl) -> None:
    """Every mode alone and with others. MINOR of anonymous memory is EINVAL, and so is no mode."""
    for modes in map(Mode, range(8)):
        memory = Memory(kind)
        memory.open(WP_EVERYWHERE)
        if not modes or (Mode.MINOR in modes and kind is ANON):
            assert refused(lambda: memory.register(modes)) == errno.EINVAL  # noqa: B023
            continue
        writeprotect = Ioctl.WRITEPROTECT if Mode.WP in modes else Ioctl(0)
        continue_ = Ioctl.CONTINUE if Mode.MINOR in modes else Ioctl(0)
        assert memory.register(modes) == of_missing | writeprotect | continue_


@case(FILES)
def test_minor_only_reads_zeroes_from_a_hole(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MINOR)
    assert memory.touch(0).ends() == 0  # it came through by itself
    assert memory.events() == []


@case(FILES)
def test_missing_only_reads_a_torn_page(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    libc.memset(memory.alias + 100, 7, 1)  # one byte of the page has arrived
    assert memory.touch(0).ends() == 0
    assert memory.events() == []


@case(FILES)
def test_torn_page_faults_as_minor(kind: Kind) -> None:
    """A minor fault says that there is a page, not that its content has arrived: that is our own state."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    libc.memset(memory.alias + 100, 7, 1)
    touch, flags = memory.fault(0)
    assert flags == PageFaultFlag.MINOR
    assert memory.continue_(0)
    assert touch.ends() == 0


@case(FILES)
def test_reading_the_alias_makes_a_fault_minor(kind: Kind) -> None:
    """Without any content: a read of another mapping puts a cleared page into the file."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING | Mode.MINOR)
    assert byte_at(memory.alias) == 0
    touch, flags = memory.fault(0)
    assert flags == PageFaultFlag.MINOR
    assert memory.continue_(0)
    assert touch.ends() == 0


@case(ALL)
def test_page_mapped_before_never_faults(kind: Kind) -> None:
    memory = Memory(kind)
    libc.memset(memory.at(0), 7, 1)
    memory.open()
    memory.register(memory.all_modes)
    assert memory.touch(0, 8).ends() == 8
    assert memory.events() == []


@case(ALL)
def test_second_userfaultfd_is_ebusy(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    with Userfaultfd.open() as other:
        assert refused(lambda: other.register(memory.address, memory.size_bytes, Mode.MISSING)) == errno.EBUSY


@case({SHMEM: errno.EPERM, SHMEM_PRIVATE: 0, HUGETLB: errno.EPERM, HUGETLB_PRIVATE: 0})
def test_shared_mapping_that_cannot_be_written(kind: Kind, error_number: int) -> None:
    """A fill would write to the file; a private mapping's fills are its own."""
    memory = Memory(kind)
    memory.open()
    file = os.open(f"/proc/self/fd/{memory.file}", os.O_RDONLY | os.O_CLOEXEC)
    address = map_memory(memory.size_bytes, MAP_SHARED if kind.is_shared else MAP_PRIVATE, file, PROT_READ)
    if error_number:
        assert refused(lambda: memory.userfaultfd.register(address, memory.size_bytes, Mode.MISSING)) == error_number
    else:
        memory.userfaultfd.register(address, memory.size_bytes, Mode.MISSING)


@case(ALL)
def test_address_and_size_are_whole_pages(kind: Kind) -> None:
    """Of hugetlbfs its own pages. The error says so."""
    memory = Memory(kind)
    memory.open()
    small = 1 if not kind.is_hugetlb else SMALL_PAGE_BYTES
    for address, size_bytes in (
        (memory.address + small, memory.page_bytes),
        (memory.address, memory.page_bytes + small),
        (memory.address, 0),
    ):
        with pytest.raises(UserfaultfdError) as raised:
            memory.userfaultfd.register(address, size_bytes, Mode.MISSING)
        assert raised.value.error_number == errno.EINVAL
        assert "page-aligned address and size_bytes > 0" in raised.value.expected
        assert f"{size_bytes} bytes at {address:#x}" in raised.value.what


@case(ALL, requires=["uffd-wp"])
def test_registering_a_subset_keeps_all_modes(kind: Kind) -> None:
    every = memory_modes = Mode.WP | Memory(kind).all_modes
    for count in (1, 2):
        for some in itertools.combinations(every, count):
            memory = Memory(kind)
            memory.open(WP_EVERYWHERE)
            memory.register(memory_modes)
            memory.register(Mode(sum(some)))
            assert memory.modes_that_work() == every


@case(ALL, requires=["uffd-wp"])
def test_registering_other_modes_replaces(kind: Kind) -> None:
    """WP is not contained in MISSING|MINOR: both are gone, and an absent page reads zeroes."""
    memory = Memory(kind)
    memory.open(WP_EVERYWHERE)
    memory.register(memory.all_modes)
    memory.register(Mode.WP)
    assert memory.modes_that_work() == Mode.WP


@case(FILES)
def test_registering_both_puts_minor_only_right(kind: Kind) -> None:
    """As a daemon does when a guest attaches."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MINOR)
    memory.register(Mode.MISSING | Mode.MINOR)
    assert memory.modes_that_work() == Mode.MISSING | Mode.MINOR


@case(ALL)
def test_registering_after_unregistering(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    memory.unregister()
    memory.register(memory.all_modes)
    assert memory.modes_that_work() == memory.all_modes


@case(ALL)
def test_range_that_is_not_mapped(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open()
    libc.munmap(memory.address, memory.size_bytes)
    assert refused(lambda: memory.register(Mode.MISSING)) == errno.EINVAL
    assert refused(memory.unregister) == errno.EINVAL
