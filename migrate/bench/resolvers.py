"""``postcopy bench resolvers``: the ways to resolve a page fault, side by side, without daemons and without a network.

Each is measured by ``postcopy-resolvers`` (resolvers.c says how), a process of its own for each way and round; rounds go through
all ways, so that what else the machine does hits all alike, and the median of the rounds is given. There is no floor and there
are no bounds: every way is bare C. Contents are checked, and a wrong byte ends the benchmark with an error.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from migrate.bench.figures import Latencies
from migrate.bench.floor import bare_c

NAME = "resolvers"
PROGRAM = Path(__file__).with_name("postcopy-resolvers")
WAYS = (
    "copy-anon",
    "copy-shmem",
    "zeropage-anon",
    "zeropage-shmem",
    "move-anon",
    "continue-shmem",
    "continue-hugetlb",
    "store-shmem",
    "pwrite-shmem",
    "sigbus-copy-anon",
    "sigbus-store-shmem",
)
RANGE_PAGES = (1, 4, 16, 64, 256, 512)
PLACEMENTS = ("unpinned", "one-cpu", "two-cpus")
SIZES = {"pages": 2048, "passes": 1, "bulk_pages": 8192}
HUGE_SIZES = {"pages": 64, "passes": 4, "bulk_pages": 64}
TINY_SIZES = {"pages": 64, "passes": 1, "bulk_pages": 512}
TINY_HUGE_SIZES = {"pages": 4, "passes": 2, "bulk_pages": 4}


@dataclass(slots=True)
class Touches:
    """Single touches under one placement of the two threads, in seconds: medians over rounds; ``n`` of all rounds."""

    p50: float
    p99: float
    cpu_seconds_per_page: float
    n: int


@dataclass(slots=True)
class Way:
    """What one way costs, in seconds: medians over rounds. ``lacks``: why it could not be measured; then nothing else is set."""

    name: str
    lacks: str = ""
    page_bytes: int = 0
    touches: dict[str, Touches] = field(default_factory=dict)
    """By placement. No ``two-cpus`` where this process may use one only, and for the ways in place: they have one thread."""
    bulk_seconds_per_page: dict[int, float] = field(default_factory=dict)
    """By pages a call. Empty for the ways in place: they differ in who calls, not in the call."""
    fill_seconds_per_page: float | None = None
    """None: content comes with the call."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "lacks": self.lacks} if self.lacks else asdict(self)


@dataclass(slots=True)
class Comparison:
    rounds: int
    ways: list[Way]

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "unit": "seconds", "rounds": self.rounds, "ways": [way.to_dict() for way in self.ways]}


def resolvers(tiny: bool) -> Comparison:
    """Raises PostcopyError when a content check or a system call failed."""
    rounds = 1 if tiny else 9
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for round_number in range(rounds):
        for name, done in runs.items():
            if not done or "lacks" not in done[-1]:
                done.append(bare_c(PROGRAM, name, seed=round_number, **_sizes(name, tiny)))
    return Comparison(rounds, [of_rounds(done) for done in runs.values()])


def _sizes(name: str, tiny: bool) -> dict[str, int]:
    if name.endswith("hugetlb"):
        return TINY_HUGE_SIZES if tiny else HUGE_SIZES
    return TINY_SIZES if tiny else SIZES


def of_rounds(runs: list[dict[str, Any]]) -> Way:
    """``runs``: what the program printed, once a round; nothing follows one that lacks something."""
    first = runs[0]
    if lacks := runs[-1].get("lacks"):
        return Way(first["name"], lacks)
    bulk = {
        int(pages): statistics.median(run["bulk_seconds_per_page"][pages] for run in runs)
        for pages in first["bulk_seconds_per_page"]
    }
    return Way(
        first["name"],
        page_bytes=first["page_bytes"],
        touches={placement: _touches([run["touches"][placement] for run in runs]) for placement in first["touches"]},
        bulk_seconds_per_page=bulk,
        fill_seconds_per_page=statistics.median(run["fill_seconds_per_page"] for run in runs)
        if "fill_seconds_per_page" in first
        else None,
    )


def _touches(runs: list[dict[str, Any]]) -> Touches:
    latencies = [Latencies() for _ in runs]
    for latency, run in zip(latencies, runs, strict=True):
        latency.add(run["histogram"])
    return Touches(
        p50=statistics.median(latency.figures()["p50"] for latency in latencies),
        p99=statistics.median(latency.figures()["p99"] for latency in latencies),
        cpu_seconds_per_page=statistics.median(run["cpu_seconds_per_page"] for run in runs),
        n=sum(run["n"] for run in runs),
    )


def tables(comparison: Comparison) -> Iterator[Table]:
    """The touches, then the bulk. What could not be measured says why below both."""
    columns = [f"{placement}\n{figure}" for placement in PLACEMENTS for figure in ("p50 µs", "p99 µs", "CPU µs")]
    drawn = _table("one touch, and the CPU time of all that it takes", columns)
    for way in comparison.ways:
        touches = [way.touches.get(placement) for placement in PLACEMENTS]
        figures = [figure for one in touches for figure in ((one.p50, one.p99, one.cpu_seconds_per_page) if one else (None,) * 3)]
        drawn.add_row(way.name, *(_cell(figure, 1e6, ".1f") for figure in figures))
    yield drawn
    drawn = _table("bulk: ns a page, by pages a call; before: ns a page to fill", [*map(str, RANGE_PAGES), "before"])
    for way in (way for way in comparison.ways if way.bulk_seconds_per_page or way.lacks):
        bulk = [*(way.bulk_seconds_per_page.get(pages) for pages in RANGE_PAGES), way.fill_seconds_per_page]
        drawn.add_row(way.name, *(_cell(figure, 1e9, ",.0f") for figure in bulk))
    drawn.caption = "\n".join(f"{way.name} {way.lacks}" for way in comparison.ways if way.lacks) or None
    yield drawn


def _table(title: str, columns: list[str]) -> Table:
    drawn = Table(title=title, padding=(0, 0))  # so that 100 columns are enough for every one
    drawn.add_column("way", no_wrap=True, min_width=max(map(len, WAYS)))
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    return drawn


def _cell(seconds: float | None, per_second: float, form: str) -> str:
    return "–" if seconds is None else format(seconds * per_second, form)
