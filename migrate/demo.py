"""``postcopy demo``: a real migration on this machine, told as it happens. Returns only when the guest verified itself."""

import json
from collections.abc import Callable

import typer

from migrate.cli.migrations import line, summary
from migrate.errors import PostcopyError
from migrate.guest.memory import MemorySpec
from migrate.guests.linux.journey import Journey
from migrate.guests.linux.machine import LinuxGuest
from migrate.pair import DaemonProcess, Pair
from migrate.session import MigrationStatus

VERIFY_DEADLINE_SECONDS = 30.0
LINUX_OWN_MIB = 128
"""What the kernel needs besides the area that is worked on."""
GUEST_OPTIONS = {
    "workload": ("--threads", "2", "--pattern", "zipf", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
    "kvm": ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
}
"""By kind of guest; the one that waits takes the first of them too: as many threads."""


def run(memory: str, *, kind: str = "workload", as_json: bool) -> None:
    """A guest of our own. Raises PostcopyError when the migration did not complete or the guest is not intact."""

    def tell(text: str) -> None:
        typer.echo(text, err=as_json)

    with Pair() as pair:
        tell_daemons(pair, tell)
        options = GUEST_OPTIONS[kind]
        arrived = pair.guest(pair.destination, "demo-there", memory, *options[:2], waiting=True, kind=kind)
        guest = pair.guest(pair.source, "demo", memory, *options, kind=kind)
        guest.event("stepped", deadline_seconds=60)
        tell(f"a guest of {memory} is at work at the source; moving it to the destination")
        now = move("demo", pair.source, pair.destination, tell)
        verified = arrived.event("verified", "failed", deadline_seconds=VERIFY_DEADLINE_SECONDS)
        if verified["event"] == "failed":
            raise PostcopyError(str(verified["failure"]), code="guest-failed")
        if as_json:
            typer.echo(json.dumps({"migration": now.model_dump(mode="json"), "guest": verified}, indent=2))
            return
        summary(now)
        tell(
            f"guest verified: all memory checked against its root after {verified['steps']} steps and {verified['writes']} writes"
        )


def run_qemu(memory: str, *, as_json: bool) -> None:
    """Linux in a QEMU. Raises PostcopyError as ``run``."""

    def tell(text: str) -> None:
        typer.echo(text, err=as_json)

    spec = MemorySpec.parse(memory)
    linux = LinuxGuest(machine_mib=spec.size_bytes >> 20, memory_mib=max(16, (spec.size_bytes >> 20) - LINUX_OWN_MIB))
    with Pair() as pair:
        tell_daemons(pair, tell)
        tell(f"Linux boots in a QEMU of {memory}, with a disk")
        journey = Journey(pair, linux, "--memory-kind", "hugetlb" if spec.kind == "hugetlb" else "memfd", name="demo")
        try:
            tell("it is at work at the source: memory, disk, a heartbeat a millisecond; moving it to the destination")
            now = move("demo-here", pair.source, pair.destination, tell)
            journey.beats(1000)
            journey.check()
            gap_seconds = journey.gap_seconds()
            verified = {"heartbeats": len(journey.debugcon.told.beats), "longest_gap_seconds": gap_seconds}
        finally:
            journey.close()
        if as_json:
            typer.echo(json.dumps({"migration": now.model_dump(mode="json"), "guest": verified}, indent=2))
            return
        summary(now)
        tell(
            f"guest verified: no bad page, no error of its disk, none of {verified['heartbeats']} heartbeats lost; longest gap "
            f"between two was {gap_seconds * 1e3:.0f} ms"
        )


def tell_daemons(pair: Pair, tell: Callable[[str], None]) -> None:
    tell(f"two daemons run: source, destination at {pair.destination.address} (metrics: {pair.destination.metrics_address})")


def move(guest_id: str, leaves: DaemonProcess, reaches: DaemonProcess, tell: Callable[[str], None]) -> MigrationStatus:
    """Complete when it returns. Raises PostcopyError."""
    with leaves.client() as client:
        now = client.migrate(guest_id, reaches.address)
        said = ""
        for event in client.events(now.id):
            if event.event in ("progress", "settled"):
                now = MigrationStatus.model_validate(event.data["migration"])
                if now.state != said:
                    tell(line(now))
                said = now.state
    if now.state != "complete":
        raise PostcopyError("demo migration", expected="complete", got=f"{now.state}: {now.error}", code="migration-failed")
    return now
