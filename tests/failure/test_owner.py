"""Promise P4 where nobody can be asked: one daemon writes a guest's memory, and a person decides what no daemon can learn."""

import os
import signal
from collections.abc import Iterator

import pytest

from migrate.errors import PostcopyError
from migrate.pair import DaemonProcess, Pair, Process
from proto.messages import GuestReleased, Message, Refused, Resume, Welcome, encode

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource

pytestmark = pytest.mark.requires("uffd")
GUESTS = "guests.sock"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def state_of(daemon: DaemonProcess, guest_id: str) -> str:
    with daemon.client() as client:
        return next((str(one["state"]) for one in client.guests() if one["id"] == guest_id), "")


def attach(guest: FakeGuest, daemon: DaemonProcess, **hello: object) -> None:
    guest.connect(daemon.runtime_dir / GUESTS)
    guest.send(encode(guest.hello(**hello)), guest.descriptors())
    assert isinstance(guest.connection.receive(Welcome), Welcome)


def test_a_stopped_daemon_keeps_its_guest(pair: Pair) -> None:
    """It may go on writing at any moment, so no other daemon may; once it is dead another one may."""
    owner, other = pair.daemon("owner"), pair.daemon("other")
    with FakeGuest("owned", "waiting") as guest, FakeSource(owner.address) as source:
        attach(guest, owner, offers=["keep"])
        source.offer()
        states_fd = guest.receive_kept()
        role: dict[str, object] = {"page_states": True}
        owner.signal(signal.SIGSTOP)
        refused = guest.connect_again(other.runtime_dir / GUESTS, [states_fd], **role)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.got) == ("guest-owned", f"process {owner.pid} has it")
        owner.signal(signal.SIGCONT)
        assert state_of(owner, "owned") == "arriving"
        assert isinstance(guest.connect_again(other.runtime_dir / GUESTS, [states_fd], **role), Refused)
        owner.signal(signal.SIGKILL)
        owner.wait()
        assert isinstance(guest.connect_again(other.runtime_dir / GUESTS, [states_fd], **role), Welcome)
        os.close(states_fd)


def test_a_runtime_directory_has_one_daemon(pair: Pair) -> None:
    """Its records too: a stopped daemon still has it."""
    pair.destination.signal(signal.SIGSTOP)
    try:
        second = pair.child("second", ["destination", "--runtime-dir", str(pair.destination.runtime_dir)])
        assert second.wait() != 0
        assert "no other daemon" in second.log()
    finally:
        pair.destination.signal(signal.SIGCONT)


def test_page_states_are_what_a_daemon_gave(pair: Pair) -> None:
    with FakeGuest("liar", "waiting") as guest:
        reading, writing = os.pipe()
        answer = guest.connect_again(pair.destination.runtime_dir / GUESTS, [reading], page_states=True)
        assert isinstance(answer, Refused)
        assert answer.code == "guest-refused"
        for descriptor in (reading, writing):
            os.close(descriptor)


def paused_undecided(pair: Pair, guest: FakeGuest) -> str:
    """A guest whose destination is gone between ``switchover`` and its answer: the migration."""
    guest.attach(pair.source.runtime_dir / GUESTS)
    with FakeDestination() as fake:
        with pair.source.client() as client:
            migration_id = client.migrate(guest.guest_id, fake.address, precopy="off").id
        fake.prepare(guest)
        fake.until_switchover_of(guest)
    with pair.source.client() as client:
        until(lambda: client.status(migration_id).state == "paused", "paused")
    return migration_id


def test_resolved_here(pair: Pair) -> None:
    with FakeGuest("here", "running") as guest, pair.source.client() as client:
        migration_id = paused_undecided(pair, guest)
        assert decide(pair, "here", "--here") == 0
        assert guest.resumed() is None
        status = client.status(migration_id, settled_within_seconds=10)
        assert status.state == "failed"
        assert state_of(pair.source, "here") == "running"
        assert not records(pair.source)
        with pytest.raises(PostcopyError) as refused:
            client.resolve("here", here=True)
        assert refused.value.code == "not-resolvable"


def test_resolved_there(pair: Pair) -> None:
    with FakeGuest("there", "running") as guest, pair.source.client() as client:
        migration_id = paused_undecided(pair, guest)
        assert decide(pair, "there", "--there") == 0
        guest.connection.receive(GuestReleased)
        status = client.status(migration_id, settled_within_seconds=10)
        assert status.state == "complete"
        assert status.error is not None
        assert not records(pair.source)


def test_not_resolved_against_the_destination(pair: Pair) -> None:
    """It has said that the guest runs there: nobody makes two of it."""
    with FakeGuest("runs", "running") as guest, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / GUESTS)
        with FakeDestination() as fake:
            migration_id = client.migrate("runs", fake.address, precopy="off").id
            fake.switch_over(guest)
            until(lambda: client.status(migration_id).state == "postcopy", "postcopy")
        until(lambda: client.status(migration_id).state == "paused", "paused")
        with pytest.raises(PostcopyError, match="its destination says it runs"):
            client.resolve("runs", here=True)
        client.resolve("runs", here=False)
        guest.connection.receive(GuestReleased)


@pytest.mark.parametrize(("here", "told"), [(True, Resume), (False, GuestReleased)])
def test_a_guest_without_a_record(pair: Pair, here: bool, told: type[Message]) -> None:
    """Nothing is known here of its migration: it is left as it is until a person decides."""
    with FakeGuest("stray", "running") as guest, pair.source.client() as client:
        attach(guest, pair.source, role="paused")
        assert state_of(pair.source, "stray") == "undecided"
        with pytest.raises(PostcopyError, match="undecided"):
            client.migrate("stray", pair.destination.address)
        client.resolve("stray", here=here)
        assert isinstance(guest.connection.receive(told), told)


def decide(pair: Pair, guest_id: str, where: str) -> int:
    command = Process(
        "resolve", ["resolve", guest_id, where, "--yes", "--daemon", str(pair.source.runtime_dir)], pair.directory / "resolve.log"
    )
    try:
        return command.wait()
    finally:
        command.kill()


def records(daemon: DaemonProcess) -> list[str]:
    return [path.name for path in (daemon.runtime_dir / "migrations").iterdir()]
