"""TCP as the daemons use it: addresses, socket options, the preamble exchange."""

import asyncio
import contextlib
import errno
import ipaddress
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from migrate.errors import ConnectionLostError, DeadlineError, ListenRefusedError, PostcopyError
from proto.preamble import ANSWER_BYTES, MAGIC, PREAMBLE_BYTES, Answer, AnswerCode, Preamble

USER_TIMEOUT_MS = 10_000
KEEPALIVE_SECONDS = 5
ACCEPT_RETRY_SECONDS = 0.2


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Address:
    """``HOST:PORT``, ``[IPv6]:PORT``."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        host, separator, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            separator = ""
        if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise PostcopyError("address", expected="HOST:PORT or [IPv6]:PORT", got=text, code="usage")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_any(self) -> bool:
        """Every address of this host, or a name that may stand for any."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return True


def host_of(peer: str) -> str:
    """Of an Address that has been told: without the port, which a peer has anew with each connection."""
    return peer.rpartition(":")[0]


def require_loopback(address: Address, what: str, *, insecure: bool) -> None:
    """Raises ListenRefusedError: nothing here is encrypted or authenticated."""
    if not insecure and not address.is_loopback:
        raise ListenRefusedError(
            f"{what} address",
            expected="a loopback address (or TLS: --tls-dir; or --insecure: nothing is encrypted or authenticated)",
            got=address,
        )


def require_explicit(address: Address, what: str, *, insecure: bool) -> None:
    """Raises ListenRefusedError: what only tells may be told beyond loopback, where somebody has said at which address."""
    if not insecure and not address.is_loopback and address.is_any:
        raise ListenRefusedError(
            f"{what} address",
            expected="one address of this host (or --insecure: whoever reaches any of them may read)",
            got=address,
        )


def tune(sock: socket.socket, congestion_control: str | None = None) -> None:
    """``congestion_control``: None leaves the system's. Raises ListenRefusedError for one that is not allowed here."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that dies shows within seconds, also to who only reads
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS)
    if congestion_control is not None:
        _choose_congestion_control(sock, congestion_control)


def check_congestion_control(name: str) -> None:
    """Raises ListenRefusedError for one that no connection here could have."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        _choose_congestion_control(sock, name)


def _choose_congestion_control(sock: socket.socket, name: str) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except OSError as error:
        known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
        expected = f"one of {', '.join(known)}"
        if error.errno == errno.EPERM:  # without CAP_NET_ADMIN
            expected = f"one that this user may have (sysctl net.ipv4.tcp_allowed_congestion_control) of {', '.join(known)}"
        raise ListenRefusedError("--congestion-control", expected=expected, got=repr(name), code="usage") from error


async def connect(address: Address, *, deadline_seconds: float, congestion_control: str | None = None) -> socket.socket:
    """Raises OSError (refused, unreachable, unknown name), DeadlineError."""
    loop = asyncio.get_running_loop()
    error: OSError | None = None
    for family, kind, protocol, _, place in await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(deadline_seconds):  # wait_for of 3.11 loses a cancellation that comes with the answer
                await loop.sock_connect(sock, place)
            tune(sock, congestion_control)
            return sock
        except TimeoutError:
            sock.close()
            raise DeadlineError(f"connection to {address}", expected=f"within {deadline_seconds} s", got="nothing") from None
        except OSError as raised:
            sock.close()
            error = OSError(raised.errno, f"connecting to {address}: {raised.strerror}")
        except BaseException:
            sock.close()
            raise
    raise error or OSError(f"{address}: no address")


def listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise ListenRefusedError(f"listening on {address}", expected="a free address of this host", got=error) from error
    sock.setblocking(False)
    return sock


async def accept(listener: socket.socket, failed: Callable[[OSError], None]) -> tuple[socket.socket, tuple[str, int]]:
    """The next connection. Without descriptors left (EMFILE) it tells ``failed`` and tries again: a listener does not end."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return await loop.sock_accept(listener)
        except OSError as error:
            failed(error)
            await asyncio.sleep(ACCEPT_RETRY_SECONDS)


def has_ended(sock: HasDescriptor) -> bool:
    """Whether the peer has ended it or it is broken; also when there are bytes before the end that nobody has read."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


async def _receive_exactly(sock: socket.socket, size_bytes: int) -> bytes:
    """Up to size_bytes: fewer when the peer closes or what has come is not ours anyway."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size_bytes:
        part = await loop.sock_recv(sock, size_bytes - len(data))
        data += part
        if not part or (len(data) >= 8 and data[:8] != b"POSTCOPY"):
            break
    return data


async def greet(sock: socket.socket, preamble: Preamble, deadline_seconds: float) -> None:
    """Send the preamble, read the answer. Closes the socket and raises ProtocolError unless welcome."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(deadline_seconds):
            await loop.sock_sendall(sock, preamble.encode())
            data = await _receive_exactly(sock, ANSWER_BYTES)
            if len(data) < ANSWER_BYTES and MAGIC.startswith(data[: len(MAGIC)]):
                raise ConnectionLostError(
                    "answer to the preamble", expected=f"{ANSWER_BYTES} bytes", got=f"{len(data)}, then its end"
                )
            Answer.decode(data).check()
    except TimeoutError:
        sock.close()
        raise DeadlineError("answer to the preamble", expected=f"within {deadline_seconds} s", got="nothing") from None
    except BaseException:
        sock.close()
        raise


async def receive_preamble_bytes(sock: socket.socket, size_bytes: int = PREAMBLE_BYTES) -> bytes:
    """Fewer when the peer ends it before, or what has come is no preamble anyway."""
    return await _receive_exactly(sock, size_bytes)


async def answer(sock: socket.socket, code: AnswerCode) -> None:
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(sock, Answer(code).encode())
