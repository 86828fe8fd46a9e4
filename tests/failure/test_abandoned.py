"""`abandon`: pages that will never come are SIGBUS, for good, never zeroes; what is here stays; the source resumes nothing."""

import signal
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrate.cli import EXIT_CODES
from migrate.errors import PostcopyError
from migrate.pair import Pair
from migrate.session import MigrationStatus
from proto.frame import Frame, FrameKind
from proto.messages import Ready, Recover, Recovered, Refused, control_decoder
from proto.preamble import AnswerCode, ConnectionKind

from ..path.commuter import Commuter, until
from .fakes import Connection, FakeSource
from .lossy_link import CutMove
from .memory_child import PAGE_BYTES
from .precopy_fakes import TouchedGuest

pytestmark = pytest.mark.requires("uffd", "uffd-poison", "wp-async", "pagemap-scan")
PAGES = 256
WITH_CONTENT, ZERO, LOST = 0, 1, 5
CONTENT = 0x4711
GUEST_FAILED = EXIT_CODES["guest-failed"]


class Arrived:
    """A guest that runs at the destination with two pages of all; the test is its source."""

    def __init__(self, pair: Pair, guest: TouchedGuest, source: FakeSource) -> None:
        self.pair, self.child, self.source = pair, guest.child, source
        self.id = source.migration_id.hex()
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        content = Frame(FrameKind.PAGES, 0, WITH_CONTENT, PAGE_BYTES).encode()
        source.bulk.sendall(content + struct.pack("<Q", CONTENT).ljust(PAGE_BYTES, b"x"))
        source.bulk.sendall(Frame(FrameKind.ZERO, 0, ZERO, PAGE_BYTES).encode())
        until(lambda: self.status().pages_done == 2, "both pages are here")

    def status(self) -> MigrationStatus:
        with self.pair.destination.client() as client:
            return client.status(self.id)

    def reaches(self, state: str) -> None:
        until(lambda: self.status().state == state, state)

    def loses_its_source(self) -> None:
        self.source.control.close()
        self.reaches("paused")

    def is_given_up(self) -> MigrationStatus:
        with self.pair.destination.client() as client:
            return client.abandon(self.id)


@pytest.fixture
def arrived(pair: Pair) -> Iterator[Arrived]:
    with TouchedGuest("given-up") as guest, FakeSource(pair.destination.address, guest_id="given-up") as source:
        yield Arrived(pair, guest, source)
    until(lambda: not there(pair, "given-up"), "its name is free again")


def there(pair: Pair, guest_id: str) -> bool:
    with pair.destination.client() as client:
        return any(one["id"] == guest_id for one in client.guests())


def test_who_waits_gets_sigbus(arrived: Arrived) -> None:
    arrived.child.begins("read", LOST)
    until(lambda: arrived.status().faults_count == 1, "its fault")
    arrived.loses_its_source()
    status = arrived.is_given_up()
    assert (status.state, status.ended, status.error and status.error.code) == ("abandoned", True, "abandoned")
    assert status.lost is not None
    assert status.lost.model_dump() == {
        "pages": PAGES - 2,
        "runs": [{"region": 0, "page_index": 2, "page_count": PAGES - 2}],
        "runs_left_off": 0,
    }
    assert arrived.child.died_of() == signal.SIGBUS


def test_what_is_here_stays(arrived: Arrived) -> None:
    """Also what the guest drops from its page table, as long as it lives; a lost page's marker goes by that, and comes back."""
    arrived.loses_its_source()
    arrived.is_given_up()
    for _ in range(2):
        assert arrived.child.does("read", WITH_CONTENT) == CONTENT
        assert arrived.child.does("read", ZERO) == 0
        for page in (WITH_CONTENT, ZERO, LOST):
            arrived.child.does("drop", page)
    arrived.child.begins("read", LOST)
    assert arrived.child.died_of() == signal.SIGBUS


def test_source_that_comes_back(arrived: Arrived) -> None:
    """It is refused by name, in words that let no source resume its guest."""
    arrived.loses_its_source()
    arrived.is_given_up()
    sock, answer = arrived.source.dial(ConnectionKind.CONTROL, token=arrived.source.token, epoch=1)
    assert answer.code is AnswerCode.WELCOME
    control = Connection(sock, control_decoder())
    control.send(Recover(epoch=1))
    assert control.refused().code == "abandoned"
    arrived.child.begins("read", LOST)
    assert arrived.child.died_of() == signal.SIGBUS


def dials_again(arrived: Arrived, epoch: int) -> Connection:
    """Greeted, and no data connection made."""
    sock, answer = arrived.source.dial(ConnectionKind.CONTROL, token=arrived.source.token, epoch=epoch)
    assert answer.code is AnswerCode.WELCOME
    control = Connection(sock, control_decoder())
    control.send(Recover(epoch=epoch))
    assert control.receive(Recovered).epoch == epoch
    return control


def test_amid_an_attempt_to_recover(arrived: Arrived) -> None:
    """Of a source that has dialled and says nothing more: it is told, and what it comes with later is not awaited."""
    arrived.loses_its_source()
    control = dials_again(arrived, 1)
    assert arrived.is_given_up().state == "abandoned"
    assert control.refused().code == "abandoned"
    _, answer = arrived.source.dial(ConnectionKind.URGENT, token=arrived.source.token, epoch=1)
    assert answer.code is AnswerCode.MIGRATION_UNKNOWN
    arrived.child.begins("read", LOST)
    assert arrived.child.died_of() == signal.SIGBUS


