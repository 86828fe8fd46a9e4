"""``postcopy bench qemu``: one machine and workload, moved by QEMU's own postcopy and by us, interleaved.

Two machines of one command line, but for what the mover adds: while one is moved, the other is stopped. Each round goes through
all ways; the medians of all runs are given, of faults also the quantiles of all faults of all runs. The guest is the one of
``make guest-image``, under TCG. The machine's own figures (QEMU's "downtime", our faults) are not used: mover.py says what is.
"""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from migrate.bench.figures import quantile
from migrate.bench.qemu.mover import FAULT_NS, Move, Mover
from migrate.bench.qemu.ours import PostcopyMover
from migrate.bench.qemu.own import OwnMover
from migrate.errors import PostcopyError
from migrate.guests.linux.machine import GuestImage, LinuxGuest

NAME = "qemu"
GUEST = LinuxGuest(memory_mib=640, machine_mib=1024, pattern="zipf", write_percent=10, report_ms=100)
TINY_GUEST = replace(GUEST, memory_mib=16, machine_mib=128)
ROUNDS = 9
BROKEN_MAX = 12
"""Moves of QEMU's own that may not count before the benchmark gives up; mostly a round of precopy that was over too soon."""


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    mover: type[Mover]
    precopy: bool
    preempt: bool = False


WAYS = (
    Way("qemu-pure", OwnMover, precopy=False),
    Way("qemu-pure-preempt", OwnMover, precopy=False, preempt=True),
    Way("postcopy-pure", PostcopyMover, precopy=False),
    Way("qemu-precopy", OwnMover, precopy=True),
    Way("qemu-precopy-preempt", OwnMover, precopy=True, preempt=True),
    Way("postcopy-precopy", PostcopyMover, precopy=True),
)
TINY_WAYS = (WAYS[2], WAYS[4])


@dataclass(frozen=True, slots=True)
class Limit:
    """A figure of ours over that of QEMU's own, and what it must stay at or below."""

    ours: str
    own: str
    figure: str
    limit: float


BOUNDS = {"fault_p50_seconds": 1 / 3, "fault_p99_seconds": 1 / 3, "total_seconds": 1, "moved_bytes": 1.02}
LIMITS = (
    Limit("postcopy-pure", "qemu-pure-preempt", "downtime_seconds", 1 / 3),
    *(Limit("postcopy-pure", "qemu-pure-preempt", figure, limit) for figure, limit in BOUNDS.items()),
    Limit("postcopy-precopy", "qemu-precopy-preempt", "downtime_seconds", 1 / 4),
    *(Limit("postcopy-precopy", "qemu-precopy-preempt", figure, limit) for figure, limit in BOUNDS.items()),
)
COLUMNS = ("moves", "downtime ms", "p99", "touch gap", "longest", "fault p50 µs", "p99 µs", "faults", "pace", "total s", "MB")


@dataclass(slots=True)
class Comparison:
    guest: LinuxGuest
    moves: dict[str, list[Move]] = field(default_factory=lambda: {way.name: [] for way in WAYS})
    broken: dict[str, list[str]] = field(default_factory=lambda: {way.name: [] for way in WAYS})
    """Moves that failed, and why: the guest was not intact, or QEMU ended the move otherwise."""

    def figures(self, way: str) -> dict[str, float]:
        """Medians and p99 over the moves; faults: the median of the moves' quantiles."""
        moves = self.moves[way]
        figures: dict[str, float] = {"moves": len(moves), "broken": len(self.broken[way])}
        for name in ("downtime_seconds", "touch_gap_seconds", "longest_gap_seconds", "total_seconds", "moved_bytes", "pace"):
            samples = [float(getattr(move, name)) for move in moves]
            figures[name] = statistics.median(samples)
            figures[f"{name}_p99"] = quantile(samples, 0.99)
        faults = [move.faults() for move in moves]
        figures["faults"] = statistics.median(one["n"] for one in faults)
        for name in ("p50", "p99"):
            figures[f"fault_{name}_seconds"] = statistics.median(one[name] for one in faults)
        return figures

    def ratios(self) -> list[tuple[Limit, float]]:
        figures = {name: self.figures(name) for name, moves in self.moves.items() if moves}
        return [
            (limit, figures[limit.ours][limit.figure] / figures[limit.own][limit.figure])
            for limit in LIMITS
            if limit.ours in figures and limit.own in figures
        ]

    def holds(self) -> bool:
        return all(ratio <= limit.limit for limit, ratio in self.ratios())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "unit": "seconds",
            "guest": asdict(self.guest),
            "fault_threshold_seconds": FAULT_NS / 1e9,
            "ways": {name: self.figures(name) for name, moves in self.moves.items() if moves},
            "broken": self.broken,
            "ratios": [{"ours": one.ours, "own": one.own, "figure": one.figure, "ratio": ratio} for one, ratio in self.ratios()],
        }


