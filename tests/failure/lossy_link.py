"""A TCP path that can be cut, stalled, throttled or cut amid a frame: what stands between two real daemons in failure tests.

    with LossyLink(target) as link:  link.address;  link.cut();  link.stall();  link.cut_at(after_bytes=1000, …)

Each connection is two pumps, threads that copy bytes; they know the preamble, and so which connection it is. Nothing of a
connection is changed, reordered or made up: what a path does, a network can do.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from migrate.pair import DaemonProcess
from migrate.session import MigrationStatus
from proto.preamble import TLS_CONTROL, TLS_DATA, ConnectionKind

from ..path.commuter import Commuter, until

PIECE_BYTES = 1 << 16
KIND_AT = 12
CONNECT_SECONDS = 2.0
LOOK_SECONDS = 0.05


@dataclass
class CutAt:
    """One cut to come: of all connections, when so many bytes of one of them have passed."""

    kind: ConnectionKind
    from_source: bool
    after_bytes: int


@dataclass(eq=False)
class Connection:
    """``source``: the end that dialled."""

    source: socket.socket
    destination: socket.socket
    kind: ConnectionKind | None = None
    passed_bytes: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def break_off(self) -> None:
        """Both ends get a reset, as from a path that has lost the connection."""
        for sock in (self.source, self.destination):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class LossyLink:
    """Between whoever dials ``address`` and ``target`` (HOST:PORT)."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LOOK_SECONDS)
        self._lock = threading.Condition()
        self._connections: set[Connection] = set()
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._open = True
        self._flows = True
        self._cut_at: CutAt | None = None
        self.bytes_per_second: float | None = None
        self.cuts = 0
        self._dialled_secured = 0  # data connections since the last control connection
        self._spawn(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._ended = True
            self._break_all()
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive(), thread.name
        self._listener.close()

    # --- what a path can do -----------------------------------------------------------------------------------------

    def cut(self, *, until_restored: bool = False) -> None:
        """Every connection is lost at once; with ``until_restored`` new ones are refused until then."""
        with self._lock:
            self._open = self._open and not until_restored
            self._break_all()

    def cut_at(self, kind: ConnectionKind, *, from_source: bool, after_bytes: int) -> None:
        """A cut to come: the bytes up to there still arrive, what follows does not."""
        with self._lock:
            self._cut_at = CutAt(kind, from_source, after_bytes)

    def stall(self) -> None:
        """Nothing passes, and nobody is told."""
        with self._lock:
            self._flows = False

    def restore(self) -> None:
        with self._lock:
            self._open = self._flows = True
            self._lock.notify_all()

    def wait_for_cut(self, deadline_seconds: float) -> bool:
        """Whether ``cut_at`` has come to its byte within that time."""
        with self._lock:
            return self._lock.wait_for(lambda: self._cut_at is None, deadline_seconds)

    def passed_bytes(self, kind: ConnectionKind, *, from_source: bool) -> int:
        """Of the connections of this kind that stand now."""
        with self._lock:
            return sum(connection.passed_bytes[from_source] for connection in self._connections if connection.kind is kind)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _break_all(self) -> None:
        self.cuts += bool(self._connections)
        for connection in self._connections:
            connection.break_off()
        self._lock.notify_all()

    def _spawn(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="lossy-link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended:
            try:
                source, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            with self._lock:
                refused = not self._open
            destination = None if refused else self._dial()
            if destination is None:
                source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                source.close()
                continue
            self._begin(Connection(source, destination))

    def _dial(self) -> socket.socket | None:
        try:
            return socket.create_connection(self._target, timeout=CONNECT_SECONDS)
        except OSError:
            return None

    def _begin(self, connection: Connection) -> None:
        for sock in (connection.source, connection.destination):
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._ended or not self._open:
                connection.break_off()
            self._connections.add(connection)
        left = [2]
        for from_source in (True, False):
            self._spawn(lambda from_source=from_source: self._pump(connection, left, from_source=from_source))

    def _pump(self, connection: Connection, left: list[int], *, from_source: bool) -> None:
        ends = (connection.source, connection.destination)
        reads, writes = ends if from_source else ends[::-1]
        with contextlib.suppress(OSError):
            while data := reads.recv(PIECE_BYTES):
                passes = self._passes(connection, data, from_source=from_source)
                writes.sendall(data[:passes])
                if passes < len(data):
                    self.cut()
            with contextlib.suppress(OSError):
                writes.shutdown(socket.SHUT_WR)
        with self._lock:
            left[0] -= 1
            if left[0] > 0:
                return
            self._connections.discard(connection)
        connection.break_off()
        connection.source.close()
        connection.destination.close()

    def _kind_of(self, data: bytes) -> ConnectionKind | None:
        """Of its first bytes. With TLS they tell control from data, and the order of dialling says the rest."""
        if data[:1] == TLS_CONTROL:
            self._dialled_secured = 0
            return ConnectionKind.CONTROL
        if data[:1] == TLS_DATA:
            self._dialled_secured += 1
            return ConnectionKind.URGENT if self._dialled_secured == 1 else ConnectionKind.BULK
        return ConnectionKind(data[KIND_AT]) if len(data) > KIND_AT else None

    def _passes(self, connection: Connection, data: bytes, *, from_source: bool) -> int:
        """How many of these bytes go on, after they have been held back for as long as they must."""
        with self._lock:
            if connection.kind is None and from_source:
                connection.kind = self._kind_of(data)
            self._lock.wait_for(lambda: self._flows or self._ended)
            before = connection.passed_bytes[from_source]
            connection.passed_bytes[from_source] += len(data)
            cut, rate = self._cut_at, self.bytes_per_second
            if cut and cut.kind is connection.kind and cut.from_source is from_source and before + len(data) > cut.after_bytes:
                self._cut_at = None
                return max(cut.after_bytes - before, 0)
        if rate is not None:
            time.sleep(len(data) / rate)  # a slow path: the one place where time itself is what is tested
        return len(data)


class CutMove:
    """One move of a commuter over a link of its own."""

    def __init__(self, guest: Commuter, **options: str | float | bool) -> None:
        self.guest = guest
        self._here, self._there = guest.is_at, guest.goes_to
        self.link = LossyLink(self._there.address)
        with self._here.client() as client:
            self.id = client.migrate(guest.guest_id, self.link.address, **options).id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.link.__exit__(kind, error, trace)

    def state(self) -> str:
        return self._state_at(self._here)

    def state_there(self) -> str:
        return self._state_at(self._there)

    def _state_at(self, daemon: DaemonProcess) -> str:
        with daemon.client() as client:
            return str(client.status(self.id).state)

    def reaches(self, *states: str) -> None:
        until(lambda: self.state() in states, " or ".join(states))

    def ends(self) -> MigrationStatus:
        """Settled; a guest that has moved has checked itself. Raises AssertionError."""
        with self._here.client() as client:
            status = client.status(self.id, settled_within_seconds=30)
        assert status.settled, status
        if status.state == "complete":
            self.guest.arrived()
        return status
