"""The bits of the userfaultfd interface by name. Their values come from the compiler (cdef.txt, kernel.h), none is typed here.

Source: include/uapi/linux/userfaultfd.h. Bits that a newer kernel adds are kept as they are, without a name.
"""

from enum import IntFlag

from migrate.uffd._uffd import lib


class Feature(IntFlag):
    """UFFD_FEATURE_*: what UFFDIO_API is asked for, and what a kernel has."""

    PAGEFAULT_FLAG_WP = lib.UFFD_FEATURE_PAGEFAULT_FLAG_WP  # write-protect faults
    EVENT_FORK = lib.UFFD_FEATURE_EVENT_FORK  # needs CAP_SYS_PTRACE
    EVENT_REMAP = lib.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = lib.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = lib.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = lib.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = lib.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = lib.UFFD_FEATURE_SIGBUS  # no page fault events, a signal instead
    THREAD_ID = lib.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = lib.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = lib.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = lib.UFFD_FEATURE_EXACT_ADDRESS  # fault addresses are not masked to their page
    WP_HUGETLBFS_SHMEM = lib.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = lib.UFFD_FEATURE_WP_UNPOPULATED  # pages not there yet can be write-protected
    POISON = lib.UFFD_FEATURE_POISON
    WP_ASYNC = lib.UFFD_FEATURE_WP_ASYNC  # the kernel lifts protection itself; read by PAGEMAP_SCAN
    MOVE = lib.UFFD_FEATURE_MOVE

    def without(self, others: "Feature") -> "Feature":
        """Of bits that have no name here too: ``& ~others`` would lose them."""
        return Feature(int(self) & ~int(others))


RELEASES: dict[Feature, tuple[int, int]] = {
    Feature.PAGEFAULT_FLAG_WP: (5, 7),
    Feature.EVENT_FORK: (4, 11),
    Feature.EVENT_REMAP: (4, 11),
    Feature.EVENT_REMOVE: (4, 11),
    Feature.MISSING_HUGETLBFS: (4, 11),
    Feature.MISSING_SHMEM: (4, 11),
    Feature.EVENT_UNMAP: (4, 11),
    Feature.SIGBUS: (4, 14),
    Feature.THREAD_ID: (4, 14),
    Feature.MINOR_HUGETLBFS: (5, 13),
    Feature.MINOR_SHMEM: (5, 14),
    Feature.EXACT_ADDRESS: (5, 18),
    Feature.WP_HUGETLBFS_SHMEM: (5, 19),
    Feature.WP_UNPOPULATED: (6, 4),
    Feature.POISON: (6, 6),
    Feature.WP_ASYNC: (6, 7),
    Feature.MOVE: (6, 8),
}
"""The first Linux release with each."""


class Mode(IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults of a range are told."""

    MISSING = lib.UFFDIO_REGISTER_MODE_MISSING  # no page is there
    WP = lib.UFFDIO_REGISTER_MODE_WP  # a write to a page that is write-protected
    MINOR = lib.UFFDIO_REGISTER_MODE_MINOR  # the page is in the file, not in this mapping: shmem and hugetlbfs only


class Ioctl(IntFlag):
    """What a descriptor (UFFDIO_API) or a range (UFFDIO_REGISTER) allows: bit 1 << _UFFDIO_* of the kernel's mask."""

    REGISTER = 1 << lib._UFFDIO_REGISTER
    UNREGISTER = 1 << lib._UFFDIO_UNREGISTER
    WAKE = 1 << lib._UFFDIO_WAKE
    COPY = 1 << lib._UFFDIO_COPY
    ZEROPAGE = 1 << lib._UFFDIO_ZEROPAGE
    MOVE = 1 << lib._UFFDIO_MOVE
    WRITEPROTECT = 1 << lib._UFFDIO_WRITEPROTECT
    CONTINUE = 1 << lib._UFFDIO_CONTINUE
    POISON = 1 << lib._UFFDIO_POISON
    API = 1 << lib._UFFDIO_API


class PageFaultFlag(IntFlag):
    """UFFD_PAGEFAULT_FLAG_*. Without WP and MINOR the page was missing."""

    WRITE = lib.UFFD_PAGEFAULT_FLAG_WRITE
    WP = lib.UFFD_PAGEFAULT_FLAG_WP
    MINOR = lib.UFFD_PAGEFAULT_FLAG_MINOR