def test_as_the_source_recovers(arrived: Arrived) -> None:
    """At the moment of its last connection: one of the two holds, and both sides are told which."""
    arrived.loses_its_source()
    control = dials_again(arrived, 1)
    arrived.source.dial(ConnectionKind.URGENT, token=arrived.source.token, epoch=1)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(lambda: arrived.source.dial(ConnectionKind.BULK, token=arrived.source.token, epoch=1))
        answered = ""
        try:
            arrived.is_given_up()
        except PostcopyError as refused:
            answered = refused.code
        last.result()
    assert answered in ("", "not-abandonable")
    if answered:
        assert arrived.status().state == "postcopy"
        assert control.receive(Ready, Refused) == Ready()
    else:
        assert arrived.status().state == "abandoned"
        assert control.refused().code == "abandoned"


def test_stalled(arrived: Arrived) -> None:
    """Its guest has what is here until then, and after."""
    arrived.source.bulk.sendall(b"no frame at all".ljust(24, b"."))
    arrived.reaches("stalled")
    arrived.child.does("drop", WITH_CONTENT)
    assert arrived.child.does("read", WITH_CONTENT) == CONTENT
    arrived.child.begins("read", LOST)
    until(lambda: arrived.status().faults_count >= 2, "its fault")
    assert arrived.is_given_up().state == "abandoned"
    assert arrived.child.died_of() == signal.SIGBUS


@pytest.mark.parametrize(("first", "count"), [(100, 50), (2, 254), (0, PAGES), (255, 1), (254, 1)])
def test_what_the_guest_has_unmapped_is_not_lost(arrived: Arrived, first: int, count: int) -> None:
    """It lives, and what it still has is decided, on either side of the gap; a fault from before the loss behind it, too."""
    arrived.child.does("unmap", first, count)
    left = [page for page in range(2, PAGES) if not first <= page < first + count]
    waits = PAGES - 1 in left  # on the very last: it dies of that, and where nobody is left nothing more is decided
    if waits:
        arrived.child.begins("read", left[-1])
        until(lambda: arrived.status().faults_count == 1, "its fault")
    arrived.loses_its_source()
    status = arrived.is_given_up()
    assert (status.state, status.lost and status.lost.pages) == ("abandoned", len(left))
    assert status.lost is not None
    assert [page for run in status.lost.runs for page in range(run.page_index, run.page_index + run.page_count)] == left
    if left and not waits:
        arrived.child.begins("read", left[-1])
    if left:
        assert arrived.child.died_of() == signal.SIGBUS


def test_guest_that_ends_meanwhile(arrived: Arrived) -> None:
    """Perhaps of the first page that was lost: nobody waits any more, and the source resumes nothing."""
    arrived.loses_its_source()
    arrived.child.kill()
    assert arrived.is_given_up().state == "abandoned"


def test_only_what_waits(arrived: Arrived) -> None:
    with pytest.raises(PostcopyError, match="paused or stalled") as refused:
        arrived.is_given_up()
    assert refused.value.code == "not-abandonable"


@pytest.mark.parametrize(
    ("memory", "rate"), [("16M", 5000), pytest.param("32M:hugetlb", 20, id="hugetlb", marks=pytest.mark.requires("hugetlb"))]
)
def test_workload(pair: Pair, memory: str, rate: int) -> None:
    """Two real daemons and a guest at work: it says which page is gone. Its old self is never resumed. Of a large page a part may
    have come: it is as lost."""
    guest = Commuter(pair, f"loser-{rate}", memory, options=("--rate", str(rate)))
    try:
        with CutMove(guest, precopy="off", bulk=False) as move:
            move.reaches("postcopy")
            move.link.cut(until_restored=True)
            until(lambda: move.state_there() == "paused", "paused there")
            with guest.is_at.client() as client, pytest.raises(PostcopyError, match="at the destination"):
                client.abandon(move.id)
            with guest.goes_to.client() as client:
                status = client.abandon(move.id)
            assert status.lost is not None
            assert (
                0 < status.lost.pages <= status.pages_total - status.pages_done
            )  # fewer: it touched one, and ended before the last
            failed = guest.waits.event("failed")
            assert "SIGBUS" in str(failed)
            move.link.restore()
            ended = move.ends()
            assert (ended.state, ended.error and ended.error.code) == ("stalled", "abandoned")
            with guest.is_at.client() as client:
                assert [one["state"] for one in client.guests() if one["id"] == guest.guest_id] == ["leaving"]
    finally:
        guest.end()


@pytest.mark.requires("uffd-kernel", "kvm")
def test_kvm(pair: Pair) -> None:
    """KVM finds the marker in a virtual CPU's stead: it fails, or its process ends of SIGBUS; nothing is read."""
    guest = Commuter(pair, "kvm-loser", "8M", options=("--vcpus", "2"), kind="kvm")
    try:
        with CutMove(guest, precopy="off", bulk=False) as move:
            move.reaches("postcopy")
            move.link.cut(until_restored=True)
            until(lambda: move.state_there() == "paused", "paused there")
            with guest.goes_to.client() as client:
                assert client.abandon(move.id).state == "abandoned"
            assert guest.waits.wait() in (-signal.SIGBUS, GUEST_FAILED), guest.waits.log()
    finally:
        guest.end()
