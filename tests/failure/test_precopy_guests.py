"""What bad guests do in precopy, and what an operator does: the guest runs on, or its pages are final; the other waits, empty."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from migrate.client import DaemonClient
from migrate.errors import PostcopyError
from migrate.pair import Pair, wait_settled
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import (
    Complete,
    GuestComplete,
    GuestPrepared,
    Offer,
    Paused,
    Prepared,
    Refused,
    Released,
    Running,
    Switchover,
    TrackFailed,
    Tracking,
    control_decoder,
    encode,
)
from proto.preamble import ConnectionKind

from ..path.commuter import Commuter, until
from .fakes import Connection, FakeDestination, FakeGuest, PeerEndedError, receive_exactly
from .memory_child import PAGE_BYTES
from .precopy_fakes import (
    LARGE,
    PrecopyDestination,
    PrecopySource,
    TouchedGuest,
    TrackedGuest,
    bits,
    content_of,
    pages,
    runs_on,
)

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
PAGES = 256
SMALL = ((1 << 20, PAGE_BYTES),)
REQUEST = Frame(FrameKind.REQUEST, 0, 5, PAGE_BYTES).encode()
COMPLETE = Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={})


@pytest.fixture
def client(pair: Pair) -> Iterator[DaemonClient]:
    with pair.source.client() as client:
        yield client


# --- guests that leave --------------------------------------------------------------------------------------------------


def passes(open_file: Callable[[], int]) -> Callable[[TrackedGuest], None]:
    def answer(guest: TrackedGuest) -> None:
        descriptor = open_file()
        guest.send(encode(Tracking()), [descriptor])
        os.close(descriptor)

    return answer


def a_pipe() -> int:
    reads, writes = os.pipe()
    os.close(writes)
    return reads


def a_tmpfs_file() -> int:
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)


def passes_its_own(what: str, *arguments: int) -> Callable[[TrackedGuest], None]:
    """After it has done this."""

    def answer(guest: TrackedGuest) -> None:
        guest.child.does(what, *arguments)
        guest.send(encode(Tracking()), [guest.pagemap_fd])

    return answer


def of(path: str) -> Callable[[], int]:
    return lambda: os.open(path, os.O_RDONLY)


ANSWERS: dict[str, tuple[Callable[[TrackedGuest], None], str]] = {
    "it fails": (lambda g: g.connection.send(TrackFailed(reason="no userfaultfd for me")), "no userfaultfd for me"),
    "no descriptor": (lambda g: g.connection.send(Tracking()), "the guest passed no pagemap"),
    "two": (lambda g: g.send(encode(Tracking()), [g.pagemap_fd] * 2), "the guest passed no pagemap"),
    "a file": (passes(a_tmpfs_file), "the guest passed /dev/shm"),
    "a pipe": (passes(a_pipe), "the guest passed pipe:["),
    "its maps": (passes(of("/proc/self/maps")), "/maps, not its pagemap"),
    "another's pagemap": (passes(of("/proc/self/pagemap")), "all of its memory mapped and tracked"),
    "not tracked": (passes_its_own("unregister"), "tracked, got EPERM"),
    "partly unmapped": (passes_its_own("unmap", 3, 1), "tracked, got EFAULT"),
}


def without_precopy(client: DaemonClient, guest: TrackedGuest, answer: Callable[[TrackedGuest], None] | None) -> str:
    """Moved without precopy; why, as the status tells it. Nothing of the attempt is left open in the daemon."""
    with FakeDestination() as fake:
        migration_id = client.migrate(guest.guest_id, fake.address).id
        fake.control = Connection(fake.greet(ConnectionKind.CONTROL), control_decoder())
        if answer is not None:
            guest.told_to_track()
            answer(guest)
        assert not fake.control.receive(Offer).precopy
    status = wait_settled(client, migration_id)
    assert status.precopy is None
    return status.switched_because


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_to_track(pair: Pair, client: DaemonClient, name: str) -> None:
    answer, why = ANSWERS[name]
    with TrackedGuest("leaves") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        client.guests()  # its connection stays
        before = len(os.listdir(f"/proc/{pair.source.pid}/fd"))
        assert why in without_precopy(client, guest, answer)
        until(lambda: len(os.listdir(f"/proc/{pair.source.pid}/fd")) <= before, "what was passed is closed")


@pytest.mark.parametrize(
    ("offers", "declares", "why"),
    [
        ((), (), "no precopy: the guest does not offer tracking"),
        (("tracking",), ("vhost-user", "vfio"), "no precopy: the guest declares vhost-user, vfio: its writes cannot all be seen"),
        (("something-else",), (), "no precopy: the guest does not offer tracking"),
    ],
)
def test_guest_that_is_not_tracked(
    pair: Pair, client: DaemonClient, offers: tuple[str, ...], declares: tuple[str, ...], why: str
) -> None:
    """It is not even asked."""
    with TrackedGuest("leaves", offers=offers, declares=declares) as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        assert without_precopy(client, guest, None) == why
        assert guest.told_nothing()


@pytest.fixture
def large(pair: Pair) -> Iterator[TrackedGuest]:
    """Of more than sockets buffer: a round is under way until it is read."""
    with TrackedGuest("large", LARGE) as guest:
        guest.child.does("fill", 1)
        yield guest.attach(pair.source.runtime_dir / "guests.sock")


IN_A_ROUND: dict[str, tuple[tuple[str, int, int] | tuple[str, int] | tuple[str], str, str]] = {
    "ends its tracking": (("unregister",), "tracking-failed", "Operation not permitted"),
    "unmaps what it wrote": (("write_and_unmap", 7), "tracking-failed", "Bad address"),
    "truncates its file": (("truncate", PAGE_BYTES), "memory-failed", "No data available"),
}


@pytest.mark.parametrize("name", IN_A_ROUND)
def test_in_a_round_the_guest(client: DaemonClient, large: TrackedGuest, name: str) -> None:
    (what, *arguments), code, got = IN_A_ROUND[name]
    with PrecopyDestination(large, receive_buffer_bytes=65536) as fake:
        migration_id = client.migrate("large", fake.address).id
        fake.begin_round()
        large.child.does(what, *arguments)
        with contextlib.suppress(PeerEndedError):
            fake.receive_rounds()
        error = runs_on(client, migration_id, large)
        assert error.code == code
        assert got in error.got


def test_guest_that_dies_in_a_round(client: DaemonClient, large: TrackedGuest) -> None:
    with PrecopyDestination(large, receive_buffer_bytes=65536) as fake:
        migration_id = client.migrate("large", fake.address).id
        fake.begin_round()
        large.child.kill()
        large.connection.close()
        fake.control.beside = None
        assert fake.control.receive(Refused).code == "guest-gone"
        status = wait_settled(client, migration_id)
        assert status.state == "failed"
        assert status.error is not None
        assert status.error.what == "guest large"
    assert all(one["id"] != "large" for one in client.guests())


@pytest.mark.parametrize("what", ["dies", "ends its tracking"])
def test_what_the_last_scan_cannot_see_is_stale(pair: Pair, client: DaemonClient, what: str) -> None:
    """A scan of a process that has ended finds nothing, without an error. Its memory lives on in its file: it all goes again."""
    with TrackedGuest("leaves") as guest, PrecopyDestination(guest) as fake:
        guest.child.does("fill", 1)
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("leaves", fake.address).id
        fake.prepare()
        fake.control.send(Prepared())
        guest.told_to_pause()
        guest.child.does("fill", 2)
        if what == "dies":
            guest.child.kill()
        else:
            guest.child.does("unregister")
        guest.connection.send(Paused(state=b"", last_step_ns=0))
        fake.control.receive(Switchover)
        assert fake.receive_stale() == set(range(PAGES))
        fake.bulk.sendall(bits(FrameKind.LACKS, range(PAGES), PAGES))
        fake.control.send(Running(epoch=0))
        received = b""
        while len(received) < 1 << 20:
            received += fake.receive_frame()[2]
        assert received == b"\2" * (1 << 20)
        fake.control.send(COMPLETE)
        fake.control.receive(Released)
        assert wait_settled(client, migration_id).state == "complete"


# --- guests that wait ---------------------------------------------------------------------------------------------------


def test_guest_that_touches_its_memory_while_it_waits(pair: Pair) -> None:
    """The thread waits through a migration that fails in a round and through the next one's, and gets the final bytes."""
    with TouchedGuest("touches") as guest:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        guest.child.begins("read", 5)
        with PrecopySource(pair.destination.address, SMALL) as source:
            source.begin_round()
            assert receive_exactly(source.urgent, FRAME_HEADER_BYTES) == REQUEST
            source.send_all()
        with pair.destination.client() as client:
            until(lambda: client.guests()[0]["state"] == "waiting", "it waits again")
        with PrecopySource(pair.destination.address, SMALL) as source:
            source.begin_round()
            source.send_all()
            assert receive_exactly(source.urgent, FRAME_HEADER_BYTES) == REQUEST
            source.until_running(guest)
            source.bulk.sendall(bits(FrameKind.STALE, {5}, PAGES))
            assert source.receive_lacks(PAGES) == set()
            source.urgent.sendall(pages(5, content_of(77)))
            assert guest.child.has_done() == 78
            guest.connection.receive(GuestComplete)


