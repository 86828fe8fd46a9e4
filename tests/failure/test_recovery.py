"""Promise P5 between two real daemons: a path that is cut after the switchover is made again; no byte is wrong."""

import random
import time
from collections.abc import Iterator

import httpx
import pytest

from migrate.errors import PostcopyError
from migrate.pair import DaemonProcess, Pair
from proto.preamble import ConnectionKind

from ..path.commuter import Commuter, until
from .lossy_link import CutMove, LossyLink

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
BUSY = ("--write-ratio", "0.5", "--threads", "2")
SERVICE_RESUMES_SECONDS = 1.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: Pair) -> Iterator[Commuter]:
    guest = Commuter(pair, "cut", "32M", options=BUSY)
    yield guest
    guest.end()


def reconnects(daemon: DaemonProcess) -> float:
    """Of all guests that have left it."""
    text = httpx.get(f"http://{daemon.metrics_address}/metrics", trust_env=False).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("postcopy_reconnects_total{"))


@pytest.mark.parametrize("precopy", ["off", 1])
def test_cut_thrice(guest: Commuter, precopy: str | int) -> None:
    """In the middle of a frame of bulk each time: the move goes on with what the destination lacks."""
    before = reconnects(guest.is_at)
    with CutMove(guest, precopy=precopy) as move:
        begun = move.link.passed_bytes(ConnectionKind.BULK, from_source=True)
        move.reaches("postcopy", "complete")
        for _ in range(3):
            move.link.cut_at(ConnectionKind.BULK, from_source=True, after_bytes=begun + 3_000_001)
            if not move.link.wait_for_cut(2):
                break
        status = move.ends()
    assert (status.state, status.error) == ("complete", None)
    assert status.epoch >= (1 if precopy == "off" else 0)
    assert (status.epoch > 0) == (reconnects(guest.goes_to) > before)
    assert sum(status.pages.values()) >= status.pages_total


@pytest.mark.parametrize("kind", [ConnectionKind.CONTROL, ConnectionKind.URGENT, ConnectionKind.BULK])
def test_cut_of_each_connection(guest: Commuter, kind: ConnectionKind) -> None:
    """Answers of the destination are cut: after its first bytes in postcopy, whichever connection they are on."""
    with CutMove(guest, precopy=1) as move:
        move.reaches("postcopy", "complete")
        passed = move.link.passed_bytes(kind, from_source=False)
        move.link.cut_at(kind, from_source=False, after_bytes=passed + 30)
        assert move.ends().state == "complete"


def test_guest_runs_on_with_what_is_here(pair: Pair, guest: Commuter) -> None:
    """While the path is away both sides say so, and wait; as soon as it is back the move goes on by itself."""
    with CutMove(guest, precopy="off", bulk=False) as move:
        move.reaches("postcopy")
        move.link.cut(until_restored=True)
        move.reaches("paused")
        until(lambda: move.state_there() == "paused", "paused there")
        with guest.is_at.client() as client:
            status = client.status(move.id)
            assert status.error is not None
            assert status.error.code in ("connection-lost", "peer-closed", "connection-failed")
            assert not status.settled
            with pytest.raises(PostcopyError) as refused:
                client.cancel(move.id)
            assert refused.value.code == "not-cancellable"
        move.link.restore()
        begun = time.monotonic()
        move.reaches("postcopy")
        assert time.monotonic() - begun < SERVICE_RESUMES_SECONDS
        until(lambda: move.state_there() == "postcopy", "postcopy there")
        with guest.is_at.client() as client:
            assert client.status(move.id).error is None
        assert move.ends().state == "complete"


def test_another_address(pair: Pair, guest: Commuter) -> None:
    """`recover`: the old path never comes back, the destination is reached by another one."""
    with CutMove(guest, precopy="off") as move, LossyLink(guest.goes_to.address) as other:
        move.reaches("postcopy", "complete")
        move.link.cut(until_restored=True)
        if move.state() != "complete":
            move.reaches("paused")
            with guest.is_at.client() as client:
                assert client.recover(move.id, other.address).peer == other.address
        assert move.ends().state == "complete"


def test_recovery_is_the_sources(pair: Pair, guest: Commuter) -> None:
    status = guest.move()
    for daemon, expected in ((guest.goes_to, "a paused one"), (guest.is_at, "to be asked at its source")):
        with daemon.client() as client, pytest.raises(PostcopyError, match=expected) as refused:
            client.recover(status.id)
        assert refused.value.code == "not-recoverable"


def test_stalled_path(guest: Commuter) -> None:
    """Nobody is told that nothing passes: silence says it, and the connections are made anew."""
    with CutMove(guest, precopy="off", bulk=False) as move:
        move.reaches("postcopy")
        move.link.stall()
        move.reaches("paused")
        move.link.restore()
        assert move.ends().state == "complete"


def test_cut_before_the_switchover(guest: Commuter) -> None:
    """P5: the guest runs on at the source, as if nothing had been tried; the waiting one waits again."""
    for after_bytes in (100, 200_001, 9_000_001):
        with CutMove(guest, precopy=3) as move:
            move.link.cut_at(ConnectionKind.BULK, from_source=True, after_bytes=after_bytes)
            status = move.ends()
        assert status.state in ("failed", "complete")
        assert "postcopy" in status.timeline_seconds or status.state == "failed"
    assert guest.move().state == "complete"


def test_cut_at_any_byte_of_the_switchover(guest: Commuter) -> None:
    """Of what the two say to each other about who runs the guest: it runs at one place, whichever byte was the last."""
    dice = random.Random(1)
    for _ in range(6):
        with CutMove(guest, precopy="off") as move:
            from_source = dice.random() < 0.5
            move.link.cut_at(ConnectionKind.CONTROL, from_source=from_source, after_bytes=dice.randint(80, 900))
            status = move.ends()
            assert status.state in ("complete", "failed")
            if status.state == "failed":
                until(lambda: guest.waiting_again(), "the waiting guest waits again")
    assert guest.move().state == "complete"
