"""Memory files beside userfaultfd: what hugetlbfs lacks and reserves, what seals forbid, what locks tell apart."""

import errno
import fcntl
import os
import signal
import socket
import struct

import pytest

from migrate.host import POOL_2M
from migrate.uffd import Mode, Outcome, Userfaultfd

from .cases import case, dies_here
from .memory import (
    ALL,
    HUGE_PAGE_BYTES,
    HUGETLB,
    MADV_REMOVE,
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    SHARED,
    SHMEM,
    Kind,
    Memory,
    byte_at,
    call,
    kernel_writes,
    libc,
    map_memory,
)


def pool(name: str) -> int:
    return int((POOL_2M / name).read_text())


def unreserved_pages() -> int:
    return pool("free_hugepages") - pool("resv_hugepages")


def hugetlb_file(pages: int) -> int:
    file = os.memfd_create("case", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(file, pages * HUGE_PAGE_BYTES)
    return file


@case([HUGETLB])
def test_hugetlbfs_is_read_and_not_written(kind: Kind) -> None:
    """pread(2) works, a hole reads as zeroes; pwrite(2) is EINVAL."""
    memory = Memory(kind)
    with pytest.raises(OSError, match="Invalid argument"):
        os.pwrite(memory.file, b"x", 0)
    assert memory.in_file(0) == 0


@case([HUGETLB])
def test_two_mappings_reserve_once(kind: Kind) -> None:
    """A file's pages, not a mapping's: half of the pool and more can be mapped twice, two such files cannot."""
    pages = unreserved_pages() // 2 + 1
    file = hugetlb_file(pages)
    for _ in range(2):
        map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, file)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, hugetlb_file(pages))


@case([HUGETLB], dies_of=signal.SIGBUS)
def test_hole_punched_loses_its_reservation(kind: Kind) -> None:
    """Somebody else takes the page: the next touch is SIGBUS."""
    pages = unreserved_pages()
    file = hugetlb_file(pages)
    address = map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, file)
    libc.memset(address, 1, 1)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        map_memory(HUGE_PAGE_BYTES, MAP_SHARED, hugetlb_file(1))
    assert libc.madvise(address, HUGE_PAGE_BYTES, MADV_REMOVE) == 0
    libc.memset(map_memory(HUGE_PAGE_BYTES, MAP_SHARED, hugetlb_file(1)), 1, 1)
    dies_here()
    byte_at(address)


@case([HUGETLB])
def test_mapping_reserves_what_a_file_lacks(kind: Kind) -> None:
    """For the file, which keeps it when the mapping goes: of one that had no reservation, and of one that a punch took it from.
    fallocate(2) then takes the pages that are reserved, although no other is left."""
    before, pages = unreserved_pages(), 4
    file = hugetlb_file(pages)
    map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED | MAP_NORESERVE, file)
    for _ in range(2):
        assert unreserved_pages() == before
        address = map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, file)
        assert libc.munmap(address, pages * HUGE_PAGE_BYTES) == 0
        assert unreserved_pages() == before - pages
        os.posix_fallocate(file, 0, pages * HUGE_PAGE_BYTES)
        assert unreserved_pages() == before - pages
        assert libc.fallocate(file, 3, 0, pages * HUGE_PAGE_BYTES) == 0  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, file)
    map_memory(unreserved_pages() * HUGE_PAGE_BYTES, MAP_SHARED, hugetlb_file(unreserved_pages()))
    os.posix_fallocate(file, 0, pages * HUGE_PAGE_BYTES)


def without_reservation() -> int:
    """The address of a page of hugetlbfs for which none is left: all are reserved for another file."""
    pages = unreserved_pages()
    map_memory(pages * HUGE_PAGE_BYTES, MAP_SHARED, hugetlb_file(pages))
    return map_memory(HUGE_PAGE_BYTES, MAP_SHARED | MAP_NORESERVE, hugetlb_file(1))


