"""One small guest, forth and back a thousand times between the same two daemons, with precopy and without, over one to three bulk
connections: neither daemon holds more descriptors, threads or memory afterwards than when it had just got going.

What a daemon keeps of what has ended is bounded (``ENDED_MIGRATIONS_KEPT``, ``EVENTS_KEPT``) and nearly full after 50 moves, from
where `make torture` compares. The suite makes 30 moves and compares from the 10th: descriptors and threads exactly, memory
roughly. One step is Python's own and may fall behind the 50th: its table of interned strings doubles once (1 MiB)."""

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.pair import DaemonProcess, Pair

from ..path.commuter import Commuter, until
from .ledger import Ledger, Scale

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
MIB = 1 << 20
AT_WORK = ("--write-ratio", "0.3", "--rate", "20000")


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment."""

    descriptors: int
    threads: int
    rss_anon_bytes: int

    @classmethod
    def by(cls, daemon: DaemonProcess) -> "Held":
        process = Path(f"/proc/{daemon.pid}")
        rss_anon = re.search(r"^RssAnon:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
        assert rss_anon
        return cls(len(os.listdir(process / "fd")), len(os.listdir(process / "task")), int(rss_anon[1]) << 10)


class Compared:
    """One daemon when the guest had attached, after the first moves, and at the end."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self.idle = self.early = self.late = Held.by(daemon)

    def warmed_up(self) -> None:
        self.early = Held.by(self._daemon)

    def end(self) -> None:
        """The last move's connections are closed a moment after its guest has proven itself."""
        until(self._has_let_go, f"{self._daemon.name} lets go of descriptors and threads")
        self.late = Held.by(self._daemon)

    def _has_let_go(self) -> bool:
        now = Held.by(self._daemon)
        return now.descriptors <= self.idle.descriptors and now.threads <= self.early.threads

    @property
    def growth_bytes(self) -> int:
        return self.late.rss_anon_bytes - self.early.rss_anon_bytes

    def __str__(self) -> str:
        early, late = (held.rss_anon_bytes / MIB for held in (self.early, self.late))
        return f"{self._daemon.name} {early:.1f} to {late:.1f} MiB"


@pytest.mark.timeout(600)
def test_soak(scale: Scale, ledger: Ledger) -> None:
    moves, warm_up, growth_bytes = (1000, 50, 2 * MIB) if scale.long else (30, 10, 4 * MIB)
    dice = random.Random(scale.seed)
    with Pair() as pair:
        guest = Commuter(pair, "soaked", "2M", options=AT_WORK)
        compared = [Compared(daemon) for daemon in (pair.source, pair.destination)]
        for number in range(1, moves + 1):
            guest.move(precopy=dice.choice(("off", "auto", 1, 2)), streams=dice.randint(1, 3))
            if number == warm_up:
                for one in compared:
                    one.warmed_up()
        for one in compared:
            one.end()
            assert one.growth_bytes <= growth_bytes, (one.early, one.late)
    memory = ", ".join(map(str, compared))
    ledger.add("one guest between the same daemons", runs=moves, note=f"RssAnon from move {warm_up} on: {memory}")
