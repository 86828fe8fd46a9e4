"""A daemon's life: readiness, private sockets, loopback unless told otherwise, and an end that abandons no guest."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from migrate.client import DaemonClient, ServerEvent
from migrate.config import make_private
from migrate.errors import HostLacksError, PostcopyError
from migrate.pair import Pair, Process
from migrate.record import FOLDER, STAGED
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

    def told_no_more(self) -> bool:
        """Whether nothing is there that has not been read; once it has ended."""
        self._notify.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return not self._notify.recv(4096)
        return True

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


MEMBERS = 65123  # a group that nobody here is in, unless told
NOBODY = 65534


@pytest.mark.requires("root")
def test_members_of_the_socket_group_and_nobody_else_may_connect() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own lie in a folder that only this user may enter
        directory = Path(name)
        directory.chmod(0o711)
        daemon = WatchedDaemon(directory, "--socket-group", str(MEMBERS))
        try:
            status = daemon.runtime_dir.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o750, MEMBERS)
            for socket_name in ("guests.sock", "api.sock"):
                path = daemon.runtime_dir / socket_name
                assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, MEMBERS)
                for group, welcome in ((MEMBERS, True), (NOBODY, False)):
                    who = ["setpriv", f"--reuid={NOBODY}", f"--regid={group}", "--clear-groups"]
                    run = subprocess.run([*who, "test", "-w", str(path)], timeout=20, check=False)
                    assert (run.returncode == 0) is welcome  # writing is what connect(2) asks for: unix(7)
        finally:
            daemon.close()


def test_group_that_does_not_exist_is_said(cli: Cli, tmp_path: Path) -> None:
    run = cli("source", "--runtime-dir", str(tmp_path / "runtime"), "--metrics", "off", "--socket-group", "no-such-group")
    assert run.returncode == 5
    assert "there is no group no-such-group; make it (groupadd --system no-such-group), or name another" in run.stderr


def test_group_that_is_not_ours_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root is a member of all of them, so to speak; an ordinary user gets EPERM."""

    def not_permitted(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", not_permitted)
    with pytest.raises(HostLacksError, match=f"no member of group {MEMBERS}.*SupplementaryGroups="):
        make_private(tmp_path / "runtime", MEMBERS)
    assert stat.S_IMODE((tmp_path / "runtime").stat().st_mode) == 0o700


def test_one_daemon_private_beside_one_with_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both below one directory: the private one closes itself, and not the way to the other."""
    monkeypatch.setenv("POSTCOPY_RUNTIME_DIR", str(tmp_path / "base"))
    make_private(tmp_path / "base" / "shared", os.getgid())
    make_private(tmp_path / "base" / "private")
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in (tmp_path / "base", *(tmp_path / "base").iterdir())}
    assert modes == {"base": 0o750, "shared": 0o750, "private": 0o700}
    (tmp_path / "base").chmod(0o777)
    make_private(tmp_path / "base" / "private")
    assert stat.S_IMODE((tmp_path / "base").stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_idle_daemon_ends_at_once_and_leaves_nothing(daemon: WatchedDaemon, number: signal.Signals) -> None:
    daemon.signal(number)
    assert daemon.told() == "STOPPING=1"
    assert daemon.wait() == 0
    assert list(daemon.runtime_dir.iterdir()) == []


def test_second_daemon_takes_neither_sockets_nor_records(daemon: WatchedDaemon, cli: Cli) -> None:
    staged = daemon.runtime_dir / FOLDER / f"{'0' * 32}.staged"
    staged.write_bytes(STAGED)
    run = cli("source", "--runtime-dir", str(daemon.runtime_dir), "--metrics", "off")
    assert run.returncode == 1
    assert "expected no other daemon, got one answers: choose another --runtime-dir" in run.stderr
    with daemon.client() as client:
        assert client.daemon()["role"] == "source"
    assert staged.read_bytes() == STAGED


def test_sockets_of_a_daemon_that_was_killed_are_taken_over(tmp_path: Path) -> None:
    first = WatchedDaemon(tmp_path)
    first.close()
    assert (first.runtime_dir / "api.sock").exists()
    (tmp_path / "notify").unlink()
    second = WatchedDaemon(tmp_path)
    with second.client() as client:
        assert client.daemon()["stopping"] is False
    second.close()


LOOPBACK = "{} address: expected a loopback address (or TLS: --tls-dir; or --insecure: nothing is encrypted"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("destination", "--listen", "0.0.0.0:0", "--metrics", "off"), LOOPBACK.format("migration")),
        (("destination", "--listen", "[::]:0", "--metrics", "off"), LOOPBACK.format("migration")),
        (("source", "--metrics", "0.0.0.0:0"), "metrics address: expected one address of this host (or --insecure"),
        (("destination", "--listen", "127.0.0.1:0", "--metrics", "[::]:0"), "metrics address: expected one address of this host"),
    ],
    ids=["listen", "listen-v6", "source-metrics", "destination-metrics"],
)
def test_beyond_loopback_takes_insecure(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    run = cli(*arguments, "--runtime-dir", str(tmp_path / "runtime"))
    assert run.returncode == 1
    assert f"postcopy: {what}" in run.stderr


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
        assert LOOPBACK.format("destination") in run.stderr
        assert client.migrations() == []


def how_it_settled(watched: Iterator[ServerEvent]) -> str:
    """What the last two events say; a watcher goes by it, and would take any other state for the guest's."""
    *_, settled, end = watched
    assert (settled.event, end.data["reason"]) == ("settled", "settled")
    return str(settled.data["migration"]["state"])


@pytest.mark.requires("uffd")
def test_migration_before_its_switchover_is_cancelled_by_the_end(daemon: WatchedDaemon) -> None:
    with FakeGuest("stays", "running") as guest, FakeDestination() as fake, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        begun = client.migrate("stays", fake.address)
        fake.attach()
        watched = client.events(begun.id)
        assert next(watched).event == "state"
        daemon.signal(signal.SIGTERM)
        assert how_it_settled(watched) == "cancelled"
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
def test_stalled_guest_does_not_put_the_end_off(tmp_path: Path) -> None:
    """Its wait has no end of its own: the service manager's patience is what bounds it."""
    daemon = WatchedDaemon(tmp_path)
    with FakeGuest("stalls", "running") as guest, FakeDestination() as fake, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        client.migrate("stalls", fake.address)
        fake.switch_over(guest)
        fake.control.close()
        until(lambda: client.migrations()[0].state == "paused", "paused")
        assert daemon.told().startswith("FDSTORE=1\n")  # and is not removed
        daemon.signal(signal.SIGTERM)
        assert daemon.told() == "STOPPING=1"
        assert daemon.told() == "STATUS=waiting for guests in postcopy: stalls"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.told_no_more()
    daemon.close()


@pytest.mark.requires("uffd")
def test_second_signal_ends_a_daemon_with_a_guest_in_postcopy(tmp_path: Path) -> None:
    daemon = WatchedDaemon(tmp_path)
    with FakeGuest("gone", "running") as guest, FakeDestination() as fake, daemon.client() as client:
        guest.attach(daemon.runtime_dir / "guests.sock")
        begun = client.migrate("gone", fake.address)
        fake.switch_over(guest)
        until(lambda: client.migrations()[0].state == "postcopy", "postcopy")
        watched = client.events(begun.id)
        assert next(watched).event == "state"
        assert daemon.told().startswith("FDSTORE=1\n")
        daemon.signal(signal.SIGTERM)
        assert daemon.told() == "STOPPING=1"
        assert daemon.told() == "STATUS=waiting for guests in postcopy: gone"
        assert daemon.told() == "EXTEND_TIMEOUT_USEC=30000000"
        assert daemon.returncode is None
        daemon.signal(signal.SIGTERM)
        assert how_it_settled(watched) == "stalled"
        assert daemon.wait() == 0
        assert guest.told_only_the_end()  # not resumed: it may run there
    assert os.listdir(daemon.runtime_dir) == ["migrations"]  # by whose record the next one goes on
    daemon.close()
