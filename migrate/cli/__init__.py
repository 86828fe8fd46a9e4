"""The command ``postcopy``. Exit codes are in ``EXIT_CODES``; every error is one line that says what to do next.

Subcommands import what they need when they run: a guest does not load the HTTP server.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from migrate import __version__
from migrate.errors import PostcopyError
from proto.errors import ProtocolError

EXIT_CODES = {
    "failed": 1,  # anything without a code of its own here
    "usage": 2,  # the command line
    "migration-failed": 3,  # or cancelled: the guest runs on at the source
    "migration-stalled": 4,  # after the switchover: the guest waits, nothing is resumed by itself
    "host-lacks": 5,  # this machine or this user lacks something; the message names the remedy
    "daemon-unreachable": 6,
    "guest-failed": 7,  # the guest found its own memory broken
    "bound-missed": 8,  # bench --check
}

app = typer.Typer(
    name="postcopy",
    help="Move a running guest to another host: it stands still for a fraction of a millisecond, its pages follow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
guest_app = typer.Typer(help="Run a guest that attaches to a daemon.", no_args_is_help=True)
app.add_typer(guest_app, name="guest")

DaemonOption = Annotated[
    str, typer.Option("--daemon", help="Runtime directory of the daemon, or `source` / `destination` for the default ones.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def guest_id_of(text: str) -> str:
    """As it was typed. Raises PostcopyError unless it is a name (proto/messages.py)."""
    from proto.messages import NAME_CHARACTERS_MAX, NAME_PATTERN

    if len(text) > NAME_CHARACTERS_MAX or re.fullmatch(NAME_PATTERN, text) is None:
        expected = f"1 to {NAME_CHARACTERS_MAX} letters, digits and . _ -, the first a letter or digit"
        raise PostcopyError("id of a guest", expected=expected, got=repr(text[:200]), code="usage")
    return text


GuestIdOption = Annotated[str, typer.Option("--id", callback=guest_id_of, help="Its name at the daemon.")]


def memory_of(texts: list[str]) -> list[str]:
    """As they were typed. Raises PostcopyError for more regions than a guest may have."""
    from proto.messages import REGIONS_MAX

    if len(texts) > REGIONS_MAX:
        raise PostcopyError("--memory", expected=f"at most {REGIONS_MAX} regions", got=len(texts), code="usage")
    return texts


def address_of(text: str | None) -> str | None:
    """As it was typed. Raises PostcopyError."""
    from migrate.network import Address

    if text is not None:
        Address.parse(text)
    return text


def runtime_dir_of(daemon: str) -> Path:
    from migrate.config import default_runtime_dir

    return default_runtime_dir(daemon) if daemon in ("source", "destination") else Path(daemon)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"postcopy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""
    from migrate import log
    from migrate.config import Settings

    level = Settings().log_level.lower() or "info"
    if level not in log.LEVELS:
        raise PostcopyError("POSTCOPY_LOG_LEVEL", expected=f"one of {', '.join(log.LEVELS)}", got=level, code="usage")
    log.configure(level)


def exit_code(error: PostcopyError | ProtocolError) -> int:
    return EXIT_CODES.get(error.code, 1)


def main() -> None:
    """The console script."""
    _register()
    try:
        app()
    except (PostcopyError, ProtocolError) as error:
        typer.echo(f"postcopy: {error}", err=True)
        sys.exit(exit_code(error))


def _register() -> None:
    from migrate.cli import daemons, doctor, guests, kvm, migrations, trials

    commands: tuple[Callable[[typer.Typer, typer.Typer], None], ...] = (
        daemons.register,
        doctor.register,
        guests.register,
        kvm.register,
        migrations.register,
        trials.register,
    )
    for register in commands:
        register(app, guest_app)
