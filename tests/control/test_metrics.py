"""/metrics and /healthz of both daemons: names, types and sizes, and figures that agree with the API's."""

import socket
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from migrate import __version__
from migrate.clock import monotonic_ns
from migrate.dataplane import FOLDED_BOUNDS_SECONDS, Histogram
from migrate.metrics import GUESTS_KEPT, DaemonCollector, Totals
from migrate.pair import DaemonProcess, Pair
from migrate.refusals import Refusals
from proto.frame import Frame, FrameKind
from proto.messages import ClockPing, ClockPong, Prepared, Refused, Running, Switchover
from proto.states import State

from ..failure.fakes import FakeDestination, FakeGuest, FakeSource, place_of
from ..path.commuter import Commuter, until

BUCKETS_MAX = 30
TYPES = {
    "postcopy_build_info": "gauge",
    "postcopy_guests": "gauge",
    "postcopy_migration_phase": "gauge",
    "postcopy_requests_outstanding": "gauge",
    "postcopy_migration_pages_final": "gauge",
    "postcopy_migration_pages": "gauge",
    "postcopy_fault_latency_seconds": "histogram",
    "postcopy_pages": "counter",
    "postcopy_bytes": "counter",
    "postcopy_migrations": "counter",
    "postcopy_errors": "counter",
    "postcopy_connections_refused": "counter",
    "postcopy_tls_certificate_expiry_timestamp_seconds": "gauge",
    "postcopy_lost_pages": "counter",
    "postcopy_polled_seconds": "counter",
    "postcopy_reconnects": "counter",
    "postcopy_bulk_pace_bytes_per_second": "gauge",
    "postcopy_bulk_waited_seconds": "counter",
    "postcopy_downtime_seconds": "gauge",
    "postcopy_downtime_uncertainty_seconds": "gauge",
}
LABELS = {"role", "guest", "kind", "phase", "state", "version", "le", "socket", "reason"}


class Scrape:
    """What one daemon says at one moment."""

    def __init__(self, daemon: DaemonProcess) -> None:
        answer = httpx.get(f"http://{daemon.metrics_address}/metrics", trust_env=False, timeout=10)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        names = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")]
        assert len(names) == len(set(names)), "a counter's name with _total is somebody else's name"
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(answer.text)}

    def value(self, sample_name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == sample_name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{sample_name} {labels}: {found}"
        return found[0]

    def by_kind(self, sample_name: str, **labels: str) -> dict[str, float]:
        samples = next(family for name, family in self.families.items() if sample_name.startswith(name)).samples
        return {s.labels["kind"]: s.value for s in samples if s.name == sample_name and labels.items() <= s.labels.items()}


@pytest.fixture(scope="module")
def commuter(pair: Pair) -> Commuter:
    return Commuter(pair, "metered", "1M", options=("--pattern", "permute", "--rate", "300", "--zero-ratio", "0.2"))


@pytest.fixture(scope="module")
def moved(commuter: Commuter) -> Iterator[tuple[Scrape, Scrape, Any, Any]]:
    """One migration, by faults alone: both daemons scraped in postcopy; the status at the end of both."""
    source, destination = commuter.is_at, commuter.goes_to
    with source.client() as here, destination.client() as there:
        begun = here.migrate(commuter.guest_id, destination.address, bulk=False)
        until(lambda: here.status(begun.id).pages_done > 20, "some pages are there")
        during = Scrape(source), Scrape(destination)
        assert here.status(begun.id, settled_within_seconds=20).state == "complete"
        until(lambda: there.status(begun.id).settled, "both sides know")
        yield *during, here.status(begun.id), there.status(begun.id)


@pytest.mark.requires("uffd")
def test_names_types_and_labels(pair: Pair, moved: object) -> None:
    for daemon in (pair.source, pair.destination):
        families = Scrape(daemon).families
        assert {name: family.type for name, family in families.items()} == TYPES
        for family in families.values():
            assert family.documentation.endswith(".")
            for sample in family.samples:
                assert set(sample.labels) <= LABELS


@pytest.mark.requires("uffd")
def test_histograms_are_small_and_whole(pair: Pair, moved: object) -> None:
    samples = Scrape(pair.destination).families["postcopy_fault_latency_seconds"].samples
    kinds = {sample.labels["kind"] for sample in samples}
    assert kinds == {"remote", "local", "zero"}
    for kind in kinds:
        of_kind = [sample for sample in samples if sample.labels["kind"] == kind and sample.labels["guest"] == "metered-here"]
        buckets = [(float(s.labels["le"]), s.value) for s in of_kind if s.name.endswith("_bucket")]
        assert 2 <= len(buckets) <= BUCKETS_MAX
        assert buckets == sorted(buckets)
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1][0] == float("inf")
        (count,) = [s.value for s in of_kind if s.name.endswith("_count")]
        assert buckets[-1][1] == count