def test_waiting_guest_that_dies_in_a_round(pair: Pair) -> None:
    with PrecopySource(pair.destination.address, SMALL) as source:
        with FakeGuest("waits", "waiting") as guest:
            guest.attach(pair.destination.runtime_dir / "guests.sock")
            source.begin_round()
            source.bulk.sendall(pages(0, content_of(0)))
        assert source.control.refused().code == "guest-gone"
    with pair.destination.client() as client:
        assert client.guests() == []


# --- operators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PrecopyDestination.STEPS)
def test_cancelled(client: DaemonClient, large: TrackedGuest, phase: str) -> None:
    """The guest runs on, and is told that it need not be tracked; what it answers too late is ignored."""
    with PrecopyDestination(large, receive_buffer_bytes=65536) as fake:
        migration_id = client.migrate("large", fake.address).id
        fake.until(phase)
        client.cancel(migration_id)
        assert wait_settled(client, migration_id).state == "cancelled"
    late = {"asked to track": large.says_tracking, "guest asked to prepare": lambda: large.connection.send(GuestPrepared())}
    late.get(phase, lambda: None)()
    assert large.untracked()
    assert "no precopy" in without_precopy(client, large, lambda guest: guest.connection.send(TrackFailed(reason="not now")))
    assert large.told_nothing()
    assert [one["state"] for one in client.guests()] == ["running"]


def test_storm_of_cancellations(commuter: Commuter) -> None:
    """Begun and cancelled, twice each, wherever that meets it; then the guest moves, and is whole."""
    with commuter.is_at.client() as client:
        for _ in range(15):
            begun = client.migrate(commuter.guest_id, commuter.goes_to.address, precopy=1000)
            client.cancel(begun.id)
            with contextlib.suppress(PostcopyError):  # not cancellable: it is cancelled already
                client.cancel(begun.id)
            assert wait_settled(client, begun.id).state == "cancelled"
    commuter.move(precopy=3)