def compare(tiny: bool) -> Comparison:
    """Raises PostcopyError; HostLacksError without the guest's image."""
    comparison = Comparison(TINY_GUEST if tiny else GUEST)
    image = GuestImage.find()
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as directory, ExitStack() as stack:
        movers: dict[type[Mover], Mover] = {}
        for kind in dict.fromkeys(way.mover for way in WAYS):
            movers[kind] = stack.enter_context(kind(comparison.guest, image, Path(directory)))
            movers[kind].launch()
        for mover in movers.values():
            mover.wait_booted()
        for _ in range(1 if tiny else ROUNDS):
            for way in TINY_WAYS if tiny else WAYS:
                with ExitStack() as others:
                    for mover in movers.values():
                        if mover is not movers[way.mover]:
                            others.enter_context(mover.frozen())
                    _run(way, movers[way.mover], comparison)
    return comparison


def _run(way: Way, mover: Mover, comparison: Comparison) -> None:
    """One move that counts; where QEMU breaks its guest, that is counted and the machine boots anew. Ours must never."""
    while True:
        try:
            comparison.moves[way.name].append(mover.move(precopy=way.precopy, preempt=way.preempt))
            return
        except PostcopyError as error:
            comparison.broken[way.name].append(str(error))
            if way.mover is not OwnMover or sum(map(len, comparison.broken.values())) > BROKEN_MAX:
                raise
            mover.restart()


def tables(comparison: Comparison) -> Iterator[Table]:
    drawn = Table(title=f"a machine of {comparison.guest.machine_mib} MiB, medians of the moves", padding=(0, 0))
    drawn.add_column("way", no_wrap=True)
    for column in COLUMNS:
        drawn.add_column(column, justify="right", no_wrap=True)
    for name in (name for name, moves in comparison.moves.items() if moves):
        figures = comparison.figures(name)
        milliseconds = ("downtime_seconds", "downtime_seconds_p99", "touch_gap_seconds", "longest_gap_seconds")
        drawn.add_row(
            name,
            f"{figures['moves']:.0f}",
            *(f"{figures[one] * 1e3:.1f}" for one in milliseconds),
            *(f"{figures[one] * 1e6:.0f}" for one in ("fault_p50_seconds", "fault_p99_seconds")),
            f"{figures['faults']:.0f}",
            f"{figures['pace']:.2f}",
            f"{figures['total_seconds']:.2f}",
            f"{figures['moved_bytes'] / 1e6:.0f}",
        )
    yield drawn
    drawn = Table("ours", "over QEMU's own", "figure", "ratio", "bound", "", padding=(0, 0))
    for one, ratio in comparison.ratios():
        missed = "" if ratio <= one.limit else "MISSED"
        drawn.add_row(one.ours, one.own, one.figure, f"{ratio:.2f}", f"<= {one.limit:.2f}", missed)
    broken = [f"{name}, a move that does not count: {why}" for name, reasons in comparison.broken.items() for why in reasons]
    drawn.caption = "\n".join(broken) or None
    yield drawn