def test_bounds_cover_what_is_measured() -> None:
    assert len(FOLDED_BOUNDS_SECONDS) == BUCKETS_MAX - 1
    assert FOLDED_BOUNDS_SECONDS[0] < 2e-6
    assert FOLDED_BOUNDS_SECONDS[-1] > 5


@pytest.mark.requires("uffd")
def test_figures_while_it_moves(moved: tuple[Scrape, Scrape, Any, Any]) -> None:
    for scrape, role in zip(moved[:2], ("source", "destination"), strict=True):
        assert scrape.value("postcopy_migration_phase", role=role, phase="postcopy") == 1
        assert scrape.value("postcopy_migration_pages", role=role) == 256
        assert 20 <= scrape.value("postcopy_migration_pages_final", role=role) < 256
    assert moved[0].value("postcopy_guests", state="leaving") == 1
    assert moved[1].value("postcopy_guests", state="arriving") == 1
    assert 0 <= moved[1].value("postcopy_requests_outstanding") <= 1  # one thread waits for at most one page
    assert moved[1].value("postcopy_lost_pages_total", role="destination", guest="metered-here") == 0
    assert not moved[0].families["postcopy_lost_pages"].samples  # the destination's to say
    assert moved[1].by_kind("postcopy_fault_latency_seconds_count")["remote"] >= 20  # before it has ended, too


@pytest.mark.requires("uffd")
def test_figures_of_an_ended_migration_stay_and_agree(pair: Pair, moved: tuple[Scrape, Scrape, Any, Any]) -> None:
    for daemon, role, status in ((pair.source, "source", moved[2]), (pair.destination, "destination", moved[3])):
        scrape = Scrape(daemon)
        who = {"role": role, "guest": status.guest_id}
        assert scrape.value("postcopy_migrations_total", state="complete", **who) == 1
        assert scrape.by_kind("postcopy_pages_total", **who) == status.pages
        assert sum(scrape.by_kind("postcopy_bytes_total", **who).values()) == status.bytes_moved
        assert scrape.value("postcopy_downtime_seconds", **who) == pytest.approx(status.downtime_seconds)
        assert scrape.value("postcopy_downtime_uncertainty_seconds", **who) == 0
        assert not scrape.families["postcopy_migration_phase"].samples
        assert not scrape.families["postcopy_errors"].samples
    scrape = Scrape(pair.destination)
    assert scrape.value("postcopy_lost_pages_total", role="destination", guest="metered-here") == 0
    counts = scrape.by_kind("postcopy_fault_latency_seconds_count", role="destination")
    assert counts == {kind: latency.count for kind, latency in moved[3].faults.items()}
    seconds = scrape.by_kind("postcopy_fault_latency_seconds_sum", role="destination")
    remote = moved[3].faults["remote"]
    assert 0 < seconds["remote"] <= remote.count * remote.max_seconds
    assert scrape.value("postcopy_build_info", version=__version__) == 1


@pytest.mark.requires("uffd")
def test_failed_migrations_are_counted_by_what_was_wrong(pair: Pair, moved: object) -> None:
    with FakeGuest("unlucky", "running", "2M") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        assert pair.move("unlucky", pair.source, pair.destination).state == "failed"
        scrape = Scrape(pair.source)
        assert scrape.value("postcopy_errors_total", guest="unlucky", kind="no-guest-fits") == 1
        assert scrape.value("postcopy_migrations_total", guest="unlucky", state="failed") == 1
        assert Scrape(pair.destination).value("postcopy_errors_total", guest="unlucky", kind="no-guest-fits") == 1


