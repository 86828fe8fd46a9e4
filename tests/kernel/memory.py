"""Memory of five kinds, a userfaultfd over it, threads and processes that touch it. Used in a case's own process only (cases.py).

ctypes gives up the GIL around each call of libc, so a thread here may wait in a page fault while this interpreter handles it.
Whether a thread waits in a fault or was woken is read from /proc/self/task/TID/syscall: "-1" is asleep outside of any system
call, which is a page fault and nothing else. The waker changes that before its ioctl returns, so "it was not woken" is read
once and needs no waiting.
"""

import ctypes
import mmap
import os
import re
import select
import sys
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from migrate.uffd import Event, Feature, Filled, Ioctl, Mode, PageFault, PageFaultFlag, Userfaultfd

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

PROT_READ, PROT_WRITE = mmap.PROT_READ, mmap.PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
MADV_DONTNEED, MADV_REMOVE = mmap.MADV_DONTNEED, mmap.MADV_REMOVE
MADV_HUGEPAGE, MADV_NOHUGEPAGE = mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE
# Those that Python 3.11 has no name for: include/uapi/asm-generic/mman-common.h, linux/mman.h, linux/falloc.h
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
MADV_PAGEOUT, MADV_COLLAPSE = 21, 25
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
NO_FEATURES = Feature(0)
SMALL_PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
PAGES = 4
UFFD_WP_BIT = 57  # of a pagemap entry: Documentation/admin-guide/mm/pagemap.rst


class Kind(StrEnum):
    """The names are those of the kernel's own tests."""

    ANON = "anon"
    SHMEM = "shmem"
    SHMEM_PRIVATE = "shmem-private"
    HUGETLB = "hugetlb"
    HUGETLB_PRIVATE = "hugetlb-private"

    @property
    def is_hugetlb(self) -> bool:
        return self in (Kind.HUGETLB, Kind.HUGETLB_PRIVATE)

    @property
    def is_shared(self) -> bool:
        return self in (Kind.SHMEM, Kind.HUGETLB)


ANON, SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE = Kind
ALL = tuple(Kind)
FILES = (SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE)
SHARED = (SHMEM, HUGETLB)


