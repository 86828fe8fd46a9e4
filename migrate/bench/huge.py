"""The scenarios `huge-urgent` and `huge-stream`: pages of 2 MiB, one that a fault waits for, and a whole memory of them."""

import statistics

from migrate.bench.figures import Bound, Latencies, Result
from migrate.bench.floor import floor
from migrate.bench.scenarios import MIB, Shuttle, bench_pair, postcopy_seconds
from migrate.errors import HostLacksError
from migrate.host import hugepages, sentences

HUGE_STALL_NS = 100_000
"""A first touch that took longer waited for its page of 2 MiB: of 512 touches of one, 511 find it mapped."""


def require_pages(size_bytes: int) -> None:
    """Both ends of a product run and, beside it, of a floor run. Raises HostLacksError."""
    wanted, pool = 4 * size_bytes // hugepages.HUGEPAGE_BYTES, hugepages.pool(hugepages.HUGEPAGE_BYTES)
    if pool is None:
        raise HostLacksError("pages of 2 MiB", "this kernel has none", "use another kernel, or name the other scenarios")
    if pool.unreserved < wanted:
        raise HostLacksError("pages of 2 MiB", *sentences.hugepages_missing(wanted, pool))


def huge_urgent(tiny: bool) -> Result:
    """First touches of each page in turn, no bulk."""
    size_bytes, rounds = (8 * MIB, 1) if tiny else (64 * MIB, 12)
    require_pages(size_bytes)
    product, bare = Latencies(HUGE_STALL_NS), Latencies()
    with bench_pair() as pair:
        shuttle = Shuttle(pair, "huge", size_bytes, "--pattern", "permute", "--write-ratio", "0", memory_kind=":hugetlb")
        for round_number in range(rounds):
            shuttle.move(bulk=False)
            product.add(shuttle.first_touches())
            with shuttle.frozen():
                bare.add(floor("huge-urgent", memory_bytes=size_bytes, seed=round_number)["histogram"])
    bounds = (Bound("ratio.p50", 1.25),)
    return Result("huge-urgent", "seconds", product.figures(), bare.figures(), bounds)


def huge_stream(tiny: bool) -> Result:
    """A whole memory at full rate."""
    size_bytes, rounds = (16 * MIB, 1) if tiny else (256 * MIB, 9)
    require_pages(size_bytes)
    rates: list[float] = []
    floor_rates: list[float] = []
    with bench_pair() as pair:
        shuttle = Shuttle(pair, "huge", size_bytes, "--rate", "1", memory_kind=":hugetlb")
        for round_number in range(rounds):
            rates.append(size_bytes / postcopy_seconds(shuttle.move()))
            with shuttle.frozen():
                floor_rates.append(floor("huge-stream", memory_bytes=size_bytes, seed=round_number)["value"])
    product, bare = ({"value": statistics.median(of)} for of in (rates, floor_rates))
    bounds = (Bound("ratio.value", 0.9, at_least=True),)
    return Result("huge-stream", "bytes/second", product, bare, bounds, {"runs": rounds})
