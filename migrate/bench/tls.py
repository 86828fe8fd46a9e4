"""The scenario `tls`: bulk at full rate, and first touches without bulk, with TLS and in the clear, in turns."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from migrate.bench.certificates import Authority
from migrate.bench.figures import Bound, Latencies, Result
from migrate.bench.scenarios import MIB, Shuttle, postcopy_seconds
from migrate.pair import Pair

NAME = "host.test"
ARGUMENTS = ("--congestion-control", "reno", "--poll", "0")


class Side:
    """Two daemons with two guests, one moved with bulk, the other one without."""

    def __init__(self, pair: Pair, stream_bytes: int, idle_bytes: int) -> None:
        self.stream = Shuttle(pair, "stream", stream_bytes, "--rate", "1")
        with self.stream.frozen():
            self.idle = Shuttle(pair, "idle", idle_bytes, "--pattern", "permute", "--write-ratio", "0")
        self.rates: list[float] = []
        self.latencies = Latencies()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        with self.stream.frozen(), self.idle.frozen():
            yield

    def round(self) -> None:
        with self.idle.frozen():
            self.rates.append(self.stream.size_bytes / postcopy_seconds(self.stream.move(warmed=True)))
        with self.stream.frozen():
            self.idle.move(bulk=False, warmed=True)
        self.latencies.add(self.idle.first_touches())


def tls(tiny: bool) -> Result:
    """Medians of the rounds; and of all first touches."""
    stream_bytes, idle_bytes, rounds = (16 * MIB, 4 * MIB, 1) if tiny else (1024 * MIB, 64 * MIB, 7)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-tls-")))
        files = Authority(directory / "authority").issue(directory / "host", NAME)
        plain = Side(stack.enter_context(Pair(arguments=ARGUMENTS)), stream_bytes, idle_bytes)
        with plain.frozen():
            secured_pair = Pair(arguments=(*ARGUMENTS, "--tls-dir", str(files), "--tls-allow", NAME))
            secured = Side(stack.enter_context(secured_pair), stream_bytes, idle_bytes)
        for _ in range(rounds):
            for one, other in ((plain, secured), (secured, plain)):
                with other.frozen():
                    one.round()
    figures: dict[str, float] = {"runs": rounds}
    for name, side in (("plain", plain), ("tls", secured)):
        figures[f"{name}_stream_bytes_per_second"] = statistics.median(side.rates)
        figures[f"{name}_urgent_p50_seconds"] = side.latencies.figures()["p50"]
        figures[f"{name}_urgent_p99_seconds"] = side.latencies.figures()["p99"]
    for name in ("stream_bytes_per_second", "urgent_p50_seconds"):
        figures[f"{name.split('_')[0]}_over_plain"] = figures[f"tls_{name}"] / figures[f"plain_{name}"]
    bounds = (Bound("figures.stream_over_plain", 0.6, at_least=True), Bound("figures.urgent_over_plain", 1.3))
    return Result("tls", "", {}, {}, bounds, figures)
