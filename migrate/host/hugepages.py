"""Pools of huge pages, by size and by NUMA node. Source: Documentation/admin-guide/mm/hugetlbpage.rst."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

HUGEPAGE_BYTES = 2 << 20
HUGEPAGES_WANTED = 160  # what the tests need: a guest of 128 MiB at both ends of a move, and some to spare
GIGANTIC_PAGES_WANTED = 2  # one at each end of a move
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
POOLS = Path("/sys/kernel/mm/hugepages")
POOL_2M = POOLS / "hugepages-2048kB"
POOL_1G = POOLS / "hugepages-1048576kB"
NODES = Path("/sys/devices/system/node")
_NAME = re.compile(r"^hugepages-(\d+)kB$")


def size_text(size_bytes: int) -> str:
    """``2 MiB``, ``1.5 GiB``."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.4g} {unit}"
    return f"{size_bytes} bytes"


@dataclass(frozen=True, slots=True)
class NodePool:
    total: int
    free: int
    surplus: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages of one size. ``overcommit``: how many more the kernel may make beyond the pool when asked."""

    page_bytes: int
    directory: Path
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int
    nodes: dict[int, NodePool] = field(default_factory=dict)

    @property
    def unreserved(self) -> int:
        """What a new guest can have: free pages that no mapping has been promised."""
        return max(self.free - self.reserved, 0) + max(self.overcommit - self.surplus, 0)

    @property
    def may_grow(self) -> bool:
        """Whether this user may raise it: by opening its file for writing, not by writing."""
        try:
            os.close(os.open(self.directory / "nr_hugepages", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            return False
        return True


def pools() -> dict[int, Pool]:
    """By page size in bytes; empty on a kernel without hugetlbfs."""
    found = (_NAME.match(directory.name) for directory in (POOLS.iterdir() if POOLS.is_dir() else ()))
    sizes = sorted(int(match[1]) << 10 for match in found if match)
    return {page_bytes: _pool(page_bytes) for page_bytes in sizes}


def pool(page_bytes: int) -> Pool | None:
    """None: this kernel has no pages of that size."""
    return _pool(page_bytes) if _directory(POOLS, page_bytes).is_dir() else None


def _directory(parent: Path, page_bytes: int) -> Path:
    return parent / f"hugepages-{page_bytes >> 10}kB"


def _pool(page_bytes: int) -> Pool:
    directory = _directory(POOLS, page_bytes)

    def count(name: str, of: Path = directory) -> int:
        return int((of / name).read_text())

    nodes = {}
    for node in sorted(NODES.glob("node[0-9]*")):
        own = _directory(node / "hugepages", page_bytes)
        if own.is_dir():
            nodes[int(node.name[4:])] = NodePool(*(count(f"{name}_hugepages", own) for name in ("nr", "free", "surplus")))
    return Pool(
        page_bytes=page_bytes,
        directory=directory,
        total=count("nr_hugepages"),
        free=count("free_hugepages"),
        reserved=count("resv_hugepages"),
        surplus=count("surplus_hugepages"),
        overcommit=count("nr_overcommit_hugepages"),
        nodes=nodes,
    )
