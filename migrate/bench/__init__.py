"""``postcopy bench``: each scenario beside a floor in bare C, in the same run, interleaved. Three must be asked for by name:
``kvm`` needs /dev/kvm; two have no floor: ``resolvers`` compares what the kernel offers with itself (resolvers.py), ``qemu`` us
with QEMU's own postcopy.

Absolutes belong to one machine at one time; the ratios travel. What is recorded of the machine is CPU model, cores,
memory and kernel version number.
"""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from migrate.bench import kvm, qemu, resolvers
from migrate.bench.figures import Bound, Result
from migrate.bench.hostile import hostile
from migrate.bench.huge import huge_stream, huge_urgent
from migrate.bench.hybrid import hybrid
from migrate.bench.scenarios import SCENARIOS as POSTCOPY
from migrate.bench.shaped import shaped
from migrate.bench.streams import streams
from migrate.bench.tls import tls
from migrate.bench.tracking import tracking
from migrate.errors import HostLacksError, PostcopyError

USUAL = {
    **POSTCOPY,
    "hybrid": hybrid,
    "tracking": tracking,
    "shaped": shaped,
    "streams": streams,
    "hostile": hostile,
    "huge-urgent": huge_urgent,
    "huge-stream": huge_stream,
}
SCENARIOS = {**USUAL, kvm.NAME: kvm.kvm, "tls": tls}


def environment() -> dict[str, Any]:
    """Of this machine: no host name, no release suffix."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    version = re.match(r"\d+(\.\d+)*", platform.release())
    return {
        "cpu_model": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": version[0] if version else "unknown",
    }


def run(names: list[str], json_path: Path | None, *, check: bool, tiny: bool) -> bool:
    """Run and print. False: ``check`` was asked for and a bound is missed. Raises PostcopyError for an unknown name."""
    known = [*SCENARIOS, resolvers.NAME, qemu.NAME]
    if unknown := set(names) - set(known):
        raise PostcopyError("scenario", expected=", ".join(known), got=", ".join(sorted(unknown)), code="usage")
    wanted = [name for name in names if name in SCENARIOS] if names else list(USUAL)
    results: list[Result] = []
    console = Console(highlight=False, width=None if os.isatty(1) else 120)
    for function in dict.fromkeys(SCENARIOS[name] for name in wanted):
        console.print(f"running {', '.join(name for name in SCENARIOS if SCENARIOS[name] is function)} …")
        try:
            got = function(tiny)
        except HostLacksError as error:
            if names:  # asked for
                raise
            console.print(f"left out: {error}")
            continue
        results += [result for result in (got if isinstance(got, list) else [got]) if result.name in wanted]
    if results:
        console.print(table(results))
    measured = [result.to_dict() for result in results]
    if resolvers.NAME in names:
        console.print(f"running {resolvers.NAME} …")
        comparison = resolvers.resolvers(tiny)
        console.print(*resolvers.tables(comparison))
        measured.append(comparison.to_dict())
    beside_qemu = None
    if qemu.NAME in names:
        console.print(f"running {qemu.NAME} …")
        beside_qemu = qemu.compare(tiny)
        console.print(*qemu.tables(beside_qemu))
        measured.append(beside_qemu.to_dict())
    if json_path is not None:
        report = {"environment": environment(), "scenarios": measured}
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if not check:
        return True
    held = beside_qemu is None or beside_qemu.holds()
    return (not results or _check(results, console)) and held


def in_unit(value: float, unit: str) -> str:
    if unit == "bytes/second":
        return f"{value / 1e9:.2f} GB/s"
    return f"{value * 1e6:.1f} µs" if value < 0.001 else f"{value * 1e3:.2f} ms" if value < 0.2 else f"{value:.2f} s"


def figure(name: str, value: float) -> str:
    for ending, unit in (("_bytes_per_second", "bytes/second"), ("_seconds", "seconds")):
        if name.endswith(ending):
            return in_unit(value, unit)
    return f"{value:.3f}"


def table(results: list[Result]) -> Table:
    drawn = Table("scenario", "figure", "postcopy", "floor", "ratio")
    for result in results:
        for key in (key for key in ("p50", "p99", "value") if key in result.product):
            drawn.add_row(
                result.name,
                key,
                in_unit(result.product[key], result.unit),
                in_unit(result.floor[key], result.unit),
                f"{result.ratio[key]:.2f}",
            )
        if not result.product:  # it compares with nothing
            for name, value in result.figures.items():
                drawn.add_row(result.name, name, figure(name, value), "", "")
    return drawn


def _check(results: list[Result], console: Console) -> bool:
    drawn = Table("scenario", "figure", "reached", "bound", "")
    good = True
    for result in results:
        for bound in result.bounds:
            holds = bound.holds(result)
            good = good and holds
            drawn.add_row(result.name, bound.where, _number(bound, bound.value(result)), _limit(bound), "" if holds else "MISSED")
    console.print(drawn)
    return good


def _number(bound: Bound, value: float) -> str:
    return in_unit(value, "seconds") if bound.where.startswith("product.") or bound.where.endswith("_seconds") else f"{value:.2f}"


def _limit(bound: Bound) -> str:
    return (">= " if bound.at_least else "<= ") + _number(bound, bound.limit)
