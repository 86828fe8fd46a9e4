"""Parts of the kernel that only tests of the kernel ask for, finer than the product's features: by what a userfaultfd grants."""

import ctypes
import functools
import operator
import os
from pathlib import Path

from migrate.errors import HostLacksError, errno_text
from migrate.host.feature import Feature
from migrate.host.hugepages import HUGEPAGE_BYTES

THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_IO_URING_SETUP = 425  # alike on all architectures, and without a name in the C library
_IO_URING_PARAMS_BYTES = 120


def full_userfaultfd() -> Feature:
    from migrate.uffd import Userfaultfd

    try:
        Userfaultfd.open(user_mode_only=False).close()
    except HostLacksError as error:
        return Feature("uffd-full", False, error.why, error.remedy)
    return Feature("uffd-full", True, "a userfaultfd may take faults inside the kernel too")


def userfaultfd_with(name: str, *wanted: str) -> Feature:
    """``wanted``: members of migrate.uffd.Feature."""
    from migrate import uffd

    try:
        uffd.Userfaultfd.open(functools.reduce(operator.or_, (uffd.Feature[one] for one in wanted))).close()
    except HostLacksError as error:
        return Feature(name, False, error.why, error.remedy)
    return Feature(name, True, f"a userfaultfd has {', '.join(wanted)}")


def pagemap_scan() -> Feature:
    from migrate.uffd import PagemapScanError, pagemap

    with open("/proc/self/pagemap", "rb") as file:
        try:
            pagemap.scan(file.fileno(), 0, HUGEPAGE_BYTES, return_mask=pagemap.Category.PRESENT)
        except PagemapScanError as error:
            return Feature("pagemap-scan", False, f"PAGEMAP_SCAN: {error.got}", "run Linux 6.7 or later")
    return Feature("pagemap-scan", True, "/proc/PID/pagemap has PAGEMAP_SCAN")


def transparent_huge_pages() -> Feature:
    if not THP_ENABLED.exists() or "[never]" in THP_ENABLED.read_text():
        return Feature("thp", False, "madvise(MADV_HUGEPAGE) has no effect", f"echo madvise > {THP_ENABLED}")
    return Feature("thp", True, "anonymous memory can have 2 MiB pages")


def io_uring() -> Feature:
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES))
    if ring < 0:
        why = f"io_uring_setup: {errno_text(ctypes.get_errno())}"
        return Feature("io-uring", False, why, "sysctl kernel.io_uring_disabled=0, or allow it in the seccomp profile")
    os.close(ring)
    return Feature("io-uring", True, "pages can be pinned as I/O buffers")
