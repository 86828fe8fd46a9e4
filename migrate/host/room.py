"""How much guest memory might be backed here at the very most, and by what it is bounded. Read, not tried.

At the very most: file cache is given up, other pages go to swap. What does not fit even then cannot be had; what fits may still
be taken by others. Who asks is who fills: memory is charged to the cgroup of the process that first writes it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from migrate.host import cgroup, sentences
from migrate.host.hugepages import pool, size_text
from migrate.host.limits import meminfo
from migrate.host.mounts import mount_of


@dataclass(frozen=True, slots=True)
class Bound:
    """``left_bytes`` at most may still be had; ``what`` sets that, in words that follow "at most 20 MiB"."""

    left_bytes: int
    what: str
    kind: Literal["machine", "cgroup", "tmpfs"] = "machine"
    total_bytes: int = 0
    place: str = ""

    def remedy(self, needed_bytes: int) -> str:
        """The one thing to change so that so much can be had."""
        if self.kind == "machine":
            return "free memory on this machine, or add swap"
        if self.kind == "cgroup":
            return cgroup.Limit(Path(self.place), self.total_bytes).remedy
        size_mib = (self.total_bytes + needed_bytes - self.left_bytes + (1 << 20) - 1) >> 20
        return f"mount -o remount,size={size_mib}M {self.place}"


def memory() -> Iterator[Bound]:
    """Of pages of 4 KiB: this machine's, and each limit of memory that this process is under."""
    swap_bytes = meminfo("SwapFree")
    available_bytes = meminfo("MemAvailable")
    what = f"of memory on this machine ({size_text(available_bytes)} available, {size_text(swap_bytes)} of swap free)"
    yield Bound(available_bytes + swap_bytes, what)
    for limit in cgroup.memory_at_most(swap_bytes):
        value = int(limit.value)
        yield Bound(int(limit.left), f"within {limit.path} ({size_text(value)})", "cgroup", value, str(limit.path))


def slowed() -> list[cgroup.Limit]:
    """Limits that refuse nothing and slow whoever is above them: memory.high."""
    return [limit for limit in cgroup.memory() if limit.path.name == "memory.high"]


def tmpfs(descriptor: int) -> Bound | None:
    """Of the file system that a memory file is on; None: it has no size (a memfd's has none). Raises OSError.

    Its number of inodes does not matter: the file is there.
    """
    status = os.fstatvfs(descriptor)
    if status.f_blocks == 0:
        return None
    total_bytes = status.f_blocks * status.f_frsize
    folder = Path(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")).parent
    # The path is that of the guest's mount namespace, which may not be ours.
    ours = folder.is_dir() and folder.stat().st_dev == os.fstat(descriptor).st_dev
    place = str(mount_of(folder).place) if ours else f"{folder} (where the guest has it)"
    what = f"on the tmpfs {place}, of {size_text(total_bytes)}"
    return Bound(status.f_bavail * status.f_frsize, what, "tmpfs", total_bytes, place)


def huge_pages(pages: int, page_bytes: int) -> tuple[str, str]:
    """Why so many pages more could not be had, a moment ago, and the one thing to change."""
    for limit in cgroup.hugepages(page_bytes):
        if limit.left < pages * page_bytes:
            return f"{size_text(int(limit.left))} within {limit.path} ({size_text(int(limit.value))})", limit.remedy
    there = pool(page_bytes)
    if there is None:
        return "none: this kernel has no pages of that size", "use another page size"
    return sentences.hugepages_missing(pages, there)
