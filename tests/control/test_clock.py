"""Two hosts' clocks: the estimate, and a downtime that is right although the clocks are a quarter of an hour apart."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate import pair as pair_module
from migrate.clock import PINGS, SAME_CLOCK, ClockOffset, clock_id, estimate
from migrate.pair import COMMAND, Pair
from proto.messages import ClockPing, ClockPong, Prepare, Ready
from proto.preamble import ConnectionKind

from ..failure.fakes import FakeDestination, FakeGuest
from ..path.commuter import Commuter

OFFSET_SECONDS = 1000
OFFSET_NS = OFFSET_SECONDS * 10**9


def test_shortest_round_trip_decides() -> None:
    slow = (0, 700 + 5000, 1000)  # as if the peer were 5200 ahead: most of the delay was on the way back
    quick = (2000, 2050 + 5000, 2100)
    assert estimate([slow, quick, slow]) == ClockOffset(offset_ns=5000, uncertainty_ns=50)
    assert estimate([slow]) == ClockOffset(offset_ns=5200, uncertainty_ns=500)


def test_round_trip_of_no_time_is_certain() -> None:
    assert estimate([(10, 17, 10)]) == ClockOffset(7, 0)
    assert ClockOffset(0, 0) == SAME_CLOCK


durations = st.integers(0, 10**10)


@settings(max_examples=300)
@given(
    offset_ns=st.integers(-(10**18), 10**18),
    trips=st.lists(st.tuples(st.integers(0, 10**18), durations, durations), min_size=1, max_size=20),
)
def test_truth_lies_within_the_uncertainty(offset_ns: int, trips: list[tuple[int, int, int]]) -> None:
    """However the way there and the way back differ."""
    measured = estimate([(sent, sent + there + offset_ns, sent + there + back) for sent, there, back in trips])
    assert abs(measured.offset_ns - offset_ns) <= measured.uncertainty_ns
    assert measured.uncertainty_ns <= (min(there + back for _, there, back in trips) + 1) // 2


def test_one_clock_has_one_name() -> None:
    assert clock_id() == clock_id()
    assert "time" in clock_id()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.requires("uffd")
@pytest.mark.parametrize("offset_ns", [0, OFFSET_NS, -OFFSET_NS // 1000], ids=["none", "ahead", "behind"])
def test_source_measures_the_offset_of_another_clock(pair: Pair, offset_ns: int) -> None:
    with FakeGuest("timed", "running") as guest, FakeDestination(clock="another host's") as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        client.migrate("timed", fake.address)
        fake.accept_offer()
        fake.send_accept()
        for _ in range(PINGS):
            ping = fake.control.receive(ClockPing)
            fake.control.send(ClockPong(sent_ns=ping.sent_ns, peer_ns=time.monotonic_ns() + offset_ns))
        fake.greet(ConnectionKind.URGENT)
        fake.greet(ConnectionKind.BULK)
        fake.control.beside = guest
        fake.control.send(Ready())
        prepare = fake.control.receive(Prepare)
    assert PINGS >= 8
    assert abs(prepare.clock_offset_ns - offset_ns) <= prepare.clock_uncertainty_ns
    assert 0 < prepare.clock_uncertainty_ns < 50_000_000


@pytest.mark.requires("uffd")
def test_same_clock_is_not_measured(pair: Pair) -> None:
    with FakeGuest("timed", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        client.migrate("timed", fake.address)
        prepare = fake.prepare(guest)
    assert (prepare.clock_offset_ns, prepare.clock_uncertainty_ns) == (0, 0)


@pytest.mark.requires("uffd", "timens")
def test_downtime_between_two_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination and its guest in a time namespace whose clock is ahead; and the way back, where it is behind."""
    with Pair() as pair:
        pair.destination.end()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(pair_module, "COMMAND", ("unshare", "--time", "--monotonic", str(OFFSET_SECONDS), *COMMAND))
            pair.destination = pair.daemon("elsewhere")
            there = pair.guest(pair.destination, "traveller-there", "4M", "--stay", waiting=True)
        commuter = Commuter(pair, "traveller", "4M", there=there)
        for moves in range(4):
            before_ns = time.monotonic_ns()
            status = pair.move(commuter.guest_id, commuter.is_at, commuter.goes_to)
            assert status.state == "complete", status.error
            verified = commuter.arrived()
            assert status.downtime_seconds is not None
            assert abs(status.downtime_seconds) < 1
            assert 0 < status.downtime_uncertainty_seconds < 0.05
            apart_ns = verified["first_step_ns"] - before_ns  # what the downtime would be off by
            assert apart_ns > 0.9 * OFFSET_NS if moves % 2 == 0 else apart_ns < 0.1 * OFFSET_NS
