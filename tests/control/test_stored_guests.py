"""Guests and daemons that die both: what the service manager has kept is taken up again, or let go of, by the daemon's next life.

The test is the service manager, the other daemon and the guest's agent; the daemon is real.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.client import DaemonClient
from migrate.errors import PostcopyError
from migrate.pair import Pair
from migrate.record import FOLDER
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import Aborted, Complete, GuestReleased, Ready, Recover, Recovered, Released, control_decoder
from proto.preamble import ANSWER_BYTES, PREAMBLE_BYTES, Answer, AnswerCode, ConnectionKind, Preamble

from ..failure.fakes import TOKEN, Connection, FakeDestination, FakeGuest, FakeSource, receive_exactly
from ..failure.memory_child import PAGE_BYTES
from ..failure.precopy_fakes import TouchedGuest
from ..path.commuter import until
from .service_manager import ServiceManager
from .test_notify import ManagedDaemon, second_life, start_migration

pytestmark = pytest.mark.requires("uffd")
PAGE = 2
CONTENT = b"the only copy".ljust(PAGE_BYTES, b".")
SLOWLY_BYTES_PER_SECOND = 4_000_000
WHOLE = Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={})


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        yield manager


class Left:
    """A source daemon that was killed behind the switchover, and the next one, which has what the manager had kept."""

    def __init__(self, directory: Path, manager: ServiceManager, guest: FakeGuest, fake: FakeDestination) -> None:
        self.guest, self.fake, self.manager = guest, fake, manager
        os.pwrite(guest.memory.files[0], CONTENT, PAGE * PAGE_BYTES)
        first = ManagedDaemon(directory, manager)
        try:
            guest.attach(first.runtime_dir / "guests.sock")
            start_migration(first, guest.guest_id, fake.address)
            fake.prepare(guest)
            fake.until_switchover_of(guest)
        finally:
            first.kill()
        manager.take_what_is_there()
        assert len(manager.stored) == 1
        manager.messages.clear()
        self.daemon = second_life(directory, manager, manager.stored)

    def dialled(self) -> Connection:
        sock = self.fake.accept()
        preamble = Preamble.decode(receive_exactly(sock, PREAMBLE_BYTES))
        assert (preamble.kind, preamble.token) == (ConnectionKind.CONTROL, TOKEN)
        sock.sendall(Answer(AnswerCode.WELCOME).encode())
        self.control = Connection(sock, control_decoder())
        self.epoch = self.control.receive(Recover).epoch
        return self.control

    def serves_its_page(self) -> None:
        """It goes on in another epoch, with what is in the memory."""
        self.dialled().send(Recovered(epoch=self.epoch, settled=True))
        self.fake.greet_data()
        self.control.send(Ready())
        self.fake.urgent.sendall(Frame(FrameKind.REQUEST, 0, PAGE, PAGE_BYTES).encode())
        header = receive_exactly(self.fake.urgent, FRAME_HEADER_BYTES)
        frame = Frame.decode(header, frozenset({FrameKind.PAGES}), [(1 << 20, PAGE_BYTES)])
        assert (frame.page_index, frame.length_bytes) == (PAGE, PAGE_BYTES)
        assert receive_exactly(self.fake.urgent, PAGE_BYTES) == CONTENT

    def is_whole(self) -> None:
        self.control.send(WHOLE)
        self.control.receive(Released)

    def keeps_nothing(self) -> None:
        self.manager.until(lambda: not self.manager.stored, "the manager lets go")
        until(lambda: self.daemon.guest_memory_files() == 0, "so does the daemon")

    def guest_returns(self, role: str = "paused") -> None:
        self.guest.connect_again(self.daemon.runtime_dir / "guests.sock", role=role)

    def verdict(self) -> str | None:
        """As the next life would find it; None where nothing is left to know."""
        for path in (self.daemon.runtime_dir / FOLDER).glob("*.json"):  # these are whole: renamed into place
            with contextlib.suppress(FileNotFoundError):
                return str(json.loads(path.read_text())["verdict"])
        return None

    def forgets(self) -> None:
        until(lambda: self.verdict() is None, "nothing is left to know")


@pytest.fixture
def left(tmp_path: Path, manager: ServiceManager) -> Iterator[Left]:
    with FakeGuest("web", "running") as guest, FakeDestination() as fake:
        left = Left(tmp_path, manager, guest, fake)
        try:
            yield left
        finally:
            left.daemon.kill()


def test_guest_that_has_ended_too(left: Left) -> None:
    left.serves_its_page()
    left.is_whole()
    left.keeps_nothing()
    assert left.verdict() == "complete"


@pytest.mark.requires("wp-async", "pagemap-scan")
def test_guest_at_work(tmp_path: Path, manager: ServiceManager) -> None:
    """Its old process and the source daemon are killed while pages are lacking; it finds all of its memory whole."""
    with Pair() as pair:
        there = pair.guest(pair.destination, "there", "16M", "--stay", waiting=True)
        first = ManagedDaemon(tmp_path, manager)
        here = pair.guest(first, "here", "16M", "--stay", "--write-ratio", "0.5", "--rate", "5000")
        here.event("stepped")
        with DaemonClient(first.runtime_dir) as client:
            limit = SLOWLY_BYTES_PER_SECOND
            moved = client.migrate("here", pair.destination.address, precopy="off", bulk_limit_bytes_per_second=limit)
            until(lambda: client.status(moved.id).state == "postcopy", "postcopy")
        here.signal(signal.SIGKILL)
        here.wait()
        first.kill()
        with pair.destination.client() as client:
            assert not client.status(moved.id).settled
        manager.take_what_is_there()
        manager.messages.clear()
        second = second_life(tmp_path, manager, manager.stored)
        try:
            assert there.event("verified", "failed")["event"] == "verified"
            manager.until(lambda: not manager.stored, "the manager lets go")
        finally:
            second.kill()


def test_guest_that_comes_back_amid_its_migration(left: Left) -> None:
    """Its own descriptors come with it; what is read already is read on."""
    left.serves_its_page()
    left.guest_returns()
    left.is_whole()
    left.guest.connection.receive(GuestReleased)
    left.keeps_nothing()
    left.forgets()


def test_guest_that_comes_back_when_it_is_whole_elsewhere(left: Left) -> None:
    left.serves_its_page()
    left.is_whole()
    left.keeps_nothing()
    left.guest_returns()
    left.guest.connection.receive(GuestReleased)
    left.forgets()


@pytest.mark.parametrize("first", ["word", "guest"])
def test_destination_that_never_will(left: Left, first: str) -> None:
    """Whichever comes first: the guest runs on here when it is back, by that word alone (P4)."""
    control = left.dialled()
    if first == "guest":
        left.guest_returns()
        assert left.guest.told_nothing()
    control.send(Aborted(epoch=0, reason="it never will"))
    if first == "word":
        left.keeps_nothing()
        left.guest_returns()
    assert left.guest.resumed() is None
    left.forgets()


def test_guest_that_runs_here(left: Left) -> None:
    """It had been resumed, and nothing was recorded of that: its agent is the authority (P4)."""
    left.dialled()
    left.guest_returns("running")
    left.forgets()
    with DaemonClient(left.daemon.runtime_dir) as client:
        assert [one["state"] for one in client.guests()] == ["running"]


def test_a_person_decides(left: Left) -> None:
    """Its destination has ended for good. Nobody can run here."""
    left.fake.__exit__(None, None, None)
    with DaemonClient(left.daemon.runtime_dir) as client:
        with pytest.raises(PostcopyError, match="its process has ended") as refused:
            client.resolve("web", here=True)
        assert refused.value.code == "not-resolvable"
        client.resolve("web", here=False)
    left.keeps_nothing()


def test_record_of_an_earlier_version(tmp_path: Path, manager: ServiceManager) -> None:
    """It says nothing of regions: the memory is held for its guest, which goes on."""
    with FakeGuest("web", "running") as guest, FakeDestination() as fake:
        left = Left(tmp_path, manager, guest, fake)
        left.dialled()  # or the connection would be taken for the next life's
        left.daemon.kill()
        path = next((tmp_path / "runtime" / "migrations").glob("*.json"))
        written = {name: value for name, value in json.loads(path.read_text()).items() if name != "regions"}
        path.write_text(json.dumps({**written, "version": 1}))
        manager.messages.clear()
        left.daemon = second_life(tmp_path, manager, manager.stored)
        try:
            manager.until_told(STATUS="holding memory of guests from before a restart: web")
            left.guest_returns()
            left.dialled().send(WHOLE)
            guest.connection.receive(GuestReleased)
        finally:
            left.daemon.kill()


@pytest.mark.parametrize("lives", [True, False], ids=["lives", "has ended"])
def test_guest_at_the_destination(tmp_path: Path, manager: ServiceManager, lives: bool) -> None:
    """One that has ended ends its migration: nothing of it is kept, and its source is told. For one that lives all of it is."""
    first = ManagedDaemon(tmp_path, manager, "destination")
    address = json.loads((first.runtime_dir / "daemon.json").read_text())["migration_address"]
    with TouchedGuest("web") as guest, FakeSource(address, guest_id="web") as source:
        try:
            guest.attach(first.runtime_dir / "guests.sock")
            source.until_running(guest)
        finally:
            first.kill()
        manager.take_what_is_there()
        manager.messages.clear()
        assert len(manager.stored) == 2
        if not lives:
            guest.child.kill()
        second = second_life(tmp_path, manager, manager.stored, "destination")
        try:
            info = json.loads((second.runtime_dir / "daemon.json").read_text())
            host, _, port = info["migration_address"].rpartition(":")
            source.address = (host, int(port))
            sock = source.open(Preamble(ConnectionKind.CONTROL, source.migration_id, 1, 0, source.token).encode())
            answer = Answer.decode(receive_exactly(sock, ANSWER_BYTES))
            manager.take_what_is_there()
            if lives:
                assert answer.code is AnswerCode.MIGRATION_UNKNOWN  # until its guest has spoken
                assert len(manager.stored) == 2
                return
            assert answer.code is AnswerCode.WELCOME
            control = Connection(sock, control_decoder())
            control.send(Recover(epoch=1))
            assert control.refused().code == "guest-gone"
            manager.until(lambda: not manager.stored, "nothing is kept")
            until(lambda: second.guest_memory_files() == 0, "here neither")
            assert "its process has ended" in second.log()
        finally:
            second.kill()
