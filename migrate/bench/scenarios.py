"""The scenarios. Each interleaves the product with its floor and returns a Result; ``tiny`` only shows that it runs.

Product and floor see the same: TCP over loopback, reno congestion control, memory that was touched a moment before, a
guest that times its own touches. The product is two daemons and guests as processes of their own, as in use.
"""

import contextlib
import http.client
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.bench.figures import Bound, Latencies, Result, quantile, samples_figures
from migrate.bench.floor import floor, warm
from migrate.pair import DaemonProcess, Pair, Process
from migrate.session import MigrationStatus

MIB = 1 << 20
STALL_NS = 2000
"""A touch under bulk that took longer was a fault; shorter ones found their page mapped."""
CPU_TICK_SECONDS = 0.01


def bench_pair(*, polling: bool = False) -> Pair:
    """Its threads sleep while they wait, as the floor's do; with ``polling`` as daemons do unless told otherwise."""
    return Pair(arguments=("--congestion-control", "reno", *(() if polling else ("--poll", "0"))))


class Shuttle:
    """One guest moved to and fro between two daemons; its two processes take turns in being the guest."""

    def __init__(self, pair: Pair, name: str, size_bytes: int, *options: str) -> None:
        self.size_bytes = size_bytes
        memory = f"{size_bytes // MIB}M"
        here = pair.guest(pair.source, f"{name}-a", memory, "--stay", "--no-verify", *options)
        there = pair.guest(pair.destination, f"{name}-b", memory, "--stay", "--no-verify", *options, waiting=True)
        here.event("stepped", deadline_seconds=60)
        self._ends: list[tuple[DaemonProcess, Process]] = [(pair.source, here), (pair.destination, there)]
        self.arrived: dict[str, object] = {}
        self.there: MigrationStatus | None = None

    def move(self, *, bulk: bool = True, precopy: str = "off", warmed: bool = False) -> MigrationStatus:
        """One migration, complete; afterwards the other end waits for the way back."""
        (leaves, leaving), (reaches, reaching) = self._ends
        with leaves.client() as client:
            if warmed:
                warm(self.size_bytes)
            begun = client.migrate(leaving.name, reaches.address, bulk=bulk, precopy=precopy)
            status = client.status(begun.id, settled_within_seconds=60)
        assert status.state == "complete", status
        seen = [reaching.event("stepped", "complete"), reaching.event("stepped", "complete")]  # in either order
        with reaches.client() as client:
            self.there = client.status(status.id)
        self.arrived = next(event for event in seen if event["event"] == "complete")
        leaving.event("waiting")
        self._ends.reverse()
        return status

    def end(self) -> None:
        """Both processes, and their memory."""
        for _, process in self._ends:
            process.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Both processes stopped: beside another guest's measurement they must not work."""
        for _, process in self._ends:
            process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for _, process in self._ends:
                process.signal(signal.SIGCONT)

    def first_touches(self) -> list[list[int]]:
        touches = self.arrived["first_touch"]
        assert isinstance(touches, dict)
        return list(touches["buckets"])

    def pages_touched(self) -> int:
        """Distinct pages, from the resumption to the end of the migration."""
        return sum(count for _, count in self.first_touches())

    def at_destination(self) -> MigrationStatus:
        """The last move as the daemon tells it that the guest has reached."""
        assert self.there is not None
        return self.there