@case([HUGETLB])
def test_without_a_huge_page_receiving_is_efault(kind: Kind) -> None:
    """What a daemon sees of a guest mapped MAP_NORESERVE: recv(2) and process_vm_writev(2) fail, nothing is killed."""
    address = without_reservation()
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    assert call(libc.recv, ours.fileno(), address, 1, 0) == errno.EFAULT
    assert kernel_writes(address) == errno.EFAULT


@case([HUGETLB])
def test_without_a_huge_page_filling_misleads(kind: Kind) -> None:
    """COPY says EEXIST where there is nothing (hugetlb_mfill_atomic_pte in mm/hugetlb.c looks for a place in the page table
    when it finds no page): who takes that for success and wakes makes the thread fault for ever. fallocate(2) says ENOSPC."""
    address = without_reservation()
    source = map_memory(HUGE_PAGE_BYTES, MAP_PRIVATE | MAP_ANONYMOUS)
    libc.memset(source, 7, HUGE_PAGE_BYTES)
    with Userfaultfd.open() as userfaultfd:
        userfaultfd.register(address, HUGE_PAGE_BYTES, Mode.MISSING)
        assert userfaultfd.copy(address, source, HUGE_PAGE_BYTES).outcome is Outcome.ALREADY_MAPPED
    assert kernel_writes(address) == errno.EFAULT
    with pytest.raises(OSError, match="No space left on device"):
        os.posix_fallocate(hugetlb_file(1), 0, HUGE_PAGE_BYTES)


@case([HUGETLB], dies_of=signal.SIGBUS)
def test_without_a_huge_page_touching_is_sigbus(kind: Kind) -> None:
    address = without_reservation()
    dies_here()
    libc.memset(address, 1, 1)


@case(SHARED)
def test_seals_keep_the_old_mapping_writable(kind: Kind) -> None:
    """Set after it was mapped, F_SEAL_FUTURE_WRITE leaves the file to who has it: others read, and no more."""
    memory = Memory(kind)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10 | fcntl.F_SEAL_SEAL  # 0x10: F_SEAL_FUTURE_WRITE
    fcntl.fcntl(memory.file, fcntl.F_ADD_SEALS, seals)
    libc.memset(memory.at(0), 7, 1)
    assert memory.in_file(0) == 7
    assert byte_at(map_memory(memory.size_bytes, MAP_SHARED, memory.file, protection=1)) == 7
    assert byte_at(map_memory(memory.size_bytes, MAP_PRIVATE, memory.file)) == 7
    forbidden = [
        lambda: map_memory(memory.size_bytes, MAP_SHARED, memory.file),
        lambda: os.ftruncate(memory.file, memory.page_bytes),
        lambda: os.ftruncate(memory.file, 2 * memory.size_bytes),
        lambda: fcntl.fcntl(memory.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ]
    if kind is SHMEM:
        forbidden.append(lambda: os.pwrite(memory.file, b"x", 0) and None)
    for one in forbidden:
        with pytest.raises(PermissionError):
            one()
    with pytest.raises(AssertionError):
        memory.punch_hole(0)
    assert byte_at(memory.at(0)) == 7


@case(SHARED)
def test_sealed_against_shrinking_it_still_takes_holes(kind: Kind) -> None:
    """F_SEAL_SHRINK alone keeps the size, not the content."""
    memory = Memory(kind)
    fcntl.fcntl(memory.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.file, memory.page_bytes)
    memory.put(0, 7)
    memory.punch_hole(0)
    assert memory.in_file(0) == 0


@case([kind for kind in ALL if kind in SHARED])
def test_lock_of_a_process_and_of_a_description(kind: Kind) -> None:
    """F_SETLK keeps a second process out even through the very same description; F_OFD_SETLK belongs to that, and does not."""
    memory = Memory(kind)
    whole = struct.pack("=hhiqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0, 0)

    def locked_out(command: int) -> bool:
        fcntl.fcntl(memory.file, command, whole)
        child = os.fork()
        if child == 0:
            try:
                fcntl.fcntl(memory.file, command, whole)
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (errno.EAGAIN, errno.EACCES)

    assert locked_out(fcntl.F_SETLK)
    memory = Memory(kind)
    assert not locked_out(fcntl.F_OFD_SETLK)
