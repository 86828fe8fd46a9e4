"""HTTP in the daemon's own event loop: the API on a unix socket, /metrics and /healthz on TCP. Never in a switchover."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from migrate.api import build_api
from migrate.http_connection import BoundedConnection
from migrate.metrics import DaemonCollector

if TYPE_CHECKING:
    from migrate.daemon import Daemon


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the daemon ends it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServers:
    def __init__(self, daemon: "Daemon") -> None:
        self._daemon = daemon
        self._running: list[tuple[_Server, asyncio.Task[None]]] = []

    async def start_api(self, listener: socket.socket) -> None:
        await self._start(build_api(self._daemon), listener)

    async def start_metrics(self, listener: socket.socket) -> None:
        await self._start(build_metrics(self._daemon), listener)

    async def stop(self) -> None:
        self._daemon.events.close()
        for server, _ in self._running:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in self._running))

    async def _start(self, app: Any, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            loop="none",
            http=BoundedConnection,
            log_config=None,
            log_level="error",  # a line for each request that is none would be a line for whoever wants one
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        server = _Server(config)
        self._running.append((server, asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))))
        await server.ready.wait()


def build_metrics(daemon: "Daemon") -> FastAPI:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(daemon))
    app = FastAPI(openapi_url=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        await daemon.quiet.wait()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> Response:
        return Response(
            "ending\n" if daemon.stopping.is_set() else "ok\n", 503 if daemon.stopping.is_set() else 200, media_type="text/plain"
        )

    return app
