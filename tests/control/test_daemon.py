"""A daemon's life: readiness, private sockets, loopback unless told otherwise, and an end that abandons no guest."""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from migrate.client import DaemonClient
from migrate.errors import PostcopyError
from migrate.pair import Pair, Process
from proto.messages import Cancel

from ..failure.fakes import FakeDestination, FakeGuest
from ..path.commuter import Commuter, until

Cli = Callable[..., subprocess.CompletedProcess[str]]
NOTIFY_DEADLINE_SECONDS = 20


class WatchedDaemon(Process):
    """One that tells us, as it would tell a service manager, what becomes of it."""

    def __init__(self, directory: Path, *arguments: str, role: str = "source") -> None:
        self.runtime_dir = directory / "runtime"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self._notify.settimeout(NOTIFY_DEADLINE_SECONDS)
        options = ["--runtime-dir", str(self.runtime_dir), "--metrics", "off", *arguments]
        super().__init__("watched", [role, *options], directory / "log", {"NOTIFY_SOCKET": str(directory / "notify")})
        assert self.told() == "READY=1"

    def told(self) -> str:
        return self._notify.recv(4096).decode()

    def client(self) -> DaemonClient:
        return DaemonClient(self.runtime_dir)

    def close(self) -> None:
        self.kill()
        self._notify.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[WatchedDaemon]:
    daemon = WatchedDaemon(tmp_path)
    yield daemon
    daemon.close()


def test_sockets_are_private(daemon: WatchedDaemon) -> None:
    assert stat.S_IMODE(daemon.runtime_dir.stat().st_mode) == 0o700
    for name in ("guests.sock", "api.sock"):
        status = (daemon.runtime_dir / name).stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600


def test_runtime_directory_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir(mode=0o755)
    daemon = WatchedDaemon(tmp_path)
    assert stat.S_IMODE(daemon.runtime_dir.stat().st_mode) == 0o700
    daemon.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_idle_daemon_ends_at_once_and_leaves_nothing(daemon: WatchedDaemon, number: signal.Signals) -> None:
    daemon.signal(number)
    assert daemon.told() == "STOPPING=1"
    assert daemon.wait() == 0
    assert list(daemon.runtime_dir.iterdir()) == []


def test_second_daemon_does_not_take_the_sockets(daemon: WatchedDaemon, cli: Cli) -> None:
    run = cli("source", "--runtime-dir", str(daemon.runtime_dir), "--metrics", "off")
    assert run.returncode == 1
    assert "expected no other daemon, got one answers: choose another --runtime-dir" in run.stderr
    with daemon.client() as client:
        assert client.daemon()["role"] == "source"


def test_sockets_of_a_daemon_that_was_killed_are_taken_over(tmp_path: Path) -> None:
    first = WatchedDaemon(tmp_path)
    first.close()
    assert (first.runtime_dir / "api.sock").exists()
    (tmp_path / "notify").unlink()
    second = WatchedDaemon(tmp_path)
    with second.client() as client:
        assert client.daemon()["stopping"] is False
    second.close()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("destination", "--listen", "0.0.0.0:0", "--metrics", "off"), "migration address"),
        (("destination", "--listen", "[::]:0", "--metrics", "off"), "migration address"),
        (("source", "--metrics", "0.0.0.0:0"), "metrics address"),
        (("destination", "--listen", "127.0.0.1:0", "--metrics", "0.0.0.0:0"), "metrics address"),
    ],
    ids=["listen", "listen-v6", "source-metrics", "destination-metrics"],
)
def test_beyond_loopback_takes_insecure(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    run = cli(*arguments, "--runtime-dir", str(tmp_path / "runtime"))
    assert run.returncode == 1
    assert f"postcopy: {what}: expected a loopback address (or --insecure: nothing is encrypted" in run.stderr


def test_insecure_is_what_it_takes(tmp_path: Path) -> None:
    daemon = WatchedDaemon(tmp_path, "--listen", "0.0.0.0:0", "--insecure", role="destination")
    assert '"migration_address": "0.0.0.0:' in (daemon.runtime_dir / "daemon.json").read_text()
    daemon.close()


@pytest.mark.requires("uffd")
def test_guest_does_not_leave_for_beyond_loopback(daemon: WatchedDaemon, cli: Cli) -> None:
    with FakeGuest("stays", "running") as guest, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        answer = client._http.post("/v1/migrations", json={"guest_id": "stays", "destination": "192.0.2.1:7641"})
        assert answer.status_code == 403
        assert answer.json()["type"] == "urn:postcopy:listen-refused"
        run = cli("migrate", "stays", "192.0.2.1:7641", "--daemon", str(daemon.runtime_dir))
        assert run.returncode == 1
        assert "destination address: expected a loopback address (or --insecure" in run.stderr
        assert client.migrations() == []


@pytest.mark.requires("uffd")
def test_migration_before_its_switchover_is_cancelled_by_the_end(daemon: WatchedDaemon) -> None:
    with FakeGuest("stays", "running") as guest, FakeDestination() as fake, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        client.migrate("stays", fake.address)
        fake.attach()
        daemon.signal(signal.SIGTERM)
        assert fake.control.receive(Cancel).reason == "the daemon is ending"
        assert daemon.wait() == 0
        assert guest.told_only_the_end()


@pytest.fixture
def own_pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.requires("uffd")
def test_guest_in_postcopy_is_not_abandoned(own_pair: Pair) -> None:
    """Both daemons are told to end while pages are still to come: they say what they wait for, and end when it is done."""
    slow = Commuter(own_pair, "slow", "1M", options=("--pattern", "permute", "--rate", "250"))
    source, destination = slow.is_at, slow.goes_to
    with source.client() as here, destination.client() as there:
        begun = here.migrate(slow.guest_id, destination.address, bulk=False)
        until(lambda: here.status(begun.id).state == "postcopy", "postcopy")
        for daemon in (source, destination):
            daemon.signal(signal.SIGTERM)
            until(lambda daemon=daemon: "waiting for guests in postcopy" in daemon.log(), "it says what it waits for")
            assert daemon.returncode is None
        assert here.daemon()["stopping"] is True
        health = httpx.get(f"http://{source.metrics_address}/healthz", trust_env=False)
        assert (health.status_code, health.text) == (503, "ending\n")
        with pytest.raises(PostcopyError, match="guest"):
            there.migrate("slow-there", source.address)
    assert slow.waits.event("verified", "failed", deadline_seconds=20)["event"] == "verified"
    assert source.wait() == 0
    assert destination.wait() == 0
    assert "migration complete" in source.log()
    assert "migration complete" in destination.log()


@pytest.mark.requires("uffd")
def test_second_signal_ends_a_daemon_with_a_guest_in_postcopy(tmp_path: Path) -> None:
    daemon = WatchedDaemon(tmp_path)
    with FakeGuest("gone", "running") as guest, FakeDestination() as fake, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        client.migrate("gone", fake.address)
        fake.switch_over(guest)
        until(lambda: client.migrations()[0].state == "postcopy", "postcopy")
        daemon.signal(signal.SIGTERM)
        assert daemon.told() == "STOPPING=1"
        assert daemon.told() == "STATUS=waiting for guests in postcopy: gone"
        assert daemon.returncode is None
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert guest.told_only_the_end()  # not resumed: it may run there
    assert os.listdir(daemon.runtime_dir) == []
    daemon.close()
