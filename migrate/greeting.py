"""The first exchange on every TCP connection, from connect or accept to WELCOME: in the clear, or inside TLS.

With TLS the dialling side first says one byte in the clear, ``C`` for control or ``D`` for data, and the handshake follows at
once. One listener takes both, and two libraries do TLS here; a session cannot go from one to the other, and which of them a
connection is for is only said inside (preamble). The byte says it before. Considered: a second port (one more to open in every
firewall); the server name or ALPN of the ClientHello (to be peeked at and parsed before anybody has proven anything); C for all
connections (a control connection would need a thread that copies). The byte decides nothing but the library: both keep one
policy, and the preamble, inside, has to name that kind. Whoever changes it on the way gets a connection refused, no more.

Handshakes of data connections wait on a thread of their own, those of control connections run in the event loop.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from migrate.control import ControlConnection
from migrate.dataplane.tls import TlsSocket
from migrate.errors import ConnectionLostError, DeadlineError, PeerNameError, TlsError
from migrate.network import answer, greet, receive_preamble_bytes
from migrate.tls import Tls, names_of, tls_error
from proto.errors import ProtocolError
from proto.preamble import (
    ANSWER_BYTES,
    MAGIC,
    PREAMBLE_BYTES,
    TLS_CONTROL,
    TLS_DATA,
    Answer,
    AnswerCode,
    ConnectionKind,
    Preamble,
)

_T = TypeVar("_T")
SHUTDOWN_SECONDS = 1.0
"""How long a peer may take to say that it has seen our end of a session."""
MAYBE_REFUSED = "the peer may have refused our certificate, and its log tells why"
"""In TLS 1.3 its verdict comes when the handshake is over for who has dialled; and not every end is said by an alert."""


class DataSocket(Protocol):
    """A plain socket or one with a TLS session: a loop is given its descriptor."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


# --- accepted ---------------------------------------------------------------------------------------------------------


class Incoming(ABC):
    """A connection that has been accepted, and that is closed unless it becomes a control or a data connection."""

    kinds = frozenset(ConnectionKind)

    async def preamble(self, deadline_seconds: float) -> Preamble:
        """Answers and raises ProtocolError or PeerNameError for what cannot be; raises DeadlineError for silence."""
        try:
            async with asyncio.timeout(deadline_seconds):
                data = await self._receive(deadline_seconds)
        except TimeoutError:
            raise DeadlineError("preamble", expected=f"within {deadline_seconds} s", got="less") from None
        try:
            self._check_peer()
            preamble = Preamble.decode(data)
            if preamble.kind not in self.kinds:
                got = f"{preamble.kind.name.lower()} on a connection that was said to be another"
                raise ProtocolError("preamble-invalid", "connection kind", expected="the one said before TLS", got=got)
            return preamble
        except PeerNameError:
            await self.answer(AnswerCode.NAME_NOT_ALLOWED)
            raise
        except ProtocolError as error:
            unsupported = error.code == "version-unsupported"
            await self.answer(AnswerCode.VERSION_UNSUPPORTED if unsupported else AnswerCode.PREAMBLE_INVALID)
            raise

    @abstractmethod
    async def _receive(self, deadline_seconds: float) -> bytes: ...

    def _check_peer(self) -> None:  # noqa: B027  whoever comes in the clear may
        """Raises PeerNameError."""

    @abstractmethod
    async def answer(self, code: AnswerCode) -> None: ...

    @abstractmethod
    async def control(self) -> ControlConnection: ...

    @abstractmethod
    def data(self) -> DataSocket: ...

    @abstractmethod
    def close(self) -> None: ...


class PlainIncoming(Incoming):
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    async def _receive(self, deadline_seconds: float) -> bytes:
        return await receive_preamble_bytes(self._socket)

    async def answer(self, code: AnswerCode) -> None:
        await answer(self._socket, code)

    async def control(self) -> ControlConnection:
        _, control = await asyncio.get_running_loop().connect_accepted_socket(ControlConnection, self._socket)
        return control

    def data(self) -> DataSocket:
        return self._socket

    def close(self) -> None:
        self._socket.close()


