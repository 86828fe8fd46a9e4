"""A process that has a fake guest's memory mapped: the test is its agent.

It does to the memory what the test asks for, a wait in a page fault is its own, and it can be killed while the memory file
lives on.
"""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from migrate import uffd
from migrate.guest._guest import ffi, lib
from migrate.guest.tracking import WriteTracking
from proto.messages import GuestRegion

PAGE_BYTES = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class MemoryChild:
    """A process that maps a region of a memory file at an address of its own, and passes one descriptor."""

    def __init__(self, file: int, region: GuestRegion, kind: "type[MappedMemory]") -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(10)
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(file, region, kind, theirs.fileno())
        theirs.close()
        said, descriptors, _, _ = socket.recv_fds(self._link, 100, 1)
        self.address = int(json.loads(said))
        [self.descriptor] = descriptors

    def does(self, what: str, *arguments: int) -> int:
        """Told, and done; what came of it."""
        self.begins(what, *arguments)
        return self.has_done()

    def begins(self, what: str, *arguments: int) -> None:
        self._link.sendall(json.dumps([what, *arguments]).encode())

    def has_done(self) -> int:
        answer = self._link.recv(100)
        assert answer, "the child has ended"
        return int(answer)

    def died_of(self) -> int:
        """The signal that has ended it, or is about to."""
        assert self._link.recv(100) == b"", "the child goes on"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.WTERMSIG(status)

    def kill(self) -> None:
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self.descriptor >= 0:
            self._link.close()
            os.close(self.descriptor)
            self.descriptor = -1


def _be_the_child(file: int, region: GuestRegion, kind: "type[MappedMemory]", link_fd: int) -> None:
    try:
        for name in os.listdir("/proc/self/fd"):  # what other peers hold open would never end otherwise
            if int(name) > 2 and int(name) not in (file, link_fd):
                with contextlib.suppress(OSError):
                    os.close(int(name))
        link = socket.socket(fileno=os.dup(link_fd))
        memory = kind(file, region)
        socket.send_fds(link, [json.dumps(memory.address).encode()], [memory.descriptor])
        while line := link.recv(100):
            what, *arguments = json.loads(line)
            action: Callable[..., int | None] = getattr(memory, what)
            link.sendall(str(action(*arguments) or 0).encode())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


class MappedMemory:
    """In the child: one region, mapped and not touched."""

    def __init__(self, file: int, region: GuestRegion) -> None:
        self._file, self.size_bytes = file, region.size_bytes
        pointer = lib.mapping_reserve(region.size_bytes)
        assert pointer != ffi.NULL
        assert lib.mapping_place(pointer, region.size_bytes, file, 0) == 0
        self.address = int(ffi.cast("uintptr_t", pointer))
        self._region = region.model_copy(update={"guest_address": self.address})
        self.descriptor = -1

    def write(self, page: int, byte: int) -> None:
        ctypes.memset(self.address + page * PAGE_BYTES, byte, PAGE_BYTES)

    def fill(self, byte: int) -> None:
        ctypes.memset(self.address, byte, self.size_bytes)

    def read(self, page: int) -> int:
        return int.from_bytes(ctypes.string_at(self.address + page * PAGE_BYTES, 8), "little")

    def drop(self, page: int) -> None:
        """Out of the page table, not out of the file."""
        assert libc.madvise(self.address + page * PAGE_BYTES, PAGE_BYTES, mmap.MADV_DONTNEED) == 0

    def split(self, page: int) -> int:
        """A mapping of its own, by a property that changes nothing else. How many its memory has then."""
        assert libc.madvise(self.address + page * PAGE_BYTES, PAGE_BYTES, mmap.MADV_DONTDUMP) == 0
        starts = [int(line.partition("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()]
        return sum(self.address <= start < self.address + self.size_bytes for start in starts)

    def unmap(self, first: int, page_count: int) -> None:
        assert libc.munmap(self.address + first * PAGE_BYTES, page_count * PAGE_BYTES) == 0

    def write_and_unmap(self, page: int) -> None:
        self.write(page, 2)
        self.unmap(page, 1)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._file, size_bytes)


class TrackedMemory(MappedMemory):
    """Its writes are seen: passes its pagemap."""

    def __init__(self, file: int, region: GuestRegion) -> None:
        super().__init__(file, region)
        self._tracking = WriteTracking([self._region])
        self.descriptor = self._tracking.pagemap_fd

    def unregister(self) -> None:
        self._tracking._userfaultfd.close()


class AwaitedMemory(MappedMemory):
    """Waits for a guest: passes its userfaultfd."""

    def __init__(self, file: int, region: GuestRegion) -> None:
        super().__init__(file, region)
        userfaultfd = uffd.open_for_postcopy(hugetlb=False)
        uffd.register_for_postcopy(userfaultfd, self.address, self.size_bytes)
        self.descriptor = userfaultfd.detach()
