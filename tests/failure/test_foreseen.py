"""Pages that a guest will touch first: its agent's word reaches the destination, which asks for them before there is a fault."""

import pytest

from migrate.pair import Pair
from migrate.uffd import Userfaultfd
from proto.frame import ACCEPTED_BY_SOURCE, FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import Progress, Running

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource, receive_exactly
from .memory_child import PAGE_BYTES
from .precopy_fakes import PrecopySource, TouchedGuest, bits, content_of, pages

pytestmark = [pytest.mark.requires("uffd"), pytest.mark.usefixtures("unharmed")]
PAGES = 256
FORESEEN = [9, 10, 200]
NOWHERE = [256, (1 << 63) - 1]


def test_the_agents_word_is_passed_on(pair: Pair) -> None:
    with FakeGuest("leaves", "running") as guest, FakeDestination() as destination:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        guest.foreseen = FORESEEN
        with pair.source.client() as client:
            client.migrate("leaves", destination.address, precopy="off")
            destination.prepare(guest)
            assert destination.until_switchover_of(guest).foreseen == FORESEEN


def test_they_are_asked_for_without_a_fault(pair: Pair) -> None:
    """Nobody touches this guest's memory. What is no page of it is passed over."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.prepare(guest)
        source.say_switchover(foreseen=[*NOWHERE, *FORESEEN])
        for page_index in FORESEEN:
            asked = Frame.decode(receive_exactly(source.urgent, FRAME_HEADER_BYTES), ACCEPTED_BY_SOURCE, [(256, 4096)])
            assert asked == Frame(FrameKind.REQUEST, region=0, page_index=page_index, length_bytes=4096)
            source.urgent.sendall(Frame(FrameKind.ZERO, region=0, page_index=page_index, length_bytes=4096).encode())
        assert guest.resumed() == b"a state"
        source.control.receive(Running)
        while (progress := source.control.receive(Progress)).pages_present < 3:
            pass
        assert (progress.pages_present, progress.faults) == (3, 0)


@pytest.mark.requires("wp-async", "pagemap-scan")
def test_stale_page_counts_as_touched_once_and_only_when_it_is(pair: Pair) -> None:
    """Foreseen or not; also when the thread faults again, woken before its page has come."""
    foreseen, other = 9, 20
    with (
        TouchedGuest("touches") as guest,
        PrecopySource(pair.destination.address, [(PAGES * PAGE_BYTES, PAGE_BYTES)]) as source,
        pair.destination.client() as client,
    ):
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.prepare(guest)
        source.say_switchover(foreseen=[foreseen])
        assert receive_exactly(source.urgent, FRAME_HEADER_BYTES)
        assert guest.resumed() == b"a state"
        source.control.receive(Running)
        source.bulk.sendall(bits(FrameKind.STALE, {foreseen, other}, PAGES))
        assert source.receive_lacks(PAGES) == {other}

        def touched() -> int | None:
            status = client.status(source.migration_id.hex())
            assert status.precopy is not None
            return status.precopy.stale_pages_touched

        for page, count in ((foreseen, 1), (other, 2)):
            assert touched() == count - 1
            guest.child.begins("read", page)
            until(lambda count=count: touched() == count, "its fault")  # type: ignore[misc]
            before = client.status(source.migration_id.hex()).faults_count
            wake(guest, page)
            until(lambda before=before: client.status(source.migration_id.hex()).faults_count > before, "again")  # type: ignore[misc]
            assert touched() == count
            source.urgent.sendall(pages(page, content_of(page)))
            assert guest.child.has_done() == page + 1


def wake(guest: TouchedGuest, page: int) -> None:
    Userfaultfd.borrow(guest.child.descriptor).wake(guest.child.address + page * PAGE_BYTES, PAGE_BYTES)
