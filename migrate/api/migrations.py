"""Migrations in both roles: begin, list, look at, limit, cancel; and the fine histogram of each one's faults."""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic.json_schema import SkipJsonSchema

from migrate.api.models import KindLatency, Latency, LimitRequest, MigrateRequest, RecoverRequest
from migrate.api.problems import refusals
from migrate.dataplane import FAULT_KINDS, Histogram
from migrate.destination import DestinationMigration
from migrate.errors import NotFoundError
from migrate.network import Address
from migrate.session import MigrationStatus
from proto.states import Role, State

if TYPE_CHECKING:
    from migrate.daemon import Daemon

LIST_MAX = 200
WAIT_SECONDS_MAX = 60
NOT_FOUND = ("not-found", "No migration has that id, or more than one begins so.")
INVALID = ("request-invalid", "A parameter, or a field of the body; `detail` names it.")
MigrationId = Annotated[str, Path(description="The id, or an unambiguous beginning of it.", examples=["5c1d0e9a"])]


def add_routes(routes: APIRouter, daemon: "Daemon") -> None:
    _add_reading(routes, daemon)
    _add_latency(routes, daemon)
    _add_steering(routes, daemon)


def _add_reading(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.get(
        "/v1/migrations",
        tags=["migrations"],
        operation_id="listMigrations",
        summary="Migrations",
        response_description="Those begun last come first.",
        responses=refusals({422: INVALID}),
    )
    async def migrations(
        state: Annotated[State | SkipJsonSchema[None], Query(description="Only those in this state.")] = None,
        guest_id: Annotated[
            str | SkipJsonSchema[None], Query(description="Only those of this guest, as the source calls it.")
        ] = None,
        role: Annotated[Role | SkipJsonSchema[None], Query(description="Only those in which this daemon has this part.")] = None,
        settled: Annotated[
            bool | SkipJsonSchema[None],
            Query(description="true: only those to which nothing more happens; false: only those under way."),
        ] = None,
        limit: Annotated[int, Query(ge=1, le=LIST_MAX, description="At most so many.")] = LIST_MAX,
    ) -> list[MigrationStatus]:
        """Those under way, and of those that have ended the last ones (`limits.ended_migrations_kept` of the daemon)."""
        wanted = (
            migration
            for migration in reversed(daemon.migrations.values())
            if state in (None, migration.state)
            and guest_id in (None, migration.guest_id)
            and role in (None, migration.role)
            and settled in (None, migration.settled)
        )
        return [migration.status() for _, migration in zip(range(limit), wanted, strict=False)]

    @routes.get(
        "/v1/migrations/{migration_id}",
        tags=["migrations"],
        operation_id="getMigration",
        summary="One migration",
        response_description="Its figures.",
        responses=refusals({404: NOT_FOUND, 422: INVALID}),
    )
    async def migration(
        migration_id: MigrationId,
        settled_within_seconds: Annotated[
            float, Query(ge=0, le=WAIT_SECONDS_MAX, description="Answer as soon as it has settled, and after so long anyway.")
        ] = 0,
    ) -> MigrationStatus:
        """As it is now, or as soon as it has settled (ended or stalled), waiting for that at most so long."""
        found = daemon.migration(migration_id)
        await found.wait_settled(settled_within_seconds)
        return found.status()


def _add_latency(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.get(
        "/v1/migrations/{migration_id}/latency",
        tags=["migrations"],
        operation_id="getMigrationLatency",
        summary="Latency of its faults, finely",
        response_description="A histogram for each kind of fault.",
        responses=refusals({404: ("not-found", f"{NOT_FOUND[1]} Or it was asked at the source."), 422: INVALID}),
    )
    async def latency(migration_id: MigrationId) -> Latency:
        """Only at the destination, which handles the faults. At any time, also after the end."""
        found = daemon.migration(migration_id)
        if not isinstance(found, DestinationMigration):
            raise NotFoundError(
                f"latency of migration {found.id}", expected=f"to be asked at the destination {found.peer}", got="the source"
            )
        return Latency(migration_id=found.id, kinds={kind: kind_latency(found.latency(kind)) for kind in FAULT_KINDS})


def kind_latency(histogram: Histogram) -> KindLatency:
    return KindLatency(count=histogram.count, sum_ns=histogram.sum_ns, max_ns=histogram.max_ns, buckets=histogram.fine())


def _add_steering(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.post(
        "/v1/migrations",
        status_code=201,
        tags=["migrations"],
        operation_id="createMigration",
        summary="Begin to move a guest away",
        response_description="It has begun.",
        responses={
            201: {"headers": {"Location": {"description": "Path of the new migration.", "schema": {"type": "string"}}}},
            **refusals(
                {
                    400: ("request-malformed", "The body is not JSON."),
                    403: (
                        "listen-refused",
                        "The destination is beyond loopback; the daemon has neither --tls-dir nor --insecure.",
                    ),
                    404: ("not-found", "No guest of that id is attached."),
                    409: ("guest-busy", "The guest does not run here as a whole: it is being migrated, or waits for one."),
                    413: ("request-too-large", "The body."),
                    415: ("media-type", "The body is not declared as application/json."),
                    422: INVALID,
                    503: ("daemon-ending", "The daemon is ending, or serves too many connections (`urn:postcopy:too-busy`)."),
                }
            ),
        },
    )
    async def migrate(request: MigrateRequest, response: Response) -> MigrationStatus:
        """Answers at once; how it goes is told by `getMigration` and `streamMigrationEvents`."""
        begun = daemon.migrate(
            request.guest_id,
            Address.parse(request.destination),
            bulk=request.bulk,
            precopy=request.policy(),
            streams=request.streams,
            bulk_limit_bytes_per_second=request.bulk_limit_bytes_per_second,
        )
        response.headers["location"] = f"/v1/migrations/{begun.id}"
        return begun.status()

    @routes.patch(
        "/v1/migrations/{migration_id}",
        tags=["migrations"],
        operation_id="limitMigration",
        summary="Limit its bulk while it runs",
        response_description="As it is at this moment, with the new limit.",
        responses=refusals(
            {
                400: ("request-malformed", "The body is not JSON."),
                404: NOT_FOUND,
                409: ("not-limitable", "It has settled, or this is the destination."),
                413: ("request-too-large", "The body."),
                415: ("media-type", "The body is not declared as application/json."),
                422: INVALID,
            }
        ),
    )
    async def limit(migration_id: MigrationId, request: LimitRequest) -> MigrationStatus:
        """Holds from the next few kilobytes on. Pages that the guest waits for, and those sent ahead of it, are never limited."""
        found = daemon.migration(migration_id)
        found.limit_bulk(request.bulk_limit_bytes_per_second)
        return found.status()

    @routes.post(
        "/v1/migrations/{migration_id}/cancel",
        tags=["migrations"],
        operation_id="cancelMigration",
        summary="Cancel before the switchover",
        response_description="It will be cancelled; as it is at this moment.",
        responses=refusals(
            {
                404: NOT_FOUND,
                409: ("not-cancellable", "The guest may run at the destination already, or this is the destination."),
                413: ("request-too-large", "The body; none is needed."),
                415: ("media-type", "A body that is not JSON; none is needed."),
                422: INVALID,
            }
        ),
    )
    async def cancel(migration_id: MigrationId) -> MigrationStatus:
        """The guest runs on at the source. Answers at once: `cancelled` is reached a moment later."""
        found = daemon.migration(migration_id)
        found.cancel("asked by the operator")
        return found.status()

    @routes.post(
        "/v1/migrations/{migration_id}/abandon",
        tags=["migrations"],
        operation_id="abandonMigration",
        summary="Give up the pages that have not come",
        response_description="It is abandoned; `lost` says what is lost.",
        responses=refusals(
            {
                404: NOT_FOUND,
                409: (
                    "not-abandonable",
                    "This is the source, or it is neither paused nor stalled, or the kernel cannot poison pages (Linux 6.6).",
                ),
                413: ("request-too-large", "The body; none is needed."),
                415: ("media-type", "A body that is not JSON; none is needed."),
                422: INVALID,
            }
        ),
    )
    async def abandon(migration_id: MigrationId) -> MigrationStatus:
        """At the destination, when the source will not come back. The guest runs on with what is here; a touch of anything else
        is SIGBUS, for good. The source's guest is not resumed by this, nor ever by the source itself. There is no way back."""
        found = daemon.migration(migration_id)
        await found.abandon()
        return found.status()

    @routes.post(
        "/v1/migrations/{migration_id}/recover",
        tags=["migrations"],
        operation_id="recoverMigration",
        summary="Dial again at once, or another address",
        response_description="It is being tried; as it is at this moment.",
        responses=refusals(
            {
                400: ("request-malformed", "The body is not JSON."),
                403: (
                    "listen-refused",
                    "The destination is beyond loopback; the daemon has neither --tls-dir nor --insecure.",
                ),
                404: NOT_FOUND,
                409: ("not-recoverable", "It is neither paused nor stalled, or this is the destination, which does not dial."),
                413: ("request-too-large", "The body."),
                415: ("media-type", "The body is not declared as application/json."),
                422: INVALID,
            }
        ),
    )
    async def recover(migration_id: MigrationId, request: RecoverRequest) -> MigrationStatus:
        """A paused migration dials by itself; this is for a destination that is reached in another way now. And for one that has
        stalled, once its reason is gone: it dials again, and goes on where it was."""
        found = daemon.migration(migration_id)
        address = None if request.destination is None else Address.parse(request.destination)
        return daemon.recover(found, address).status()
