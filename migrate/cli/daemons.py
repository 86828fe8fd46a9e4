"""``postcopy source`` and ``postcopy destination``: run a daemon."""

from dataclasses import dataclass
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
    bool, typer.Option("--insecure", help="Allow addresses beyond loopback without TLS: nothing is encrypted or authenticated.")
]
CongestionOption = Annotated[
    str | None,
    typer.Option("--congestion-control", help="Of migration connections: bbr, cubic, reno, …; the system's if not given."),
]
SocketGroupOption = Annotated[
    str | None,
    typer.Option("--socket-group", help="Group (name or number) whose members may attach guests and steer; default: nobody."),
]

TlsDirOption = Annotated[
    Path | None, typer.Option("--tls-dir", help="Where cert.pem, key.pem and ca.pem lie: TLS 1.3 on every migration connection.")
]
TlsCertOption = Annotated[Path | None, typer.Option("--tls-cert", help="This daemon's certificate, if it is not in --tls-dir.")]
TlsKeyOption = Annotated[Path | None, typer.Option("--tls-key", help="Its key, without a passphrase.")]
TlsCaOption = Annotated[Path | None, typer.Option("--tls-ca", help="The authority that other daemons' certificates come from.")]
TlsAllowOption = Annotated[
    list[str] | None, typer.Option("--tls-allow", metavar="NAME", help="DNS name in the certificate of a daemon that is let in.")
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


@dataclass(frozen=True, slots=True)
class _Secured:
    """The options of TLS, as they were given."""

    directory: Path | None
    certificate: Path | None
    key: Path | None
    authority: Path | None
    allowed: tuple[str, ...]


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
    tls_dir: TlsDirOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    tls_allow: TlsAllowOption = None,
) -> None:
    """Run a source daemon: guests attach to it and are moved away from it."""
    tls = _Secured(tls_dir, tls_cert, tls_key, tls_ca, tuple(tls_allow or ()))
    _run("source", runtime_dir, None, metrics, insecure, congestion_control, poll, pacing, socket_group, STREAMS_MAX, tls)


def destination(
    listen: Annotated[str, typer.Option(help="HOST:PORT at which sources connect.")] = DESTINATION_LISTEN,
    runtime_dir: RuntimeDirOption = None,
    metrics: MetricsOption = DESTINATION_METRICS,
    insecure: InsecureOption = False,
    congestion_control: CongestionOption = None,
    poll: PollOption = POLL_MICROSECONDS,
    pacing: PacingOption = True,
    socket_group: SocketGroupOption = None,
    tls_dir: TlsDirOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    tls_allow: TlsAllowOption = None,
    max_streams: Annotated[
        int, typer.Option(min=1, max=STREAMS_MAX, help="Bulk connections that a migration may have.")
    ] = STREAMS_MAX,
) -> None:
    """Run a destination daemon: it takes guests in; those that have arrived can be moved on or back."""
    tls = _Secured(tls_dir, tls_cert, tls_key, tls_ca, tuple(tls_allow or ()))
    _run("destination", runtime_dir, listen, metrics, insecure, congestion_control, poll, pacing, socket_group, max_streams, tls)


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
    secured: _Secured,
) -> None:
    import uvloop

    from migrate.daemon import Daemon
    from migrate.errors import ListenRefusedError
    from migrate.network import Address, check_congestion_control
    from migrate.tls import Tls, TlsFiles

    if congestion_control is not None:
        check_congestion_control(congestion_control)
    files = TlsFiles.chosen(secured.directory, secured.certificate, secured.key, secured.authority)
    if files is None and secured.allowed:
        raise ListenRefusedError("--tls-allow", expected="--tls-dir with it", got="no certificate of this daemon")
    tls = None if files is None else Tls(files, secured.allowed)

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
            tls=tls,
        )
        await daemon.serve()

    uvloop.run(serve())