def _first_touches(pair: Pair, tiny: bool) -> tuple[Latencies, Latencies]:
    """Random first touches of every page, no bulk: the product's and the floor's, whose threads sleep."""
    size_bytes, rounds = (4 * MIB, 1) if tiny else (64 * MIB, 6)
    product, bare = Latencies(), Latencies()
    shuttle = Shuttle(pair, "idle", size_bytes, "--pattern", "permute", "--write-ratio", "0")
    for round_number in range(rounds):
        shuttle.move(bulk=False, warmed=True)
        product.add(shuttle.first_touches())
        with shuttle.frozen():
            done = floor("fault-idle", memory_bytes=size_bytes, touches=size_bytes // 4096, seed=round_number)
        bare.add(done["histogram"])
    return product, bare


def fault_idle(tiny: bool) -> Result:
    """Both sleep while they wait."""
    with bench_pair() as pair:
        product, bare = _first_touches(pair, tiny)
    bounds = (Bound("ratio.p50", 1.15), Bound("ratio.p99", 1.5))
    return Result("fault-idle", "seconds", product.figures(), bare.figures(), bounds)


def fault_idle_polling(tiny: bool) -> Result:
    """The product's threads look for a while before they sleep, as they do unless told otherwise."""
    with bench_pair(polling=True) as pair:
        product, bare = _first_touches(pair, tiny)
        polled_seconds = sum(_polled_seconds(daemon) for daemon in (pair.source, pair.destination))
    figures = {"polled_seconds_per_fault": polled_seconds / product.figures()["n"]}
    bounds = (Bound("ratio.p50", 0.7),)
    return Result("fault-idle-polling", "seconds", product.figures(), bare.figures(), bounds, figures)


def _polled_seconds(daemon: DaemonProcess) -> float:
    """CPU time spent looking, of all guests of a daemon so far."""
    connection = http.client.HTTPConnection(daemon.metrics_address, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("postcopy_polled_seconds_total{"))


class Duplicates:
    """Pages that came for the second time, told by what one side sent and the other placed."""

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()
        self._placed: Counter[str] = Counter()

    def add(self, sent: MigrationStatus, placed: MigrationStatus) -> None:
        self._sent.update(sent.pages)
        self._placed.update(placed.pages)

    def figures(self) -> dict[str, float]:
        sent, ahead = sum(self._sent.values()), self._sent["readahead"]
        return {
            "duplicate_bytes_ratio": (sent - sum(self._placed.values())) / sent,
            "readahead_bytes_ratio": ahead / sent,
            "readahead_duplicate_bytes_ratio": (ahead - self._placed["readahead"]) / max(ahead, 1),
        }


def fault_under_stream(tiny: bool) -> list[Result]:
    """Random first touches beside bulk at full rate; only those that stalled. `random`: what of it came twice."""
    size_bytes, rounds = (16 * MIB, 1) if tiny else (512 * MIB, 9)
    product, bare = Latencies(STALL_NS), Latencies(STALL_NS)
    p99: dict[str, list[float]] = {"product": [], "floor": []}
    p50: dict[str, list[float]] = {"product": [], "floor": []}
    duplicates = Duplicates()
    with bench_pair() as pair:
        shuttle = Shuttle(pair, "stream", size_bytes, "--pattern", "random", "--write-ratio", "0")
        for round_number in range(rounds):
            duplicates.add(shuttle.move(warmed=True), shuttle.at_destination())
            with shuttle.frozen():
                done = floor("fault-under-stream", memory_bytes=size_bytes, touches=size_bytes // 4096, seed=round_number)
            for side, latencies, buckets in (
                ("product", product, shuttle.first_touches()),
                ("floor", bare, done["histogram"]),
            ):
                one = Latencies(STALL_NS)
                one.add(buckets)
                latencies.add(buckets)
                p50[side].append(one.figures()["p50"])
                p99[side].append(one.figures()["p99"])
    # A run's p99 is a lottery while others use the machine: the median of the runs is quoted.
    figures = [
        {"p50": statistics.median(p50[side]), "p99": statistics.median(p99[side]), "n": latencies.figures()["n"]}
        for side, latencies in (("product", product), ("floor", bare))
    ]
    bounds = (Bound("ratio.p50", 1.25), Bound("ratio.p99", 1.5))
    stalls = Result(
        "fault-under-stream", "seconds", figures[0], figures[1], bounds, {"runs_whose_median_p50_and_p99_are_given": rounds}
    )
    few = Bound("figures.duplicate_bytes_ratio", 0.05), Bound("figures.readahead_duplicate_bytes_ratio", 0.05)
    return [stalls, Result("random", "", {}, {}, few, duplicates.figures())]


def _cpu_seconds(pair: Pair) -> float:
    """Of both daemons since they began, ended threads included."""
    ticks = 0
    for daemon in (pair.source, pair.destination):
        fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * CPU_TICK_SECONDS


def _postcopy_seconds(status: MigrationStatus) -> float:
    return status.timeline_seconds["complete"] - status.timeline_seconds["postcopy"]


class Reading:
    """A guest that reads all of its memory in order while it comes: how fast, and how many pages for each time that it waits for
    the source. It has no floor in bare C: beside it stands the product's own stream, of a guest that does nothing."""

    def __init__(self, shuttle: Shuttle) -> None:
        self.shuttle = shuttle
        self._rates: list[float] = []
        self._touched = self._stalls = 0
        self._paths: Counter[str] = Counter()

    def move(self) -> None:
        status = self.shuttle.move(warmed=True)
        touched = self.shuttle.pages_touched()
        self._rates.append(touched * 4096 / _postcopy_seconds(status))
        self._touched += touched
        self._stalls += status.faults["remote"].count
        self._paths.update(self.shuttle.at_destination().pages)

    def result(self, stream_rate: float) -> Result:
        result = Result("sequential", "bytes/second", {"value": statistics.median(self._rates)}, {"value": stream_rate})
        result.figures = {
            "runs": len(self._rates),
            "pages_per_remote_stall": self._touched / max(self._stalls, 1),
            "readahead_bytes_ratio": self._paths["readahead"] / self._paths.total(),
        }
        result.bounds = (
            Bound("ratio.value", 0.7, at_least=True),
            Bound("figures.pages_per_remote_stall", 20, at_least=True),
        )
        return result


def stream_and_cpu(tiny: bool) -> list[Result]:
    """A whole memory at full rate, the CPU time of both daemons for it, and the same beside a guest that reads it in order."""
    size_bytes, rounds = (16 * MIB, 1) if tiny else (1024 * MIB, 7)
    rates: list[float] = []
    floor_rates: list[float] = []
    cpu: list[float] = []
    floor_cpu: list[float] = []
    with bench_pair() as pair:
        # Of another size: a daemon gives a guest to any that waits with the same regions.
        reading = Reading(Shuttle(pair, "reader", size_bytes + MIB, "--pattern", "sequential", "--write-ratio", "0"))
        with reading.shuttle.frozen():
            shuttle = Shuttle(pair, "bulk", size_bytes, "--rate", "1")
        for round_number in range(rounds):
            with reading.shuttle.frozen():
                before = _cpu_seconds(pair)
                rates.append(size_bytes / _postcopy_seconds(shuttle.move(warmed=True)))
                cpu.append(_cpu_seconds(pair) - before)
            with shuttle.frozen():
                reading.move()
            with shuttle.frozen(), reading.shuttle.frozen():
                done = floor("stream", memory_bytes=size_bytes, seed=round_number)
            floor_rates.append(done["value"])
            floor_cpu.append(done["cpu_seconds_per_gib"])
    stream = Result(
        "stream",
        "bytes/second",
        {"value": statistics.median(rates)},
        {"value": statistics.median(floor_rates)},
        (Bound("ratio.value", 0.9, at_least=True),),
        {"runs": rounds},
    )
    per_gib = statistics.median(cpu) / (size_bytes / (1 << 30))
    bounds = (Bound("ratio.value", 1.25),)
    return [
        stream,
        Result("cpu", "seconds", {"value": per_gib}, {"value": statistics.median(floor_cpu)}, bounds, {"runs": rounds}),
        reading.result(stream.product["value"]),
    ]


def _rss_anon_bytes(daemon: DaemonProcess) -> int:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/PID/status")


def hops(moves: int, into: list[float]) -> None:
    for low_ns, count in floor("hops", moves=moves)["histogram"]:
        into += [low_ns / 1e9] * count


def downtime_seconds(status: MigrationStatus) -> float:
    assert status.downtime_seconds is not None, f"the guest told no first step: {status}"
    return status.downtime_seconds


def downtime(tiny: bool) -> Result:
    """A busy guest moved to and fro: what it saw, at 16 MiB and, interleaved, at 4 GiB; the floor is the bare exchange."""
    batches, moves, large_bytes = (1, 4, 64 * MIB) if tiny else (21, 48, 4096 * MIB)
    small_seconds: list[float] = []
    large_seconds: list[float] = []
    bare: list[float] = []
    with bench_pair() as pair:
        large = Shuttle(pair, "large", large_bytes)
        with large.frozen():
            small = Shuttle(pair, "small", 16 * MIB)
        rss_bytes = 0
        for _ in range(batches):
            with large.frozen():
                for _ in range(moves):
                    small_seconds.append(downtime_seconds(small.move()))
            with small.frozen():
                large_seconds.append(downtime_seconds(large.move()))
                rss_bytes = max(rss_bytes, *(_rss_anon_bytes(daemon) for daemon in (pair.source, pair.destination)))
            with small.frozen(), large.frozen():
                hops(moves, bare)
    result = Result("downtime", "seconds", samples_figures(small_seconds), samples_figures(bare))
    p50_large = quantile(large_seconds, 0.5)
    result.figures = {
        "downtime_4gib_p50_seconds": p50_large,
        "downtime_4gib_moves": len(large_seconds),
        "downtime_4gib_over_16mib": p50_large / result.product["p50"],
        "daemon_rss_anon_bytes": rss_bytes,
        "daemon_rss_anon_bound_bytes": 96 * MIB + 2 * (large_bytes // 4096),
    }
    result.figures["daemon_rss_anon_share_of_bound"] = rss_bytes / result.figures["daemon_rss_anon_bound_bytes"]
    result.bounds = (
        Bound("product.p50", 0.0005),
        Bound("product.p99", 0.002),
        Bound("figures.downtime_4gib_over_16mib", 1.2),
        Bound("figures.daemon_rss_anon_share_of_bound", 1.0),
    )
    return result


@contextlib.contextmanager
def scraped(pair: Pair, per_second: int) -> Iterator[list[float]]:
    """Both daemons' /metrics read that often; gives the list that counts them."""
    done, stop = [0.0], threading.Event()

    def scrape() -> None:
        while not stop.wait(1 / per_second):
            for daemon in (pair.source, pair.destination):
                host, _, port = daemon.metrics_address.rpartition(":")
                connection = http.client.HTTPConnection(host, int(port), timeout=10)
                connection.request("GET", "/metrics")
                connection.getresponse().read()
                connection.close()
                done[0] += 1

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def downtime_scraped(tiny: bool) -> Result:
    """The same at 16 MiB while both daemons are scraped ten times a second."""
    batches, moves = (1, 4) if tiny else (10, 100)
    seconds: list[float] = []
    bare: list[float] = []
    with bench_pair() as pair:
        small = Shuttle(pair, "small", 16 * MIB)
        with scraped(pair, 10) as done:
            for _ in range(batches):
                for _ in range(moves):
                    seconds.append(downtime_seconds(small.move()))
                with small.frozen():
                    hops(moves, bare)
    bounds = (Bound("product.p99", 0.002),)
    return Result("downtime-scraped", "seconds", samples_figures(seconds), samples_figures(bare), bounds, {"scrapes": done[0]})


SCENARIOS: dict[str, Callable[[bool], Result | list[Result]]] = {
    "fault-idle": fault_idle,
    "fault-idle-polling": fault_idle_polling,
    "fault-under-stream": fault_under_stream,
    "random": fault_under_stream,
    "stream": stream_and_cpu,
    "cpu": stream_and_cpu,
    "sequential": stream_and_cpu,
    "downtime": downtime,
    "downtime-scraped": downtime_scraped,
}
