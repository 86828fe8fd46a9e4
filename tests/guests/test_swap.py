"""Under memory pressure: pages that have arrived are swapped out while others arrive, and after; the guest finds each as it was.

The pressure is reclaim that is asked for, of a cgroup's memory, again and again. A narrow limit would do it too, but only until
the kernel finds that all that fits has just been used, and kills.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.pair import Pair

from ..control.obstacles import memory_cgroup
from ..path.commuter import Commuter

pytestmark = pytest.mark.requires("uffd", "cgroup", "zram")
MIB = 1 << 20
PAGES = 4 * MIB // 4096


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def place(pair: Pair) -> Iterator[Path]:
    """The cgroup of the destination daemon. Wide: it is only there to be squeezed."""
    with memory_cgroup(512 * MIB, swap=True) as directory:
        try:
            (directory / "cgroup.procs").write_text(str(pair.destination.pid))
            yield directory
        finally:
            pair.destination.end()


class Squeezed(threading.Thread):
    """Reclaims what a cgroup has, until it is left; ``swapped_bytes``: the most that was in swap at once."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.swapped_bytes = 0
        self._left = threading.Event()

    def __enter__(self) -> "Squeezed":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self.join()

    def run(self) -> None:
        version_1, version_2 = (self.directory / name for name in ("memory.force_empty", "memory.reclaim"))
        while not self._left.is_set():
            with contextlib.suppress(OSError):  # EAGAIN: not all that was asked for
                version_1.write_text("0") if version_1.exists() else version_2.write_text("64M")
            self.swapped_bytes = max(self.swapped_bytes, self._in_swap())

    def _in_swap(self) -> int:
        file = self.directory / "memory.swap.current"
        if file.exists():
            return int(file.read_text())
        statistics = dict(line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
        return int(statistics["swap"])


@pytest.mark.parametrize(("bulk", "precopy"), [(False, "off"), (True, 2)], ids=["faults", "precopy"])
def test_guest_arrives_and_leaves_while_its_memory_is_swapped_out(
    pair: Pair, place: Path, bulk: bool, precopy: str | int
) -> None:
    commuter = Commuter(pair, f"squeezed-{precopy}", "4M", options=("--write-ratio", "0.5", "--rate", "20000"))
    (place / "cgroup.procs").write_text(str(commuter.waits.pid))
    with Squeezed(place) as squeezed:
        arrived = commuter.move(bulk=bulk, precopy=precopy)
        commuter.move(precopy=precopy)  # read from swap at its source
    commuter.end()
    assert squeezed.swapped_bytes > MIB // 2
    if not bulk:  # pages that were mapped before were swapped out, and faulted again: as what is here
        assert arrived.pages["urgent"] + arrived.pages["zero"] == PAGES
        assert arrived.faults["local"].count > 0
