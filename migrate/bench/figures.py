"""Figures of a benchmark: samples, quantiles by one estimator for both sides, the JSON, the bounds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Latencies:
    """A log-linear histogram summed over runs: (lower bound in ns, count) as the product and the floor both print it."""

    def __init__(self, least_ns: int = 0) -> None:
        self._least_ns = least_ns
        self._buckets: Counter[int] = Counter()

    def add(self, buckets: Iterable[Sequence[int]]) -> None:
        for low_ns, count in buckets:
            if low_ns >= self._least_ns:
                self._buckets[low_ns] += count

    def figures(self) -> dict[str, float]:
        return {"p50": self._quantile(0.5), "p99": self._quantile(0.99), "n": sum(self._buckets.values())}

    def _quantile(self, share: float) -> float:
        """In seconds, interpolated inside its bucket (buckets are 1/16 of an octave wide)."""
        target = share * sum(self._buckets.values())
        seen = 0
        for low_ns, count in sorted(self._buckets.items()):
            if seen + count >= target:
                width_ns = (1 << (low_ns.bit_length() - 1)) / 16
                return (low_ns + width_ns * (target - seen) / count) / 1e9
            seen += count
        return 0.0


def quantile(samples: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def samples_figures(samples: Sequence[float]) -> dict[str, float]:
    return {"p50": quantile(samples, 0.5), "p99": quantile(samples, 0.99), "n": len(samples)}


@dataclass(frozen=True, slots=True)
class Bound:
    """What one figure must reach. ``where``: ``ratio.p50``, ``product.p99``, ``figures.NAME``."""

    where: str
    limit: float
    at_least: bool = False

    def value(self, result: "Result") -> float:
        section, name = self.where.split(".", 1)
        return float(getattr(result, section)[name])

    def holds(self, result: "Result") -> bool:
        value = self.value(result)
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(slots=True)
class Result:
    """One scenario: what the product did, what the floor did in the same run, and the ratio product / floor."""

    name: str
    unit: str
    product: dict[str, float]
    floor: dict[str, float]
    bounds: Sequence[Bound] = ()
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> dict[str, float]:
        return {key: self.product[key] / self.floor[key] for key in self.product if key != "n" and self.floor.get(key)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "product": self.product,
            "floor": self.floor,
            "ratio": self.ratio,
            "figures": self.figures,
        }
