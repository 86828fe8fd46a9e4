"""Promise P4 step by step: a daemon is killed between any two words of the switchover, and the next one knows who runs the guest.

Guests and the peer are fakes, so that each moment is a certain one; the daemons are real, killed and started anew.
"""

import os
from collections.abc import Iterator

import pytest

from migrate.pair import DaemonProcess, Pair
from proto.messages import (
    Aborted,
    Complete,
    GuestReleased,
    Message,
    Prepared,
    Recover,
    Recovered,
    Released,
    Resume,
    Running,
    Welcome,
    control_decoder,
    encode,
)
from proto.preamble import Answer, AnswerCode, ConnectionKind, Preamble

from ..path.commuter import until
from .fakes import PREAMBLE_BYTES, TOKEN, Connection, FakeDestination, FakeGuest, FakeSource, receive_exactly
from .killing import slain

pytestmark = pytest.mark.requires("uffd")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


class Leaving:
    """A fake guest at a real source daemon, whose destination is a fake."""

    def __init__(self, pair: Pair, guest: FakeGuest, fake: FakeDestination) -> None:
        self.pair, self.guest, self.fake = pair, guest, fake
        guest.attach(pair.source.runtime_dir / "guests.sock")
        with pair.source.client() as client:
            client.migrate(guest.guest_id, fake.address, precopy="off")
        fake.prepare(guest)

    def kill(self) -> None:
        self.pair.source = slain(self.pair, self.pair.source)
        answer = self.guest.connect_again(self.pair.source.runtime_dir / "guests.sock", role="paused")
        assert isinstance(answer, Welcome)

    def dialled(self) -> Connection:
        """In a later epoch, by a source that proves itself."""
        sock = self.fake.accept()
        preamble = Preamble.decode(receive_exactly(sock, PREAMBLE_BYTES))
        assert (preamble.kind, preamble.token) == (ConnectionKind.CONTROL, TOKEN)
        assert preamble.epoch > 0
        sock.sendall(Answer(AnswerCode.WELCOME).encode())
        connection = Connection(sock, control_decoder())
        assert connection.receive(Recover).epoch == preamble.epoch
        return connection


def test_source_killed_before_switchover(pair: Pair) -> None:
    """Told to pause, and nothing recorded but that: the guest runs on here, nobody is asked."""
    with FakeGuest("before", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.control.send(Prepared())
        guest.told_to_pause()
        leaving.kill()
        assert guest.resumed() is None
        until(lambda: records(pair.source) == [], "nothing is left to know")


WORDS: list[tuple[Message, type[Message]]] = [
    (Aborted(epoch=1, reason="it never will"), Resume),
    (Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={}), GuestReleased),
]


@pytest.mark.parametrize(("word", "told"), WORDS, ids=["aborted", "complete"])
@pytest.mark.parametrize("ran", [False, True], ids=["unanswered", "running"])
def test_source_killed_behind_switchover(pair: Pair, ran: bool, word: Message, told: type[Message]) -> None:
    """The destination alone knows, and is asked; until it has spoken the guest is told nothing."""
    with FakeGuest("behind", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        switchover = fake.until_switchover_of(guest)
        if ran:
            fake.control.send(Running(epoch=switchover.epoch))
        leaving.kill()
        control = leaving.dialled()
        assert guest.told_nothing()
        control.send(word)
        assert isinstance(guest.connection.receive(told), told)
        if told is GuestReleased:
            control.receive(Released)
        until(lambda: records(pair.source) == [], "nothing is left to know")


class Arriving:
    """A fake guest at a real destination daemon, whose source is a fake."""

    def __init__(self, pair: Pair, guest: FakeGuest, source: FakeSource) -> None:
        self.pair, self.guest, self.source = pair, guest, source
        guest.connect(pair.destination.runtime_dir / "guests.sock")
        guest.send(encode(guest.hello(offers=["keep"])), guest.descriptors())
        guest.connection.receive(Welcome)
        streams = source.offer().streams
        self.states_fd = guest.receive_kept()
        source.attach_accepted(streams)
        source.prepare_attached(guest)

    def kill(self) -> None:
        self.pair.destination = slain(self.pair, self.pair.destination)

    def guest_returns(self, **hello: object) -> None:
        """It says where it stands."""
        socket_path = self.pair.destination.runtime_dir / "guests.sock"
        answer = self.guest.connect_again(socket_path, [self.states_fd], page_states=True, **hello)
        assert isinstance(answer, Welcome)
        os.close(self.states_fd)

    def dial(self, epoch: int) -> AnswerCode:
        sock, answer = self.source.dial(ConnectionKind.CONTROL, token=self.source.token, epoch=epoch)
        self.control = Connection(sock, control_decoder())
        if answer.code is AnswerCode.WELCOME:
            self.control.send(Recover(epoch=epoch))
        return answer.code


def test_destination_killed_before_switchover(pair: Pair) -> None:
    """Prepared, and no resume recorded: it never will, and says so before any guest has come back."""
    with FakeGuest("prepared", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        arriving.kill()
        assert arriving.dial(1) is AnswerCode.WELCOME
        assert "started anew" in arriving.control.receive(Aborted).reason
        arriving.guest_returns()


def test_destination_killed_with_resume_unread(pair: Pair) -> None:
    """It may have run, so the source is not answered before the guest has spoken; it says that it waits: it never ran."""
    with FakeGuest("unread", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        guest.connection.receive(Resume)  # and is lost with the agent's old connection
        arriving.kill()
        assert arriving.dial(1) is AnswerCode.MIGRATION_UNKNOWN
        arriving.guest_returns()
        assert arriving.dial(2) is AnswerCode.WELCOME
        arriving.control.receive(Aborted)


def test_destination_killed_with_resume_read(pair: Pair) -> None:
    """It runs there, and whoever has its page states goes on; another token gets nothing."""
    with FakeGuest("read", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        guest.connection.receive(Resume)
        arriving.kill()
        arriving.guest_returns(role="arriving", epoch=0, offers=["keep"])
        os.close(guest.receive_kept())
        _, answer = source.dial(ConnectionKind.CONTROL, token=bytes(16), epoch=1)
        assert answer.code is AnswerCode.TOKEN_WRONG
        assert arriving.dial(2) is AnswerCode.WELCOME
        recovered = arriving.control.receive(Recovered)
        assert (recovered.epoch, recovered.settled) == (2, True)


def test_a_guest_that_cannot_come_back_twice(pair: Pair) -> None:
    """It keeps no page states of this life: those of the last one would call lacking what comes now, so nothing does."""
    with FakeGuest("once", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        guest.connection.receive(Resume)
        arriving.kill()
        arriving.guest_returns(role="arriving", epoch=0)
        with pair.destination.client() as client:
            status = client.status(source.migration_id.hex(), settled_within_seconds=10)
        assert status.state == "stalled"
        assert status.error is not None
        assert status.error.code == "guest-refused"


def records(daemon: DaemonProcess) -> list[str]:
    return [path.name for path in (daemon.runtime_dir / "migrations").iterdir()]
