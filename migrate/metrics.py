"""Prometheus metrics: counters live in C and are read at scrape; ended migrations are folded into totals by guest.

Labels are few and bounded: role, guest (the last GUESTS_KEPT), kind. A histogram has at most 30 buckets, folded in C:
fine ones would cost the control loop milliseconds a scrape (tests/control/test_metrics.py counts them).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from migrate import __version__
from migrate.dataplane import FAULT_KINDS, FOLDED_BOUNDS_SECONDS, Histogram
from proto.states import Role, State

if TYPE_CHECKING:
    from migrate.daemon import Daemon
    from migrate.session import Migration

GUESTS_KEPT = 32
_BOUNDS = [f"{bound:.9g}" for bound in FOLDED_BOUNDS_SECONDS] + ["+Inf"]


class GuestTotals:
    """What one guest's ended migrations in one role add up to."""

    def __init__(self) -> None:
        self.pages: defaultdict[str, int] = defaultdict(int)
        self.bytes_moved: defaultdict[str, int] = defaultdict(int)
        self.latency: dict[str, Histogram] = {}
        self.ended: defaultdict[str, int] = defaultdict(int)
        self.errors: defaultdict[str, int] = defaultdict(int)
        self.pages_lost = 0
        self.reconnects = 0
        self.polled_seconds = 0.0
        self.pace_waited_seconds = 0.0
        self.downtime_seconds: float | None = None
        self.downtime_uncertainty_seconds = 0.0

    def add(self, migration: "Migration") -> None:
        self.add_figures(migration)
        self.ended[str(migration.state)] += 1
        if migration.error is not None:
            self.errors[migration.error.code] += 1
        # The destination's to say: what the source has sent may not have arrived.
        if migration.role == Role.DESTINATION and migration.state in (State.STALLED, State.ABANDONED):
            self.pages_lost += migration.pages_total - migration.pages_done()

    def add_figures(self, migration: "Migration") -> None:
        figures = migration.figures()
        for path, pages in migration.pages_by_path().items():
            self.pages[path] += pages
        for path in ("urgent", "bulk", "precopy"):
            self.bytes_moved[path] += figures.get(f"bytes_{path}", 0)
        self.reconnects += migration.reconnects
        self.polled_seconds += figures.get("polled_ns", 0) / 1e9
        self.pace_waited_seconds += figures.get("pace_waited_ns", 0) / 1e9
        if migration.downtime_ns is not None:
            self.downtime_seconds = migration.downtime_ns / 1e9
            self.downtime_uncertainty_seconds = migration.downtime_uncertainty_ns / 1e9
        latency = getattr(migration, "latency", None)
        if latency is not None:
            for kind in FAULT_KINDS:
                self.latency.setdefault(kind, Histogram()).add(latency(kind))

    def copy(self) -> "GuestTotals":
        copied = GuestTotals()
        for name in ("pages", "bytes_moved", "ended", "errors"):
            getattr(copied, name).update(getattr(self, name))
        for kind, histogram in self.latency.items():
            copied.latency[kind] = Histogram()
            copied.latency[kind].add(histogram)
        copied.pages_lost = self.pages_lost
        copied.reconnects = self.reconnects
        copied.polled_seconds = self.polled_seconds
        copied.pace_waited_seconds = self.pace_waited_seconds
        copied.downtime_seconds = self.downtime_seconds
        copied.downtime_uncertainty_seconds = self.downtime_uncertainty_seconds
        return copied


class Totals:
    """Of every (role, guest), the last GUESTS_KEPT of them."""

    def __init__(self) -> None:
        self.by_guest: OrderedDict[tuple[str, str], GuestTotals] = OrderedDict()

    def add(self, migration: "Migration") -> None:
        key = (str(migration.role), migration.guest_id)
        self.by_guest.setdefault(key, GuestTotals()).add(migration)
        self.by_guest.move_to_end(key)
        while len(self.by_guest) > GUESTS_KEPT:
            self.by_guest.popitem(last=False)


