"""The door to tls.h: OpenSSL's sessions on data connections. What blocks here belongs on a thread of its own."""

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.dataplane._dataplane import ffi, lib
from migrate.errors import ConnectionLostError, DeadlineError, TlsError

NAMES_BYTES_MAX = 16 << 10


def _names(tell: Callable[[Any, int], int]) -> list[str]:
    names = ffi.new("char[]", NAMES_BYTES_MAX)
    return bytes(ffi.buffer(names, tell(names, NAMES_BYTES_MAX))).decode("ascii").splitlines()


def _said(why: Any) -> str:
    return str(ffi.string(why).decode(errors="replace"))


class TlsContext:
    """A certificate with its key, and who is trusted, from PEM files that are read once. Raises TlsError."""

    def __init__(self, certificate: Path, key: Path, authority: Path) -> None:
        why = ffi.new("char[]", lib.TLS_WHY_BYTES)
        pointer = lib.tls_context_create(bytes(certificate), bytes(key), bytes(authority), why)
        if pointer == ffi.NULL:
            raise TlsError("TLS files", expected="a certificate, its key without a passphrase, an authority", got=_said(why))
        self._pointer = ffi.gc(pointer, lib.tls_context_destroy)
        self.names = _names(lambda names, capacity_bytes: lib.tls_context_names(pointer, names, capacity_bytes))
        """The DNS names of our own certificate; and from when until when it is valid, in seconds of Unix time."""
        self.valid_from_seconds = int(lib.tls_context_valid_from(pointer))
        self.valid_until_seconds = int(lib.tls_context_valid_until(pointer))

    def session(self, sock: socket.socket, *, accepts: bool) -> "TlsSocket":
        pointer = lib.tls_session_create(self._pointer, sock.fileno(), accepts)
        if pointer == ffi.NULL:
            raise MemoryError("TLS session")
        return TlsSocket(sock, pointer)


class TlsSocket:
    """A connection with its session. A loop that is given ``fileno()`` finds the session on it; ``close`` when none has it."""

    def __init__(self, sock: socket.socket, pointer: Any) -> None:
        self._socket = sock
        self._pointer: Any = pointer
        self._why = ffi.new("char[]", lib.TLS_WHY_BYTES)

    def fileno(self) -> int:
        return self._socket.fileno()

    def handshake(self, deadline_seconds: float) -> None:
        """Raises TlsError, DeadlineError, ConnectionLostError, as the others do."""
        self._check("TLS handshake", lib.tls_handshake(self._pointer, int(deadline_seconds * 1000), self._why), deadline_seconds)

    def peer_names(self) -> list[str]:
        """The DNS names of its certificate."""
        return _names(lambda names, capacity_bytes: lib.tls_peer_names(self._pointer, names, capacity_bytes))

    def write(self, data: bytes, deadline_seconds: float) -> None:
        """Less than 16 KiB."""
        outcome = lib.tls_write(self._pointer, data, len(data), int(deadline_seconds * 1000), self._why)
        self._check("TLS connection", outcome, deadline_seconds)

    def read(self, size_bytes: int, deadline_seconds: float) -> bytes:
        """Fewer when the peer ends it before."""
        buffer, received_bytes = ffi.new("char[]", size_bytes), ffi.new("size_t *")
        outcome = lib.tls_read(self._pointer, buffer, size_bytes, int(deadline_seconds * 1000), received_bytes, self._why)
        if outcome != lib.TLS_CLOSED:
            self._check("TLS connection", outcome, deadline_seconds)
        return bytes(ffi.buffer(buffer, received_bytes[0]))

    def _check(self, what: str, outcome: int, deadline_seconds: float) -> None:
        if outcome == lib.TLS_DEADLINE:
            raise DeadlineError(what, expected=f"within {deadline_seconds} s", got="less")
        if outcome == lib.TLS_CLOSED:
            raise ConnectionLostError(what, expected="to succeed", got="the peer's end of the connection")
        if outcome == lib.TLS_FAILED:
            raise TlsError.of(_said(self._why))

    def abandon(self) -> None:
        """From another thread: what blocks returns."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Once or more often."""
        if self._pointer is not None:
            lib.tls_session_destroy(self._pointer)  # before the descriptor can be somebody else's
            self._pointer = None
        self._socket.close()
