"""``postcopy source`` and ``postcopy destination``: run a daemon."""

from pathlib import Path
from typing import Annotated

import typer

from migrate.cli import runtime_dir_of
from proto.messages import STREAMS_MAX

SOURCE_METRICS = "127.0.0.1:9641"
DESTINATION_METRICS = "127.0.0.1:9642"
POLL_MICROSECONDS = 50
DESTINATION_LISTEN = "127.0.0.1:7641"

RuntimeDirOption = Annotated[Path | None, typer.Option(help="Where this daemon keeps its sockets (0700); POSTCOPY_RUNTIME_DIR.")]
MetricsOption = Annotated[str, typer.Option("--metrics", help="HOST:PORT of /metrics and /healthz; `off` for none.")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow addresses beyond loopback: nothing is encrypted or authenticated yet.")
]
CongestionOption = Annotated[
    str | None,
    typer.Option("--congestion-control", help="Of migration connections: bbr, cubic, reno, …; the system's if not given."),
]
SocketGroupOption = Annotated[
    str | None,
    typer.Option("--socket-group", help="Group (name or number) whose members may attach guests and steer; default: nobody."),
]

PollOption = Annotated[
    int,
    typer.Option(
        "--poll", min=0, max=10_000, help="Microseconds, at most, that fault and serve threads look for work before they sleep."
    ),
]
PacingOption = Annotated[
    bool, typer.Option(help="--no-pacing: bulk goes as fast as it can, and pages that guests wait for queue behind it.")
]


def register(app: typer.Typer, _: typer.Typer) -> None:
    app.command()(source)
    app.command()(destination)


def source(
    runtime_dir: RuntimeDirOption = None,
    metrics: MetricsOption = SOURCE_METRICS,
    insecure: InsecureOption = False,
    congestion_control: CongestionOption = None,
    poll: PollOption = POLL_MICROSECONDS,
    pacing: PacingOption = True,
    socket_group: SocketGroupOption = None,
) -> None:
    """Run a source daemon: guests attach to it and are moved away from it."""
    _run("source", runtime_dir, None, metrics, insecure, congestion_control, poll, pacing, socket_group, STREAMS_MAX)


def destination(
    listen: Annotated[str, typer.Option(help="HOST:PORT at which sources connect.")] = DESTINATION_LISTEN,
    runtime_dir: RuntimeDirOption = None,
    metrics: MetricsOption = DESTINATION_METRICS,
    insecure: InsecureOption = False,
    congestion_control: CongestionOption = None,
    poll: PollOption = POLL_MICROSECONDS,
    pacing: PacingOption = True,
    socket_group: SocketGroupOption = None,
    max_streams: Annotated[
        int, typer.Option(min=1, max=STREAMS_MAX, help="Bulk connections that a migration may have.")
    ] = STREAMS_MAX,
) -> None:
    """Run a destination daemon: it takes guests in; those that have arrived can be moved on or back."""
    _run("destination", runtime_dir, listen, metrics, insecure, congestion_control, poll, pacing, socket_group, max_streams)


def _run(
    role: str,
    runtime_dir: Path | None,
    listen: str | None,
    metrics: str,
    insecure: bool,
    congestion_control: str | None,
    poll_microseconds: int,
    pacing: bool,
    socket_group: str | None,
    streams_max: int,
) -> None:
    import uvloop

    from migrate.daemon import Daemon
    from migrate.network import Address

    async def serve() -> None:
        daemon = Daemon(
            role,
            runtime_dir or runtime_dir_of(role),
            listen_at=Address.parse(listen) if listen else None,
            metrics_at=None if metrics == "off" else Address.parse(metrics),
            insecure=insecure,
            congestion_control=congestion_control,
            poll_ns=poll_microseconds * 1000,
            pacing=pacing,
            socket_group=socket_group,
            streams_max=streams_max,
        )
        await daemon.serve()

    uvloop.run(serve())