class DaemonCollector(Collector):
    """Reads a daemon at scrape time."""

    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon

    def _current(self) -> dict[tuple[str, str], GuestTotals]:
        """The totals with what is running now on top."""
        current = dict(self._daemon.totals.by_guest)
        for migration in self._daemon.migrations.values():
            if not migration.counted:
                key = (str(migration.role), migration.guest_id)
                current[key] = current[key].copy() if key in current else GuestTotals()
                current[key].add_figures(migration)
        return current

    def _under_way(self) -> dict[tuple[str, str], "Migration"]:
        """What has not ended, the newest of each guest: one may have stalled and its guest, begun anew, be on its way again."""
        migrations = self._daemon.migrations.values()
        return {(str(migration.role), migration.guest_id): migration for migration in migrations if not migration.ended}

    def collect(self) -> Iterator[Metric]:
        daemon = self._daemon
        current = self._current()
        labels = ["role", "guest"]
        build = GaugeMetricFamily("postcopy_build_info", "Version of this daemon.", labels=["version", "role"])
        build.add_metric([__version__, daemon.role], 1)
        yield build

        guests = GaugeMetricFamily("postcopy_guests", "Attached guests by state.", labels=["state"])
        counts: defaultdict[str, int] = defaultdict(int)
        for link in daemon.guests.values():
            counts[str(link.state)] += 1
        for state, number in counts.items():
            guests.add_metric([state], number)
        yield guests

        expiry = GaugeMetricFamily(
            "postcopy_tls_certificate_expiry_timestamp_seconds",
            "When this daemon's certificate ends, in Unix time; no series without TLS.",
        )
        if daemon.tls is not None:
            expiry.add_metric([], daemon.tls.data.valid_until_seconds)
        yield expiry

        refused = CounterMetricFamily(
            "postcopy_connections_refused",
            "Connections turned away, by the socket that they came to.",
            labels=["socket", "reason"],
        )
        for (where, reason), number in daemon.refusals.counts.items():
            refused.add_metric([where, reason], number)
        yield refused

        phase = GaugeMetricFamily(
            "postcopy_migration_phase", "1 for the state that a migration is in.", labels=["role", "guest", "phase"]
        )
        queue = GaugeMetricFamily("postcopy_requests_outstanding", "Pages asked for and not answered.", labels=["guest"])
        final = GaugeMetricFamily(
            "postcopy_migration_pages_final",
            "Pages of a running migration that are final here (during precopy: held).",
            labels=labels,
        )
        pace = GaugeMetricFamily(
            "postcopy_bulk_pace_bytes_per_second",
            "Of a migration under way: at which bulk and precopy go, at most; no series while nothing limits them.",
            labels=["guest"],
        )
        total = GaugeMetricFamily("postcopy_migration_pages", "Pages of a running migration.", labels=labels)
        for (role, guest), migration in self._under_way().items():
            phase.add_metric([role, guest, str(migration.state)], 1)
            final.add_metric([role, guest], migration.pages_done())
            total.add_metric([role, guest], migration.pages_total)
            if role == Role.DESTINATION:
                queue.add_metric([guest], migration.figures().get("requests_outstanding", 0))
            elif (bytes_per_second := migration.bulk_pace()) is not None:
                pace.add_metric([guest], bytes_per_second)
        yield from (phase, queue, final, pace, total)

        faults = HistogramMetricFamily(
            "postcopy_fault_latency_seconds",
            "From reading a page fault to its resolution, by kind. The guest waits for two wake-ups more (deploy/README.md).",
            labels=["role", "guest", "kind"],
        )
        pages = CounterMetricFamily("postcopy_pages", "Pages moved, by path.", labels=["role", "guest", "kind"])
        moved = CounterMetricFamily("postcopy_bytes", "Bytes on data connections, by path.", labels=["role", "guest", "kind"])
        ended = CounterMetricFamily(
            "postcopy_migrations", "Migrations that have settled, by state.", labels=["role", "guest", "state"]
        )
        errors = CounterMetricFamily(
            "postcopy_errors", "Migrations that failed, by kind of error.", labels=["role", "guest", "kind"]
        )
        lost = CounterMetricFamily(
            "postcopy_lost_pages",
            "Pages that a stalled migration left without content here (the source still has them), or that were abandoned.",
            labels=labels,
        )
        reconnects = CounterMetricFamily(
            "postcopy_reconnects", "Times that all connections of a migration were made anew after a loss.", labels=labels
        )
        polled = CounterMetricFamily(
            "postcopy_polled_seconds", "CPU time in which loops looked for work instead of sleeping (--poll).", labels=labels
        )
        waited = CounterMetricFamily(
            "postcopy_bulk_waited_seconds",
            "Time for which bulk and precopy were kept waiting, by the path's bottleneck or --bulk-limit.",
            labels=["guest"],
        )
        downtime = GaugeMetricFamily(
            "postcopy_downtime_seconds", "Of the last migration: last step at the source to first one here.", labels=labels
        )
        uncertainty = GaugeMetricFamily(
            "postcopy_downtime_uncertainty_seconds", "How far off the downtime may be, from the two hosts' clocks.", labels=labels
        )
        for (role, guest), figures in current.items():
            for kind, histogram in figures.latency.items():
                buckets = list(zip(_BOUNDS, histogram.folded(), strict=True))
                faults.add_metric([role, guest, kind], buckets, histogram.sum_ns / 1e9)
            for path, number in figures.pages.items():
                pages.add_metric([role, guest, path], number)
            for path, number in figures.bytes_moved.items():
                moved.add_metric([role, guest, path], number)
            for state, number in figures.ended.items():
                ended.add_metric([role, guest, state], number)
            for kind, number in figures.errors.items():
                errors.add_metric([role, guest, kind], number)
            if role == Role.DESTINATION:  # 0 is said too: an alert needs the series before the loss
                lost.add_metric([role, guest], figures.pages_lost)
            else:
                waited.add_metric([guest], figures.pace_waited_seconds)
            reconnects.add_metric([role, guest], figures.reconnects)
            polled.add_metric([role, guest], figures.polled_seconds)
            if figures.downtime_seconds is not None:
                downtime.add_metric([role, guest], figures.downtime_seconds)
                uncertainty.add_metric([role, guest], figures.downtime_uncertainty_seconds)
        yield from (faults, pages, moved, ended, errors, lost, reconnects, polled, waited, downtime, uncertainty)
