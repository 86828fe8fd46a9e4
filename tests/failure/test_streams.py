"""Several bulk connections: which are taken and which refused; one of them cut, in each phase; what they wait for."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.client import DaemonClient
from migrate.connections import DataConnections
from migrate.pair import DaemonProcess, Pair, wait_settled
from proto.frame import FrameKind
from proto.messages import Aborted, Complete, GuestComplete, Prepare, Prepared, Progress, Quiesced, Ready, Refused, Round, Running
from proto.preamble import ANSWER_BYTES, Answer, AnswerCode, ConnectionKind

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource, closed_by_peer, interrupted, receive_exactly
from .memory_child import PAGE_BYTES
from .precopy_fakes import (
    PrecopyDestination,
    PrecopySource,
    TrackedGuest,
    bits,
    content_of,
    mark,
    pages,
    runs_on,
    stays_paused,
)
from .test_precopy_sources import GONE, SMALL, is_empty, waits_again

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
STREAMS = 3
LAST = STREAMS - 1
PAGES = 256
LARGE = "32M"
"""More than the sockets of all connections buffer."""
LARGE_PAGES = 8192


# --- which connections there are ----------------------------------------------------------------------------------------


def test_a_destination_takes_as_many_as_it_may(tmp_path: Path) -> None:
    """Fewer than were offered; each once, in any order, and no other: not one beyond, none twice, none late."""
    daemon = DaemonProcess(tmp_path, "destination", ["--max-streams", "2"])
    try:
        with FakeGuest("waits", "waiting") as guest, FakeSource(daemon.address) as source:
            guest.attach(daemon.runtime_dir / "guests.sock")
            source.streams = 5
            assert source.offer().streams == 2

            def answer_to(kind: ConnectionKind, stream: int) -> AnswerCode:
                sock, answer = source.dial(kind, token=source.token, stream_index=stream)
                assert answer.code is AnswerCode.WELCOME or closed_by_peer(sock)
                return answer.code

            assert answer_to(ConnectionKind.BULK, 2) is AnswerCode.KIND_UNEXPECTED
            assert answer_to(ConnectionKind.BULK, 0xFFFFFFFF) is AnswerCode.KIND_UNEXPECTED
            assert answer_to(ConnectionKind.URGENT, 1) is AnswerCode.KIND_UNEXPECTED
            assert answer_to(ConnectionKind.BULK, 1) is AnswerCode.WELCOME
            assert answer_to(ConnectionKind.BULK, 1) is AnswerCode.KIND_UNEXPECTED
            assert answer_to(ConnectionKind.URGENT, 0) is AnswerCode.WELCOME
            assert answer_to(ConnectionKind.BULK, 0) is AnswerCode.WELCOME
            source.control.receive(Ready)
            for stream in range(3):
                assert answer_to(ConnectionKind.BULK, stream) is AnswerCode.KIND_UNEXPECTED
        until(lambda: "got bulk 2" in daemon.log(), "which one it was is in the log")
    finally:
        daemon.end()


def test_connections_that_came_are_no_longer_half_open(pair: Pair) -> None:
    """However many a migration has: who has said who it is does not count against those who have not."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address, SMALL) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.streams = 8
        source.attach()
        silent = [source.open() for _ in range(64)]
        _, answer = source.dial(ConnectionKind.BULK, token=source.token)  # the oldest of the silent ones gives way to it
        assert answer.code is AnswerCode.KIND_UNEXPECTED
        assert Answer.decode(receive_exactly(silent[0], ANSWER_BYTES)).code is AnswerCode.BUSY
        assert closed_by_peer(silent[0])
        silent[1].settimeout(0)
        with pytest.raises(BlockingIOError):
            silent[1].recv(1)


def test_those_that_have_not_come_are_named() -> None:
    connections = DataConnections(2)
    assert connections.reserve(ConnectionKind.BULK, 1)
    assert connections.missing() == ["urgent", "bulk 0", "bulk 1"]  # reserved is not yet here
    with socket.socket() as sock:
        connections.add(ConnectionKind.BULK, 1, sock)
        assert connections.missing() == ["urgent", "bulk 0"]


