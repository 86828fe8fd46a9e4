"""Who is not let in, and why: one table of peers against control (Python's ssl) and data connections (OpenSSL in C)."""

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from migrate.bench.certificates import openssl
from migrate.errors import PostcopyError
from migrate.greeting import dial_control, dial_data
from migrate.network import Address
from migrate.pair import Pair, wait_settled
from migrate.tls import Tls, TlsFiles
from proto.errors import ProtocolError
from proto.preamble import PREAMBLE_BYTES, Answer, AnswerCode, ConnectionKind, Preamble

from ..path.commuter import Commuter, until
from .fakes import host_of_its_own
from .lossy_link import CutMove
from .tls_peers import GOOD, SECONDS, Certificates, Peer, listening

pytestmark = pytest.mark.requires("uffd")
KINDS = pytest.mark.parametrize("kind", [ConnectionKind.CONTROL, ConnectionKind.URGENT], ids=["control", "data"])
OLD = ssl.TLSVersion.TLSv1_2
LIMIT = 64
"""Connections that have not said who they are."""
GREETING_SECONDS = 5.0


def said_before(kind: ConnectionKind) -> bytes:
    return b"C" if kind is ConnectionKind.CONTROL else b"D"


def preamble(kind: ConnectionKind) -> Preamble:
    return Preamble(kind, os.urandom(16), 0, 0, bytes(16) if kind is ConnectionKind.CONTROL else os.urandom(16))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(certificates: Certificates) -> Iterator[Pair]:
    with Pair(arguments=("--tls-dir", str(certificates.host), "--tls-allow", "HOST.test")) as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: Pair) -> Iterator[Commuter]:
    guest = Commuter(pair, "guest", "16M", options=("--write-ratio", "0.5"))
    yield guest
    guest.end()


def connected(pair: Pair) -> socket.socket:
    address = Address.parse(pair.destination.address)
    return socket.create_connection((address.host, address.port), SECONDS, (host_of_its_own(), 0))


def logged_since(pair: Pair, at: int, *words: str) -> None:
    def found() -> bool:
        return any(all(word in line for word in words) for line in pair.destination.log()[at:].splitlines())

    until(found, f"{words} in {pair.destination.log()[at:]}", deadline_seconds=5)


def what_comes(sock: socket.socket) -> bytes:
    """Until its end, however it ends."""
    came = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := sock.recv(4096):
            came += data
    return came


# --- they dial --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("peer", "code", "words"),
    [
        (Peer(None), None, ("peer did not return a certificate", "--tls-dir")),
        (Peer("other_authority"), None, ("certificate verify failed", "our ca.pem does not vouch")),
        (Peer("expired"), None, ("certificate has expired", "renew it")),
        (Peer("host", OLD), None, ("unsupported protocol", "TLS 1.3")),
        (Peer("other_name"), AnswerCode.NAME_NOT_ALLOWED, ("host.test; add --tls-allow other.test", "got other.test")),
    ],
    ids=["no certificate", "another authority", "expired", "TLS 1.2", "another name"],
)
def test_who_dials_is_refused(
    pair: Pair, certificates: Certificates, kind: ConnectionKind, peer: Peer, code: AnswerCode | None, words: tuple[str, ...]
) -> None:
    at = len(pair.destination.log())
    came = b""
    with connected(pair) as sock:
        sock.sendall(said_before(kind))
        context = peer.context(certificates, accepts=False)
        with contextlib.suppress(ssl.SSLError, ConnectionError), context.wrap_socket(sock) as inside:
            inside.sendall(preamble(kind).encode())
            came = what_comes(inside)
    assert (Answer.decode(came).code if came else None) is code
    logged_since(pair, at, "connection refused", *words)


