"""What a bad source sends to a destination daemon: a typed answer that names what was expected, an end, and no harm to others."""

import struct

import msgpack
import pytest

from migrate.pair import Pair
from proto.frame import Frame, FrameKind
from proto.messages import Aborted, Accept, Cancel, Prepare, Progress, Ready, Refused, encode
from proto.preamble import ANSWER_BYTES, MAGIC, Answer, AnswerCode, ConnectionKind, Preamble

from ..path.commuter import Commuter, until
from .fakes import Connection, FakeGuest, FakeSource, closed_by_peer, framed, oversized, receive_exactly

pytestmark = [pytest.mark.requires("uffd"), pytest.mark.usefixtures("unharmed")]
COMMUTER_REGIONS = ((4 << 20, 4096),)
PAGES = 256
GOOD = Preamble(ConnectionKind.CONTROL, bytes(16), 0)


def waiting_daemon(commuter: Commuter) -> str:
    return commuter.goes_to.address


def changed(preamble: bytes, offset: int, value: bytes) -> bytes:
    return preamble[:offset] + value + preamble[offset + len(value) :]


def logged(pair: Pair, *words: str) -> None:
    """The destination daemon's log has a line with all of these words."""

    def found() -> bool:
        return any(all(word in line for word in words) for line in pair.destination.log().splitlines())

    until(found, f"{words} in the log", deadline_seconds=5)


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [
        (changed(GOOD.encode(), 8, struct.pack("<H", 2)), AnswerCode.VERSION_UNSUPPORTED, ("expected 1.x", "got 2.0")),
        (changed(GOOD.encode(), 8, struct.pack("<HH", 0, 9)), AnswerCode.VERSION_UNSUPPORTED, ("expected 1.x", "got 0.9")),
        (b"GET / HTTP/1.1\r\n\r\n", AnswerCode.PREAMBLE_INVALID, ("magic", "POSTCOPY", "GET / HT")),
        (changed(GOOD.encode(), 12, b"\x09"), AnswerCode.PREAMBLE_INVALID, ("connection kind", "got 9")),
        (changed(GOOD.encode(), 13, b"\x01"), AnswerCode.PREAMBLE_INVALID, ("reserved bytes", "zero")),
        (changed(GOOD.encode(), 63, b"\x01"), AnswerCode.PREAMBLE_INVALID, ("reserved bytes", "zero")),
    ],
    ids=["version-2", "version-0.9", "magic", "kind", "reserved", "reserved-at-the-end"],
)
def test_preamble_is_refused(pair: Pair, sent: bytes, code: AnswerCode, words: tuple[str, ...]) -> None:
    with FakeSource(pair.destination.address) as source:
        sock = source.open(sent)
        answer = receive_exactly(sock, ANSWER_BYTES)
        assert answer == MAGIC + struct.pack("<HHHH", 1, 0, code, 0)
        assert closed_by_peer(sock)
    logged(pair, "connection refused", *words)


def test_a_greater_minor_version_is_welcome(pair: Pair) -> None:
    with FakeSource(pair.destination.address) as source:
        sock = source.open(changed(GOOD.encode(), 10, struct.pack("<H", 7)))
        assert Answer.decode(receive_exactly(sock, ANSWER_BYTES)).code is AnswerCode.WELCOME


def test_of_too_many_silent_connections_the_oldest_gives_way(pair: Pair) -> None:
    with FakeSource(pair.destination.address) as source:
        sock = source.open()
        for _ in range(64):
            source.open()
        assert Answer.decode(receive_exactly(sock, ANSWER_BYTES)).code is AnswerCode.BUSY
        assert closed_by_peer(sock)


def an_offer(**more: object) -> bytes:
    regions = [{"size_bytes": 1 << 20, "page_bytes": 4096}]
    fields = {"type": "offer", "guest_id": "fake", "regions": regions, "clock_id": "", "software": "", **more}
    return framed(msgpack.packb({key: value for key, value in fields.items() if value is not None}))


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [
        (oversized(), "message-too-large", ("message size", "1048576", "1048577")),
        (framed(b"\xc1"), "message-invalid", ("a msgpack map",)),
        (framed(msgpack.packb([1, 2])), "message-invalid", ("a map",)),
        (framed(msgpack.packb({"type": "launch"})), "message-invalid", ("launch",)),
        (an_offer(colour="red"), "message-invalid", ("colour", "red")),
        (an_offer(software=None), "message-invalid", ("software", "nothing")),
        (an_offer(guest_id="../etc"), "message-invalid", ("guest_id", "../etc")),
        (an_offer(regions=[{"size_bytes": 4097, "page_bytes": 4096}]), "message-invalid", ("regions", "4097")),
        (an_offer(regions=[{"size_bytes": 4096, "page_bytes": 8192}]), "message-invalid", ("page_bytes", "8192")),
        (encode(Ready()), "message-unexpected", ("control message", "offer", "ready")),
        (encode(Cancel(reason="no reason")) * 70, "message-flood", ("unread messages", "64", "70")),
    ],
    ids=["oversized", "garbage", "array", "type", "more", "less", "name", "part-page", "page-size", "order", "flood"],
)
def test_first_message_is_refused(pair: Pair, sent: bytes, code: str, words: tuple[str, ...]) -> None:
    with FakeSource(pair.destination.address) as source:
        control = source.begin()
        control.socket.sendall(sent)
        refusal = control.refused()
        assert refusal.code == code
        for word in words:
            assert word in f"{refusal.what} {refusal.expected} {refusal.got}"
        logged(pair, source.migration_id.hex(), "migration did not happen")
    logged(pair, refusal.expected[:40], refusal.got[:40])


