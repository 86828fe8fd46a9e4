"""The CLI's side of a daemon's HTTP API, over its unix socket."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from migrate.daemon_paths import API_SOCKET
from migrate.errors import DaemonUnreachableError, NotFoundError, PostcopyError
from migrate.session import MigrationStatus

EVENTS_SILENCE_SECONDS = 60.0
"""A stream says that it is there more often than that."""


class ServerEvent(BaseModel):
    """One event of a stream: its name, its id (not every one has one), and the object that it carries."""

    event: str
    id: str | None
    data: dict[str, Any]


class DaemonClient:
    """``with DaemonClient(runtime_dir) as daemon``. Raises PostcopyError with the daemon's own code and words."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(runtime_dir / API_SOCKET)),
            base_url="http://daemon",
            timeout=90,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def daemon(self) -> dict[str, Any]:
        return dict(self._call("GET", "/v1/daemon"))

    def guests(self) -> list[dict[str, Any]]:
        return list(self._call("GET", "/v1/guests"))

    def migrations(self) -> list[MigrationStatus]:
        """Those begun last first."""
        return [MigrationStatus.model_validate(item) for item in self._call("GET", "/v1/migrations")]

    def migrate(self, guest_id: str, destination: str, *, bulk: bool = True, **options: str | float | None) -> MigrationStatus:
        """``options``: streams, precopy, max_rounds, max_stale_bytes, deadline_seconds, bulk_limit_bytes_per_second as the API
        has them."""
        body = {"guest_id": guest_id, "destination": destination, "bulk": bulk, **options}
        return MigrationStatus.model_validate(self._call("POST", "/v1/migrations", body))

    def status(self, migration_id: str, *, settled_within_seconds: float = 0) -> MigrationStatus:
        """As it is now; or wait, at most so long, until it has settled."""
        path = f"{_path(migration_id)}?settled_within_seconds={settled_within_seconds}"
        return MigrationStatus.model_validate(self._call("GET", path))

    def limit(self, migration_id: str, bytes_per_second: int | None) -> MigrationStatus:
        """Of bulk and precopy together, from now on; None: no limit."""
        return MigrationStatus.model_validate(
            self._call("PATCH", _path(migration_id), {"bulk_limit_bytes_per_second": bytes_per_second})
        )

    def cancel(self, migration_id: str) -> MigrationStatus:
        return MigrationStatus.model_validate(self._call("POST", f"{_path(migration_id)}/cancel"))

    def recover(self, migration_id: str, destination: str | None = None) -> MigrationStatus:
        """Have a paused migration dial at once, from now on there."""
        body = {"destination": destination}
        return MigrationStatus.model_validate(self._call("POST", f"{_path(migration_id)}/recover", body))

    def resolve(self, guest_id: str, *, here: bool) -> dict[str, Any]:
        """Decide where a paused guest runs, of which it cannot be learned."""
        return dict(self._call("POST", f"/v1/guests/{quote(guest_id, safe='')}/resolve", {"runs": "here" if here else "there"}))

    def abandon(self, migration_id: str) -> MigrationStatus:
        """At the destination: give up what has not come. There is no way back."""
        return MigrationStatus.model_validate(self._call("POST", f"{_path(migration_id)}/abandon"))

    def latency(self, migration_id: str) -> dict[str, Any]:
        return dict(self._call("GET", f"{_path(migration_id)}/latency"))

    def events(self, migration_id: str | None = None, *, last_event_id: str | None = None) -> Iterator[ServerEvent]:
        """All events, or those of one migration, until the one named ``end``. Raises DaemonUnreachableError without it."""
        path = "/v1/events" if migration_id is None else f"{_path(migration_id)}/events"
        headers = {} if last_event_id is None else {"last-event-id": last_event_id}
        try:
            with self._http.stream("GET", path, headers=headers, timeout=EVENTS_SILENCE_SECONDS) as answer:
                if not answer.is_success:
                    answer.read()
                    raise refusal(answer)
                for event in parsed(answer.iter_lines()):
                    yield event
                    if event.event == "end":
                        return
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        raise self._unreachable("the end of its event stream")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if answer.is_success:
            return answer.json()
        raise refusal(answer)

    def _unreachable(self, got: object) -> DaemonUnreachableError:
        hint = "start it, or name another with --daemon"
        if isinstance(got, httpx.TransportError) and not isinstance(got, httpx.ConnectError):  # somebody is there
            hint = "its log tells what it lacks, such as descriptors"
        return DaemonUnreachableError(f"daemon at {self._runtime_dir}", expected=f"one that answers ({hint})", got=got)


def _path(migration_id: str) -> str:
    """Whatever else somebody typed would be other segments of a path, or be resolved (``..``). Raises NotFoundError."""
    if re.fullmatch("[0-9a-f]{1,32}", migration_id) is None:
        expected, got = "an id that `postcopy list` shows, or the beginning of one", repr(migration_id[:64])
        raise NotFoundError("migration", expected=expected, got=got)
    return f"/v1/migrations/{migration_id}"


def refusal(answer: httpx.Response) -> PostcopyError:
    """The daemon's own code and words."""
    problem = answer.json()
    code = str(problem.get("type", "")).removeprefix("urn:postcopy:") or "failed"
    if code == "request-invalid":  # of what was typed
        code = "usage"
    return PostcopyError(str(problem.get("detail", "")), code=code)


def parsed(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Server-sent events as this daemon writes them: one line of data each; comments are dropped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield ServerEvent(event=fields["event"], id=fields.get("id"), data=json.loads(fields["data"]))
            fields = {}
        else:
            fields = {}
