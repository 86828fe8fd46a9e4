"""What a bad destination says to a source daemon: a typed error in the migration and in the log, and a guest that runs on."""

import struct

import pytest

from migrate.errors import PostcopyError
from migrate.pair import Pair, wait_settled
from migrate.session import MigrationStatus
from proto.frame import Frame, FrameKind
from proto.messages import Aborted, PauseFailed, Prepared, Progress, Ready, Refused, Resume, encode
from proto.preamble import ANSWER_BYTES, MAGIC, PREAMBLE_BYTES, Answer, AnswerCode

from ..path.commuter import Commuter, until
from .fakes import FakeDestination, FakeGuest, framed, oversized, receive_exactly

pytestmark = pytest.mark.requires("uffd")
PAGES = 256
PROGRESS = Progress(pages_present=0, faults=0, downtime_ns=0, downtime_uncertainty_ns=0)


def begin(commuter: Commuter, fake: FakeDestination) -> str:
    """The commuter's guest is told to move to the fake; the migration's id."""
    with commuter.is_at.client() as client:
        return client.migrate(commuter.guest_id, fake.address).id


def ended(commuter: Commuter, migration_id: str) -> MigrationStatus:
    """It failed; the reason is in the log too; and the guest is as it was: it is whole after a real move."""
    with commuter.is_at.client() as client:
        status = wait_settled(client, migration_id)
        assert status.state == "failed"
        assert status.error is not None
        assert next(one["state"] for one in client.guests() if one["id"] == commuter.guest_id) == "running"
    log = next(line for line in commuter.is_at.log().splitlines() if migration_id in line and "runs on here" in line)
    assert status.error.got[:40] in log
    commuter.move()
    return status


@pytest.mark.parametrize("step", FakeDestination.STEPS[:-2])
def test_destination_that_goes_away_before_the_switchover(commuter: Commuter, step: str) -> None:
    with FakeDestination() as fake:
        migration_id = begin(commuter, fake)
        fake.until(step)
    status = ended(commuter, migration_id)
    assert status.error is not None
    assert status.error.code in ("connection-lost", "connection-failed", "magic-wrong", "peer-closed")
    assert status.downtime_seconds is None


def test_nobody_listens(commuter: Commuter) -> None:
    with FakeDestination() as fake:
        address = fake.address
    with commuter.is_at.client() as client:
        migration_id = client.migrate(commuter.guest_id, address).id
    status = ended(commuter, migration_id)
    assert status.error is not None
    assert status.error.code == "connection-failed"
    assert address in status.error.what


@pytest.mark.parametrize(
    ("answer", "code", "got"),
    [
        (Answer(AnswerCode.VERSION_UNSUPPORTED, 2, 1).encode(), "version-unsupported", "peer speaks 2.1, this side 1.0"),
        (Answer(AnswerCode.BUSY).encode(), "busy", "busy"),
        (Answer(AnswerCode.EPOCH_STALE).encode(), "epoch-stale", "is it the daemon that the guest leaves?"),
        (b"HTTP/1.1 400 Bad Request\r\n", "magic-wrong", "HTTP/1.1"),
        (MAGIC + struct.pack("<HHHH", 1, 0, 99, 0), "preamble-invalid", "99"),
        (MAGIC, "connection-lost", "8"),
    ],
    ids=["version-2", "busy", "stale", "another-protocol", "unknown-code", "short"],
)
def test_answer_to_the_preamble(commuter: Commuter, answer: bytes, code: str, got: str) -> None:
    with FakeDestination() as fake:
        migration_id = begin(commuter, fake)
        sock = fake.accept()
        receive_exactly(sock, PREAMBLE_BYTES)
        sock.sendall(answer[:ANSWER_BYTES])
        sock.close()
        status = ended(commuter, migration_id)
    assert status.error is not None
    assert status.error.code == code
    assert got in status.error.got
    assert status.error.expected != ""