def test_who_ends_the_handshake_is_told_of(pair: Pair) -> None:
    """As a source that does not trust us: it need not say so."""
    at = len(pair.destination.log())
    with connected(pair) as sock:
        sock.sendall(said_before(ConnectionKind.CONTROL))
        inside = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out := ssl.MemoryBIO(), server_hostname="host.test")
        with pytest.raises(ssl.SSLWantReadError):
            inside.do_handshake()
        sock.sendall(out.read())
        assert sock.recv(4096)
    logged_since(pair, at, "TLS handshake", "its end; the peer may have refused our certificate")


@KINDS
def test_kind_said_before_is_the_one_said_inside(pair: Pair, certificates: Certificates, kind: ConnectionKind) -> None:
    """Whoever changes the byte in the clear has a connection refused."""
    at = len(pair.destination.log())
    other = ConnectionKind.BULK if kind is ConnectionKind.CONTROL else ConnectionKind.CONTROL
    with connected(pair) as sock:
        sock.sendall(said_before(kind))
        with GOOD.context(certificates, accepts=False).wrap_socket(sock) as inside:
            inside.sendall(preamble(other).encode())
            assert Answer.decode(what_comes(inside)).code is AnswerCode.PREAMBLE_INVALID
    logged_since(pair, at, "connection refused", "connection kind", "was said to be another")


@pytest.mark.parametrize(
    ("sent", "answered", "words"),
    [
        (preamble(ConnectionKind.CONTROL).encode(), True, ("expected TLS; start the other daemon with --tls-dir", "got b'P'")),
        (b"GET / HTTP/1.1\r\n\r\n", True, ("TLS", "got b'G'")),
        (b"\x16\x03\x01", True, ("TLS", "x16")),
        (b"C" + bytes(range(256)), False, ("TLS handshake",)),
        (b"D" + bytes(range(256)), False, ("TLS handshake",)),
        (b"C" + preamble(ConnectionKind.CONTROL).encode(), False, ("TLS handshake",)),
        (b"D" + preamble(ConnectionKind.URGENT).encode(), False, ("TLS handshake",)),
    ],
    ids=["preamble", "HTTP", "TLS at once", "C garbage", "D garbage", "C preamble", "D preamble"],
)
def test_what_is_no_tls_is_refused(pair: Pair, sent: bytes, answered: bool, words: tuple[str, ...]) -> None:
    at = len(pair.destination.log())
    with connected(pair) as sock:
        sock.sendall(sent)
        came = what_comes(sock)
    if answered:
        assert Answer.decode(came).code is AnswerCode.TLS_REQUIRED
    else:
        assert b"POSTCOPY" not in came
    logged_since(pair, at, "connection refused", *words)


