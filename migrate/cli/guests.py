"""``postcopy guest …``: run a guest."""

from typing import Annotated

import typer

from migrate.cli import DaemonOption, GuestIdOption, memory_of, runtime_dir_of

RatioOption = Annotated[float, typer.Option(min=0, max=1)]


def register(_: typer.Typer, guest_app: typer.Typer) -> None:
    guest_app.command()(workload)
    guest_app.command()(qemu)
    guest_app.callback()(_guests)


def _guests() -> None:
    """Run a guest that attaches to a daemon."""


def workload(
    memory: Annotated[
        list[str], typer.Option(callback=memory_of, help="SIZE[:memfd|:tmpfs|:hugetlb|:hugetlb-1g]; repeat for several regions.")
    ],
    guest_id: GuestIdOption = "workload",
    daemon: DaemonOption = "source",
    waiting: Annotated[bool, typer.Option("--waiting", help="Wait for a guest of this size to arrive.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="After departing, wait for the next guest.")] = False,
    verify: Annotated[bool, typer.Option(help="Check all memory against the root once it is complete.")] = True,
    threads: Annotated[int, typer.Option(min=1, max=64)] = 1,
    pattern: Annotated[str, typer.Option(help="sequential, random, zipf, chase or permute.")] = "random",
    write_ratio: RatioOption = 0.25,
    zero_ratio: RatioOption = 0.0,
    discard_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Steps that discard their page by MADV_REMOVE; not of hugetlb memory.")
    ] = 0.0,
    discard_by: Annotated[
        str, typer.Option(help="How the destination learns of discards: `event` of the userfaultfd, or `message` to the daemon.")
    ] = "event",
    rate: Annotated[int, typer.Option(min=0, help="Steps a second of all threads; 0: flat out.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """The built-in guest: threads that work on memory and check every page they touch."""
    from migrate.daemon_paths import GUEST_SOCKET
    from migrate.errors import PostcopyError
    from migrate.guest.memory import MemorySpec
    from migrate.guests.workload.guest import WorkloadOptions, run
    from migrate.guests.workload.native import Pattern, WorkloadConfig

    if pattern.upper() not in Pattern.__members__:
        raise PostcopyError("pattern", expected=", ".join(p.name.lower() for p in Pattern), got=pattern, code="usage")
    if discard_by not in ("event", "message"):
        raise PostcopyError("discard-by", expected="event or message", got=discard_by, code="usage")
    specs = [MemorySpec.parse(text) for text in memory]
    if discard_ratio > 0 and any(spec.is_hugetlb for spec in specs):
        raise PostcopyError("discard-ratio", expected="memory of 4096-byte pages", got="hugetlb", code="usage")
    config = WorkloadConfig(
        threads=threads,
        pattern=Pattern[pattern.upper()],
        write_per_mille=round(write_ratio * 1000),
        zero_per_mille=round(zero_ratio * 1000),
        discard_per_mille=round(discard_ratio * 1000),
        rate_per_second=rate,
        seed=seed,
    )
    run(
        WorkloadOptions(
            guest_id=guest_id,
            socket_path=runtime_dir_of(daemon) / GUEST_SOCKET,
            memory=specs,
            waiting=waiting,
            stay=stay,
            verify=verify,
            discard_by_event=discard_by == "event",
            config=config,
        )
    )


def qemu(
    command: Annotated[list[str], typer.Argument(help="Behind `--`: QEMU and its options, as you start it yourself.")],
    guest_id: GuestIdOption = "qemu",
    daemon: DaemonOption = "source",
    waiting: Annotated[bool, typer.Option("--waiting", help="Wait for a guest of the same command line to arrive.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="After departing, wait for the next guest.")] = False,
    memory_kind: Annotated[str, typer.Option(help="memfd, or hugetlb: pages of 2 MiB.")] = "memfd",
) -> None:
    """Your own virtual machine: QEMU by your own command line, with what moving it needs added."""
    from migrate.daemon_paths import GUEST_SOCKET
    from migrate.errors import PostcopyError
    from migrate.guests.qemu.guest import QemuOptions, run

    if memory_kind not in ("memfd", "hugetlb"):
        raise PostcopyError("memory-kind", expected="memfd or hugetlb", got=memory_kind, code="usage")
    run(QemuOptions(guest_id, runtime_dir_of(daemon) / GUEST_SOCKET, command, memory_kind, waiting, stay))
