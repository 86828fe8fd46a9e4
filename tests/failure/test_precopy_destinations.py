"""What a bad destination does in precopy: before the switchover the guest runs on; after it, it stays paused."""

from collections.abc import Callable, Iterator

import pytest

from migrate.client import DaemonClient
from migrate.pair import Pair, wait_settled
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import (
    Aborted,
    Cancel,
    Complete,
    GuestReleased,
    Offer,
    Paused,
    Prepare,
    Prepared,
    Quiesced,
    Ready,
    Refused,
    Released,
    Resume,
    Round,
    Running,
    Switchover,
    control_decoder,
)
from proto.preamble import ConnectionKind

from .fakes import Connection, FakeDestination, receive_exactly
from .memory_child import PAGE_BYTES
from .precopy_fakes import LARGE, PrecopyDestination, TrackedGuest, bits, content_of, pages, runs_on, stays_paused

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
PAGES = 256
SMALL = ((1 << 20, PAGE_BYTES),)
HUGE = ((4 << 20, 2 << 20),)
COMPLETE = Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={})


@pytest.fixture
def leaves(pair: Pair) -> Iterator[TrackedGuest]:
    with TrackedGuest("leaves") as guest:
        guest.child.does("fill", 1)
        yield guest.attach(pair.source.runtime_dir / "guests.sock")


@pytest.fixture
def fake(leaves: TrackedGuest) -> Iterator[PrecopyDestination]:
    with PrecopyDestination(leaves, receive_buffer_bytes=65536) as fake:
        yield fake


@pytest.fixture
def client(pair: Pair) -> Iterator[DaemonClient]:
    with pair.source.client() as client:
        yield client