def test_half_a_handshake_holds_up_nobody_for_long(pair: Pair, certificates: Certificates, guest: Commuter) -> None:
    """As many as there may be, of both kinds, at every step: the oldest gives way to one more, and all do after their time."""
    halves: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        for i in range(LIMIT):
            sock = stack.enter_context(connected(pair))
            step = i % 4
            if step > 0:
                sock.sendall(b"CD"[i // 4 % 2 :][:1])
            if step == 2:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            if step == 3:  # all of it, and then not a word
                sock = stack.enter_context(GOOD.context(certificates, accepts=False).wrap_socket(sock))
            halves.append(sock)
        with connected(pair):
            assert what_comes(halves[0]) == b""
        assert time.monotonic() - begun < GREETING_SECONDS - 1, "too slow a machine: the first half has had its time"
        for sock in halves:
            assert b"POSTCOPY" not in what_comes(sock)
    guest.move()


# --- we dial ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(certificates: Certificates) -> Tls:
    host = certificates.host
    return Tls(TlsFiles(host / "cert.pem", host / "key.pem", host / "ca.pem"), ["host.test"])


def dialled(ours: Tls, address: str, kind: ConnectionKind, deadline_seconds: float = SECONDS) -> PostcopyError | ProtocolError:
    """The error that it ends with."""

    async def dial() -> None:
        host, _, port = address.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=SECONDS)
        sock.setblocking(False)
        run = dial_control if kind is ConnectionKind.CONTROL else dial_data
        try:
            end = await run(sock, preamble(kind), ours, deadline_seconds)
            end.close()
        finally:
            for _ in range(10_000):  # it is closed when the event loop has let go of it
                if sock.fileno() < 0:
                    break
                await asyncio.sleep(0)
            assert sock.fileno() < 0

    with pytest.raises((PostcopyError, ProtocolError)) as raised:
        uvloop.run(dial())
    assert isinstance(raised.value, PostcopyError | ProtocolError)
    return raised.value


@KINDS
@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (Peer("other_authority"), ("certificate verify failed", "our ca.pem does not vouch")),
        (Peer("expired"), ("certificate has expired", "renew it there")),
        (Peer("other_name"), ("add --tls-allow other.test", "got other.test")),
        (Peer("host", OLD), ("the peer wants another TLS than 1.3",)),
    ],
    ids=["another authority", "expired", "another name", "TLS 1.2"],
)
def test_whom_we_dial_is_refused(
    ours: Tls, certificates: Certificates, kind: ConnectionKind, peer: Peer, words: tuple[str, ...]
) -> None:
    """He never sees a preamble, which has the token in it."""

    def serve(sock: socket.socket) -> None:
        assert sock.recv(1) == said_before(kind)
        context = peer.context(certificates, accepts=True)
        with contextlib.suppress(ssl.SSLError, ConnectionError), context.wrap_socket(sock, server_side=True) as inside:
            assert what_comes(inside) == b""

    with listening(serve) as address:
        error = dialled(ours, address, kind)
    assert all(word in str(error) for word in words), error


@KINDS
@pytest.mark.parametrize(
    ("alert", "words"),
    [
        ("other_authority", "its ca.pem needs that authority"),
        ("host", "it lets other names in: add --tls-allow"),
    ],
)
def test_whom_we_dial_does_not_want_us(
    ours: Tls, certificates: Certificates, kind: ConnectionKind, alert: str, words: str
) -> None:
    """By an alert, which comes when the handshake is over for us, or by his answer."""

    def serve(sock: socket.socket) -> None:
        assert sock.recv(1) == said_before(kind)
        context = GOOD.context(certificates, accepts=True)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(getattr(certificates, alert) / "ca.pem")
        with context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as inside:
            try:
                inside.do_handshake()
            except ssl.SSLError:
                inside.shutdown(socket.SHUT_WR)  # closed with something unread it would be a reset, which may overtake the alert
            else:
                assert len(inside.recv(PREAMBLE_BYTES)) == PREAMBLE_BYTES
                inside.sendall(Answer(AnswerCode.NAME_NOT_ALLOWED).encode())
            what_comes(inside)

    with listening(serve) as address:
        error = dialled(ours, address, kind)
    assert words in str(error), error


@KINDS
def test_whom_we_dial_speaks_no_tls(ours: Tls, kind: ConnectionKind) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(PREAMBLE_BYTES)  # a byte at least
        sock.sendall(Answer(AnswerCode.PREAMBLE_INVALID).encode())
        sock.shutdown(socket.SHUT_WR)
        what_comes(sock)

    with listening(serve) as address:
        error = dialled(ours, address, kind)
    assert "the peer speaks no TLS: start it with --tls-dir too" in str(error), error


@KINDS
def test_whom_we_dial_says_nothing(ours: Tls, kind: ConnectionKind) -> None:
    with listening(lambda sock: what_comes(sock) and None) as address:
        assert dialled(ours, address, kind, deadline_seconds=0.3).code == "deadline"


@KINDS
def test_whom_we_dial_goes_away(ours: Tls, kind: ConnectionKind) -> None:
    with listening(lambda sock: sock.recv(100) and None) as address:
        assert dialled(ours, address, kind).code == "connection-lost"


