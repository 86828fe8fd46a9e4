"""Clients of the API that dawdle, do not read, or come in crowds: each is bounded, and the others are served."""

import contextlib
import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.http_connection import CONNECTIONS_MAX
from migrate.pair import DaemonProcess

from ..failure.mutants import Mutation, python_tree
from ..path.commuter import until

DEADLINE_SECONDS = 10.0
BOUNDS = "migrate/http_connection.py"
SOON = (
    Mutation(BOUNDS, "REQUEST_SECONDS = 10.0", "REQUEST_SECONDS = 0.2"),
    Mutation(BOUNDS, "UNREAD_SECONDS = 10.0", "UNREAD_SECONDS = 0.2"),
)
"""The deadlines of the product, short enough to wait for."""
REQUEST = b"GET /openapi.json HTTP/1.1\r\nHost: daemon\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("hasty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(python_tree(directory / "tree", *SOON)))
        daemon = DaemonProcess(directory, "source", listens=False)
    yield daemon
    daemon.end()


def dial(daemon: DaemonProcess) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_SECONDS)
    sock.connect(str(daemon.runtime_dir / "api.sock"))
    return sock


def end_of(sock: socket.socket) -> bytes:
    """What comes until the daemon closes; TimeoutError if it does not."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            said += part
    return said


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/heal",
        b"POST /v1/migrations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n{",
        REQUEST.replace(b"openapi.json", b"v1/events") + b"GET /v1",
    ],
    ids=["nothing", "half a line", "half a body", "half a second request, while a stream is open"],
)
def test_request_that_does_not_come_ends_its_connection(hasty: DaemonProcess, sent: bytes) -> None:
    with dial(hasty) as sock:
        sock.sendall(sent)
        end_of(sock)
    with hasty.client() as client:
        assert client.daemon()["stopping"] is False


def test_stream_outlives_the_deadline_of_its_request(hasty: DaemonProcess) -> None:
    """Which is over when the request is here."""
    with hasty.client() as client, client._http.stream("GET", "/v1/events?for_seconds=0.5") as answer:
        assert b"event: end" in answer.read()


def test_stream_outlives_an_empty_line_behind_its_request(hasty: DaemonProcess) -> None:
    """Some clients end a request with one (RFC 9112, 2.2): it begins nothing that would have to come to an end."""
    with dial(hasty) as sock:
        sock.sendall(b"GET /v1/events?for_seconds=0.5 HTTP/1.1\r\nHost: daemon\r\nConnection: close\r\n\r\n\r\n")
        assert b"event: end" in end_of(sock)


def test_empty_lines_keep_no_connection(hasty: DaemonProcess) -> None:
    with dial(hasty) as sock:
        sock.sendall(REQUEST)
        sock.recv(1)
        sock.sendall(b"\r\n")
        end_of(sock)


HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: daemon\r\n"


@pytest.mark.parametrize(
    ("padding", "statuses"),
    [(31_000, [b"200"] * 9), (34_000, [b"200"] * 8 + [b"431"])],
    ids=["behind others", "too large"],
)
def test_head_is_counted_alone(hasty: DaemonProcess, padding: int, statuses: list[bytes]) -> None:
    """Not with what came in one read with it, and answered behind what was asked before."""
    with dial(hasty) as sock:
        sock.sendall((HEALTH + b"X: " + b"x" * 7_000 + b"\r\n\r\n") * 8 + HEALTH + b"Connection: close\r\nX: ")
        sock.sendall(b"x" * padding + b"\r\n\r\n")
        assert [answer[:3] for answer in end_of(sock).split(b"HTTP/1.1 ")[1:]] == statuses


def test_head_without_an_end_is_refused(hasty: DaemonProcess) -> None:
    with dial(hasty) as sock:
        sock.sendall(HEALTH + b"X: ")
        for _ in range(8):
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(b"x" * 20_000)
        assert end_of(sock).startswith(b"HTTP/1.1 431 ")


def test_answer_that_is_not_read_ends_its_connection(hasty: DaemonProcess) -> None:
    """Pipelined requests whose answers fill the socket and more; an answer would go on when it is read at last."""
    with dial(hasty) as sock:
        sock.sendall(REQUEST * 60)
        hung_up = select.poll()
        hung_up.register(sock, 0)  # POLLHUP alone, and nothing has been read
        assert hung_up.poll(20_000), "the daemon has closed it"
        assert len(end_of(sock)) < 60 * 40_000


def test_crowd(tmp_path: Path) -> None:
    """Beyond CONNECTIONS_MAX a request is told so; beyond twice as many a connection ends unheard. Then there is room again."""
    daemon = DaemonProcess(tmp_path, "source", listens=False)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS_MAX):
                stack.enter_context(dial(daemon))
            with dial(daemon) as sock:
                sock.sendall(REQUEST)
                head, _, body = end_of(sock).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"application/problem+json" in head
                assert json.loads(body)["type"] == "urn:postcopy:too-busy"
            crowd = [stack.enter_context(dial(daemon)) for _ in range(CONNECTIONS_MAX)]
            with dial(daemon) as sock:
                assert end_of(sock) == b""
            crowd[0].setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody else's
                crowd[0].recv(1)

        def served() -> bool:
            with daemon.client() as client:
                return client._http.get("/v1/health").status_code == 200

        until(served, "there is room again")
    finally:
        daemon.end()
