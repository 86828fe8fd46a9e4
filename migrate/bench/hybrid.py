"""The scenario `hybrid`: precopy, then postcopy. What its guest waits for after it has been resumed, and its downtime."""

import statistics

from migrate.bench.figures import Bound, Result, quantile, samples_figures
from migrate.bench.scenarios import MIB, Shuttle, bench_pair, downtime_seconds, hops

WORKLOAD = ("--pattern", "zipf", "--rate", "500000", "--write-ratio", "0.005")
"""Reads by Zipf's law as fast as a thread can; 2,500 writes a second: 1 % of the pages of a GiB, if they were all different."""
GIB = 1024 * MIB


def stalls_after_precopy(shuttle: Shuttle, moves: int) -> dict[str, float]:
    """What the guest waited for in so many moves, before and after the stale set had been applied."""
    touched = local = held = after = stale_touched = stale = 0
    windows: list[float] = []
    for _ in range(moves):
        status = shuttle.move(precopy="auto")
        told = shuttle.at_destination().precopy
        assert told is not None
        assert told.stale_window_seconds is not None
        windows.append(told.stale_window_seconds)
        touched += shuttle.pages_touched()
        local += status.faults["local"].count
        held += told.faults_held or 0
        after += told.faults_after or 0
        stale += told.stale_pages
        stale_touched += told.stale_pages_touched or 0
    return {
        "moves": moves,
        "stale_pages_a_move": stale / moves,
        "stale_pages_touched_a_move": stale_touched / moves,
        "remote_stalls_per_stale_page_touched": after / max(stale_touched, 1),
        "stale_window_seconds": statistics.median(windows),
        "stale_window_max_seconds": max(windows),
        "stalls_in_stale_window_a_move": held / moves,
        "local_faults_per_page_touched": local / max(touched, 1),
    }


def downtime_of(shuttle: Shuttle, precopy: str) -> float:
    """A precopied guest may be whole before its first step: then the destination alone hears of it."""
    status = shuttle.move(precopy=precopy)
    return downtime_seconds(status if status.downtime_seconds is not None else shuttle.at_destination())


def hybrid(tiny: bool) -> Result:
    """A guest that reads by Zipf's law and rewrites 1 % of its pages a second: its stalls at 1 GiB, and its downtime at 256 MiB,
    interleaved with pure postcopy and with 8 GiB."""
    batches, moves = (1, 2) if tiny else (11, 10)
    middle_bytes, small_bytes, large_bytes = (16 * MIB, 16 * MIB, 32 * MIB) if tiny else (GIB, GIB // 4, 8 * GIB)
    small_seconds: list[float] = []
    large_seconds: list[float] = []
    pure_seconds: list[float] = []
    bare: list[float] = []
    with bench_pair() as pair:
        middle = Shuttle(pair, "middle", middle_bytes, *WORKLOAD)
        figures = stalls_after_precopy(middle, batches)
        middle.end()  # two guests of 8 GiB want its memory
        large = Shuttle(pair, "large", large_bytes, *WORKLOAD)
        with large.frozen():
            small = Shuttle(pair, "small", small_bytes, *WORKLOAD)
        for _ in range(batches):
            with large.frozen():
                for _ in range(moves):
                    small_seconds.append(downtime_of(small, "auto"))
                    pure_seconds.append(downtime_of(small, "off"))
            with small.frozen():
                large_seconds.append(downtime_of(large, "auto"))
            with small.frozen(), large.frozen():
                hops(moves, bare)
    result = Result("hybrid", "seconds", samples_figures(small_seconds), samples_figures(bare))
    result.figures = {
        **figures,
        "downtime_over_postcopy": result.product["p50"] / quantile(pure_seconds, 0.5),
        "downtime_8gib_p50_seconds": quantile(large_seconds, 0.5),
        "downtime_8gib_moves": len(large_seconds),
        "downtime_8gib_over_256mib": quantile(large_seconds, 0.5) / result.product["p50"],
    }
    result.bounds = (
        Bound("figures.remote_stalls_per_stale_page_touched", 1.2),
        Bound("figures.stale_window_seconds", 0.003),
        Bound("figures.local_faults_per_page_touched", 1 / 16),
        Bound("figures.downtime_over_postcopy", 1.2),
        Bound("figures.downtime_8gib_over_256mib", 1.2),
    )
    return result
