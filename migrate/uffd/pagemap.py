"""PAGEMAP_SCAN: which pages of a process were written, atomically with protecting them again. Linux 6.7 and later.

Sources: Documentation/admin-guide/mm/pagemap.rst, pagemap_scan in fs/proc/task_mmu.c. Shown, with what it is blind to, in
tests/kernel/test_dirty_tracking.py.
"""

from dataclasses import dataclass
from enum import IntFlag

from migrate.uffd._uffd import ffi, lib
from migrate.uffd.errors import PagemapScanError


class Category(IntFlag):
    """PAGE_IS_*: what a page is."""

    WPALLOWED = lib.PAGE_IS_WPALLOWED  # in a range registered WP, on a userfaultfd with WP_ASYNC
    WRITTEN = lib.PAGE_IS_WRITTEN  # not write-protected: written since it was, or never protected
    FILE = lib.PAGE_IS_FILE
    PRESENT = lib.PAGE_IS_PRESENT
    SWAPPED = lib.PAGE_IS_SWAPPED
    PFNZERO = lib.PAGE_IS_PFNZERO  # the shared zero page
    HUGE = lib.PAGE_IS_HUGE
    SOFT_DIRTY = lib.PAGE_IS_SOFT_DIRTY
    GUARD = lib.PAGE_IS_GUARD  # 6.15


NOTHING = Category(0)


@dataclass(frozen=True, slots=True)
class Region:
    """[start, end) of pages that are alike in ``categories``, as far as return_mask asked."""

    start: int
    end: int
    categories: Category


@dataclass(frozen=True, slots=True)
class ScanResult:
    """``walk_end``: where the scan stopped; short of the range's end when max_pages or max_regions was reached."""

    regions: tuple[Region, ...]
    walk_end: int


def scan(
    pagemap_fd: int,
    start: int,
    end: int,
    *,
    category_mask: Category = NOTHING,
    category_inverted: Category = NOTHING,
    category_anyof_mask: Category = NOTHING,
    return_mask: Category = NOTHING,
    write_protect_matching: bool = False,
    check_wpasync: bool = False,
    max_pages: int = 0,
    max_regions: int = 512,
) -> ScanResult:
    """The pages of [start, end) that match, as regions in order of address.

    A page matches with all of ``category_mask`` and one of ``category_anyof_mask`` (if not empty), each bit first turned round
    that is in ``category_inverted``. ``write_protect_matching`` protects what matches in the same walk, page by page atomically;
    ``check_wpasync`` makes ranges that are not registered so an error, EPERM, instead of all written. ``max_pages`` 0: no bound.
    ``max_regions`` 0: nothing is returned, only protected. ``pagemap_fd`` is /proc/PID/pagemap, opened by or for who may.

    Raises PagemapScanError: EINVAL (address not page-aligned, unknown category), EPERM (not registered WP with WP_ASYNC),
    ENOTTY (Linux before 6.7, or not a pagemap), ESRCH (the process is gone).
    """
    vector, count = ffi.new("struct page_region[]", max(max_regions, 1)), ffi.new("uint64_t *")
    argument = ffi.new(
        "struct pm_scan_arg *",
        {
            "flags": (lib.PM_SCAN_WP_MATCHING if write_protect_matching else 0)
            | (lib.PM_SCAN_CHECK_WPASYNC if check_wpasync else 0),
            "start": start,
            "end": end,
            "vec": int(ffi.cast("uintptr_t", vector)) if max_regions else 0,
            "vec_len": max_regions,
            "max_pages": max_pages,
            "category_mask": category_mask,
            "category_inverted": category_inverted,
            "category_anyof_mask": category_anyof_mask,
            "return_mask": return_mask,
        },
    )
    error_number = lib.pagemap_scan(pagemap_fd, argument, count)
    if error_number:
        expected = "a pagemap of Linux 6.7 or later, page-aligned addresses" + (
            ", a range registered WP with WP_ASYNC" if check_wpasync or write_protect_matching else ""
        )
        raise PagemapScanError(f"PAGEMAP_SCAN of {start:#x} to {end:#x}", error_number, expected=expected)
    found = (vector[index] for index in range(count[0]))
    regions = tuple(Region(int(one.start), int(one.end), Category(one.categories)) for one in found)
    return ScanResult(regions, int(argument.walk_end))
