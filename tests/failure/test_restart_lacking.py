"""A daemon that was started anew and lacks what it takes to take its guest back, descriptors here: it tries again until it can.

Meanwhile the guest is told nothing, the reason is said once, and who asks is answered.
"""

import os
from collections.abc import Iterator

import pytest

from migrate.pair import Pair
from proto.messages import Complete, GuestReleased, Message, Recovered, Released, Resume
from proto.preamble import AnswerCode

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource
from .killing import slain
from .returning_fakes import ARRIVING_DESCRIPTORS, LEAVING_DESCRIPTORS, Arriving, Leaving, records, short_of_descriptors, told_of

pytestmark = pytest.mark.requires("uffd")
REASON = "Too many open files"
ATTEMPTS_SECONDS = 1.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def test_source(pair: Pair) -> None:
    """It dials as soon as it has what it lacked."""
    with FakeGuest("lacking", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.until_switchover_of(guest)
        with short_of_descriptors(slain(pair, pair.source), LEAVING_DESCRIPTORS) as daemon:
            leaving.guest_returns()
            with daemon.client() as client:
                until(lambda: client.status(leaving.id).elapsed_seconds > ATTEMPTS_SECONDS, "several attempts")
                status = client.status(leaving.id)
            assert (status.state, status.settled, status.epoch) == ("paused", False, 0)
            assert status.error is not None
            assert REASON in status.error.got
            assert told_of(daemon, leaving.id, REASON) == 1
            assert guest.told_nothing()
        control = leaving.dialled()
        control.send(Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={}))
        guest.connection.receive(GuestReleased)
        control.receive(Released)


@pytest.mark.parametrize(("here", "told"), [(True, Resume), (False, GuestReleased)], ids=["here", "there"])
def test_source_that_a_person_decides_for(pair: Pair, here: bool, told: type[Message]) -> None:
    with FakeGuest("decided", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.until_switchover_of(guest)
        with short_of_descriptors(slain(pair, pair.source), LEAVING_DESCRIPTORS) as daemon:
            leaving.guest_returns()
            until(lambda: told_of(daemon, leaving.id, REASON) == 1, "it lacks descriptors")
            with daemon.client() as client:
                client.resolve("decided", here=here)
            guest.connection.receive(told)
            until(lambda: records(daemon) == [], "nothing is left to know")
            with daemon.client() as client:
                assert client.status(leaving.id).state == ("failed" if here else "complete")


def test_destination(pair: Pair) -> None:
    """Its source is told to dial again, not that it is over."""
    with FakeGuest("lacking", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        guest.connection.receive(Resume)
        with short_of_descriptors(slain(pair, pair.destination), ARRIVING_DESCRIPTORS) as daemon:
            arriving.guest_returns(role="arriving", epoch=0, offers=["keep"])
            with daemon.client() as client:
                until(lambda: client.status(arriving.id).elapsed_seconds > ATTEMPTS_SECONDS, "several attempts")
                assert client.status(arriving.id).state == "paused"
            assert told_of(daemon, arriving.id, REASON) == 1
            assert arriving.dial(1) is AnswerCode.BUSY
        os.close(guest.receive_kept())
        assert arriving.dial(2) is AnswerCode.WELCOME
        assert arriving.control.receive(Recovered).epoch == 2
