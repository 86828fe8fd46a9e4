"""Pages pinned for I/O, as vfio and vhost-user pin them: a fixed buffer of io_uring, long-term and writable.

By system calls and three shared mappings; no more than one operation at a time. Source: io_uring_setup(2),
io_uring_register(2) and include/uapi/linux/io_uring.h (the layouts are part of the kernel's binary interface).
"""

import ctypes
import os
import struct
from types import TracebackType
from typing import Self

from .memory import MAP_SHARED, Piece, libc, map_memory

SYS_IO_URING_SETUP, SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER = 425, 426, 427  # alike on all architectures
IORING_REGISTER_BUFFERS = 0
IORING_OP_READ_FIXED = 4
IORING_ENTER_GETEVENTS = 1
IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES = 0, 0x8000000, 0x10000000
PARAMETERS_BYTES, SQ_OFFSETS_AT, CQ_OFFSETS_AT = 120, 40, 80
ENTRY_BYTES, RING_BYTES = 64, 4096


def _system_call(number: int, *arguments: object) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


class Pinned:
    """[address, address + size_bytes) is pinned until the end of the block; what was absent is faulted in, to be written."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self._address, self._size_bytes = address, size_bytes
        self._parameters = ctypes.create_string_buffer(PARAMETERS_BYTES)
        self._ring = _system_call(SYS_IO_URING_SETUP, 1, self._parameters)
        _system_call(SYS_IO_URING_REGISTER, self._ring, IORING_REGISTER_BUFFERS, ctypes.byref(Piece(address, size_bytes)), 1)

    def read_into(self, file: int, size_bytes: int) -> None:
        """The device writes: the first bytes of a file into the pinned pages, past every page table."""
        sq = map_memory(RING_BYTES, MAP_SHARED, self._ring, offset_bytes=IORING_OFF_SQ_RING)
        cq = map_memory(RING_BYTES, MAP_SHARED, self._ring, offset_bytes=IORING_OFF_CQ_RING)
        entries = map_memory(RING_BYTES, MAP_SHARED, self._ring, offset_bytes=IORING_OFF_SQES)
        entry = struct.pack("=BBHiQQIiQH", IORING_OP_READ_FIXED, 0, 0, file, 0, self._address, size_bytes, 0, 0, 0)
        ctypes.memmove(entries, entry.ljust(ENTRY_BYTES, b"\0"), ENTRY_BYTES)
        _, tail_at, _, _, _, _, array_at = struct.unpack_from("=7I", self._parameters, SQ_OFFSETS_AT)
        ctypes.c_uint32.from_address(sq + array_at).value = 0
        ctypes.c_uint32.from_address(sq + tail_at).value += 1
        _system_call(SYS_IO_URING_ENTER, self._ring, 1, 1, IORING_ENTER_GETEVENTS, None, 0)
        *_, completions_at = struct.unpack_from("=6I", self._parameters, CQ_OFFSETS_AT)
        result = ctypes.c_int32.from_address(cq + completions_at + 8).value
        assert result == size_bytes, os.strerror(-result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        os.close(self._ring)
