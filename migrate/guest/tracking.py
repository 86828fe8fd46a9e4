"""Tells the daemon what a running guest writes, so that precopy sends only that again: uffd-wp async, and the pagemap.

The guest registers its own mapping for asynchronous write protection and opens its own pagemap; whoever holds that
descriptor can then scan, without any privilege (Documentation/admin-guide/mm/pagemap.rst, PAGEMAP_SCAN; Linux 6.7). A first
write to an armed page costs the guest 0.8 us and never waits for anybody: the kernel lifts the protection by itself.
Blind to writes through another mapping of the file or to the file itself, to DMA, and to discards. The guest tells of these by
itself (``discard``), not by events: one is read before the hole is made, so its reader cannot say when the page is zero.
"""

import os
from collections.abc import Sequence

from migrate.uffd import Feature, Mode, Userfaultfd
from proto.messages import GuestRegion

FEATURES = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


class WriteTracking:
    """From its making until ``close``. Raises HostLacksError, UserfaultfdError, OSError: then there is no precopy."""

    def __init__(self, regions: Sequence[GuestRegion]) -> None:
        self._userfaultfd = Userfaultfd.open(FEATURES)
        self.pagemap_fd = -1
        try:
            for region in regions:
                self._userfaultfd.register(region.guest_address, region.size_bytes, Mode.WP)
            self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The last descriptor's end lifts what is protected still; every page stays as it is."""
        self._userfaultfd.close()
        if self.pagemap_fd >= 0:
            os.close(self.pagemap_fd)
            self.pagemap_fd = -1
