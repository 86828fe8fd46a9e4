"""``postcopy demo``: a real migration on this machine, told as it happens. Returns only when the guest verified itself."""

import json
import time

import typer

from migrate.cli.migrations import line, summary
from migrate.errors import PostcopyError
from migrate.pair import Pair

VERIFY_DEADLINE_SECONDS = 30.0
GUEST_OPTIONS = {
    "workload": ("--threads", "2", "--pattern", "zipf", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
    "kvm": ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
}
"""By kind of guest; the one that waits takes the first of them too: as many threads."""


def run(memory: str, *, kind: str = "workload", as_json: bool) -> None:
    """Raises PostcopyError when the migration did not complete or the guest is not intact."""

    def tell(text: str) -> None:
        typer.echo(text, err=as_json)

    with Pair() as pair:
        tell(f"two daemons run: source, destination at {pair.destination.address} (metrics: {pair.destination.metrics_address})")
        options = GUEST_OPTIONS[kind]
        arrived = pair.guest(pair.destination, "demo-there", memory, *options[:2], waiting=True, kind=kind)
        guest = pair.guest(pair.source, "demo", memory, *options, kind=kind)
        guest.event("stepped", deadline_seconds=60)
        tell(f"a guest of {memory} is at work at the source; moving it to the destination")
        with pair.source.client() as client:
            now = client.migrate("demo", pair.destination.address)
            said = ""
            while not now.settled:
                time.sleep(0.1)
                now = client.status(now.id)
                if now.state != said:
                    tell(line(now))
                    said = now.state
        if now.state != "complete":
            raise PostcopyError("demo migration", expected="complete", got=f"{now.state}: {now.error}", code="migration-failed")
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
