"""The doctor's report for people: verdicts, facts, what to change, and one line that says it all."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrate.host.hugepages import size_text
from migrate.host.report import Facts, Finding, Pages, Report

COLUMNS_IN_A_PIPE = 100
GROUP_TITLES = {"guests": "guests", "transport": "transport", "limits": "limits", "later": "nothing uses these yet"}
STYLES = {"yes": "green", "limited": "yellow", "no": "red"}


def tell(found: Report) -> None:
    """In plain words, 100 columns in a pipe. A command is on a line of its own, however long, to be copied."""
    console = Console(width=None if sys.stdout.isatty() else COLUMNS_IN_A_PIPE, highlight=False)
    with console.capture() as told:
        console.print(_findings(found.features))
        console.print(_facts(found.facts))
        for line in changes(found.features):
            console.print(Text(line), soft_wrap=True)
        console.print(Text(verdict_line(found), style="bold"), soft_wrap=True)
    print("\n".join(line.rstrip() for line in told.get().splitlines()))


def _findings(findings: list[Finding]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for group, title in GROUP_TITLES.items():
        table.add_row(Text(title, style="bold"))
        for one in findings:
            if one.group == group:
                table.add_row(f"  {one.title}", Text(one.verdict, style=STYLES[one.verdict]), Text(one.reason))
    return table


def _facts(facts: Facts) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("facts", style="bold"))
    for name, text in fact_lines(facts):
        table.add_row(f"  {name}", Text(text))
    return table


def changes(findings: list[Finding]) -> list[str]:
    """What is in use first. Empty where nothing has to be changed."""
    lines = []
    for one in sorted(findings, key=lambda one: one.need == "later"):
        if one.remedy:
            lines += [f"{one.title} ({one.id}): {one.verdict}. To change that:", f"    {one.remedy}"]
    return ["", *lines, ""] if lines else [""]


def verdict_line(found: Report) -> str:
    lacking = [one.id for one in found.features if one.verdict == "no" and one.need != "later"]
    if not found.works:
        return "No guest can be moved from here or to here."
    if lacking:
        return f"Guests can be moved from here and to here, without {', '.join(lacking)}."
    return "No surprises: guests can be moved from here and to here."


def fact_lines(facts: Facts) -> list[tuple[str, str]]:
    """Name and text of each."""
    kernel, user, memory, limits, network = facts.kernel, facts.user, facts.memory, facts.limits, facts.network
    config = ", ".join(f"{name.removeprefix('CONFIG_')}={value or '?'}" for name, value in kernel.config.items())
    sysctl = facts.unprivileged_userfaultfd
    lines = [
        (
            "kernel",
            f"{kernel.release} {kernel.machine}; soft-dirty {'works' if kernel.soft_dirty else 'does not work'}; {config}",
        ),
        (
            "this process",
            f"{user.name}:{user.group}, capabilities {user.capabilities_effective} of {user.capabilities_bounding}, no_new_privs "
            f"{int(user.no_new_privs)}, seccomp {user.seccomp}, {user.security_module or 'no security module around it'}",
        ),
        ("userfaultfd", f"vm.unprivileged_userfaultfd is {'not there' if sysctl is None else sysctl}"),
    ]
    for device in facts.devices:
        lines.append((device.path, f"{device.owner}:{device.group} {device.mode}" if device.exists else "not there"))
    free, total = size_text(memory.shared_memory_free_bytes), size_text(memory.shared_memory_bytes)
    available = f"{size_text(memory.available_bytes)} of {size_text(memory.total_bytes)} available"
    lines.append(
        ("memory", f"{available}; {free} of {total} free in /dev/shm; shmem huge pages {memory.shmem_huge_pages or 'none'}")
    )
    lines += [(f"{size_text(pool.page_bytes)} pages", _pool_line(pool)) for pool in memory.huge_pages]
    locked = "unlimited" if limits.locked_bytes is None else size_text(limits.locked_bytes)
    lines.append(("limits", f"open files {limits.open_files_soft} of {limits.open_files_hard}; locked memory {locked}"))
    lines += [(f"cgroup {one.kind}", f"{one.path} is {one.value:.12g}, {one.used:.12g} used") for one in limits.cgroup]
    known, anyone = " ".join(network.congestion_control_available), " ".join(network.congestion_control_allowed)
    queue = network.queueing_discipline_default
    lines.append(
        ("TCP", f"{network.congestion_control_default} of {known}; anyone may use {anyone}; queueing discipline {queue}")
    )
    return [*lines, ("clock", f"source {facts.clock_source}")]


def _pool_line(pool: Pages) -> str:
    text = f"{pool.free} of {pool.total} free, {pool.reserved} reserved, {pool.surplus} surplus, overcommit {pool.overcommit}"
    nodes = ", ".join(f"node {one.node}: {one.free} of {one.total} free" for one in pool.nodes)
    return f"{text}; {nodes}" if len(pool.nodes) > 1 else text