@pytest.mark.requires("uffd")
def test_pages_that_a_stalled_migration_left_are_counted(pair: Pair, moved: object) -> None:
    """Of 768 pages 16 came when the source went away. The same guest, begun anew, loses all: one series, which adds up."""
    lost = {"role": "destination", "guest": "forlorn"}

    def lose(came: int, lost_by_now: int) -> None:
        with (
            FakeGuest("forlorn", "waiting", "3M") as guest,
            FakeSource(pair.destination.address, ((3 << 20, 4096),), "forlorn") as source,
        ):
            guest.attach(pair.destination.runtime_dir / "guests.sock")
            source.until_running(guest)
            if came:
                frame = Frame(FrameKind.PAGES, region=0, page_index=0, length_bytes=came * 4096)
                source.bulk.sendall(frame.encode() + b"x" * frame.length_bytes)
            until(lambda: Scrape(pair.destination).value("postcopy_migration_pages_final", **lost) == came, "pages are there")
            source.control.send(Refused(code="failed", what="the source", expected="to go on", got="its end"))
            until(lambda: pair.destination.log().count('"migration stalled') == (1 if came else 2), "it has stalled")
            assert Scrape(pair.destination).value("postcopy_migration_phase", **lost, phase="stalled") == 1
            assert Scrape(pair.destination).value("postcopy_lost_pages_total", **lost) == lost_by_now
        with pair.destination.client() as client:
            until(lambda: all(one["id"] != "forlorn" for one in client.guests()), "the guest is gone")

    lose(came=16, lost_by_now=752)
    lose(came=0, lost_by_now=752 + 768)


@pytest.mark.requires("uffd")
def test_no_scrape_within_a_switchover(pair: Pair) -> None:
    """It waits until the guest runs: what the source says of its clock meanwhile shows that its loop was free to answer."""
    with FakeGuest("still", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        client.migrate("still", fake.address)
        fake.prepare(guest)
        with socket.create_connection(place_of(pair.source.metrics_address), 10) as scrape:
            scrape.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            for _ in range(20):  # the gate is shut for 0.1 s at most
                fake.control.send(ClockPing(sent_ns=monotonic_ns()))
                fake.control.receive(ClockPong)
            scrape.setblocking(False)
            with pytest.raises(BlockingIOError):
                scrape.recv(1)
            fake.control.send(Prepared())
            guest.pauses()
            fake.control.send(Running(epoch=fake.control.receive(Switchover).epoch))
            scrape.settimeout(10)
            assert scrape.recv(12) == b"HTTP/1.1 200"


def test_healthz(pair: Pair) -> None:
    for daemon in (pair.source, pair.destination):
        answer = httpx.get(f"http://{daemon.metrics_address}/healthz", trust_env=False)
        assert (answer.status_code, answer.text) == (200, "ok\n")


def ended_migration(number: int) -> Any:
    figures = {"bytes_urgent": 100, "bytes_bulk": 1000, "bytes_precopy": 10000}
    return SimpleNamespace(
        role="source",
        guest_id=f"guest-{number}",
        state=State.COMPLETE,
        error=None,
        reconnects=0,
        downtime_ns=1_000_000 * number,
        downtime_uncertainty_ns=0,
        figures=lambda: figures,
        pages_by_path=lambda: {"urgent": 1, "bulk": 2},
        latency=lambda kind: Histogram(),
    )


def test_series_of_ended_guests_are_bounded() -> None:
    totals = Totals()
    for number in range(100):
        totals.add(ended_migration(number))
    totals.add(ended_migration(70))  # the one that was moved last is kept longest
    kept: Sequence[str] = [guest for _, guest in totals.by_guest]
    assert GUESTS_KEPT == len(kept) == 32
    assert kept[-1] == "guest-70"
    assert kept[0] == "guest-68"
    assert totals.by_guest["source", "guest-70"].pages == {"urgent": 2, "bulk": 4}
    assert totals.by_guest["source", "guest-70"].bytes_moved == {"urgent": 200, "bulk": 2000, "precopy": 20000}
    assert totals.by_guest["source", "guest-70"].ended == {"complete": 2}


def test_all_that_is_kept_is_told_in_a_bounded_number_of_lines() -> None:
    totals = Totals()
    for number in range(100):
        totals.add(ended_migration(number))
    daemon: Any = SimpleNamespace(role="destination", totals=totals, guests={}, migrations={}, refusals=Refusals(), tls=None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(daemon))
    assert generate_latest(registry).count(b"_bucket{") == 32 * 3 * BUCKETS_MAX
