"""``postcopy demo`` and ``postcopy bench``: see it work, and measure it, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from migrate.cli import EXIT_CODES, JsonOption


def register(app: typer.Typer, _: typer.Typer) -> None:
    app.command()(demo)
    app.command()(bench)


def demo(
    memory: Annotated[str, typer.Option(help="SIZE[:memfd|:tmpfs|:hugetlb|:hugetlb-1g].")] = "512M",
    guest: Annotated[
        str, typer.Option(help="workload; kvm: a small machine on /dev/kvm; qemu: Linux in a QEMU (make guest-image).")
    ] = "workload",
    as_json: JsonOption = False,
) -> None:
    """Two daemons, a guest at work, one migration, and a guest that proves itself intact afterwards."""
    from migrate.demo import GUEST_OPTIONS, run, run_qemu
    from migrate.errors import PostcopyError

    if guest == "qemu":
        run_qemu(memory, as_json=as_json)
        return
    if guest not in GUEST_OPTIONS:
        raise PostcopyError("guest", expected=" or ".join([*GUEST_OPTIONS, "qemu"]), got=guest, code="usage")
    run(memory, kind=guest, as_json=as_json)


def bench(
    scenarios: Annotated[
        list[str] | None, typer.Argument(help="Which; all but resolvers, kvm, tls and qemu when none is named.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Print each figure beside its bound; exit 8 where one is missed.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A few iterations of each, to see that it runs; figures mean nothing.")
    ] = False,
) -> None:
    """Measure each scenario beside a floor in bare C, interleaved in the same run.

    resolvers: the kernel's ways to resolve a page fault beside each other; it has no bounds to check.
    kvm: downtime and faults of a KVM guest, beside the same guest in bare C.

    qemu: a virtual machine moved by QEMU's own postcopy and by us, as its guest sees it (make guest-image).
    """
    from migrate.bench import run

    if not run(scenarios or [], json_path, check=check, tiny=tiny):
        raise typer.Exit(EXIT_CODES["bound-missed"])
