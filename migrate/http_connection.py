"""One HTTP connection, bounded: how long a request may take to come, how large its head is, how long its answer waits.

uvicorn bounds the pause between two requests (timeout_keep_alive) and nothing else; a daemon that runs out of descriptors or of
memory for a client that dawdles takes no guest in.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from migrate.api.problems import problem

CONNECTIONS_MAX = 64
"""At one listener. Further ones are told so; twice as many, and the next is closed unheard."""
REQUEST_SECONDS = 10.0
"""From the first byte of a request to its last, and from a connection to its first byte."""
HEAD_BYTES_MAX = 32 << 10
HEADER_EXTRA_BYTES = 4  # ": " and the end of the line
HEAD_TOO_LARGE = (
    "request-too-large",
    f"request line and headers: expected <= {HEAD_BYTES_MAX} bytes",
    f"<= {HEAD_BYTES_MAX} bytes",
    "more",
)
UNREAD_SECONDS = 10.0
"""How long a client may leave its answer unread once the socket is full."""


class BoundedConnection(HttpToolsProtocol):
    """Overrides what asyncio and httptools call, and leaves the rest to uvicorn."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._in_head = self._message_ended = False
        self._head_bytes = 0  # of a head that is not whole yet; without the read that also had the end of the message before it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * CONNECTIONS_MAX:
            transport.abort()
        elif len(self.connections) > CONNECTIONS_MAX:
            self.app = _too_busy
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_here()
        self.resume_writing()
        super().connection_lost(exc)

    # --- a request that comes ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._message_ended = False
        super().data_received(data)
        if not self._answering():  # also after an empty line, which begins nothing
            self._await_request()
        self._head_bytes = self._head_bytes + len(data) if self._in_head and not self._message_ended else 0
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(431, *HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_request()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """Whole: counted exactly, and answered in its turn."""
        self._in_head = False
        serving = self.app
        if len(self.url) + sum(len(name) + len(value) + HEADER_EXTRA_BYTES for name, value in self.headers) > HEAD_BYTES_MAX:
            self.app = _head_too_large
        super().on_headers_complete()
        self.app = serving

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._message_ended = True
        self._request_is_here()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "request-malformed", msg, "an HTTP/1.1 request", "something else")

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _request_is_here(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, code: str, detail: str, expected: str, got: str) -> None:
        """Where no application can answer yet."""
        if self.transport.is_closing():
            return
        if self._answering():  # ours would be read as the rest of that
            self.transport.abort()
            return
        answer = problem(status, code, detail, expected=expected, got=got, headers={"connection": "close"})
        head = [f"HTTP/1.1 {status} {code}".encode(), *(name + b": " + value for name, value in answer.raw_headers)]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(answer.body))
        self.transport.close()

    # --- an answer that is not read ---------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def shutdown(self) -> None:
        """The server ends: who does not read holds nothing up."""
        super().shutdown()
        if self._unread is not None:
            self.transport.abort()


async def _head_too_large(scope: Scope, receive: Receive, send: Send) -> None:
    code, detail, expected, got = HEAD_TOO_LARGE
    await problem(431, code, detail, expected=expected, got=got, headers={"connection": "close"})(scope, receive, send)


async def _too_busy(scope: Scope, receive: Receive, send: Send) -> None:
    limit = f"at most {CONNECTIONS_MAX}"
    detail = f"connections: expected {limit}, got one more"
    refusal = problem(503, "too-busy", detail, expected=limit, got="one more", headers={"connection": "close"})
    await refusal(scope, receive, send)
