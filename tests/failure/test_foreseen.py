"""Pages that a guest will touch first: its agent's word reaches the destination, which asks for them before there is a fault."""

import pytest

from migrate.pair import Pair
from proto.frame import ACCEPTED_BY_SOURCE, FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import Progress, Running

from .fakes import FakeDestination, FakeGuest, FakeSource, receive_exactly

pytestmark = [pytest.mark.requires("uffd"), pytest.mark.usefixtures("unharmed")]
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
