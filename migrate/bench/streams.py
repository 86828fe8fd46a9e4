"""The scenario `streams`: what several bulk connections bring and cost over loopback, beside one, interleaved.

On few cores they bring nothing: one connection keeps a receiving thread busy, and in one memory file writers queue on the
inode's lock. They are for links on which one TCP connection does not get what the link has.
"""

import statistics

from migrate.bench.figures import Result
from migrate.bench.scenarios import MIB, Shuttle, _cpu_seconds, bench_pair, postcopy_seconds

SEVERAL = (1, 2, 4)


def streams(tiny: bool) -> Result:
    size_bytes, rounds = (16 * MIB, 1) if tiny else (1024 * MIB, 7)
    rates: dict[int, list[float]] = {number: [] for number in SEVERAL}
    cpu: dict[int, list[float]] = {number: [] for number in SEVERAL}
    with bench_pair() as pair:
        shuttle = Shuttle(pair, "streams", size_bytes, "--rate", "1")
        for _ in range(rounds):
            for number in SEVERAL:
                before = _cpu_seconds(pair)
                rates[number].append(size_bytes / postcopy_seconds(shuttle.move(warmed=True, streams=number)))
                cpu[number].append(_cpu_seconds(pair) - before)
    figures: dict[str, float] = {"runs": rounds}
    for number in SEVERAL[1:]:
        for name, measured in (("rate", rates), ("cpu", cpu)):
            ratios = [several / max(one, 0.001) for several, one in zip(measured[number], measured[1], strict=True)]
            figures[f"{name}_{number}_ratio"] = statistics.median(ratios)
    return Result("streams", "", {}, {}, (), figures)
