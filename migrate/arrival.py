"""A migration as its destination tells it: figures while it runs and, once its C side is gone, as they were at the end."""

from collections.abc import Callable

from migrate.dataplane import FAULT_KINDS, DestinationPlane, Histogram
from migrate.session import Migration, PrecopyInfo
from proto.messages import FaultKind, LatencySummary, Progress
from proto.states import Role, State


class Arrival(Migration):
    """What is known of a guest that comes; ``migrate/destination.py`` drives it."""

    role = Role.DESTINATION

    def __init__(self, migration_id: bytes, peer: str, on_end: Callable[[Migration], None]) -> None:
        super().__init__(migration_id, "?", peer, on_end)
        self.rounds_begun = 0
        self._plane: DestinationPlane | None = None
        self._precopy = False
        self._resumed_ns = 0
        self._figures: dict[str, int] = {}
        self._latency: dict[FaultKind, Histogram] = {}

    def _summarize(self) -> None:
        """Keep the figures; the C side's object is about to go."""
        if self._plane is None:
            return
        self._figures = self._plane.figures()
        self._latency = {kind: self._plane.latency(kind) for kind in FAULT_KINDS}
        self.faults = {
            kind: LatencySummary(
                count=histogram.count,
                p50_ns=histogram.quantile_ns(0.5),
                p99_ns=histogram.quantile_ns(0.99),
                max_ns=histogram.max_ns,
            )
            for kind, histogram in self._latency.items()
        }

    def stale_window_ns(self) -> int | None:
        """From the guest's resumption to when every held page was known final or stale; None without precopy, or where an earlier
        migration of it knows."""
        settled_ns = self.figures().get("settled_ns", 0)
        return max(0, settled_ns - self._resumed_ns) if settled_ns and self._resumed_ns else None

    def latency(self, kind: FaultKind) -> Histogram:
        return self._plane.latency(kind) if self._plane is not None else self._latency.get(kind, Histogram())

    def figures(self) -> dict[str, int]:
        return self._plane.figures() if self._plane is not None else self._figures

    def pages_done(self) -> int:
        figures = self.figures()
        return max(figures.get("pages_final", 0), figures.get("pages_held", 0) if self.state is State.PRECOPY else 0)

    def pages_by_path(self) -> dict[str, int]:
        figures = self.figures()
        by_path = {path: figures.get(f"pages_{path}", 0) for path in ("urgent", "readahead", "bulk", "zero")}
        discarded = {"discarded": figures["pages_removed"]} if figures.get("pages_removed") else {}
        return {**by_path, "precopy": figures.get("pages_kept", 0), **discarded}

    def precopy_info(self) -> PrecopyInfo | None:
        if not self._precopy:
            return None
        figures = self.figures()
        window_ns = self.stale_window_ns()
        return PrecopyInfo(
            rounds_begun=self.rounds_begun,
            rounds=[],
            bytes_moved=figures.get("bytes_precopy", 0),
            stale_pages=figures.get("pages_stale", 0),
            stale_window_seconds=None if window_ns is None else window_ns / 1e9,
            faults_held=figures.get("faults_held", 0),
            faults_after=figures.get("faults_remote", 0) - figures.get("faults_unsettled", 0),
            stale_pages_touched=figures.get("pages_stale_touched", 0),
        )

    def faults_count(self) -> int:
        figures = self.figures()
        return sum(figures.get(f"faults_{kind}", 0) for kind in FAULT_KINDS)

    def _progress(self) -> Progress:
        return Progress(
            pages_present=self.pages_done(),
            faults=self.faults_count(),
            downtime_ns=self.downtime_ns,
            downtime_uncertainty_ns=self.downtime_uncertainty_ns,
        )
