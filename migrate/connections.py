"""The data connections of one migration: one urgent, and as many of bulk as both sides have agreed on."""

import asyncio
import contextlib
from typing import Any

from migrate.errors import ConnectionLostError, DeadlineError
from migrate.greeting import DataSocket
from migrate.network import has_ended
from proto.preamble import ConnectionKind

URGENT = (ConnectionKind.URGENT, 0)


class DataConnections:
    """By kind and stream number, in the order in which the source dials them. Whoever holds it closes them with ``close``,
    when no loop uses them any more."""

    def __init__(self, streams: int = 1) -> None:
        self.streams = streams
        self.wanted = (URGENT, *((ConnectionKind.BULK, stream) for stream in range(streams)))
        self._sockets: dict[tuple[ConnectionKind, int], DataSocket | None] = {}
        self._whole = asyncio.Event()

    @property
    def urgent(self) -> DataSocket:
        return self._of(*URGENT)

    @property
    def bulk(self) -> list[DataSocket]:
        return [self._of(ConnectionKind.BULK, stream) for stream in range(self.streams)]

    def _of(self, kind: ConnectionKind, stream: int) -> DataSocket:
        sock = self._sockets[kind, stream]
        assert sock is not None
        return sock

    def reserve(self, kind: ConnectionKind, stream: int) -> bool:
        """Whether this one is awaited; from then on another of that name is not."""
        name = (kind, stream)
        if name not in self.wanted or name in self._sockets:
            return False
        self._sockets[name] = None
        return True

    def add(self, kind: ConnectionKind, stream: int, sock: DataSocket) -> None:
        self._sockets[kind, stream] = sock
        if not self.missing():
            self._whole.set()

    async def all_here(self, closed: asyncio.Future[None], deadline_seconds: float) -> None:
        """Until every one is, or the control connection is ``closed``. Raises ConnectionLostError, DeadlineError."""
        whole = asyncio.ensure_future(self._whole.wait())
        waited: set[asyncio.Future[Any]] = {whole, closed}
        try:
            await asyncio.wait(waited, timeout=deadline_seconds, return_when="FIRST_COMPLETED")
        finally:
            whole.cancel()
        if closed.done():
            raise ConnectionLostError("control connection", expected="data connections", got="its end")
        if missing := self.missing():
            expected, got = f"urgent and bulk within {deadline_seconds} s", f"no {' and no '.join(missing)}"
            raise DeadlineError("data connections", expected=expected, got=got)

    def name(self, kind: ConnectionKind, stream: int) -> str:
        """``urgent``, ``bulk``, and of several ``bulk 2``."""
        return kind.name.lower() + (f" {stream}" if kind is ConnectionKind.BULK and self.streams > 1 else "")

    def missing(self) -> list[str]:
        return [self.name(*wanted) for wanted in self.wanted if self._sockets.get(wanted) is None]

    def lost(self) -> ConnectionLostError | None:
        """Of those whose loops are parked, and do not see that one has ended."""
        for wanted in self.wanted:
            if has_ended(self._of(*wanted)):
                what = f"{self.name(*wanted)} connection"
                return ConnectionLostError(what, expected="to stay", got="its end before the switchover")
        return None

    def close(self) -> None:
        for sock in self._sockets.values():
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.close()