def test_what_a_destination_lacks_decides(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """A good one: it holds a copy of all; told what is stale; lacks whatever it says, and gets that alone, in its last state."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.begin_round()
    fake.receive_rounds()
    assert fake.precopied == dict.fromkeys(range(PAGES), b"\1" * PAGE_BYTES)
    leaves.child.does("write", 9, 2)
    leaves.child.does("write", 200, 0)
    fake.control.send(Quiesced())
    fake.prepare_asked()
    fake.until_switchover_of(leaves)
    assert fake.receive_stale() == {9, 200}
    fake.bulk.sendall(bits(FrameKind.LACKS, {7, 9, 200, 255}, PAGES))
    fake.control.send(Running(epoch=0))
    got = {}
    while got.keys() != {7, 9, 200, 255}:
        kind, first, content = fake.receive_frame()
        got[first] = content if kind is FrameKind.PAGES else b""
        assert len(content) <= PAGE_BYTES
    assert got == {7: b"\1" * PAGE_BYTES, 9: b"\2" * PAGE_BYTES, 200: b"", 255: b"\1" * PAGE_BYTES}
    fake.control.send(COMPLETE)
    leaves.connection.receive(GuestReleased)
    fake.control.receive(Released)
    status = wait_settled(client, migration_id)
    assert status.state == "complete"
    assert status.precopy is not None
    assert status.precopy.stale_pages == 2
    assert status.pages == {"urgent": 0, "readahead": 0, "bulk": 3, "zero": 1, "precopy": PAGES}


def test_everything_is_lacking(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """What the source remembers of precopy counts for nothing: all of it goes once more, once."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.prepare()
    fake.until_switchover_of(leaves)
    assert fake.receive_stale() == set()
    fake.bulk.sendall(bits(FrameKind.LACKS, range(PAGES), PAGES))
    fake.control.send(Running(epoch=0))
    received = b""
    while len(received) < 1 << 20:
        received += fake.receive_frame()[2]
    fake.control.send(COMPLETE)
    fake.control.receive(Released)
    assert received == b"\1" * (1 << 20)
    status = wait_settled(client, migration_id)
    assert status.pages["bulk"] == PAGES


def test_accepted_without_precopy(client: DaemonClient, leaves: TrackedGuest) -> None:
    """Pure postcopy, and the status says why; the guest need not be tracked."""
    with FakeDestination() as fake:
        migration_id = client.migrate("leaves", fake.address).id
        fake.control = Connection(fake.greet(ConnectionKind.CONTROL), control_decoder())
        leaves.tracks()
        assert fake.control.receive(Offer).precopy
        fake.send_accept()
        assert leaves.untracked()
        fake.urgent, fake.bulk = fake.greet(ConnectionKind.URGENT), fake.greet(ConnectionKind.BULK)
        fake.control.beside = leaves
        fake.control.send(Ready())
        fake.control.receive(Prepare)
        fake.until_switchover_of(leaves)
        fake.control.send(Aborted(epoch=0, reason="for a test"))
        assert leaves.connection.receive(Resume).state is None
        status = wait_settled(client, migration_id)
    assert status.precopy is None
    assert status.switched_because == "no precopy: the destination does not take part"


@pytest.mark.parametrize("when", ["in a round", "before the offer is accepted"])
def test_quiesced_that_is_too_early(pair: Pair, client: DaemonClient, when: str) -> None:
    """It cannot have had the mark: precopied pages would be in flight when the guest is paused."""
    with TrackedGuest("large", LARGE) as guest, PrecopyDestination(guest, receive_buffer_bytes=65536) as fake:
        guest.child.does("fill", 1)
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("large", fake.address).id
        if when == "in a round":
            fake.begin_round()
        else:
            fake.accept_offer()
        fake.control.send(Quiesced())
        assert fake.control.refused().code == "message-unexpected"
        assert runs_on(client, migration_id, guest).got == "quiesced"


def test_quiesced_that_never_comes(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """Megabytes may be on a slow link still: it is waited for, as long as the operator does."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.begin_round()
    fake.receive_rounds()
    assert client.status(migration_id).state == "precopy"
    client.cancel(migration_id)
    fake.control.receive(Cancel)
    assert wait_settled(client, migration_id).state == "cancelled"
    assert leaves.untracked()
    assert leaves.told_nothing()


def test_request_before_the_pause(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """P2: a guest that waits may touch its memory; what it asked for comes once it is final."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.begin_round()
    fake.urgent.sendall(Frame(FrameKind.REQUEST, 0, 5, PAGE_BYTES).encode())
    fake.receive_rounds()
    fake.control.send(Quiesced())
    fake.prepare_asked()
    leaves.child.does("write", 5, 77)
    fake.control.send(Prepared())
    leaves.told_to_pause()
    fake.urgent.setblocking(False)
    with pytest.raises(BlockingIOError):
        fake.urgent.recv(1)
    fake.urgent.settimeout(10)
    leaves.connection.send(Paused(state=b"", last_step_ns=0))
    fake.control.receive(Switchover)
    assert receive_exactly(fake.urgent, FRAME_HEADER_BYTES + PAGE_BYTES) == pages(5, bytes([77]) * PAGE_BYTES)
    fake.control.send(Aborted(epoch=0, reason="for a test"))
    assert wait_settled(client, migration_id).state == "failed"


@pytest.mark.parametrize("phase", ["in a round", "marked", "quiesced", "prepared"])
@pytest.mark.parametrize("which", ["bulk", "urgent"])
def test_data_connection_that_ends(
    client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination, which: str, phase: str
) -> None:
    """Of a destination that goes on as if nothing were: the guest is not given to where its pages cannot follow (P5)."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.begin_round()
    steps: dict[str, Callable[[], object]] = {
        "in a round": fake.receive_rounds,
        "marked": lambda: fake.control.send(Quiesced()),
        "quiesced": fake.prepare_asked,
        "prepared": lambda: fake.control.send(Prepared()),
    }
    for step, goes_on in steps.items():
        if step == phase:
            getattr(fake, which).close()
            if which == "bulk" and phase in ("in a round", "marked"):  # it is in use
                break
        goes_on()
    while not isinstance(message := fake.control.receive(Round, Refused), Refused):
        pass
    assert message.code == "connection-lost"
    assert runs_on(client, migration_id, leaves).what == f"{which} connection"


def test_refusal_in_a_round(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """Its own words, also where its connections end at the same time."""
    migration_id = client.migrate("leaves", fake.address).id
    fake.begin_round()
    fake.control.send(Refused(code="no-room", what="destination", expected="room", got="none"))
    fake.bulk.close()
    error = runs_on(client, migration_id, leaves)
    assert (error.code, error.what, error.expected, error.got) == ("no-room", "destination", "room", "none")


LACKS = FrameKind.LACKS
BAD_LACKS = {
    "a gap": (bits(LACKS, (), 8) + bits(LACKS, (), 8, first=9), "page_index", "8", "9"),
    "a gap at the start": (bits(LACKS, (), 8, first=8), "page_index", "0", "8"),
    "one twice": (bits(LACKS, (), 8) * 2, "page_index", "8", "0"),
    "beyond the end": (bits(LACKS, (), PAGES + 8), "length_bytes", str(1 << 20), str((1 << 20) + 8 * PAGE_BYTES)),
    "nothing": (Frame(LACKS, 0, 0, 0).encode(), "length_bytes", "4096", "0"),
    "another region": (Frame(LACKS, 1, 0, PAGE_BYTES).encode(), "region", "1", "1"),
    "stale": (bits(FrameKind.STALE, (), PAGES), "kind", "64", "4"),
    "pages": (pages(0, content_of(0)), "kind", "64", "2"),
    "a request": (Frame(FrameKind.REQUEST, 0, 0, PAGE_BYTES).encode(), "kind", "64", "1"),
}


@pytest.mark.parametrize("name", BAD_LACKS)
def test_lacking_set(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination, name: str) -> None:
    sent, field, expected, got = BAD_LACKS[name]
    migration_id = client.migrate("leaves", fake.address).id
    fake.prepare()
    fake.until_switchover_of(leaves)
    fake.control.send(Running(epoch=0))
    fake.bulk.sendall(sent)
    assert fake.control.refused().code == "frame-invalid"
    error = stays_paused(client, migration_id, leaves)
    assert error.what.startswith(f"frame {field} (")
    assert (error.expected, error.got) == (expected, got)
