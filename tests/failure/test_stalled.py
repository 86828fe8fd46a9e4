"""Out of `stalled`: the reason passes and a person has it dial again, or a person decides. And what is no reason to stall.

A migration stalls after the switchover over what a new connection does not mend: here a destination that cannot write (EFBIG, by
RLIMIT_FSIZE), a guest that has ended, a destination that answers what nobody asked."""

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator

import pytest

from migrate.errors import PostcopyError
from migrate.pair import DaemonProcess, Pair, wait_settled
from proto.messages import (
    Aborted,
    Discard,
    Discarded,
    GuestReleased,
    PageRange,
    Prepared,
    Recover,
    Recovered,
    Refused,
    Resume,
    Running,
    Switchover,
    control_decoder,
)
from proto.preamble import AnswerCode, ConnectionKind

from ..path.commuter import Commuter, until
from .fakes import Connection, FakeDestination, FakeGuest, FakeSource
from .killing import slain
from .lossy_link import CutMove
from .returning_fakes import Leaving

pytestmark = pytest.mark.requires("uffd")
HALF_BYTES = 8 << 20
NOBODY = "127.0.0.1:1"
SLOWLY_BYTES_PER_SECOND = 10_000_000


@contextlib.contextmanager
def writes_no_further_than(daemon: DaemonProcess, size_bytes: int) -> Iterator[None]:
    """In any file: a page behind that is EFBIG, as ENOSPC would be where memory is short."""
    before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def traveller(pair: Pair) -> Iterator[Commuter]:
    guest = Commuter(pair, "traveller", "16M", options=("--rate", "5000", "--write-ratio", "0.3"))
    yield guest
    guest.end()


def stall(traveller: Commuter) -> str:
    """Midway, at both ends; both know why. The migration's id."""
    with writes_no_further_than(traveller.goes_to, HALF_BYTES), CutMove(traveller, precopy="off") as move:
        move.reaches("stalled")
        until(lambda: move.state_there() == "stalled", "stalled at the destination")
        for daemon in (traveller.is_at, traveller.goes_to):
            with daemon.client() as client:
                error = client.status(move.id).error
                assert error is not None
                assert "EFBIG" in error.got
    return move.id


def asked_to_recover(traveller: Commuter, migration_id: str) -> None:
    with traveller.is_at.client() as client:
        client.recover(migration_id, traveller.goes_to.address)


def source_begun_anew(traveller: Commuter, migration_id: str) -> None:
    """The link it had been told to dial is no more."""
    traveller.is_at = slain(traveller.pair, traveller.is_at)
    with traveller.is_at.client() as client:
        until(lambda: any(one.id == migration_id for one in client.migrations()), "the guest is back")
    asked_to_recover(traveller, migration_id)


@pytest.mark.parametrize("way", [asked_to_recover, source_begun_anew])
def test_it_goes_on_when_the_reason_has_passed(traveller: Commuter, way: Callable[[Commuter, str], None]) -> None:
    for _ in range(2):
        migration_id = stall(traveller)
        way(traveller, migration_id)
        with traveller.is_at.client() as client:
            status = wait_settled(client, migration_id)
        assert (status.state, status.error) == ("complete", None)
        traveller.arrived()
    traveller.move()


def test_it_stalls_again_while_the_reason_lasts(traveller: Commuter) -> None:
    migration_id = stall(traveller)
    with writes_no_further_than(traveller.goes_to, HALF_BYTES):
        asked_to_recover(traveller, migration_id)
        with traveller.is_at.client() as client:
            status = wait_settled(client, migration_id)
        assert status.state == "stalled"
        assert status.error is not None
        assert "EFBIG" in status.error.got
    asked_to_recover(traveller, migration_id)
    with traveller.is_at.client() as client:
        assert wait_settled(client, migration_id).state == "complete"
    traveller.arrived()


@pytest.mark.parametrize("who", ["source", "destination"])
def test_a_daemon_that_ends_does_not_stall_the_other(traveller: Commuter, who: str) -> None:
    """By a second SIGTERM, in postcopy: the next one takes its guest back, and nobody has to ask for it."""
    with CutMove(traveller, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND) as move:
        move.reaches("postcopy")
        daemon = getattr(traveller.pair, who)
        daemon.signal(signal.SIGTERM)
        until(lambda: "waiting for guests in postcopy" in daemon.log(), "the first one is heard")
        daemon.signal(signal.SIGTERM)
        again = traveller.pair.again(daemon)
        traveller.is_at, traveller.goes_to = (again if one is daemon else one for one in (traveller.is_at, traveller.goes_to))
        with traveller.is_at.client() as client:
            until(lambda: client.status(move.id).state == "complete", "the move goes on")
        traveller.arrived()