@pytest.mark.parametrize(
    ("said", "code", "expected", "got"),
    [
        (encode(Refused(code="no-guest-fits", what="guest", expected="this", got="that")), "no-guest-fits", "this", "that"),
        (encode(Ready()), "message-unexpected", "accept", "ready"),
        (oversized(), "message-too-large", "1048576", "1048577"),
        (framed(b"\xff" * 10), "message-invalid", "a msgpack map", "extra data"),
        (b"\x00" * 64, "message-invalid", "msgpack map", ""),
        (encode(PROGRESS), "message-unexpected", "accept", "progress"),
    ],
    ids=["refused", "order", "oversized", "garbage", "zeroes", "progress"],
)
def test_answer_to_the_offer(commuter: Commuter, said: bytes, code: str, expected: str, got: str) -> None:
    with FakeDestination() as fake:
        migration_id = begin(commuter, fake)
        fake.accept_offer()
        fake.control.socket.sendall(said)
        if code != "no-guest-fits":  # which is the peer's own word, not to be told back
            assert fake.control.receive(Refused).code == code
        status = ended(commuter, migration_id)
    assert status.error is not None
    assert status.error.code == code
    assert expected in status.error.expected
    assert got in status.error.got


def test_garbage_where_the_switchover_would_begin(commuter: Commuter) -> None:
    with FakeDestination() as fake:
        migration_id = begin(commuter, fake)
        fake.prepare()
        fake.control.socket.sendall(framed(b"\xc1"))
        assert fake.control.receive(Refused).code == "message-invalid"
        status = ended(commuter, migration_id)
    assert status.error is not None
    assert status.error.code == "message-invalid"


def test_destination_that_aborts_gives_the_guest_back(commuter: Commuter) -> None:
    """It was paused, and everything had been sent; the destination recorded that it never resumes it."""
    with FakeDestination() as fake:
        migration_id = begin(commuter, fake)
        switchover = fake.until_switchover()
        assert len(switchover.state) > 0
        fake.control.send(Aborted(epoch=switchover.epoch, reason="no room"))
        status = ended(commuter, migration_id)
    assert status.error is not None
    assert (status.error.code, status.error.got) == ("aborted", "no room")


def test_pause_that_fails_leaves_the_guest_running(pair: Pair, commuter: Commuter) -> None:
    """The guest says that it cannot be stopped in time: nothing has been sent, it runs on and can be moved again."""
    with FakeGuest("stubborn", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("stubborn", fake.address).id
        fake.prepare(guest)
        fake.control.send(Prepared())
        guest.told_to_pause()
        guest.connection.send(PauseFailed(reason="a vCPU is stalled"))
        assert fake.control.receive(Refused).code == "pause-failed"
        status = wait_settled(client, migration_id)
        assert status.state == "failed"
        assert status.error is not None
        assert "a vCPU is stalled" in status.error.got
        assert guest.connection.receive(Resume).state is None
        assert next(one["state"] for one in client.guests() if one["id"] == "stubborn") == "running"
    commuter.move()


BAD_REQUESTS = {
    "magic": b"??" + Frame(FrameKind.REQUEST, 0, 0, 4096).encode()[2:],
    "kind": Frame(FrameKind.PAGES, 0, 0, 4096).encode(),
    "flags": Frame(FrameKind.REQUEST, 0, 0, 4096, flags=4).encode(),
    "region": Frame(FrameKind.REQUEST, 7, 0, 4096).encode(),
    "offset_bytes": Frame(FrameKind.REQUEST, 0, 0, 4096, offset_bytes=64).encode(),
    "page_index": Frame(FrameKind.REQUEST, 0, PAGES, 4096).encode(),
    "length_bytes": Frame(FrameKind.REQUEST, 0, 0, 8192).encode(),
}


@pytest.mark.parametrize("field", BAD_REQUESTS)
def test_request_is_refused(pair: Pair, commuter: Commuter, field: str) -> None:
    """After the switchover: the guest may run there, so here it stays paused (P4), and its memory is kept."""
    with FakeGuest("leaves", "running") as guest, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        with FakeDestination() as fake:
            migration_id = client.migrate("leaves", fake.address).id
            fake.prepare(guest)
            fake.control.send(Prepared())
            guest.pauses()
            fake.urgent.sendall(BAD_REQUESTS[field])
            refusal = fake.refusal_after_switchover()
            assert refusal.code == "frame-invalid"
            assert f"frame {field} (" in refusal.what
            until(lambda: client.status(migration_id).state == "paused", "it is asked again")
            status = client.status(migration_id)
            assert status.error is not None
            assert status.error.code == "frame-invalid"
            assert guest.told_nothing()
            with pytest.raises(PostcopyError, match="leaving") as busy:
                client.migrate("leaves", fake.address)
            assert busy.value.code == "guest-busy"
        client.resolve("leaves", here=False)
        assert wait_settled(client, migration_id).state == "complete"
    until(lambda: f"frame {field}" in pair.source.log(), "the reason in the log")
    commuter.move()
