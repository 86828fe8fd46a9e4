"""Guest memory: memory files (memfd, tmpfs, hugetlbfs) mapped side by side in one range of addresses.

Nothing here touches a page: a page mapped before it is registered would never fault.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from migrate import uffd
from migrate.errors import HostLacksError, PostcopyError
from migrate.guest._guest import ffi, lib
from migrate.guest.tracking import WriteTracking
from migrate.host import hugepages, sentences
from proto.messages import GuestRegion

PAGE_BYTES_OF_KIND: dict[str, Literal[4096, 2097152, 1073741824]] = {
    "memfd": 4096,
    "tmpfs": 4096,
    "hugetlb": 2097152,
    "hugetlb-1g": 1073741824,
}
_HUGETLB_FLAGS = {"hugetlb": os.MFD_HUGETLB | os.MFD_HUGE_2MB, "hugetlb-1g": os.MFD_HUGETLB | os.MFD_HUGE_1GB}
_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SPEC = re.compile(r"(\d+)([KMGT]?)(?:iB)?(?::([a-z0-9-]+))?", re.ASCII)
REGION_BYTES_MAX = 1 << 50  # of the wire (proto/messages.py)


def size_bytes_of(text: str) -> int:
    """``64M``. Raises PostcopyError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:iB)?", text, re.ASCII)
    if match is None:
        raise PostcopyError("size", expected="SIZE[K|M|G|T], such as 64M", got=text, code="usage")
    return int(match[1]) * _SUFFIX[match[2]]


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """One region as a user asks for it: ``512M``, ``1G:hugetlb``, ``64M:tmpfs``."""

    size_bytes: int
    kind: str

    @property
    def is_hugetlb(self) -> bool:
        return self.kind in _HUGETLB_FLAGS

    @classmethod
    def parse(cls, text: str) -> "MemorySpec":
        match = _SPEC.fullmatch(text)
        kind = (match and match[3]) or "memfd"
        if match is None or kind not in PAGE_BYTES_OF_KIND:
            raise PostcopyError(
                "memory",
                expected="SIZE[K|M|G|T][:memfd|:tmpfs|:hugetlb|:hugetlb-1g], such as 512M or 1G:hugetlb",
                got=text,
                code="usage",
            )
        size_bytes = int(match[1]) * _SUFFIX[match[2]]
        page_bytes = PAGE_BYTES_OF_KIND[kind]
        if size_bytes == 0 or size_bytes % page_bytes or size_bytes > REGION_BYTES_MAX:
            expected = f"a whole number of {page_bytes}-byte pages, {REGION_BYTES_MAX >> 40}T at most"
            raise PostcopyError(f"memory of kind {kind}", expected=expected, got=text, code="usage")
        return cls(size_bytes, kind)


def _memory_file(spec: MemorySpec) -> int:
    if spec.kind == "tmpfs":
        descriptor, path = tempfile.mkstemp(prefix="postcopy-", dir="/dev/shm")
        os.unlink(path)
    else:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _HUGETLB_FLAGS.get(spec.kind, 0)
        descriptor = os.memfd_create("postcopy-guest", flags)
    os.ftruncate(descriptor, spec.size_bytes)
    return descriptor


def _refused(spec: MemorySpec, error_number: int) -> tuple[str, str, str]:
    """What is lacking, why, and the remedy, when a memory file could not be mapped."""
    pool = hugepages.pool(PAGE_BYTES_OF_KIND[spec.kind]) if spec.is_hugetlb else None
    if error_number == errno.ENOMEM and pool is not None:
        pages = spec.size_bytes // pool.page_bytes
        return "hugetlbfs memory", *sentences.hugepages_missing(pages, pool)
    return "guest memory", *sentences.address_space_refused(spec.size_bytes, error_number)


class GuestMemory:
    """Memory files and their mapping. Raises HostLacksError when hugetlbfs has too few free pages."""

    def __init__(self, specs: Sequence[MemorySpec]) -> None:
        self.specs = tuple(specs)
        self.size_bytes = sum(spec.size_bytes for spec in specs)
        self.files: list[int] = []
        self.regions: list[GuestRegion] = []
        self._address = lib.mapping_reserve(self.size_bytes)
        if self._address == ffi.NULL:
            raise HostLacksError("guest memory", *sentences.address_space_refused(self.size_bytes, ffi.errno))
        try:
            self._place_all()
        except BaseException:
            self.close()
            raise

    def _place_all(self) -> None:
        address = self.address
        for index, spec in enumerate(self.specs):
            page_bytes = PAGE_BYTES_OF_KIND[spec.kind]
            if address % page_bytes:
                raise PostcopyError("order of memory regions", expected="those of larger pages first", got=str(self.specs))
            self.files.append(_memory_file(spec))
            error_number = lib.mapping_place(ffi.cast("void *", address), spec.size_bytes, self.files[-1], 0)
            if error_number:
                raise HostLacksError(*_refused(spec, error_number))
            self.regions.append(
                GuestRegion(
                    guest_address=address, size_bytes=spec.size_bytes, offset_bytes=0, page_bytes=page_bytes, memory_file=index
                )
            )
            address += spec.size_bytes

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self._address))

    def register(self, *, remove_events: bool = False) -> int:
        """A new userfaultfd, registered MISSING|MINOR over every region; its owner closes it last (P3)."""
        hugetlb = any(spec.is_hugetlb for spec in self.specs)
        userfaultfd = uffd.open_for_postcopy(hugetlb=hugetlb, remove_events=remove_events)
        try:
            for region in self.regions:
                uffd.register_for_postcopy(userfaultfd, region.guest_address, region.size_bytes)
        except BaseException:
            userfaultfd.close()
            raise
        return userfaultfd.detach()

    def track(self) -> WriteTracking:
        """Raises HostLacksError, UserfaultfdError, OSError: then there is no precopy."""
        return WriteTracking(self.regions)

    def close(self) -> None:
        lib.mapping_release(self._address, self.size_bytes)
        for descriptor in self.files:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.files.clear()
