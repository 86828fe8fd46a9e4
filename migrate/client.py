"""The CLI's side of a daemon's HTTP API, over its unix socket."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from migrate.daemon_paths import API_SOCKET
from migrate.errors import DaemonUnreachableError, PostcopyError
from migrate.session import MigrationStatus


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
        return [MigrationStatus.model_validate(item) for item in self._call("GET", "/v1/migrations")]

    def migrate(self, guest_id: str, destination: str, *, bulk: bool = True) -> MigrationStatus:
        body = {"guest_id": guest_id, "destination": destination, "bulk": bulk}
        return MigrationStatus.model_validate(self._call("POST", "/v1/migrations", body))

    def status(self, migration_id: str, *, settled_within_seconds: float = 0) -> MigrationStatus:
        """As it is now; or wait, at most so long, until it has settled."""
        path = f"/v1/migrations/{migration_id}?settled_within_seconds={settled_within_seconds}"
        return MigrationStatus.model_validate(self._call("GET", path))

    def cancel(self, migration_id: str) -> MigrationStatus:
        return MigrationStatus.model_validate(self._call("POST", f"/v1/migrations/{migration_id}/cancel"))

    def _call(self, method: str, path: str, body: object = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise DaemonUnreachableError(
                f"daemon at {self._runtime_dir}", expected="one that answers (start it, or name another with --daemon)", got=error
            ) from error
        if answer.is_success:
            return answer.json()
        problem = answer.json()
        code = str(problem.get("type", "")).removeprefix("urn:postcopy:") or "failed"
        what = str(problem.get("detail", ""))
        raise PostcopyError(what, code=code)