def test_no_waiting_guest_fits_and_the_answer_says_which_there_are(commuter: Commuter) -> None:
    with FakeSource(waiting_daemon(commuter), ((8 << 20, 4096), (2 << 20, 2 << 20))) as source:
        source.begin().send(source.offered())
        refusal = source.control.refused()
    assert refusal.code == "no-guest-fits"
    assert refusal.expected == "8 MiB of 4 KiB pages + 2 MiB of 2048 KiB pages"
    assert refusal.got == f"{commuter.waits.name}: 4 MiB of 4 KiB pages"


def test_data_connections_prove_themselves(pair: Pair) -> None:
    """Each of these is turned away by name, and the migration that they wanted to join is not hurt by any of them."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.offer()

        def answer_to(kind: ConnectionKind, **how: object) -> AnswerCode:
            sock, answer = source.dial(kind, **{"token": source.token, **how})  # type: ignore[arg-type]
            if answer.code is not AnswerCode.WELCOME:
                assert closed_by_peer(sock)
            return answer.code

        assert answer_to(ConnectionKind.CONTROL) is AnswerCode.EPOCH_STALE
        assert answer_to(ConnectionKind.URGENT, token=bytes(16)) is AnswerCode.TOKEN_WRONG
        assert answer_to(ConnectionKind.URGENT, token=source.token[:-1] + b"\0") is AnswerCode.TOKEN_WRONG
        assert answer_to(ConnectionKind.BULK, epoch=1) is AnswerCode.EPOCH_STALE
        assert answer_to(ConnectionKind.BULK, stream_index=1) is AnswerCode.KIND_UNEXPECTED
        migration_id, source.migration_id = source.migration_id, bytes(16)
        assert answer_to(ConnectionKind.URGENT) is AnswerCode.MIGRATION_UNKNOWN
        source.migration_id = migration_id
        assert answer_to(ConnectionKind.URGENT) is AnswerCode.WELCOME
        assert answer_to(ConnectionKind.URGENT) is AnswerCode.KIND_UNEXPECTED
        assert answer_to(ConnectionKind.BULK) is AnswerCode.WELCOME
        source.control.receive(Ready)
        assert answer_to(ConnectionKind.BULK) is AnswerCode.KIND_UNEXPECTED
        log = pair.destination.log()
    for code in ("token", "epoch", "urgent or bulk of a migration that waits for it"):
        assert code in log
    assert source.token.hex() not in log


def frame(**changed: int) -> bytes:
    return Frame(**{"kind": FrameKind.ZERO, "region": 0, "page_index": 3, "length_bytes": 4096, **changed}).encode()  # type: ignore[arg-type]


BAD_FRAMES = {
    "magic": (b"XX" + frame()[2:], ("17232", "22616")),
    "kind": (frame(kind=FrameKind.REQUEST), ("1",)),
    "flags": (frame(flags=1), ("0", "1")),
    "region": (frame(region=1), ("1",)),
    "offset_bytes": (frame(offset_bytes=8), ("0", "8")),
    "page_index": (frame(page_index=PAGES), (str(PAGES),)),
    "length_bytes": (frame(length_bytes=4095), ("4096", "4095")),
    "length_bytes, beyond the end": (frame(length_bytes=(PAGES - 2) * 4096), (str((PAGES - 3) * 4096), str((PAGES - 2) * 4096))),
}


@pytest.mark.parametrize("field", BAD_FRAMES)
@pytest.mark.parametrize("path", ["urgent", "bulk"])
def test_frame_is_refused(pair: Pair, path: str, field: str) -> None:
    sent, words = BAD_FRAMES[field]
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        (source.urgent if path == "urgent" else source.bulk).sendall(sent)
        refusal = refused_in_postcopy(source)
        assert refusal.code == "frame-invalid"
        assert f"frame {field.split(',')[0]} (" in refusal.what
        for word in words:
            assert word in f"{refusal.expected} {refusal.got}"
        assert guest.told_nothing()  # neither complete nor released: it stands still where it is
    logged(pair, "migration stalled", refusal.what)


def refused_in_postcopy(source: FakeSource) -> Refused:
    """The refusal, behind the progress that may have been said before."""
    while not isinstance(message := source.control.receive(Progress, Refused), Refused):
        pass
    source.control.receive_end()
    return message


@pytest.mark.parametrize("phase", ["before the switchover", "after it"])
def test_page_nobody_asked_for(pair: Pair, phase: str) -> None:
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        if phase == "after it":
            source.until_running(guest)
        else:
            source.attach()
        source.urgent.sendall(frame(kind=FrameKind.PAGES) + b"x" * 4096)
        refusal = refused_in_postcopy(source)
        assert refusal.code == "page-unasked"
        assert "page 3" in refusal.what
        assert "nobody asked" in refusal.got
        with pair.destination.client() as client:
            state = next(one["state"] for one in client.guests() if one["id"] == "waits")
        assert state == ("lost" if phase == "after it" else "waiting")


def test_readahead_before_the_switchover(pair: Pair) -> None:
    """It would not be final (P2): refused, and the guest waits on."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.attach()
        source.urgent.sendall(frame(kind=FrameKind.AHEAD) + b"x" * 4096)
        refusal = refused_in_postcopy(source)
        assert (refusal.code, refusal.got) == ("frame-invalid", str(int(FrameKind.AHEAD)))
        assert "frame kind (" in refusal.what
        with pair.destination.client() as client:
            assert next(one["state"] for one in client.guests() if one["id"] == "waits") == "waiting"


