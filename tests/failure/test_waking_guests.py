"""What a guest says of itself in `hello` reaches those who act on it: how long it wakes, and what it is."""

import time
from pathlib import Path

import pytest

from migrate.pair import Pair
from proto.messages import Accept, Progress, Running, Welcome, encode

from .fakes import FakeDestination, FakeGuest, FakeSource, receive_exactly

pytestmark = pytest.mark.requires("uffd")
CLOCKS_APART_SECONDS = 0.001
"""Of two processors of a virtual machine, at most: seen were 12 us."""


def attached(guest: FakeGuest, runtime_dir: Path, **said: object) -> None:
    guest.connect(runtime_dir / "guests.sock")
    guest.send(encode(guest.hello(**said)), guest.descriptors())
    guest.connection.receive(Welcome)


@pytest.mark.parametrize("wake_ms", [0, 400])
def test_bulk_leaves_a_waking_guest_alone(pair: Pair, wake_ms: int) -> None:
    """Even though its first step is known: the destination says so at once."""
    with FakeGuest(f"wakes-{wake_ms}", "running") as guest, FakeDestination() as fake:
        attached(guest, pair.source.runtime_dir, wake_ms=wake_ms)
        with pair.source.client() as client:
            client.migrate(guest.guest_id, fake.address, precopy="off")
        fake.prepare(guest)
        switchover = fake.until_switchover_of(guest)
        said = time.monotonic()
        fake.control.send(Running(epoch=switchover.epoch))
        fake.control.send(Progress(pages_present=0, faults=0, downtime_ns=1, downtime_uncertainty_ns=0))
        receive_exactly(fake.bulk, 1)
        assert time.monotonic() - said >= wake_ms / 1000 - CLOCKS_APART_SECONDS


def test_guest_is_taken_by_its_like_only(pair: Pair) -> None:
    """Same regions, another machine: refused, with both in words. The like is taken, wherever it stands."""
    address = pair.destination.address
    with FakeGuest("other", "waiting", "3M") as other, FakeGuest("like", "waiting", "3M") as like:
        attached(other, pair.destination.runtime_dir, machine="machine B")
        with FakeSource(address, [(3 << 20, 4096)]) as source:
            source.begin().send(source.offered().model_copy(update={"machine": "machine A"}))
            refused = source.control.refused()
        assert refused.code == "no-guest-fits"
        assert refused.expected == "3 MiB of 4 KiB pages, machine A"
        assert refused.got == "other: 3 MiB of 4 KiB pages, machine B"
        attached(like, pair.destination.runtime_dir, machine="machine A")
        with FakeSource(address, [(3 << 20, 4096)]) as source:
            source.begin().send(source.offered().model_copy(update={"machine": "machine A"}))
            assert source.control.receive(Accept).waiting_guest_id == "like"
