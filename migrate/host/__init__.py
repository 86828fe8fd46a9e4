"""What this machine can do, in sentences: each feature with why it is or is not there, and the one thing to change.

``postcopy doctor`` tells those of the product (``product.py``), ``python -m migrate.host`` these and what the tests need.
Probes use what they probe (no version is believed), change nothing that outlives them, need no privilege, and take well
under a second together; only the compiler's take longer.
"""

import functools
from collections.abc import Callable

from migrate.host import suite, suite_kernel
from migrate.host.feature import Feature
from migrate.host.hugepages import GIGANTIC_PAGES_WANTED, HUGEPAGE_BYTES, HUGEPAGES_WANTED, NR_HUGEPAGES, POOL_1G, POOL_2M
from migrate.host.product import ROWS
from migrate.host.suite import sanitizer_prefix

__all__ = [
    "GIGANTIC_PAGES_WANTED",
    "HUGEPAGES_WANTED",
    "HUGEPAGE_BYTES",
    "NR_HUGEPAGES",
    "POOL_1G",
    "POOL_2M",
    "PROBES",
    "Feature",
    "feature",
    "sanitizer_prefix",
]

PROBES: dict[str, Callable[[], Feature]] = {
    **{row.name: row.probe for row in ROWS},
    "hugetlb": suite.hugetlb,
    "gigantic": suite.gigantic,
    "uffd-restricted": suite.userfaultfd_restricted,
    "cgroup": suite.limiting_cgroups,
    "netns": suite.netns,
    "timens": suite.timens,
    "zram": suite.zram,
    "root": suite.root,
    "linux-guest": suite.linux_guest,
    "asan": lambda: suite.sanitizer("asan", "address,undefined", "libasan, libubsan"),
    "tsan": lambda: suite.sanitizer("tsan", "thread", "libtsan"),
    "uffd-full": suite_kernel.full_userfaultfd,
    "uffd-wp": lambda: suite_kernel.userfaultfd_with("uffd-wp", "PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED"),
    "uffd-poison": lambda: suite_kernel.userfaultfd_with("uffd-poison", "POISON"),
    "uffd-move": lambda: suite_kernel.userfaultfd_with("uffd-move", "MOVE"),
    "wp-async": lambda: suite_kernel.userfaultfd_with("wp-async", "WP_ASYNC", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED"),
    "pagemap-scan": suite_kernel.pagemap_scan,
    "thp": suite_kernel.transparent_huge_pages,
    "io-uring": suite_kernel.io_uring,
}


@functools.cache
def feature(name: str) -> Feature:
    """Probe one feature, once a process. Raises KeyError for a name that is not in PROBES."""
    return PROBES[name]()