@pytest.mark.parametrize("path", ["urgent", "bulk"])
def test_readahead_where_it_may_not_come(pair: Pair, path: str) -> None:
    """Each page once, and never by bulk."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        ahead = frame(kind=FrameKind.AHEAD_ZERO, length_bytes=8192)
        if path == "urgent":
            source.urgent.sendall(ahead + frame(kind=FrameKind.AHEAD, page_index=4) + b"x" * 4096)
            refusal = refused_in_postcopy(source)
            assert (refusal.code, "page 4" in refusal.what) == ("page-duplicate", True)
        else:
            source.bulk.sendall(ahead)
            assert refused_in_postcopy(source).code == "frame-invalid"


def test_page_twice_by_bulk(pair: Pair) -> None:
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        source.bulk.sendall(frame(length_bytes=8192) + frame(page_index=4))
        refusal = refused_in_postcopy(source)
        assert refusal.code == "page-duplicate"
        assert "page 4" in refusal.what
        assert "second time" in refusal.got


def test_state_that_the_guest_refuses_is_aborted(pair: Pair, commuter: Commuter) -> None:
    """The agent is asked, says no, and waits on: for the next one it is as good as new."""
    with FakeSource(waiting_daemon(commuter), COMMUTER_REGIONS) as source:
        source.switch_over(state=b"not a workload's state")
        assert "state" in source.control.receive(Aborted).reason
        source.control.receive_end()


def test_switchover_of_another_epoch_is_aborted(commuter: Commuter) -> None:
    with FakeSource(waiting_daemon(commuter), COMMUTER_REGIONS) as source:
        source.switch_over(epoch=3)
        assert "epoch 3" in source.control.receive(Aborted).reason
        source.control.receive_end()


def test_pages_before_the_switchover_leave_no_trace(commuter: Commuter) -> None:
    """P2: what comes before the source has paused its guest is not final, and the next guest must not find it."""
    with FakeSource(waiting_daemon(commuter), COMMUTER_REGIONS) as source:
        source.attach()
        for page_index in range(16):  # the guest's table among them: it would be read at the first step
            source.bulk.sendall(frame(kind=FrameKind.PAGES, page_index=page_index) + b"x" * 4096)
        source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
        source.control.send(Cancel(reason="for a test"))


@pytest.mark.parametrize("step", ["begin", "offer", "attach", "prepare"])
def test_source_that_goes_away_leaves_a_waiting_guest(commuter: Commuter, step: str) -> None:
    with FakeSource(waiting_daemon(commuter), COMMUTER_REGIONS) as source:
        getattr(source, step)()
    with commuter.goes_to.client() as client:
        until(lambda: all(one["state"] != "arriving" for one in client.guests()), "the guest waits again")


def test_second_source_does_not_get_the_same_guest(commuter: Commuter) -> None:
    address = waiting_daemon(commuter)
    with FakeSource(address, COMMUTER_REGIONS) as first, FakeSource(address, COMMUTER_REGIONS) as second:
        assert isinstance(first.offer(), Accept)
        control: Connection = second.begin()
        control.send(second.offered())
        refusal = control.refused()
        assert refusal.code == "no-guest-fits"
        assert "no waiting guest at all" in refusal.got
    with commuter.goes_to.client() as client:
        until(lambda: all(one["state"] != "arriving" for one in client.guests()), "the guest waits again")
