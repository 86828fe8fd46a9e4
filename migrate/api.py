"""The HTTP API on the daemon's unix socket: guests, migrations, daemon. Errors are application/problem+json (RFC 9457)."""

from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from migrate import __version__
from migrate.errors import PostcopyError
from migrate.network import Address
from migrate.region import shape_text
from migrate.session import MigrationStatus

if TYPE_CHECKING:
    from migrate.daemon import Daemon

HTTP_STATUS = {"not-found": 404, "guest-busy": 409, "not-cancellable": 409, "listen-refused": 403}


class GuestInfo(BaseModel):
    id: str
    state: str
    size_bytes: int
    shape: str
    pid: int


class DaemonInfo(BaseModel):
    role: str
    version: str
    guests: int
    migrations_active: int
    stopping: bool


class MigrateRequest(BaseModel):
    """``destination``: HOST:PORT. ``bulk`` false: pages cross only when the guest touches them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    guest_id: Annotated[str, Field(min_length=1, max_length=64)]
    destination: Annotated[str, Field(min_length=3, max_length=300)]
    bulk: bool = True


class Problem(BaseModel):
    type: str
    title: str
    status: int
    detail: str
    expected: str = ""
    got: str = ""


def _problem(status: int, code: str, detail: str, expected: str = "", got: str = "") -> JSONResponse:
    body = Problem(
        type=f"urn:postcopy:{code}", title=code.replace("-", " "), status=status, detail=detail, expected=expected, got=got
    )
    return JSONResponse(body.model_dump(), status, media_type="application/problem+json")


def build_api(daemon: "Daemon") -> FastAPI:
    app = FastAPI(title="postcopy daemon", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(PostcopyError)
    async def refused(_: Request, error: PostcopyError) -> Response:
        return _problem(HTTP_STATUS.get(error.code, 400), error.code, str(error), error.expected, error.got)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _problem(422, "request-invalid", f"{where}: {first['msg']}")

    @app.middleware("http")
    async def not_in_a_switchover(request: Request, call_next):  # type: ignore[no-untyped-def]
        await daemon.quiet.wait()
        return await call_next(request)

    @app.get("/v1/daemon")
    async def info() -> DaemonInfo:
        return DaemonInfo(
            role=daemon.role,
            version=__version__,
            guests=len(daemon.guests),
            migrations_active=sum(1 for m in daemon.migrations.values() if not m.ended),
            stopping=daemon.stopping.is_set(),
        )

    @app.get("/v1/guests")
    async def guests() -> list[GuestInfo]:
        return [
            GuestInfo(id=g.guest_id, state=str(g.state), size_bytes=g.size_bytes, shape=shape_text(g.shape), pid=g.pid)
            for g in daemon.guests.values()
        ]

    @app.get("/v1/migrations")
    async def migrations() -> list[MigrationStatus]:
        return [migration.status() for migration in daemon.migrations.values()]

    @app.post("/v1/migrations", status_code=201)
    async def migrate(request: MigrateRequest) -> MigrationStatus:
        return daemon.migrate(request.guest_id, Address.parse(request.destination), bulk=request.bulk).status()

    @app.get("/v1/migrations/{migration_id}")
    async def migration(migration_id: str, settled_within_seconds: Annotated[float, Query(ge=0, le=60)] = 0) -> MigrationStatus:
        """As it is now, or as soon as it has settled (ended or stalled), waiting for that at most so long."""
        found = daemon.migration(migration_id)
        await found.wait_settled(settled_within_seconds)
        return found.status()

    @app.post("/v1/migrations/{migration_id}/cancel")
    async def cancel(migration_id: str) -> MigrationStatus:
        found = daemon.migration(migration_id)
        found.cancel("asked by the operator")
        return found.status()

    return app
