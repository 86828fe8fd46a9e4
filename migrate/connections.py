"""The data connections of one migration: one urgent, and one of bulk."""

import contextlib
import socket

from migrate.errors import ConnectionLostError
from migrate.network import has_ended
from proto.preamble import ConnectionKind

DATA_KINDS = (ConnectionKind.URGENT, ConnectionKind.BULK)


class DataConnections:
    """As they come; whoever made them all whole closes them with ``close``, when no loop uses them any more."""

    def __init__(self) -> None:
        self._sockets: dict[ConnectionKind, socket.socket] = {}

    @property
    def urgent(self) -> socket.socket:
        return self._sockets[ConnectionKind.URGENT]

    @property
    def bulk(self) -> socket.socket:
        return self._sockets[ConnectionKind.BULK]

    def expects(self, kind: ConnectionKind) -> bool:
        return kind in DATA_KINDS and kind not in self._sockets

    def add(self, kind: ConnectionKind, sock: socket.socket) -> None:
        self._sockets[kind] = sock

    def missing(self) -> list[str]:
        return [kind.name.lower() for kind in DATA_KINDS if kind not in self._sockets]

    def lost(self) -> ConnectionLostError | None:
        """Of those whose loops are parked, and do not see that one has ended."""
        for kind in DATA_KINDS:
            if has_ended(self._sockets[kind]):
                what = f"{kind.name.lower()} connection"
                return ConnectionLostError(what, expected="to stay", got="its end before the switchover")
        return None

    def close(self) -> None:
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.close()