def test_refused_amid_the_switchover_it_asks_again(pair: Pair) -> None:
    """Whatever that was, a destination that is asked again and says `aborted` never runs the guest: it runs on here."""
    with FakeGuest("refused", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        leaving = Leaving(pair, guest, fake)
        fake.control.send(Prepared())
        guest.pauses()
        fake.control.send(Refused(code="message-invalid", what="control message", expected="a known type", got="switchower"))
        control = leaving.dialled()
        assert guest.told_nothing()
        control.send(Aborted(epoch=0, reason="it did not understand"))
        assert guest.connection.receive(Resume).state is None
        assert wait_settled(client, leaving.id).state == "failed"


def stalled_without_a_word(pair: Pair, guest: FakeGuest, fake: FakeDestination, *, ran: bool) -> str:
    leaving = Leaving(pair, guest, fake)
    fake.control.send(Prepared())
    guest.pauses()
    if ran:
        fake.control.send(Running(epoch=0))
    else:
        fake.control.send(Refused(code="guest-gone", what="guest there", expected="an answer", got="its socket ended"))
    with pair.source.client() as client:
        if ran:
            until(lambda: client.status(leaving.id).state == "postcopy", "it runs there")
            fake.control.send(Refused(code="guest-gone", what="guest there", expected="to stay", got="its socket ended"))
        else:
            leaving.dialled().send(Refused(code="guest-gone", what="guest there", expected="to go on", got="stalled"))
        status = wait_settled(client, leaving.id)
    assert status.state == "stalled"
    assert status.error is not None
    assert status.error.code == "guest-gone"
    assert guest.told_nothing()
    return leaving.id


@pytest.mark.parametrize("here", [True, False], ids=["here", "there"])
def test_a_person_decides_for_one_that_may_have_run(pair: Pair, here: bool) -> None:
    with FakeGuest("undecided", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        migration_id = stalled_without_a_word(pair, guest, fake, ran=False)
        client.resolve("undecided", here=here)
        guest.connection.receive(Resume if here else GuestReleased)
        assert wait_settled(client, migration_id).state == ("failed" if here else "complete")


def test_one_that_ran_there_is_let_go_of_and_never_resumed(pair: Pair) -> None:
    with FakeGuest("ran", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        migration_id = stalled_without_a_word(pair, guest, fake, ran=True)
        with pytest.raises(PostcopyError, match="its destination says it runs"):
            client.resolve("ran", here=True)
        assert client.status(migration_id).state == "stalled"
        client.recover(migration_id, NOBODY)  # in vain, and it forgets nothing
        with pytest.raises(PostcopyError, match="its destination says it runs"):
            client.resolve("ran", here=True)
        assert guest.told_nothing()
        client.resolve("ran", here=False)
        guest.connection.receive(GuestReleased)
        assert wait_settled(client, migration_id).state == "complete"


def test_one_that_was_abandoned_there_is_never_resumed(pair: Pair) -> None:
    """`running` had not come: but who has been given up there has run there."""
    with FakeGuest("given-up", "running") as guest:
        with FakeDestination() as fake, pair.source.client() as client:
            leaving = Leaving(pair, guest, fake)
            fake.control.send(Prepared())
            guest.pauses()
            fake.control.receive(Switchover)
            fake.control.close()
            leaving.dialled().send(Refused(code="abandoned", what="guest there", expected="its missing pages", got="given up"))
            assert wait_settled(client, leaving.id).state == "stalled"
            with pytest.raises(PostcopyError, match="its destination says it runs"):
                client.resolve("given-up", here=True)
            daemon = slain(pair, pair.source)
            leaving.guest_returns()
        with daemon.client() as client:
            with pytest.raises(PostcopyError, match="its destination says it runs"):
                client.resolve("given-up", here=True)
            assert guest.told_nothing()
            client.resolve("given-up", here=False)
            assert wait_settled(client, leaving.id).state == "complete"


def test_what_was_discarded_meanwhile_reads_zero_and_is_answered(pair: Pair) -> None:
    """And a guest that keeps no page states goes on all the same, within one life of its daemon."""
    with FakeGuest("discards", "waiting") as guest, FakeSource(pair.destination.address, guest_id="discards") as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.switch_over(guest)
        assert guest.connection.receive(Resume).state == b"a state"
        guest.connection.send(Running(epoch=0))
        source.control.receive(Running)
        source.control.send(Refused(code="memory-failed", what="stream loop", expected="to run on", got="ENODATA"))
        with pair.destination.client() as client:
            migration_id = source.migration_id.hex()
            assert wait_settled(client, migration_id).state == "stalled"
            guest.connection.send(Discard(ranges=[PageRange(region=0, page_index=7, page_count=2)]))
            assert guest.told_nothing()
            sock, answer = source.dial(ConnectionKind.CONTROL, token=source.token, epoch=1)
            assert answer.code is AnswerCode.WELCOME
            control = Connection(sock, control_decoder())
            control.send(Recover(epoch=1))
            assert control.receive(Recovered).epoch == 1
            guest.connection.receive(Discarded)
            status = client.status(migration_id)
            assert (status.state, status.pages["discarded"]) == ("paused", 2)


def test_memory_whose_process_has_ended_is_let_go_of(pair: Pair) -> None:
    with FakeGuest("ended", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        migration_id = stalled_without_a_word(pair, guest, fake, ran=True)
        open_before = len(os.listdir(f"/proc/{pair.source.pid}/fd"))
        guest.connection.close()
        until(lambda: all(one["id"] != "ended" for one in client.guests()), "its process has ended")
        client.resolve("ended", here=False)
        assert wait_settled(client, migration_id).state == "complete"
        until(lambda: len(os.listdir(f"/proc/{pair.source.pid}/fd")) < open_before, "its memory is let go of")
