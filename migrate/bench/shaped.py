"""The scenario `shaped`: urgent pages and bulk on one link of 1 Gbit/s without priorities, with and without pacing.

For each congestion control that the kernel has: what share of a plain TCP transfer's rate bulk gets, and how long a fault waits
for the source, alone and beside bulk. What is compared stands in one round: transfer, idle, paced, unpaced, and again.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from migrate.bench.figures import Bound, Result
from migrate.bench.scenarios import MIB, Shuttle
from migrate.bench.shaped_link import ADDRESSES, MBIT, ShapedLink
from migrate.errors import HostLacksError
from migrate.pair import COMMAND, DaemonProcess, Pair
from migrate.session import MigrationStatus

LINK_BYTES_PER_SECOND = 1000 * MBIT
CONTROLS = ("cubic", "reno", "bbr")
WORKLOAD = ("--pattern", "permute", "--write-ratio", "0")
TOUCHES_A_SECOND = 400
"""Beside bulk: 1.3 % of the link, and 99 faults a page behind a p99."""
LATE_SECONDS = 150e-6
TIMES_IDLE = 3


class LinkedPair(Pair):
    """Daemons at the two ends of the link; guests are outside of it and attach by unix sockets."""

    def __init__(self, link: ShapedLink, *arguments: str) -> None:
        super().__init__(arguments=("--poll", "0", "--insecure", *arguments))
        self._link = link

    def daemon(self, role: str) -> DaemonProcess:
        end = int(role == "destination")
        arguments = (*self._arguments, "--listen", f"{ADDRESSES[end]}:0")
        child = DaemonProcess(self.directory, role, arguments, command=[*self._link.inside(end), *COMMAND])
        self._children.append(child)
        return child


@dataclass
class Measured:
    """Of one congestion control: a figure a round."""

    plain: list[float] = field(default_factory=list)
    rate: dict[str, list[float]] = field(default_factory=lambda: {"paced": [], "unpaced": []})
    p50: dict[str, list[float]] = field(default_factory=lambda: {"idle": [], "paced": [], "unpaced": []})
    p99: dict[str, list[float]] = field(default_factory=lambda: {"idle": [], "paced": [], "unpaced": []})

    def note(self, name: str, status: MigrationStatus) -> None:
        remote = status.faults["remote"]
        self.p50[name].append(remote.p50_seconds)
        self.p99[name].append(remote.p99_seconds)

    def figures(self, control: str) -> dict[str, float]:
        """Medians of the rounds, each share of its round's own transfer."""
        told = {f"{control}_link_bytes_per_second": statistics.median(self.plain)}
        for name, rates in self.rate.items():
            shares = [rate / plain for rate, plain in zip(rates, self.plain, strict=True)]
            told[f"{control}_{name}_bulk_of_link"] = statistics.median(shares)
        for name in self.p50:
            told[f"{control}_{name}_p50_seconds"] = statistics.median(self.p50[name])
            told[f"{control}_{name}_p99_seconds"] = statistics.median(self.p99[name])
        return told


def available(path: Path = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")) -> list[str]:
    return [control for control in CONTROLS if control in path.read_text().split()]


def bulk_bytes_per_second(status: MigrationStatus) -> float:
    """While it streamed: from the switchover to the end."""
    moved_bytes = status.pages["bulk"] * 4096
    return moved_bytes / (status.timeline_seconds["complete"] - status.timeline_seconds["postcopy"])


def measure(link: ShapedLink, control: str, rounds: int, size_bytes: int, idle_bytes: int, seconds: float) -> Measured:
    measured = Measured()
    options = ("--congestion-control", control)
    with LinkedPair(link, *options) as paced, LinkedPair(link, *options, "--no-pacing") as unpaced:
        beside = {
            name: Shuttle(pair, name, size_bytes, *WORKLOAD, "--rate", str(TOUCHES_A_SECOND))
            for name, pair in (("paced", paced), ("unpaced", unpaced))
        }
        idle = Shuttle(paced, "idle", idle_bytes, *WORKLOAD, "--rate", str(4 * TOUCHES_A_SECOND))
        for _ in range(rounds):
            with idle.frozen():
                measured.plain.append(link.transfer(control, seconds))
                for name, shuttle in beside.items():
                    status = shuttle.move()
                    measured.rate[name].append(bulk_bytes_per_second(status))
                    measured.note(name, status)
            measured.note("idle", idle.move(bulk=False))
    return measured


def shaped(tiny: bool) -> Result:
    """Raises HostLacksError: it makes network namespaces."""
    rounds, size_bytes, idle_bytes, seconds = (1, 16 * MIB, 1 * MIB, 0.2) if tiny else (3, 256 * MIB, 4 * MIB, 1.2)
    result = Result("shaped", "", {}, {})
    controls = available()[:1] if tiny else available()
    if not controls:
        raise HostLacksError("shaped", f"the kernel has none of {', '.join(CONTROLS)}", "modprobe tcp_cubic")
    shares: list[float] = []
    late: list[float] = []
    with ShapedLink(LINK_BYTES_PER_SECOND) as link:
        for control in controls:
            told = measure(link, control, rounds, size_bytes, idle_bytes, seconds).figures(control)
            result.figures |= told
            shares.append(told[f"{control}_paced_bulk_of_link"])
            idle = told[f"{control}_idle_p99_seconds"]
            late.append(told[f"{control}_paced_p99_seconds"] / max(TIMES_IDLE * idle, idle + LATE_SECONDS))
    result.figures |= {"least_bulk_of_link": min(shares), "most_urgent_p99_of_allowed": max(late)}
    result.bounds = (Bound("figures.least_bulk_of_link", 0.9, at_least=True), Bound("figures.most_urgent_p99_of_allowed", 1))
    return result
