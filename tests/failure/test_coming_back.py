"""A guest whose daemon ends, refuses it or is confused, in precopy too: it runs on, and comes back."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from migrate.client import DaemonClient
from migrate.guest.agent import Agent
from migrate.guest.attaching import attach_when_there
from migrate.pair import DaemonProcess, Pair, Process, wait_settled
from proto.messages import Hello, Pause, Paused, Refused, Track, Welcome, encode, guest_decoder
from proto.states import Role

from ..path.commuter import Commuter, until
from .fakes import Connection, framed

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")


def in_precopy(client: DaemonClient, migration_id: str) -> bool:
    status = client.status(migration_id)
    assert not status.settled, status.error
    return status.precopy is not None and status.precopy.rounds_begun > 2


def is_tracked(guest: Process) -> bool:
    """Whether a mapping of its is registered for write protection: "uw" among VmFlags (Documentation/filesystems/proc.rst)."""
    flags = [
        line.split()[1:] for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines() if line.startswith("VmFlags:")
    ]
    return any("uw" in one for one in flags)


def test_daemons_that_end_in_precopy() -> None:
    """One after the other, under the same two guests: the one runs on and is not tracked any more, the other waits; in the end
    it moves, and is whole."""
    with Pair() as pair:
        guest = Commuter(pair, "web", "16M", options=("--rate", "20000", "--write-ratio", "1"))
        for role, number, settled in (
            (Role.SOURCE, signal.SIGKILL, "failed"),
            (Role.DESTINATION, signal.SIGKILL, "failed"),
            (Role.SOURCE, signal.SIGTERM, "cancelled"),
        ):
            ends, stays = (pair.source, pair.destination) if role is Role.SOURCE else (pair.destination, pair.source)
            with guest.is_at.client() as client:
                begun = client.migrate(guest.guest_id, guest.goes_to.address, precopy=1000)
                while not in_precopy(client, begun.id):
                    pass
            assert is_tracked(guest.runs)
            ends.signal(number)
            ends.wait()
            with stays.client() as client:
                assert wait_settled(client, begun.id).state == settled
            begin_again(pair, guest, ends)
            until(lambda: not is_tracked(guest.runs), "tracking has ended")
        guest.move()


def begin_again(pair: Pair, guest: Commuter, ended: DaemonProcess) -> None:
    """A new daemon in its place, to which its guest has come back."""
    if ended is guest.is_at:
        guest.is_at = pair.source = pair.daemon("source")
        guest.runs.event("started")
    else:
        guest.goes_to = pair.destination = pair.daemon("destination")
        guest.waits.event("waiting")


class FakeDaemon:
    """Where an agent attaches."""

    def __init__(self, directory: Path) -> None:
        self.greeted: list[Connection] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "guests.sock"))
        self._listener.listen()
        self._listener.settimeout(20)

    def accept(self) -> Connection:
        """A guest that has said hello."""
        sock, _ = self._listener.accept()
        connection = Connection(sock, guest_decoder())
        self.greeted.append(connection)
        connection.receive(Hello)
        return connection

    def close(self) -> None:
        self._listener.close()
        for connection in self.greeted:
            connection.close()


WELCOME = Welcome(major=1, minor=0, software="a fake daemon")
TAKEN = Refused(code="guest-id-taken", what="guest id", expected="another", got="web")


@pytest.fixture
def workload(tmp_path: Path) -> Iterator[tuple[FakeDaemon, Process]]:
    daemon = FakeDaemon(tmp_path)
    arguments = ["guest", "workload", "--id", "web", "--daemon", str(tmp_path), "--memory", "1M", "--rate", "1000"]
    process = Process("web", arguments, tmp_path / "web.log")
    yield daemon, process
    process.kill()
    daemon.close()


def test_running_guest_that_is_refused_when_it_comes_back(workload: tuple[FakeDaemon, Process]) -> None:
    """It has a whole life to lose: it runs on, says so, and tries again; also where the daemon goes or is confused."""
    daemon, process = workload
    first = daemon.accept()
    first.send(WELCOME)
    process.event("stepped")
    for answer in (encode(TAKEN), b"", encode(WELCOME) + encode(WELCOME), framed(b"\xc1"), encode(Track())):
        first.close()
        first = daemon.accept()
        first.socket.sendall(answer)
    first.close()
    last = daemon.accept()
    last.send(WELCOME)
    last.send(Pause(deadline_ms=1000))
    assert last.receive(Paused).last_step_ns > 0
    assert process.returncode is None
    for words in ("guest id: expected another, got web", "an answer to hello", "msgpack", "welcome or refused", "a request"):
        assert words in process.log()


def test_guest_that_is_refused_at_first(workload: tuple[FakeDaemon, Process]) -> None:
    daemon, process = workload
    daemon.accept().send(TAKEN)
    assert process.wait() == 1
    assert "guest id: expected another, got web" in process.log()


def test_daemon_that_goes_amid_the_first_greeting(workload: tuple[FakeDaemon, Process]) -> None:
    """Nobody has refused the guest: it looks for the next daemon."""
    daemon, process = workload
    daemon.accept().close()
    daemon.accept().send(WELCOME)
    process.event("stepped")


def test_daemon_that_goes_before_it_hears_of_tracking(workload: tuple[FakeDaemon, Process]) -> None:
    daemon, process = workload
    first = daemon.accept()
    first.send(WELCOME)
    process.event("stepped")  # told, so that no other message comes before `paused`
    os.kill(process.pid, signal.SIGSTOP)
    first.send(Track())
    first.close()
    os.kill(process.pid, signal.SIGCONT)
    last = daemon.accept()
    last.send(WELCOME)
    last.send(Pause(deadline_ms=1000))
    last.receive(Paused)


class Patient:
    """In an agent's place: the daemon is away for a hundred attempts."""

    guest_id = "patient"
    attempts = 0

    def attach(self, _: Path) -> None:
        self.attempts += 1
        if self.attempts <= 100:
            raise ConnectionRefusedError


def test_daemon_that_was_away_for_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The longer it was away, the longer its guests wait for it once it is back: a quarter of a second at most, since until then
    it answers no peer that asks for them."""
    waited_seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", waited_seconds.append)
    attach_when_there(cast(Agent, Patient()), tmp_path, again=True)
    assert len(waited_seconds) == 100
    assert max(waited_seconds) <= 0.25
