"""Regions of guest memory as a daemon accepts them: descriptors checked before anything is mapped or read."""

import ctypes
import fcntl
import itertools
import os
from collections.abc import Sequence

from migrate.dataplane import MemoryRegion
from migrate.errors import GuestRefusedError
from proto.messages import GuestRegion, OfferedRegion

TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6


class _Statfs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("f_bsize", ctypes.c_long), ("rest", ctypes.c_char * 256))


_libc = ctypes.CDLL(None, use_errno=True)


def _filesystem(descriptor: int) -> tuple[int, int]:
    """(f_type, f_bsize); Python's os.statvfs has no type."""
    result = _Statfs()
    if _libc.fstatfs(descriptor, ctypes.byref(result)) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs")
    return result.f_type & 0xFFFFFFFF, result.f_bsize


def is_memory_file(descriptor: int) -> bool:
    """Whether guest memory may lie in it: tmpfs (memfd) or hugetlbfs. Raises OSError."""
    return _filesystem(descriptor)[0] in (TMPFS_MAGIC, HUGETLBFS_MAGIC)


def check_regions(regions: Sequence[GuestRegion], memory_files: Sequence[int]) -> list[MemoryRegion]:
    """What the data plane may use. Raises GuestRefusedError naming the region and what is wrong with it."""
    checked: list[MemoryRegion] = []
    for index, region in enumerate(regions):
        where = f"region {index}"
        if region.memory_file >= len(memory_files):
            raise GuestRefusedError(f"{where} memory_file", expected=f"< {len(memory_files)}", got=region.memory_file)
        descriptor = memory_files[region.memory_file]
        kind, block_bytes = _filesystem(descriptor)
        if kind not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
            raise GuestRefusedError(
                f"{where} memory file", expected="a file on tmpfs (memfd) or hugetlbfs", got=f"filesystem {kind:#x}"
            )
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) != os.O_RDWR:
            raise GuestRefusedError(f"{where} memory file", expected="open for reading and writing", got="less")
        expected_page_bytes = block_bytes if kind == HUGETLBFS_MAGIC else 4096
        if region.page_bytes != expected_page_bytes:
            raise GuestRefusedError(f"{where} page_bytes", expected=expected_page_bytes, got=region.page_bytes)
        if region.page_bytes > 2 << 20:
            raise GuestRefusedError(
                f"{where} page_bytes", expected="4096 or 2097152 (larger pages are not handled yet)", got=region.page_bytes
            )
        misaligned = (region.size_bytes | region.offset_bytes | region.guest_address) % region.page_bytes
        if misaligned:
            raise GuestRefusedError(f"{where}", expected="address, offset and size in whole pages", got=region.model_dump())
        file_bytes = os.fstat(descriptor).st_size
        if region.offset_bytes + region.size_bytes > file_bytes:
            raise GuestRefusedError(
                f"{where} end", expected=f"<= {file_bytes} bytes, the file's size", got=region.offset_bytes + region.size_bytes
            )
        checked.append(MemoryRegion(region.guest_address, region.size_bytes, region.offset_bytes, region.page_bytes, descriptor))
    _check_overlap(regions)
    return checked


def _check_overlap(regions: Sequence[GuestRegion]) -> None:
    by_address = sorted(regions, key=lambda region: region.guest_address)
    by_file = sorted(regions, key=lambda region: (region.memory_file, region.offset_bytes))
    for first, second in itertools.pairwise(by_address):
        if first.guest_address + first.size_bytes > second.guest_address:
            raise GuestRefusedError(
                "regions", expected="ranges of addresses that do not overlap", got=f"{second.guest_address:#x} twice"
            )
    for first, second in itertools.pairwise(by_file):
        if first.memory_file == second.memory_file and first.offset_bytes + first.size_bytes > second.offset_bytes:
            raise GuestRefusedError(
                "regions", expected="ranges of a memory file that do not overlap", got=f"{second.offset_bytes} twice"
            )


def populated_bytes(regions: Sequence[MemoryRegion]) -> list[int]:
    """Of each, what has been written or read at most: swapped pages count (st_blocks of shmem has them), holes do not.

    A file may hold more than the region. A hugetlbfs region needs all of its pages, whatever they hold: room.c.
    """
    return [
        region.size_bytes if region.page_bytes > 4096 else min(region.size_bytes, os.fstat(region.memory_fd).st_blocks * 512)
        for region in regions
    ]


def shape_of(regions: Sequence[GuestRegion] | Sequence[OfferedRegion]) -> list[tuple[int, int]]:
    """(size_bytes, page_bytes) of each region: what two guests must have alike."""
    return [(region.size_bytes, region.page_bytes) for region in regions]


def shape_text(shape: Sequence[tuple[int, int]]) -> str:
    return " + ".join(f"{size_bytes >> 20} MiB of {page_bytes >> 10} KiB pages" for size_bytes, page_bytes in shape)


def fit_text(shape: Sequence[tuple[int, int]], machine: str | None) -> str:
    """What another guest must have alike: its regions, and what it says to be."""
    return shape_text(shape) if machine is None else f"{shape_text(shape)}, {machine}"
