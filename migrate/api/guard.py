"""What every request passes: its body is small and JSON, no switchover is under way, and no error leaves but as a problem."""

from typing import TYPE_CHECKING

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from migrate.api.problems import problem

if TYPE_CHECKING:
    from migrate.daemon import Daemon

BODY_BYTES_MAX = 64 << 10
log = structlog.get_logger("postcopy.api")


class BodyTooLargeError(Exception):
    pass


class ClientGoneError(Exception):
    pass


class Guard:
    """ASGI, and not the framework's own middleware: that one stands between a stream and its connection."""

    def __init__(self, app: ASGIApp, daemon: "Daemon") -> None:
        self._app, self._daemon = app, daemon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = {name.lower(): value for name, value in scope["headers"]}
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            body = await _read(receive, headers)
            await self._daemon.quiet.wait()
            if body and scope["method"] == "POST" and _media_type(headers) != b"application/json":
                got = _media_type(headers).decode("latin-1") or "no content-type"
                answer = problem(415, "media-type", f"body: expected JSON, got {got}", expected="application/json", got=got)
                await answer(scope, receive, sending)
                return
            await self._app(scope, _replay(body, receive), sending)
        except BodyTooLargeError:
            limit = f"<= {BODY_BYTES_MAX} bytes"
            refusal = problem(
                413, "request-too-large", f"body: expected {limit}", expected=limit, got="more", headers={"connection": "close"}
            )
            await refusal(scope, receive, sending)
        except ClientGoneError:
            pass
        except Exception as error:
            log.error("internal error", path=scope["path"], exc_info=error)
            if started:
                raise
            internal = problem(500, "internal", f"{type(error).__name__} within the daemon: its log has the rest")
            await internal(scope, receive, sending)


def _media_type(headers: dict[bytes, bytes]) -> bytes:
    name, _, _ = headers.get(b"content-type", b"").partition(b";")
    return name.strip().lower()


async def _read(receive: Receive, headers: dict[bytes, bytes]) -> bytes:
    """The whole body. Raises BodyTooLargeError before more than BODY_BYTES_MAX are kept, ClientGoneError."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
        raise BodyTooLargeError
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise BodyTooLargeError
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