@KINDS
def test_whom_we_dial_ends_it_without_an_alert(ours: Tls, certificates: Certificates, kind: ConnectionKind) -> None:
    """Once the handshake is over for us: as who resets it because of our certificate."""

    def serve(sock: socket.socket) -> None:
        assert sock.recv(1) == said_before(kind)
        with GOOD.context(certificates, accepts=True).wrap_socket(sock, server_side=True) as inside:
            inside.recv(PREAMBLE_BYTES)

    with listening(serve) as address:
        error = dialled(ours, address, kind)
    assert error.code == "connection-lost"
    assert str(error).endswith("got 0, then its end; the peer may have refused our certificate, and its log tells why")


# --- as an operator sees it -------------------------------------------------------------------------------------------


def test_move_to_who_lets_us_not_in(pair: Pair, certificates: Certificates, guest: Commuter) -> None:
    """P5: the guest runs on, and the error says what to do. It need not be loopback, with TLS."""
    pair._arguments = ("--tls-dir", str(certificates.host), "--tls-allow", "other.test", "--listen", "0.0.0.0:0")
    strict = pair.daemon("destination-strict")
    assert strict.address.startswith("0.0.0.0:")
    with guest.is_at.client() as client:
        status = wait_settled(client, client.migrate(guest.guest_id, strict.address).id)
    assert (status.state, status.error and status.error.code) == ("failed", "name-not-allowed")
    assert status.error is not None
    assert "add --tls-allow with a DNS name of our certificate there" in status.error.got
    strict.end()


@pytest.mark.parametrize("kind", [ConnectionKind.CONTROL, ConnectionKind.URGENT, ConnectionKind.BULK])
def test_cut_amid_a_record(guest: Commuter, kind: ConnectionKind) -> None:
    """The path is made again, with sessions of its own; no byte is wrong."""
    with CutMove(guest, precopy="off") as move:
        from_source = kind is not ConnectionKind.CONTROL
        move.reaches("postcopy", "complete")
        passed = move.link.passed_bytes(kind, from_source=from_source)
        move.link.cut_at(kind, from_source=from_source, after_bytes=passed + 101)
        status = move.ends()
    assert (status.state, status.error) == ("complete", None)


def test_files_that_will_not_do(certificates: Certificates, tmp_path: Path) -> None:
    """Nothing that is in them is told."""
    host, other = certificates.host, certificates.other_name
    locked = tmp_path / "locked.pem"
    openssl("ec", "-in", host / "key.pem", "-aes256", "-passout", "pass:secret", "-out", locked)
    good = TlsFiles(host / "cert.pem", host / "key.pem", host / "ca.pem")
    for files, words in (
        (TlsFiles(tmp_path / "none.pem", good.key, good.authority), "No such file"),
        (TlsFiles(good.certificate, other / "key.pem", good.authority), "key values mismatch"),
        (TlsFiles(good.key, good.key, good.authority), "certificate: no start line"),
        (TlsFiles(good.certificate, locked, good.authority), "without a passphrase"),
        (TlsFiles(good.certificate, good.key, good.key), "authority"),
    ):
        with pytest.raises(PostcopyError) as raised:
            Tls(files, ["host.test"])
        assert words in str(raised.value)
        assert "BEGIN" not in str(raised.value)
    for wrong in ("b example", "*.test", "", "host..test", "-" * 64):
        with pytest.raises(PostcopyError, match="--tls-allow: expected a DNS name") as raised:
            Tls(good, ["host.test", wrong])
        assert raised.value.code == "usage"
    with pytest.raises(PostcopyError, match="--tls-allow NAME"):
        Tls(good, [])
    with pytest.raises(PostcopyError, match="no --tls-key, --tls-ca"):
        TlsFiles.chosen(None, good.certificate, None, None)
    assert TlsFiles.chosen(host, None, other / "key.pem", None) == TlsFiles(good.certificate, other / "key.pem", good.authority)
    assert TlsFiles.chosen(None, None, None, None) is None
