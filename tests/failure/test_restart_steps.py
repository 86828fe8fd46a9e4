"""Promise P4 step by step: a daemon is killed between any two words of the switchover, and the next one knows who runs the guest.

Guests and the peer are fakes, so that each moment is a certain one; the daemons are real, killed and started anew.
"""

import os
from collections.abc import Iterator

import pytest

from migrate.pair import Pair
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import (
    Aborted,
    Complete,
    GuestReleased,
    Message,
    Prepared,
    Ready,
    Recovered,
    Released,
    Resume,
    Running,
)
from proto.preamble import AnswerCode, ConnectionKind

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource, receive_exactly
from .memory_child import PAGE_BYTES
from .precopy_fakes import pages_of
from .returning_fakes import Arriving, Leaving, records

pytestmark = pytest.mark.requires("uffd")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


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


def test_destination_returns_with_pages_that_nobody_precopied(pair: Pair) -> None:
    """As its guest's page states say, in which anything may stand. It waits for the stale set then, and gets one: all of them."""
    with FakeGuest("liar", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.control.send(Running(epoch=fake.until_switchover_of(guest).epoch))
        fake.control.close()
        control = leaving.dialled()
        control.send(Recovered(epoch=leaving.epoch, settled=False))
        fake.greet_data()
        control.send(Ready())
        frame = Frame.decode(
            receive_exactly(fake.bulk, FRAME_HEADER_BYTES), frozenset({FrameKind.STALE}), [(1 << 20, PAGE_BYTES)]
        )
        page_count = frame.length_bytes // PAGE_BYTES
        assert (frame.kind, frame.page_index, page_count) == (FrameKind.STALE, 0, 256)
        assert pages_of(receive_exactly(fake.bulk, page_count // 8), page_count) == set(range(page_count))


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
