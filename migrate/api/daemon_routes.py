"""The daemon itself: what it is, and whether it takes work."""

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fastapi import APIRouter

from migrate import __version__
from migrate.api.guard import BODY_BYTES_MAX
from migrate.api.models import DaemonInfo, Health, Limits, TlsInfo
from migrate.api.problems import refusals
from migrate.api.streams import STREAMS_MAX
from migrate.errors import PostcopyError
from migrate.events import EVENTS_KEPT
from migrate.session import utc
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR

if TYPE_CHECKING:
    from migrate.daemon import Daemon
    from migrate.tls import Tls


def add_routes(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.get(
        "/v1/daemon",
        tags=["daemon"],
        operation_id="getDaemon",
        summary="What this daemon is",
        response_description="Its facts, counts and limits.",
        responses=refusals({}),
    )
    async def info() -> DaemonInfo:
        return daemon_info(daemon)

    @routes.get(
        "/v1/health",
        tags=["daemon"],
        operation_id="getHealth",
        summary="Whether it takes work",
        response_description="It does.",
        responses=refusals({503: ("daemon-ending", "It lives, and takes no new migration (or serves too many connections).")}),
    )
    async def health() -> Health:
        """Any answer says that it lives; 200 that it is ready."""
        if daemon.stopping.is_set():
            raise PostcopyError("this daemon", expected="to run on", got="it is ending", code="daemon-ending")
        return Health(status="ready")


def tls_info(tls: "Tls") -> TlsInfo:
    return TlsInfo(
        certificate_names=tls.data.names,
        certificate_expires_at=datetime.fromtimestamp(tls.data.valid_until_seconds, UTC),
        allowed_names=sorted(tls.allowed),
    )


def daemon_info(daemon: "Daemon") -> DaemonInfo:
    from migrate.daemon import ENDED_MIGRATIONS_KEPT
    from migrate.http_connection import CONNECTIONS_MAX

    ended = sum(1 for migration in daemon.migrations.values() if migration.ended)
    return DaemonInfo.model_validate(
        {
            "role": daemon.role,
            "version": __version__,
            "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
            "pid": os.getpid(),
            "started_at": utc(daemon.started_wall_ns),
            "uptime_seconds": (time.monotonic_ns() - daemon.started_ns) / 1e9,
            "migration_address": daemon.addresses.get("migration"),
            "metrics_address": daemon.addresses.get("metrics"),
            "insecure": daemon.insecure,
            "tls": None if daemon.tls is None else tls_info(daemon.tls),
            "stopping": daemon.stopping.is_set(),
            "guests": len(daemon.guests),
            "migrations_active": len(daemon.migrations) - ended,
            "migrations_ended": ended,
            "limits": Limits(
                ended_migrations_kept=ENDED_MIGRATIONS_KEPT,
                events_kept=EVENTS_KEPT,
                streams=STREAMS_MAX,
                connections=CONNECTIONS_MAX,
                body_bytes=BODY_BYTES_MAX,
            ),
        }
    )
