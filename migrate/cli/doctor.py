"""``postcopy doctor``: what can be moved here, and what to change where something cannot."""

from pathlib import Path

import typer

from migrate.cli import EXIT_CODES, JsonOption


def register(app: typer.Typer, _: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """What this machine and this user can move; for each thing that they cannot, the one change. Exit 5: no guest at all."""
    from migrate.errors import HostLacksError
    from migrate.host.report import report
    from migrate.host.text import tell

    if not Path("/proc/self/stat").exists():  # most of what there is to look at
        raise HostLacksError("/proc", "no procfs is mounted there", "mount -t proc proc /proc")
    found = report()
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        tell(found)
    if not found.works:
        raise typer.Exit(EXIT_CODES["host-lacks"])
