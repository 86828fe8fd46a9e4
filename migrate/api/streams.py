"""Event streams: server-sent events, the ``text/event-stream`` of the HTML standard (EventSource)."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.types import Receive, Scope, Send

from migrate.api.migrations import NOT_FOUND, MigrationId
from migrate.api.problems import problem, refusals
from migrate.api.reader import Reader
from migrate.events import EventLog

if TYPE_CHECKING:
    from migrate.daemon import Daemon

STREAMS_MAX = 16
OPENED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events, until the one named `end`. Ids are given to those at which a reader can take up again.",
        "content": {
            "text/event-stream": {
                "itemSchema": {"$ref": "#/components/schemas/Event"},
                "example": 'event: state\nid: 9f86d081-17\ndata: {"at":"2026-01-31T12:00:00.000000Z","migration_id":"5c1d0e9a…",'
                '"role":"source","guest_id":"web","state":"postcopy"}\n\n',
            }
        },
    }
}
FULL = ("too-busy", f"{STREAMS_MAX} streams are open already, or too many connections.")
INVALID = ("request-invalid", "A parameter.")
LastEventId = Annotated[
    str | SkipJsonSchema[None],
    Header(alias="Last-Event-ID", description="Go on behind the event of this id. A browser's EventSource sends it by itself."),
]
ForSeconds = Annotated[
    Annotated[float, Field(ge=0, le=86400)] | SkipJsonSchema[None], Query(description="End the stream after so long.")
]


class EventStream(StreamingResponse):
    """One of at most STREAMS_MAX at a time."""

    media_type = "text/event-stream"

    def __init__(self, log: EventLog, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"cache-control": "no-store"})
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._log.readers >= STREAMS_MAX:
            limit = f"at most {STREAMS_MAX}"
            refusal = problem(503, "too-busy", f"event streams: expected {limit}, got one more", expected=limit, got="one more")
            await refusal(scope, receive, send)
            return
        self._log.readers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._log.readers -= 1


def add_routes(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.get(
        "/v1/events",
        tags=["events"],
        operation_id="streamEvents",
        summary="All that happens",
        status_code=200,
        response_class=EventStream,
        responses={**OPENED, **refusals({422: INVALID, 503: FULL})},
    )
    async def events(last_event_id: LastEventId = None, for_seconds: ForSeconds = None) -> EventStream:
        """Begins with a `snapshot` of what there is, or behind the event that Last-Event-ID names."""
        return EventStream(daemon.events, Reader(daemon, None, last_event_id, for_seconds).run())

    @routes.get(
        "/v1/migrations/{migration_id}/events",
        tags=["events"],
        operation_id="streamMigrationEvents",
        summary="What happens to one migration",
        status_code=200,
        response_class=EventStream,
        responses={**OPENED, **refusals({404: NOT_FOUND, 422: INVALID, 503: FULL})},
    )
    async def migration_events(
        migration_id: MigrationId, last_event_id: LastEventId = None, for_seconds: ForSeconds = None
    ) -> EventStream:
        """From its beginning, or behind the event that Last-Event-ID names; `settled` and `end` are the last two."""
        return EventStream(daemon.events, Reader(daemon, daemon.migration(migration_id), last_event_id, for_seconds).run())
