"""An operator's commands on migrations: ``postcopy migrate``, ``status``, ``cancel``, ``recover``, ``resolve`` and others.

What they need is imported when they run: the HTTP client and tables are a quarter of what a guest's start would take."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from migrate.cli import EXIT_CODES, DaemonOption, JsonOption, address_of, guest_id_of, runtime_dir_of
from migrate.errors import PostcopyError
from migrate.precopy import AUTO, DEADLINE_SECONDS_MAX, ROUNDS_MAX
from proto.errors import sentence
from proto.messages import STREAMS_MAX

if TYPE_CHECKING:
    from migrate.client import DaemonClient, ServerEvent
    from migrate.session import MigrationStatus

LINE_SECONDS = 1.0


def register(app: typer.Typer, _: typer.Typer) -> None:
    app.command()(migrate)
    app.command("list")(list_all)
    app.command()(status)
    app.command()(events)
    app.command()(limit)
    app.command()(cancel)
    app.command()(recover)
    app.command()(resolve)
    app.command()(abandon)


def migrate(
    guest: Annotated[str, typer.Argument(callback=guest_id_of, help="Its id at the daemon.")],
    to: Annotated[str, typer.Argument(callback=address_of, help="HOST:PORT of the destination daemon.")],
    daemon: DaemonOption = "source",
    bulk: Annotated[bool, typer.Option(help="--no-bulk: pages cross only when the guest touches them.")] = True,
    precopy: Annotated[str, typer.Option(help="auto, off, or a number of rounds while the guest still runs here.")] = "auto",
    max_rounds: Annotated[int, typer.Option(min=1, max=ROUNDS_MAX, help="Of --precopy auto.")] = AUTO.rounds_max,
    max_stale: Annotated[
        str, typer.Option("--max-stale-bytes", help="SIZE: so few stale bytes are switched over at once.")
    ] = "1M",
    deadline: Annotated[
        float | None,
        typer.Option(min=0.001, max=DEADLINE_SECONDS_MAX, help="Seconds of precopy after which no further round begins."),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=STREAMS_MAX, help="Bulk connections, if the destination takes so many.")] = 1,
    bulk_limit: Annotated[
        str, typer.Option(help="SIZE a second of bulk and precopy together, or none: as fast as the path lets them.")
    ] = "none",
    as_json: JsonOption = False,
) -> None:
    """Move a guest to another daemon, and show how it goes until it is whole there."""
    from migrate.guest.memory import size_bytes_of

    options = {
        "precopy": rounds_of(precopy),
        "max_rounds": max_rounds,
        "max_stale_bytes": size_bytes_of(max_stale),
        "deadline_seconds": deadline,
        "streams": streams,
        "bulk_limit_bytes_per_second": limit_of(bulk_limit),
    }
    with _client(daemon) as client:
        begun = client.migrate(guest, to, bulk=bulk, **options)
        ended = _watch(client, begun, quiet=as_json)
    typer.echo(ended.model_dump_json(indent=2) if as_json else "", nl=as_json)
    if not as_json:
        summary(ended)
    raise typer.Exit(result_code(ended))


def _client(daemon: str) -> "DaemonClient":
    from migrate.client import DaemonClient

    return DaemonClient(runtime_dir_of(daemon))


def rounds_of(text: str) -> int | str:
    """As the API has it. Raises PostcopyError."""
    if text in ("auto", "off"):
        return text
    if text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= ROUNDS_MAX:
        return int(text)
    raise PostcopyError("--precopy", expected=f"auto, off, or 1 to {ROUNDS_MAX} rounds", got=text, code="usage")


def limit_of(text: str) -> int | None:
    """Bytes a second, as the API has it. Raises PostcopyError."""
    from migrate.guest.memory import size_bytes_of
    from migrate.session import BULK_LIMIT_MAX

    limit = None if text == "none" else size_bytes_of(text)
    if limit is not None and not 1 <= limit <= BULK_LIMIT_MAX:
        raise PostcopyError("bulk limit", expected=f"none, or 1 to {BULK_LIMIT_MAX} bytes a second", got=text, code="usage")
    return limit


def result_code(ended: "MigrationStatus") -> int:
    if ended.state == "complete":
        return 0
    if not ended.settled:  # its daemon ended first: where the guest runs is not known here
        return EXIT_CODES["daemon-unreachable"]
    return EXIT_CODES["migration-stalled" if ended.state == "stalled" else "migration-failed"]


def line(now: "MigrationStatus") -> str:
    eta = "-" if now.eta_seconds is None else f"{now.eta_seconds:.1f} s"
    return (
        f"{now.state:<11} {now.pages_done}/{now.pages_total} pages  {now.bytes_per_second / 1e6:.0f} MB/s  "
        f"{now.faults_count} faults  ETA {eta}"
    )


def _watch(client: "DaemonClient", begun: "MigrationStatus", *, quiet: bool) -> "MigrationStatus":
    """Follow its events until it has settled: a bar on a terminal, a line a second elsewhere, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    now = begun
    columns = (TextColumn("{task.description}"), BarColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    with bar:
        task = bar.add_task(line(now), total=max(now.pages_total, 1))
        said_at = 0.0
        for event in client.events(begun.id):
            if event.event not in ("progress", "settled"):
                continue
            now = begun.model_validate(event.data["migration"])
            bar.update(task, description=line(now), completed=now.pages_done, total=max(now.pages_total, 1))
            if not quiet and not console.is_terminal and time.monotonic() - said_at >= LINE_SECONDS:
                said_at = time.monotonic()
                typer.echo(line(now), err=True)
    return now


def seconds(value: float) -> str:
    """With a unit that fits: 64.2 µs, 1.3 ms, 2.1 s."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if abs(value) < 1000 / factor:
            return f"{value * factor:.1f} {unit}"
    return f"{value:.2f} s"


def summary(ended: "MigrationStatus") -> None:
    """What an operator wants to know of a migration that has settled."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("migration", f"{ended.id}: guest {ended.guest_id} to {ended.peer}")
    table.add_row("state", ended.state)
    if ended.error is not None:
        table.add_row("reason", sentence(ended.error.what, ended.error.expected, ended.error.got))
    if ended.downtime_seconds is not None:
        uncertainty = ended.downtime_uncertainty_seconds
        note = f" (+- {seconds(uncertainty)}, clocks of two hosts)" if uncertainty else ""
        table.add_row("downtime", seconds(ended.downtime_seconds) + note + ", as the guest saw it")
    for kind, latency in ended.faults.items():
        if latency.count:
            text = f"p50 {seconds(latency.p50_seconds)}, p99 {seconds(latency.p99_seconds)}, max {seconds(latency.max_seconds)}"
            table.add_row(f"{kind} faults", f"{latency.count}: {text}")
    if ended.precopy is not None:
        held, rounds = ended.precopy, len(ended.precopy.rounds) or ended.precopy.rounds_begun
        window = "" if held.stale_window_seconds is None else f", known {seconds(held.stale_window_seconds)} after it ran on"
        table.add_row("precopy", f"{rounds} rounds, {held.bytes_moved / 1e6:.1f} MB; {held.stale_pages} pages stale{window}")
    if ended.switched_because:
        table.add_row("switched", ended.switched_because)
    table.add_row("pages", ", ".join(f"{number} {path}" for path, number in ended.pages.items()) + f" of {ended.pages_total}")
    by = f" by {ended.streams} bulk connections" if ended.streams > 1 else ""
    table.add_row("moved", f"{ended.bytes_moved / 1e6:.1f} MB at {ended.bytes_per_second / 1e6:.0f} MB/s{by}")
    table.add_row("total time", seconds(ended.elapsed_seconds))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def list_all(daemon: DaemonOption = "source", as_json: JsonOption = False) -> None:
    """Guests and migrations of a daemon."""
    from rich.console import Console
    from rich.table import Table

    with _client(daemon) as client:
        guests, migrations = client.guests(), client.migrations()
    if as_json:
        typer.echo(json.dumps({"guests": guests, "migrations": [m.model_dump(mode="json") for m in migrations]}, indent=2))
        return
    console = Console(highlight=False)
    table = Table("guest", "state", "memory", "pid")
    for guest in guests:
        table.add_row(guest["id"], guest["state"], guest["shape"], str(guest["pid"]))
    console.print(table)
    table = Table("migration", "role", "guest", "peer", "state", "pages")
    for m in migrations:
        table.add_row(m.id[:12], m.role, m.guest_id, m.peer, m.state, f"{m.pages_done}/{m.pages_total}")
    console.print(table)


YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
MigrationArgument = Annotated[str, typer.Argument(help="Its id, or the beginning of it.")]


def status(migration: MigrationArgument, daemon: DaemonOption = "source", as_json: JsonOption = False) -> None:
    """One migration, as it is now."""
    with _client(daemon) as client:
        now = client.status(migration)
    if as_json:
        typer.echo(now.model_dump_json(indent=2))
    else:
        summary(now)


def events(
    migration: Annotated[
        str | None, typer.Argument(help="Only of this one, until it has settled; its id or the beginning.")
    ] = None,
    daemon: DaemonOption = "source",
    as_json: JsonOption = False,
) -> None:
    """What happens at a daemon, as it happens. With --json a line is an object: event, id, data."""
    with _client(daemon) as client:
        for event in client.events(migration):
            print(event.model_dump_json() if as_json else event_line(event), flush=True)


def event_line(event: "ServerEvent") -> str:
    """``12:00:00.123  state     5c1d0e9a1b2c  web  postcopy``."""
    data = event.data
    if "migration" in data:
        from migrate.session import MigrationStatus

        now = MigrationStatus.model_validate(data["migration"])
        about, text = now.id, f"{now.guest_id}  {line(now)}"
    elif event.event == "snapshot":
        about, text = "", f"{len(data['guests'])} guests, {len(data['migrations'])} migrations under way"
    else:
        about = data.get("migration_id", "")
        told = ("guest_id", "change", "state", "count", "reason")
        text = "  ".join(str(data[name]) for name in told if data.get(name) is not None)
    return f"{data['at'][11:23]}  {event.event:<8}  {about[:12]:<12}  {text}".rstrip()


def limit(
    migration: MigrationArgument,
    rate: Annotated[str, typer.Argument(help="SIZE a second, such as 50M, or none.")],
    daemon: DaemonOption = "source",
    as_json: JsonOption = False,
) -> None:
    """Limit bulk and precopy of a migration while it runs. Pages that the guest waits for are never limited."""
    with _client(daemon) as client:
        now = client.limit(migration, limit_of(rate))
    said = "no limit" if now.bulk_limit_bytes_per_second is None else f"at most {now.bulk_limit_bytes_per_second} bytes a second"
    typer.echo(now.model_dump_json(indent=2) if as_json else f"bulk of guest {now.guest_id}: {said}")


def cancel(migration: MigrationArgument, daemon: DaemonOption = "source", as_json: JsonOption = False) -> None:
    """Cancel a migration before its switchover: the guest runs on at the source."""
    with _client(daemon) as client:
        now = client.cancel(migration)
    typer.echo(now.model_dump_json(indent=2) if as_json else f"cancelled: guest {now.guest_id} runs on at the source")


def recover(
    migration: MigrationArgument,
    to: Annotated[
        str | None, typer.Option(callback=address_of, help="HOST:PORT at which the destination is reached now.")
    ] = None,
    daemon: DaemonOption = "source",
    as_json: JsonOption = False,
) -> None:
    """Have a paused migration dial at once, which it does by itself too; or another address from now on. One that has stalled
    dials again by this alone."""
    with _client(daemon) as client:
        now = client.recover(migration, to)
    typer.echo(now.model_dump_json(indent=2) if as_json else f"dialling {now.peer}: guest {now.guest_id} waits for its pages")


def resolve(
    guest: Annotated[str, typer.Argument(help="Its id at the daemon where it is paused.")],
    here: Annotated[
        bool, typer.Option("--here/--there", help="It runs on at this daemon; or elsewhere: what is here is let go of.")
    ],
    yes: YesOption = False,
    daemon: DaemonOption = "source",
    as_json: JsonOption = False,
) -> None:
    """Decide where a paused guest runs, when it cannot be learned: make sure first that it runs nowhere else."""
    if not yes and sys.stdin.isatty():  # a script has made sure
        stake = "if it runs at its destination too, both are damaged" if here else "if it does not run elsewhere, it is lost"
        typer.confirm(f"guest {guest} {'runs on here' if here else 'is let go of here'}: {stake}; go on?", abort=True, err=True)
    with _client(daemon) as client:
        now = client.resolve(guest, here=here)
    done = "runs on here" if here else "is let go of: it runs elsewhere"
    typer.echo(json.dumps(now, indent=2) if as_json else f"guest {guest} {done}")


def abandon(
    migration: MigrationArgument,
    yes: YesOption = False,
    daemon: DaemonOption = "destination",
    as_json: JsonOption = False,
) -> None:
    """At the destination: give up the pages that have not come. A touch of one is SIGBUS; there is no way back."""
    with _client(daemon) as client:
        found = client.status(migration)
        if not yes:
            left = found.pages_total - found.pages_done
            typer.confirm(
                f"guest {found.guest_id} loses {left} of {found.pages_total} pages for good; go on?", abort=True, err=True
            )
        now = client.abandon(found.id)
    if as_json:
        typer.echo(now.model_dump_json(indent=2))
        return
    assert now.lost is not None
    typer.echo(f"abandoned: guest {now.guest_id} runs on without {now.lost.pages} pages, SIGBUS where it touches one")
    for run in now.lost.runs:
        typer.echo(f"  region {run.region}: pages {run.page_index} to {run.page_index + run.page_count - 1}")
    if now.lost.runs_left_off:
        typer.echo(f"  and {now.lost.runs_left_off} more runs")
