"""Certificates of every sort, and the other end of a connection, spoken by neither of the two libraries' code in the product."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.bench.certificates import Authority

SECONDS = 10.0


class Certificates:
    """``host``: what daemons have. The others are nobody that they let in."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = Authority(directory / "ours"), Authority(directory / "theirs")
        self.host = ours.issue(directory / "host", "host.test")
        self.expired = ours.issue(directory / "expired", "host.test", days=-1)
        self.other_name = ours.issue(directory / "other", "other.test")
        self.other_authority = theirs.issue(directory / "stranger", "host.test")


@dataclass(frozen=True)
class Peer:
    """What somebody shows: a certificate of ``Certificates``, or none, and the newest TLS that he speaks."""

    shows: str | None
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3

    def context(self, certificates: Certificates, *, accepts: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if accepts else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # he does not care who we are
        context.maximum_version = self.newest
        if self.shows is not None:
            files: Path = getattr(certificates, self.shows)
            context.load_cert_chain(files / "cert.pem", files / "key.pem")
        return context


GOOD = Peer("host")


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """HOST:PORT of somebody who does this with the first connection that comes, and then waits for its end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(SECONDS)
                    serve(sock)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, name="tls-peer", daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(SECONDS)
        assert not thread.is_alive()
        if raised:
            raise raised[0]
