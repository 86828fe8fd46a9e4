"""Limits of the cgroups that this process is in, versions 1 and 2: the tightest of each kind, with the file that sets it.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/. A limit may be set at any level above, so each is
looked for from the process's own cgroup up to what this mount shows as the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from migrate.host.mounts import mounts
from migrate.host.rights import read_text

_UNLIMITED_V1 = 1 << 60  # memory.limit_in_bytes without a limit: the largest long, rounded down to a page


@dataclass(frozen=True, slots=True)
class Limit:
    """``value`` and ``used``: bytes, processes, or CPUs."""

    path: Path
    value: float
    used: float = 0.0

    @property
    def left(self) -> float:
        return max(self.value - self.used, 0.0)

    @property
    def remedy(self) -> str:
        """Writing this lifts it. Version 1 writes -1 for no limit of memory and CPU time."""
        no_limit = "-1" if self.path.name.endswith(("_in_bytes", "_us")) else "max"
        return f"echo {no_limit} > {self.path}"


def memory() -> list[Limit]:
    """What may still be charged, tightest first."""
    found = [
        limit
        for directory in levels("memory")
        for name, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        )
        if (limit := _limit(directory / name, directory / used)) is not None
    ]
    return sorted(found, key=lambda limit: limit.left)


def memory_at_most(swap_free_bytes: int) -> list[Limit]:
    """What might still be charged at the very most, tightest first: file cache goes for it, and other pages go to swap.

    ``used`` is less by that, and may be negative. memory.high is no limit in this sense: it slows, and refuses nothing.
    """
    found = []
    for directory in levels("memory"):
        statistics = dict(line.split() for line in read_text(directory / "memory.stat").splitlines())
        # Of version 1, total_ includes the cgroups below as version 2 always does. Cache on these lists can be dropped.
        names = ("active_file", "inactive_file")
        cache_bytes = sum(int(statistics.get(f"total_{name}", statistics.get(name, 0))) for name in names)
        swap = _limit(directory / "memory.swap.max", directory / "memory.swap.current")
        swap_bytes = swap_free_bytes if swap is None else min(swap_free_bytes, int(swap.left))
        for name, used, elsewhere_bytes in (
            # Memory and swap together, first: the kernel refuses to lift the other limit above this one.
            ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes", 0),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", swap_bytes),
            ("memory.max", "memory.current", swap_bytes),
        ):
            limit = _limit(directory / name, directory / used)
            if limit is not None:
                found.append(replace(limit, used=limit.used - cache_bytes - elsewhere_bytes))
    return sorted(found, key=lambda limit: limit.left)


def hugepages(page_bytes: int) -> list[Limit]:
    """Of one page size (hugetlb controller), tightest first; a reservation is charged before a page is."""
    size = f"{page_bytes >> 30}GB" if page_bytes >= 1 << 30 else f"{page_bytes >> 20}MB"
    names = []
    for middle in (f"hugetlb.{size}", f"hugetlb.{size}.rsvd"):
        names += [(f"{middle}.max", f"{middle}.current"), (f"{middle}.limit_in_bytes", f"{middle}.usage_in_bytes")]
    found = [
        limit
        for directory in levels("hugetlb")
        for name, used in names
        if (limit := _limit(directory / name, directory / used)) is not None
    ]
    return sorted(found, key=lambda limit: limit.left)


def processes() -> list[Limit]:
    """Threads count too."""
    found = [_limit(directory / "pids.max", directory / "pids.current") for directory in levels("pids")]
    return sorted((limit for limit in found if limit is not None), key=lambda limit: limit.left)


def cpus() -> list[Limit]:
    """Quotas, as a number of CPUs."""
    found = []
    for directory in levels("cpu"):
        path = directory / "cpu.max"
        quota, _, period = read_text(path).partition(" ")
        if not quota:
            path = directory / "cpu.cfs_quota_us"
            quota, period = read_text(path), read_text(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            found.append(Limit(path, int(quota) / int(period)))
    return sorted(found, key=lambda limit: limit.value)


def _limit(path: Path, used: Path) -> Limit | None:
    text = read_text(path)
    if not text.isdigit() or int(text) >= _UNLIMITED_V1:
        return None
    spent = read_text(used)
    return Limit(path, int(text), int(spent) if spent.isdigit() else 0)


def levels(controller: str) -> Iterator[Path]:
    """Directories of this process's cgroup with that controller, from its own upwards."""
    hierarchies = _hierarchies()
    for line in read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and "" in hierarchies:
            root, above = hierarchies[""]
        elif controller in controllers.split(",") and controller in hierarchies:
            root, above = hierarchies[controller]
        else:
            continue
        below = path.removeprefix(root.rstrip("/")).strip("/")
        own = above / below if ".." not in below.split("/") else above
        while not own.is_dir():  # made elsewhere, and mounted here without it
            own = own.parent
        yield own
        while own != above and own.is_relative_to(above):
            own = own.parent
            yield own


def top(controller: str) -> Path | None:
    """Where the controller's hierarchy is mounted; None: nowhere."""
    hierarchies = _hierarchies()
    if controller in hierarchies:
        return hierarchies[controller][1]
    if "" in hierarchies and controller in read_text(hierarchies[""][1] / "cgroup.controllers").split():
        return hierarchies[""][1]
    return None


def _hierarchies() -> dict[str, tuple[str, Path]]:
    """Controller (empty: version 2) to the part of the hierarchy that is mounted, and where."""
    found: dict[str, tuple[str, Path]] = {}
    for mount in mounts():
        if mount.kind == "cgroup2":
            found.setdefault("", (mount.root, mount.place))
        elif mount.kind == "cgroup":
            for name in mount.options:
                found.setdefault(name, (mount.root, mount.place))
    return found