def test_more_than_were_offered(pair: Pair) -> None:
    with FakeGuest("leaves", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        begun = client.migrate("leaves", fake.address, streams=2)
        assert fake.accept_offer().streams == 2
        fake.streams = 3
        fake.send_accept()
        refusal = fake.control.refused()
        assert (refusal.code, refusal.what, refusal.expected, refusal.got) == ("message-invalid", "accept streams", "<= 2", "3")
        assert wait_settled(client, begun.id).state == "failed"
        assert guest.told_nothing()


def test_without_bulk_there_is_one(pair: Pair) -> None:
    with FakeGuest("leaves", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        client.migrate("leaves", fake.address, streams=8, bulk=False)
        assert fake.accept_offer().streams == 1


# --- one of them is cut: at the destination -----------------------------------------------------------------------------


@pytest.fixture
def waits(pair: Pair) -> Iterator[FakeGuest]:
    with FakeGuest("waits", "waiting") as guest:
        yield guest.attach(pair.destination.runtime_dir / "guests.sock")


@pytest.fixture
def source(pair: Pair) -> Iterator[PrecopySource]:
    with PrecopySource(pair.destination.address, SMALL) as source:
        source.streams = STREAMS
        yield source


@pytest.mark.parametrize("phase", ["in a round", "before its mark", "behind its mark", "quiesced", "prepared"])
def test_source_cuts_one_before_the_switchover(pair: Pair, source: PrecopySource, waits: FakeGuest, phase: str) -> None:
    """The guest is not resumed where its pages cannot follow; without the last mark `quiesced` is not said."""
    source.begin_round()
    if phase != "in a round":
        source.send_all()
        for bulk in source.bulks[:LAST]:
            bulk.sendall(mark())
    if phase not in ("in a round", "before its mark"):
        source.bulks[LAST].sendall(mark())
    if phase in ("quiesced", "prepared"):
        source.control.receive(Quiesced)
    if phase == "prepared":
        source.control.beside = waits
        source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
        source.control.receive(Prepared)
    source.bulks[LAST].close()
    if phase in ("in a round", "before its mark"):
        assert "receive loop" in source.control.receive(Refused).what
    else:  # it is parked: whoever goes on is told, at the last moment at the latest
        source.quiesced = True
        if phase == "behind its mark":
            source.control.receive(Quiesced)
        if phase != "prepared":
            source.control.beside = waits
            source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
            source.control.receive(Prepared)
        source.control.send(GONE)
        assert source.control.receive(Aborted).reason == "the bulk 2 connection has ended"
    waits_again(pair, waits)


@pytest.mark.parametrize("phase", ["before the stale set", "settled"])
def test_source_cuts_one_after_the_switchover(pair: Pair, source: PrecopySource, waits: FakeGuest, phase: str) -> None:
    source.until_running(waits)
    if phase == "before the stale set":
        source.bulks[LAST].close()
    source.bulk.sendall(bits(FrameKind.STALE, {3, 9}, PAGES))
    assert source.receive_lacks(PAGES) == {3, 9}
    source.bulks[LAST].close()
    with pair.destination.client() as client:
        assert interrupted(client, source.migration_id.hex()).state == "paused"
    assert waits.told_nothing()


def test_pages_that_come_before_the_stale_set_are_not_lost(source: PrecopySource, waits: FakeGuest) -> None:
    """By another connection, from a source that does not wait to be told what is lacking: what is still held would drop its final
    content, and nobody would send it again."""
    source.until_running(waits)
    source.bulks[1].sendall(pages(9, b"final".ljust(PAGE_BYTES)))
    source.bulk.sendall(bits(FrameKind.STALE, {3, 9}, PAGES))
    assert source.receive_lacks(PAGES) in ({3, 9}, {3})  # it may have been taken by then
    source.bulks[LAST].sendall(pages(3, content_of(3)))
    waits.connection.receive(GuestComplete)
    while not isinstance(message := source.control.receive(Progress, Complete), Complete):
        pass
    assert (message.pages["bulk"], message.pages["precopy"]) == (2, PAGES - 2)
    assert not is_empty(waits)


# --- one of them is cut: at the source ----------------------------------------------------------------------------------


@pytest.fixture
def client(pair: Pair) -> Iterator[DaemonClient]:
    with pair.source.client() as client:
        yield client


@pytest.fixture
def leaves(pair: Pair) -> Iterator[TrackedGuest]:
    with TrackedGuest("leaves", LARGE) as guest:
        guest.child.does("fill", 1)
        yield guest.attach(pair.source.runtime_dir / "guests.sock")


@pytest.fixture
def fake(leaves: TrackedGuest) -> Iterator[PrecopyDestination]:
    with PrecopyDestination(leaves, receive_buffer_bytes=65536) as fake:
        fake.streams = STREAMS
        yield fake


@pytest.mark.parametrize("phase", ["in a round", "marked", "quiesced", "prepared"])
def test_destination_cuts_one_before_the_switchover(
    client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination, phase: str
) -> None:
    """P5: the guest runs on. In a round the others are in the middle of it, and are not waited for."""
    migration_id = client.migrate("leaves", fake.address, streams=STREAMS).id
    fake.begin_round()
    steps: dict[str, Callable[[], object]] = {
        "in a round": fake.receive_rounds,
        "marked": lambda: fake.control.send(Quiesced()),
        "quiesced": fake.prepare_asked,
        "prepared": lambda: fake.control.send(Prepared()),
    }
    for step, goes_on in steps.items():
        if step == phase:
            fake.bulks[LAST].close()
            if phase in ("in a round", "marked"):  # it is in use
                break
        goes_on()
    while not isinstance(message := fake.control.receive(Round, Refused), Refused):
        pass
    assert message.code == "connection-lost"
    assert runs_on(client, migration_id, leaves).what in ("bulk connection", "bulk 2 connection")


@pytest.mark.parametrize("phase", ["before lacks", "streaming"])
def test_destination_cuts_one_after_the_switchover(
    client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination, phase: str
) -> None:
    migration_id = client.migrate("leaves", fake.address, streams=STREAMS).id
    fake.prepare()
    assert len(fake.precopied) == LARGE_PAGES
    fake.until_switchover_of(leaves)
    fake.control.send(Running(epoch=0))
    if phase == "before lacks":
        fake.bulks[LAST].close()
    assert fake.receive_stale() == set()
    fake.bulk.sendall(bits(FrameKind.LACKS, range(LARGE_PAGES), LARGE_PAGES))
    if phase == "streaming":
        assert fake.receive_frame(LAST)[0] is FrameKind.PAGES
        fake.bulks[LAST].close()
    assert stays_paused(client, migration_id, leaves).what == "stream connection"


def test_nothing_but_the_stale_set_before_lacks(client: DaemonClient, leaves: TrackedGuest, fake: PrecopyDestination) -> None:
    """The other connections are silent until it is known what is lacking; then each brings some of it."""
    migration_id = client.migrate("leaves", fake.address, streams=STREAMS).id
    fake.prepare()
    fake.until_switchover_of(leaves)
    fake.control.send(Running(epoch=0))
    assert fake.receive_stale() == set()
    for bulk in fake.bulks:
        bulk.setblocking(False)
        with pytest.raises(BlockingIOError):
            bulk.recv(1)
        bulk.settimeout(10)
    fake.bulk.sendall(bits(FrameKind.LACKS, range(LARGE_PAGES), LARGE_PAGES))
    first = {stream: fake.receive_frame(stream) for stream in range(STREAMS)}
    assert {kind for kind, _, _ in first.values()} == {FrameKind.PAGES}
    assert len({page for _, page, _ in first.values()}) == STREAMS
    fake.control.close()
    stays_paused(client, migration_id, leaves)