def map_memory(
    size_bytes: int,
    flags: int,
    file: int = -1,
    protection: int = PROT_READ | PROT_WRITE,
    at: int | None = None,
    offset_bytes: int = 0,
) -> int:
    """The address. Raises OSError."""
    address = libc.mmap(at, size_bytes, protection, flags | (MAP_FIXED if at else 0), file, offset_bytes)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def aligned_place(size_bytes: int) -> int:
    """Address space at a multiple of 2 MiB, reserved and not accessible: to be mapped over."""
    anywhere = map_memory(size_bytes + HUGE_PAGE_BYTES, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, protection=0)
    return -(-anywhere // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def call(function: Callable[..., int], *arguments: object) -> int:
    """0, or the errno of a libc call that says -1."""
    return ctypes.get_errno() if function(*arguments) == -1 else 0


def byte_at(address: int) -> int:
    """Read by this thread: of memory that is mapped."""
    byte = ctypes.create_string_buffer(1)
    libc.memcpy(byte, address, 1)
    return byte.raw[0]


class Touch(threading.Thread):
    """A thread that reads a byte, or writes one and reads it, and keeps what it ``seen``."""

    def __init__(self, address: int, value: int | None = None) -> None:
        super().__init__(daemon=True)
        self.address, self.value, self.seen = address, value, -1
        self.start()

    def run(self) -> None:
        if self.value is not None:
            libc.memset(self.address, self.value, 1)
        self.seen = byte_at(self.address)

    @property
    def waits(self) -> bool:
        """In a page fault, woken by nobody. After its event was read: before, it may not have come so far."""
        try:
            return Path(f"/proc/self/task/{self.native_id}/syscall").read_text().startswith("-1 ")
        except (FileNotFoundError, ProcessLookupError):
            return False  # it has ended

    def ends(self) -> int:
        """Waited for; the byte seen."""
        self.join()
        return self.seen


class Calling(threading.Thread):
    """A thread in a call that blocks until its event is read; ``ends()`` gives what it returned."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.result: Any = None
        self.start()

    def run(self) -> None:
        self.result = self.function(*self.arguments)

    def ends(self) -> Any:
        self.join()
        return self.result


class Memory:
    """PAGES pages of a kind, nothing touched, nothing registered. ``alias``: the same file mapped shared, never registered."""

    userfaultfd: Userfaultfd

    def __init__(self, kind: Kind, pages: int = PAGES) -> None:
        self.kind, self.pages = kind, pages
        self.page_bytes = HUGE_PAGE_BYTES if kind.is_hugetlb else SMALL_PAGE_BYTES
        self.size_bytes = pages * self.page_bytes
        self.file = self.alias = -1
        place = aligned_place(self.size_bytes)
        if kind is ANON:
            self.address = map_memory(self.size_bytes, MAP_PRIVATE | MAP_ANONYMOUS, at=place)
            return
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if kind.is_hugetlb else 0)
        self.file = os.memfd_create("case", flags)
        os.ftruncate(self.file, self.size_bytes)
        self.address = map_memory(self.size_bytes, MAP_SHARED if kind.is_shared else MAP_PRIVATE, self.file, at=place)
        self.alias = map_memory(self.size_bytes, MAP_SHARED, self.file)

    def at(self, page: int) -> int:
        return self.address + page * self.page_bytes

    # --- the userfaultfd --------------------------------------------------------------------------------------------

    def open(self, features: Feature = NO_FEATURES, *, user_mode_only: bool | None = None) -> None:
        self.userfaultfd = Userfaultfd.open(features, user_mode_only=user_mode_only)

    def register(self, modes: Mode) -> Ioctl:
        return self.userfaultfd.register(self.address, self.size_bytes, modes)

    def unregister(self) -> None:
        self.userfaultfd.unregister(self.address, self.size_bytes)

    def events(self) -> list[Event]:
        """Those that are there now."""
        return self.userfaultfd.read_events()

    def next_event(self) -> Event:
        """Waited for; it is the only one."""
        self.wait_for_events()
        [event] = self.events()
        return event

    def wait_for_events(self) -> None:
        poll = select.poll()
        poll.register(self.userfaultfd.fileno(), select.POLLIN)
        [(_, revents)] = poll.poll()
        assert revents == select.POLLIN

    def next_flags(self) -> PageFaultFlag:
        """Of the fault that is the next event."""
        event = self.next_event()
        assert isinstance(event, PageFault)
        return event.flags

    def has_events(self, timeout_ms: int = 0) -> bool:
        poll = select.poll()
        poll.register(self.userfaultfd.fileno(), select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def pending_faults(self) -> int:
        """Faults that nobody has read (userfaultfd_show_fdinfo in fs/userfaultfd.c)."""
        info = Path(f"/proc/self/fdinfo/{self.userfaultfd.fileno()}").read_text()
        [line] = re.findall(r"^pending:\s+(\d+)$", info, re.MULTILINE)
        return int(line)

    @property
    def all_modes(self) -> Mode:
        """Of absent pages."""
        return Mode.MISSING if self.kind is ANON else Mode.MISSING | Mode.MINOR

    def modes_that_work(self) -> Mode:
        """Tried, on pages 0 to 2, which nothing has touched."""
        tried = [Mode.MISSING] if self._has_event(self.touch(0), PageFaultFlag(0)) else []
        if self.kind is not ANON:
            self.put(1, 1)
            tried += [Mode.MINOR] if self._has_event(self.touch(1), PageFaultFlag.MINOR) else []
        assert self.copy(2, 1)
        if self.protect(2):
            tried += [Mode.WP] if self._has_event(self.touch(2, 2), PageFaultFlag.WP | PageFaultFlag.WRITE) else []
        return Mode(sum(tried))

    def _has_event(self, touch: "Touch", flags: PageFaultFlag) -> bool:
        """Whether the touch waits with such an event, or came through with none. It is left waiting."""
        while touch.is_alive() and not self.has_events(1):
            pass
        events = self.events()
        assert events in ([], [PageFault(touch.address, flags, None)])
        return bool(events)

    def continue_(self, page: int, count: int = 1, **modes: bool) -> Filled:
        return self.userfaultfd.continue_(self.at(page), count * self.page_bytes, **modes)

    def copy(self, page: int, value: int, count: int = 1, **modes: bool) -> Filled:
        """Pages that hold ``value`` in every byte."""
        source = map_memory(count * self.page_bytes, MAP_PRIVATE | MAP_ANONYMOUS)
        libc.memset(source, value, count * self.page_bytes)
        filled = self.userfaultfd.copy(self.at(page), source, count * self.page_bytes, **modes)
        libc.munmap(source, count * self.page_bytes)
        return filled

    def zeropage(self, page: int, count: int = 1, **modes: bool) -> Filled:
        return self.userfaultfd.zeropage(self.at(page), count * self.page_bytes, **modes)

    def poison(self, page: int, count: int = 1, **modes: bool) -> Filled:
        return self.userfaultfd.poison(self.at(page), count * self.page_bytes, **modes)

    def protect(self, page: int, count: int = 1) -> Filled:
        return self.userfaultfd.writeprotect(self.at(page), count * self.page_bytes, protect=True)

    def unprotect(self, page: int, count: int = 1, **modes: bool) -> Filled:
        return self.userfaultfd.writeprotect(self.at(page), count * self.page_bytes, protect=False, **modes)

    def wake(self, page: int) -> None:
        self.userfaultfd.wake(self.at(page), self.page_bytes)

    # --- touching ---------------------------------------------------------------------------------------------------

    def put(self, page: int, value: int) -> None:
        """Into the file, by the alias: what a daemon does when a page has arrived."""
        libc.memset(self.alias + page * self.page_bytes, value, self.page_bytes)

    def in_file(self, page: int) -> int:
        """The byte that the file has there; a hole reads 0."""
        return os.pread(self.file, 1, page * self.page_bytes)[0]

    def touch(self, page: int, value: int | None = None) -> Touch:
        """A thread that reads the first byte of a page, or writes it."""
        return Touch(self.at(page), value)

    def fault(self, page: int, value: int | None = None) -> tuple[Touch, PageFaultFlag]:
        """A touch whose event has been read: the flags that it had."""
        touch = self.touch(page, value)
        event = self.next_event()
        assert isinstance(event, PageFault)
        assert event.address == self.at(page)
        return touch, event.flags

    def advise(self, page: int, advice: int, count: int = 1) -> int:
        """madvise(2) by this thread; its errno or 0."""
        return call(libc.madvise, self.at(page), count * self.page_bytes, advice)

    def punch_hole(self, page: int) -> None:
        where = (page * self.page_bytes, self.page_bytes)
        assert call(libc.fallocate, self.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, *where) == 0

    def is_protected(self, page: int, pid: int | str = "self") -> bool:
        """The uffd-wp bit of the page's entry in the page table of a process."""
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            entry = os.pread(pagemap.fileno(), 8, self.at(page) // SMALL_PAGE_BYTES * 8)
        return bool(int.from_bytes(entry, sys.byteorder) >> UFFD_WP_BIT & 1)


class Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("address", ctypes.c_void_p), ("size_bytes", ctypes.c_size_t)]


def kernel_reads(address: int) -> tuple[int, int]:
    """One byte read by the kernel on our behalf (process_vm_readv(2) of ourselves): its errno or 0, and the byte."""
    byte = ctypes.create_string_buffer(1)
    here, there = Piece(ctypes.addressof(byte), 1), Piece(address, 1)
    got = libc.process_vm_readv(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return (ctypes.get_errno(), -1) if got == -1 else (0, byte.raw[0])


def kernel_writes(address: int) -> int:
    """One byte written by the kernel on our behalf: its errno or 0."""
    byte = ctypes.create_string_buffer(b"x", 1)
    here, there = Piece(ctypes.addressof(byte), 1), Piece(address, 1)
    return call(libc.process_vm_writev, os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
