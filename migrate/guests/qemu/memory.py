"""QEMU's guest memory as the agent hands it to its daemon: the file is the agent's own, the mapping is QEMU's."""

import os

from migrate.errors import GuestRefusedError
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.qemu.preload import Mapping, Preload
from proto.messages import GuestRegion


class PreloadTracking:
    """As WriteTracking, made inside QEMU. Raises PostcopyError."""

    def __init__(self, preload: Preload) -> None:
        self._preload = preload
        self.pagemap_fd = preload.track()

    def close(self) -> None:
        """What is protected still is no longer; every page stays as it is."""
        if self.pagemap_fd >= 0:
            os.close(self.pagemap_fd)
            self.pagemap_fd = -1
            self._preload.untrack()


class QemuMemory:
    """A memfd: QEMU opens it once more by /proc/self/fd, as its memory-backend-file.

    It is mapped here too, and never touched: that reserves huge pages, and says what is lacking before QEMU starts.
    """

    def __init__(self, spec: MemorySpec) -> None:
        self._reserved = GuestMemory([spec])
        self.files = self._reserved.files
        self.regions: list[GuestRegion] = []
        self._preload: Preload | None = None
        self._userfaultfd = -1

    def attach(self, preload: Preload, mapping: Mapping) -> None:
        """QEMU has mapped it. Raises GuestRefusedError."""
        [reserved] = self._reserved.regions
        if (mapping.size_bytes, mapping.offset_bytes) != (reserved.size_bytes, 0):
            raise GuestRefusedError(
                "QEMU's memory",
                expected=f"{reserved.size_bytes} bytes from the file's begin",
                got=f"{mapping.size_bytes} bytes at {mapping.offset_bytes}",
            )
        self.regions = [reserved.model_copy(update={"guest_address": mapping.address})]
        self._preload, self._userfaultfd = preload, mapping.userfaultfd

    def register(self, *, remove_events: bool = False) -> int:
        """The userfaultfd of a guest that waits, registered by QEMU as it mapped the memory. Once: it is the caller's then."""
        assert not remove_events, "QEMU's discards punch holes, which raise no event"
        userfaultfd, self._userfaultfd = self._userfaultfd, -1
        assert userfaultfd >= 0, "of a guest that waits"
        return userfaultfd

    def track(self) -> PreloadTracking:
        """Raises PostcopyError: then there is no precopy."""
        assert self._preload is not None
        return PreloadTracking(self._preload)

    def close(self) -> None:
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)
            self._userfaultfd = -1
        self._reserved.close()
