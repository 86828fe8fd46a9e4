"""Certificates that are replaced under running daemons: SIGHUP, and the connections that stand, begin, or are refused."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from migrate import tls
from migrate.bench.certificates import Authority
from migrate.dataplane.tls import TlsContext
from migrate.errors import PostcopyError
from migrate.greeting import dial_control, dial_data
from migrate.network import Address, connect
from migrate.pair import DaemonProcess, Pair
from migrate.tls import Tls, TlsFiles
from proto.errors import ProtocolError
from proto.preamble import ConnectionKind, Preamble

from ..path.commuter import Commuter, until
from .lossy_link import CutMove

NAME = "host.test"
DAY_SECONDS = 86400


def files_in(directory: Path) -> TlsFiles:
    return TlsFiles(directory / "cert.pem", directory / "key.pem", directory / "ca.pem")


class Renewal:
    """Two daemons with one directory of certificates, and what it is changed to."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.directory, self.pair = directory, pair
        self.old, self.new = Authority(directory / "old-authority"), Authority(directory / "new-authority")
        self.in_use = self.old.issue(directory / "in-use", NAME, days=5)

    def puts(self, other: Path, *names: str) -> None:
        for name in names or ("cert.pem", "key.pem", "ca.pem"):
            shutil.copy(other / name, self.in_use / name)

    def reloads(self, *words: str) -> None:
        for daemon in (self.pair.source, self.pair.destination):
            at = len(daemon.log())
            daemon.signal(signal.SIGHUP)
            until(lambda d=daemon, at=at: all(word in d.log()[at:] for word in words), f"{words}")  # type: ignore[misc]

    def days_left(self, daemon: DaemonProcess) -> int:
        with daemon.client() as client:
            told: dict[str, Any] = client.daemon()["tls"]
        assert (told["certificate_names"], told["allowed_names"]) == ([NAME], [NAME])
        expires = datetime.fromisoformat(told["certificate_expires_at"]).timestamp()
        metrics = httpx.get(f"http://{daemon.metrics_address}/metrics", trust_env=False, timeout=10).text
        gauge = next(line for line in metrics.splitlines() if line.startswith("postcopy_tls_certificate_expiry"))
        assert float(gauge.split()[1]) == expires
        return round((expires - time.time()) / DAY_SECONDS)


@pytest.fixture
def renewal(tmp_path: Path) -> Iterator[Renewal]:
    renewal = Renewal(tmp_path, Pair(arguments=("--tls-dir", str(tmp_path / "in-use"), "--tls-allow", NAME)))
    with renewal.pair:
        yield renewal


def is_let_in(daemon: DaemonProcess, directory: Path, kind: ConnectionKind) -> bool:
    """Whether a handshake with these files comes as far as our preamble's answer."""

    async def dial() -> None:
        sock = await connect(Address.parse(daemon.address), deadline_seconds=10)
        preamble = Preamble(kind, os.urandom(16), 1, 0, bytes(16))
        run = dial_control if kind is ConnectionKind.CONTROL else dial_data
        (await run(sock, preamble, Tls(files_in(directory), [NAME]), 10)).close()

    with pytest.raises((PostcopyError, ProtocolError)) as ended:
        asyncio.run(dial())
    code = ended.value.code  # type: ignore[attr-defined]
    assert code in ("migration-unknown", "tls-failed", "connection-lost")
    return bool(code == "migration-unknown")


@pytest.mark.requires("uffd")
def test_new_connections_use_what_is_new_and_those_that_stand_go_on(renewal: Renewal) -> None:
    """Another authority altogether, amid a migration; nobody connects anew for it."""
    guest = Commuter(renewal.pair, "renewed", "4M", options=("--rate", "4000"))
    try:
        assert [renewal.days_left(daemon) for daemon in (renewal.pair.source, renewal.pair.destination)] == [5, 5]
        with CutMove(guest, precopy="off", bulk=False) as move:
            move.reaches("postcopy")
            renewal.puts(renewal.new.issue(renewal.directory / "new", NAME, days=20))
            renewal.reloads("TLS files read anew")
            status = move.ends()
        assert (status.state, status.epoch, status.error) == ("complete", 0, None)
        assert [renewal.days_left(daemon) for daemon in (renewal.pair.source, renewal.pair.destination)] == [20, 20]
        old = renewal.old.issue(renewal.directory / "old", NAME)
        for kind in (ConnectionKind.CONTROL, ConnectionKind.URGENT):
            assert not is_let_in(renewal.pair.destination, old, kind)
            assert is_let_in(renewal.pair.destination, renewal.in_use, kind)
        assert guest.move().state == "complete"
    finally:
        guest.end()


@pytest.mark.requires("uffd")
def test_files_that_will_not_do_change_nothing(renewal: Renewal) -> None:
    other = renewal.new.issue(renewal.directory / "other", NAME)
    renewal.puts(other, "key.pem")
    renewal.reloads("the earlier stay in use", "key values mismatch", "send SIGHUP again")
    renewal.puts(renewal.old.issue(renewal.directory / "expired", NAME, days=-1))
    renewal.reloads("the earlier stay in use", "valid now", "send SIGHUP again")
    (renewal.in_use / "ca.pem").unlink()
    renewal.reloads("the earlier stay in use", "No such file", "send SIGHUP again")
    assert renewal.days_left(renewal.pair.destination) == 5
    guest = Commuter(renewal.pair, "unmoved", "1M")
    try:
        assert guest.move().state == "complete"
    finally:
        guest.end()
    renewal.puts(renewal.old.issue(renewal.directory / "mended", NAME, days=9))
    renewal.reloads("TLS files read anew")
    assert renewal.days_left(renewal.pair.destination) == 9


def test_both_libraries_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of the files between the one and the other."""
    directory = Authority(tmp_path / "authority").issue(tmp_path / "host", NAME)

    class Slow(TlsContext):
        def __init__(self, *files: Path) -> None:
            super().__init__(*files)
            for name in ("cert.pem", "key.pem", "ca.pem"):
                (directory / name).write_text("half of another file")

    monkeypatch.setattr(tls, "TlsContext", Slow)
    made = Tls(files_in(directory), [NAME])
    assert made.data.names == [NAME]
    assert len(made.accepting.get_ca_certs()) == len(made.dialling.get_ca_certs()) == 1
    with pytest.raises(PostcopyError, match="certificate: no start line"):
        made.reload()
