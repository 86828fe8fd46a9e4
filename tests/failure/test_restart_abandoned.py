"""A guest whose source was given up (`abandon`) outlives its daemon: what is lost stays lost, what is here stays.

The guest's memory is touched by a child process; the test is its agent, and its source.
"""

import os
import signal
import struct
from collections.abc import Iterator

import httpx
import pytest

from migrate.pair import Pair
from migrate.record import RecordBook
from migrate.session import MigrationStatus
from proto.frame import Frame, FrameKind
from proto.messages import Running
from proto.preamble import AnswerCode

from ..path.commuter import until
from .fakes import FakeSource
from .memory_child import PAGE_BYTES
from .precopy_fakes import TouchedGuest
from .returning_fakes import Arriving

pytestmark = pytest.mark.requires("uffd", "uffd-poison")
PAGES = 256
WITH_CONTENT, ZERO, LOST = 0, 1, 5
CONTENT = 0x4711
WHAT_IS_LOST = {
    "pages": PAGES - 2,
    "runs": [{"region": 0, "page_index": 2, "page_count": PAGES - 2}],
    "runs_left_off": 0,
}


class Kept(Arriving):
    """A guest that runs at a real destination with two pages of all, and has lost its source. Its daemon may be killed."""

    guest: TouchedGuest

    def __init__(self, pair: Pair, guest: TouchedGuest, source: FakeSource) -> None:
        super().__init__(pair, guest, source)
        self.child = guest.child
        source.say_switchover()
        assert guest.resumed() == b"a state"
        source.control.receive(Running)
        content = Frame(FrameKind.PAGES, 0, WITH_CONTENT, PAGE_BYTES).encode()
        source.bulk.sendall(content + struct.pack("<Q", CONTENT).ljust(PAGE_BYTES, b"x"))
        source.bulk.sendall(Frame(FrameKind.ZERO, 0, ZERO, PAGE_BYTES).encode())
        until(lambda: self.status().pages_done == 2, "both pages are here")
        source.control.close()
        until(lambda: self.status().state == "paused", "paused")

    def status(self) -> MigrationStatus:
        with self.pair.destination.client() as client:
            return client.status(self.id)

    def is_given_up(self) -> MigrationStatus:
        with self.pair.destination.client() as client:
            return client.abandon(self.id)

    def returns(self) -> None:
        """Its agent has found the next daemon, which gives it page states of its own."""
        self.guest_returns(role="arriving", epoch=0, offers=["keep"])
        self.states_fd = self.guest.receive_kept()

    def awaits_its_source(self) -> bool:
        status = self.status()
        return status.state == "paused" and status.pages_done == 2

    def is_abandoned(self) -> None:
        """As before the kill, in every way."""
        until(lambda: self.status().state == "abandoned", "abandoned")
        status = self.status()
        assert (status.ended, status.error and status.error.code) == (True, "abandoned")
        assert status.lost is not None
        assert status.lost.model_dump() == WHAT_IS_LOST
        metrics = httpx.get(f"http://{self.pair.destination.metrics_address}/metrics", trust_env=False).text
        told = [line for line in metrics.splitlines() if self.guest.guest_id in line and "postcopy_lost_pages_total{" in line]
        assert [line.rpartition(" ")[2] for line in told] == [f"{PAGES - 2}.0"]
        assert self.child.does("read", WITH_CONTENT) == CONTENT
        for page in (WITH_CONTENT, ZERO, LOST):
            self.child.does("drop", page)
        assert self.child.does("read", WITH_CONTENT) == CONTENT
        assert self.child.does("read", ZERO) == 0
        self.child.begins("read", LOST)
        assert self.child.died_of() == signal.SIGBUS


@pytest.fixture
def kept(pair: Pair, request: pytest.FixtureRequest) -> Iterator[Kept]:
    guest_id = request.function.__name__
    with TouchedGuest(guest_id) as guest, FakeSource(pair.destination.address, guest_id=guest_id) as source:
        arrived = Kept(pair, guest, source)
        yield arrived
        os.close(arrived.states_fd)


def test_killed_afterwards(kept: Kept) -> None:
    """Twice. The source is told before the guest is back, and after."""
    kept.is_given_up()
    for epoch in (1, 2):
        kept.kill()
        assert kept.dial(2 * epoch) is AnswerCode.WELCOME
        assert kept.control.refused().code == "abandoned"
        kept.returns()
        until(lambda: kept.status().state == "abandoned", "abandoned")
        assert kept.dial(2 * epoch + 1) is AnswerCode.WELCOME
        assert kept.control.refused().code == "abandoned"
    kept.is_abandoned()


def test_killed_before_the_first_page_is_lost(kept: Kept) -> None:
    """The record holds, and nothing has been done: it is done by the next one. Who waits for a page waits until then."""
    kept.child.begins("read", LOST)
    until(lambda: kept.status().faults_count == 1, "its fault")
    pair = kept.pair
    pair.destination.signal(signal.SIGKILL)
    pair.destination.wait()
    book = RecordBook(pair.destination.runtime_dir)
    book.open()
    book.write(book.earlier[kept.id].changed(verdict="abandoned"))
    pair.again(pair.destination)
    kept.returns()
    assert kept.child.died_of() == signal.SIGBUS
    until(lambda: kept.status().state == "abandoned", "abandoned")
    lost = kept.status().lost
    assert lost is not None
    assert lost.model_dump() == WHAT_IS_LOST


def test_killed_before_it_is_recorded(kept: Kept) -> None:
    """Then nobody has given it up: it waits for its source, and can be given up as ever."""
    kept.kill()
    kept.returns()
    until(kept.awaits_its_source, "paused, and what is here")
    assert kept.is_given_up().state == "abandoned"
    kept.is_abandoned()


def test_record_that_cannot_be_written(kept: Kept) -> None:
    """Then no page is lost: the operator is told, the guest waits on, and it can be asked for again."""
    folder = kept.pair.destination.runtime_dir / "migrations"
    aside = folder.rename(folder.with_name("aside"))
    with pytest.raises(Exception, match="record of migration") as refused:
        kept.is_given_up()
    assert getattr(refused.value, "code", "") == "not-abandonable"
    assert kept.status().state == "paused"
    aside.rename(folder)
    kept.is_given_up()
    kept.is_abandoned()