class TlsControlIncoming(Incoming):
    kinds = frozenset({ConnectionKind.CONTROL})

    def __init__(self, tls: Tls, sock: socket.socket) -> None:
        self._tls, self._socket = tls, sock
        self._greeting = _Greeting(PREAMBLE_BYTES)

    async def _receive(self, deadline_seconds: float) -> bytes:
        loop = asyncio.get_running_loop()
        await _handshake(
            loop.connect_accepted_socket(
                lambda: self._greeting,
                self._socket,
                ssl=self._tls.accepting,
                ssl_handshake_timeout=deadline_seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        )
        return await self._greeting.received()

    def _check_peer(self) -> None:
        self._tls.check(self._greeting.peer_names())

    async def answer(self, code: AnswerCode) -> None:
        self._greeting.write(Answer(code).encode())

    async def control(self) -> ControlConnection:
        return self._greeting.become_control()

    def data(self) -> DataSocket:
        raise AssertionError

    def close(self) -> None:
        self._greeting.close()
        self._socket.close()


class TlsDataIncoming(Incoming):
    kinds = frozenset({ConnectionKind.URGENT, ConnectionKind.BULK})

    def __init__(self, tls: Tls, sock: socket.socket) -> None:
        self._tls = tls
        self._secured = tls.data.session(sock, accepts=True)
        self._names: list[str] = []

    async def _receive(self, deadline_seconds: float) -> bytes:
        def receive() -> bytes:
            self._secured.handshake(deadline_seconds)
            self._names = self._secured.peer_names()
            return self._secured.read(PREAMBLE_BYTES, deadline_seconds)

        return await _on_own_thread("greet", receive, self._secured)

    def _check_peer(self) -> None:
        self._tls.check(self._names)

    async def answer(self, code: AnswerCode) -> None:
        with contextlib.suppress(TlsError, ConnectionLostError, DeadlineError):
            self._secured.write(Answer(code).encode(), 0)  # 16 bytes, the first that are sent since the handshake: they fit

    async def control(self) -> ControlConnection:
        raise AssertionError

    def data(self) -> DataSocket:
        return self._secured

    def close(self) -> None:
        self._secured.close()


async def incoming(sock: socket.socket, tls: Tls | None, deadline_seconds: float) -> Incoming:
    """What it is in. Raises ProtocolError for the clear where TLS is wanted, DeadlineError, OSError."""
    if tls is None:
        return PlainIncoming(sock)
    try:
        async with asyncio.timeout(deadline_seconds):
            first = await asyncio.get_running_loop().sock_recv(sock, 1)
    except TimeoutError:
        raise DeadlineError("connection", expected=f"a byte within {deadline_seconds} s", got="none") from None
    if first == TLS_CONTROL:
        return TlsControlIncoming(tls, sock)
    if first == TLS_DATA:
        return TlsDataIncoming(tls, sock)
    if first == MAGIC[:1]:
        async with asyncio.timeout(deadline_seconds):
            await receive_preamble_bytes(sock, PREAMBLE_BYTES - 1)  # else the answer may be lost with what nobody has read
    await answer(sock, AnswerCode.TLS_REQUIRED)
    raise ProtocolError("tls-required", "connection", expected="TLS; start the other daemon with --tls-dir too", got=first)


# --- dialled ----------------------------------------------------------------------------------------------------------


async def dial_control(sock: socket.socket, preamble: Preamble, tls: Tls | None, deadline_seconds: float) -> ControlConnection:
    """Welcome, or closed and one of ProtocolError, TlsError, PeerNameError, DeadlineError, ConnectionLostError, OSError."""
    loop = asyncio.get_running_loop()
    if tls is None:
        await greet(sock, preamble, deadline_seconds)
        _, control = await loop.create_connection(ControlConnection, sock=sock)
        return control
    greeting = _Greeting(ANSWER_BYTES)
    try:
        async with asyncio.timeout(deadline_seconds):
            await loop.sock_sendall(sock, TLS_CONTROL)
            await _handshake(
                loop.create_connection(
                    lambda: greeting,
                    sock=sock,
                    ssl=tls.dialling,
                    server_hostname="",
                    ssl_handshake_timeout=deadline_seconds,
                    ssl_shutdown_timeout=SHUTDOWN_SECONDS,
                )
            )
            tls.check(greeting.peer_names())  # before the preamble is said, which has the token in it
            greeting.write(preamble.encode())
            _check_answer(await greeting.received())
            return greeting.become_control()
    except TimeoutError:
        await greeting.abandon()
        sock.close()
        raise DeadlineError("answer to the preamble", expected=f"within {deadline_seconds} s", got="nothing") from None
    except BaseException:
        await greeting.abandon()
        sock.close()
        raise


async def dial_data(sock: socket.socket, preamble: Preamble, tls: Tls | None, deadline_seconds: float) -> DataSocket:
    """As dial_control."""
    if tls is None:
        await greet(sock, preamble, deadline_seconds)
        return sock
    secured = tls.data.session(sock, accepts=False)

    def greet_inside() -> bytes:
        secured.handshake(deadline_seconds)
        tls.check(secured.peer_names())
        secured.write(preamble.encode(), deadline_seconds)
        return secured.read(ANSWER_BYTES, deadline_seconds)

    try:
        await asyncio.get_running_loop().sock_sendall(sock, TLS_DATA)  # a byte: at once
        _check_answer(await _on_own_thread("greet", greet_inside, secured))
        return secured
    except BaseException:
        secured.close()
        raise


def _check_answer(data: bytes) -> None:
    if len(data) < ANSWER_BYTES and MAGIC.startswith(data[: len(MAGIC)]):
        got = f"{len(data)}, then its end; {MAYBE_REFUSED}"
        raise ConnectionLostError("answer to the preamble", expected=f"{ANSWER_BYTES} bytes", got=got)
    Answer.decode(data).check()


# --- how ----------------------------------------------------------------------------------------------------------------


async def _handshake(connecting: Any) -> None:
    """Raises TlsError, DeadlineError, ConnectionLostError."""
    try:
        await connecting
    except ssl.SSLError as error:
        raise tls_error(error) from None
    except ConnectionAbortedError:
        raise DeadlineError("TLS handshake", expected="within its time", got="less") from None
    except OSError as error:
        raise ConnectionLostError("TLS handshake", expected="to succeed", got=str(error) or f"its end; {MAYBE_REFUSED}") from None


class _Greeting(asyncio.Protocol):
    """The first bytes inside TLS, on a transport of asyncio; then it is a control connection's."""

    def __init__(self, wanted_bytes: int) -> None:
        self._wanted_bytes = wanted_bytes
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) >= self._wanted_bytes:
            assert self._transport is not None
            self._transport.pause_reading()  # what follows is for whom it becomes
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set()
        self._end(exc)

    def _end(self, error: Exception | None = None) -> None:
        if self._whole.done():
            return
        if isinstance(error, ssl.SSLError):
            self._whole.set_exception(tls_error(error))
        else:
            self._whole.set_result(None)
        self._whole.exception()  # whoever waits is told; nobody has to

    async def received(self) -> bytes:
        """As many as wanted, or what there was before the end."""
        await asyncio.shield(self._whole)
        return self._data[: self._wanted_bytes]

    def peer_names(self) -> list[str]:
        assert self._transport is not None
        return names_of(self._transport.get_extra_info("ssl_object").getpeercert())

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def become_control(self) -> ControlConnection:
        assert self._transport is not None
        control = ControlConnection()
        control.connection_made(self._transport)
        self._transport.set_protocol(control)
        if rest := self._data[self._wanted_bytes :]:
            control.data_received(rest)
        self._transport.resume_reading()
        return control

    def close(self) -> None:
        """What has been written still goes out."""
        if self._transport is not None:
            self._transport.close()

    async def abandon(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            await self._lost.wait()


async def _on_own_thread(name: str, run: Callable[[], _T], secured: TlsSocket) -> _T:
    """It blocks, with the GIL released. Given up, it is made to return before anybody closes what it uses."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(_T, result))

    def body() -> None:
        try:
            outcome: tuple[_T | None, BaseException | None] = run(), None
        except BaseException as error:
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, *outcome)

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    try:
        return await done
    finally:
        if not done.done() or done.cancelled():
            secured.abandon()
        thread.join()
