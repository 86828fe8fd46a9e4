"""``postcopy bench kvm``: what moving a KVM guest costs it. Its downtime over many moves; and its faults, as it measures them
itself, beside those of the same machine and program behind the floor's bare C (floor_kvm.c), in the same run."""

from migrate.bench.figures import Bound, Latencies, Result, samples_figures
from migrate.bench.floor import floor
from migrate.bench.scenarios import MIB, Shuttle, bench_pair, downtime_seconds, hops

NAME = "kvm"
DOWNTIME_P50_SECONDS = 0.001
DOWNTIME_P99_SECONDS = 0.003
FAULT_OVER_FLOOR = 1.3


def kvm(tiny: bool) -> Result:
    """Two vCPUs at work and moved to and fro; then one that touches each page once, without bulk."""
    batches, moves, rounds = (1, 4, 1) if tiny else (10, 10, 6)
    busy_bytes, fault_bytes = (8 * MIB, 4 * MIB) if tiny else (64 * MIB, 16 * MIB)
    seconds: list[float] = []
    precopied: list[float] = []
    bare_hops: list[float] = []
    product, bare = Latencies(), Latencies()
    with bench_pair() as pair:
        busy = Shuttle(pair, "busy", busy_bytes, "--vcpus", "2", kind="kvm")
        with busy.frozen():
            reader = Shuttle(pair, "reader", fault_bytes, "--vcpus", "1", "--write-ratio", "0", kind="kvm")
        for _ in range(batches):
            with reader.frozen():
                for _ in range(moves):
                    seconds.append(downtime_seconds(busy.move(warmed=True)))
                precopied.append(downtime_seconds(busy.move(precopy="auto")))
            with reader.frozen(), busy.frozen():
                hops(moves, bare_hops)
        for round_number in range(rounds):
            with busy.frozen():
                reader.move(bulk=False, warmed=True)
                product.add(reader.first_touches())
            with busy.frozen(), reader.frozen():
                pages = fault_bytes // 4096
                bare.add(floor("fault-kvm", memory_bytes=fault_bytes, touches=pages, seed=round_number)["histogram"])
    result = Result(NAME, "seconds", samples_figures(seconds), samples_figures(bare_hops))
    faults, floor_faults = product.figures(), bare.figures()
    result.figures = {
        "fault_p50_seconds": faults["p50"],
        "fault_p99_seconds": faults["p99"],
        "fault_p50_over_floor": faults["p50"] / floor_faults["p50"],
        "fault_p99_over_floor": faults["p99"] / floor_faults["p99"],
        "faults": faults["n"],
        "downtime_precopied_p50_seconds": samples_figures(precopied)["p50"],
    }
    result.bounds = (
        Bound("product.p50", DOWNTIME_P50_SECONDS),
        Bound("product.p99", DOWNTIME_P99_SECONDS),
        Bound("figures.fault_p50_over_floor", FAULT_OVER_FLOOR),
    )
    return result
