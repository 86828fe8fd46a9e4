"""Defects that a review found, one test each: every one of them got past the tests that there were."""

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from migrate.config import make_private
from migrate.daemon import Daemon
from migrate.errors import GuestBusyError, HostLacksError, PostcopyError
from migrate.guest_link import GuestLink, GuestState
from migrate.network import Address, connect
from migrate.pair import Pair, wait_settled
from proto.frame import Frame, FrameKind
from proto.messages import Cancel, ClockPing, ClockPong, Prepared, Progress, Refused, Resume, Switchover, encode

from ..path.commuter import Commuter, until
from .fakes import FakeDestination, FakeGuest, FakeSource

API_SECONDS_MAX = 2.0
NOBODY = 65534
NO_ROOM = Refused(code="no-room", what="destination", expected="room", got="none")


def state_of(pair: Pair, guest_id: str) -> str:
    with pair.source.client() as client:
        return str(next(one["state"] for one in client.guests() if one["id"] == guest_id))


@pytest.mark.requires("uffd")
def test_memory_that_shrinks_after_hello(pair: Pair, unharmed: Commuter) -> None:
    """A store beyond the end of a file is SIGBUS: it would end the destination and stall all guests there."""
    pair.guest(pair.source, "whole", "8M", "--stay").event("stepped")
    with FakeGuest("shrinks", "waiting", "8M") as guest, pair.source.client() as client:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        os.ftruncate(guest.memory.files[0], 4096)
        status = wait_settled(client, client.migrate("whole", pair.destination.address).id)
        assert status.state == "failed"
        assert status.error is not None
        assert status.error.code == "memory-failed"
        assert "pausing" not in status.timeline_seconds
        assert guest.told_nothing()
    assert pair.destination.returncode is None
    with pair.destination.client() as client:
        until(lambda: all(one["id"] != "shrinks" for one in client.guests()), "it is gone")
    honest = pair.guest(pair.destination, "honest", "8M", "--stay", waiting=True)
    assert pair.move("whole", pair.source, pair.destination).state == "complete"
    assert honest.event("verified", "failed")["event"] == "verified"


@pytest.mark.requires("uffd")
@pytest.mark.parametrize(("end", "code"), [("refuses", "no-room"), ("goes", "connection-lost")])
def test_destination_that_changes_its_mind_once_prepared(pair: Pair, unharmed: Commuter, end: str, code: str) -> None:
    """P5: its word is here before the switchover is recorded, so the guest runs on where it is."""
    with FakeGuest("stays", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("stays", fake.address).id
        fake.prepare(guest)
        if end == "refuses":
            fake.control.socket.sendall(encode(Prepared()) + encode(NO_ROOM))
        else:
            fake.control.send(Prepared())
            fake.control.close()
        guest.pauses()
        assert guest.connection.receive(Resume).state is None
        status = wait_settled(client, migration_id)
        assert status.state == "failed"
        assert status.error is not None
        assert status.error.code == code
        assert state_of(pair, "stays") == "running"
        if end == "refuses":
            fake.control.receive_end()  # no switchover before it


def test_second_migration_of_a_guest_before_the_first_has_begun(tmp_path: Path) -> None:
    """Both asked within one turn of the event loop: the first one's task has not run yet."""

    async def ask_twice() -> None:
        daemon = Daemon("source", tmp_path, listen_at=None, metrics_at=None, insecure=False)
        ours, theirs = socket.socketpair()
        with theirs, FakeGuest("twice", "running") as guest:
            link = GuestLink(ours, lambda _: None, lambda _: None)
            link.hello, link.state = guest.hello(), GuestState.RUNNING
            daemon.guests[link.guest_id] = link
            first = daemon.migrate(link.guest_id, Address("127.0.0.1", 1))
            with pytest.raises(GuestBusyError):
                daemon.migrate(link.guest_id, Address("127.0.0.1", 1))
            assert list(daemon.migrations.values()) == [first]
            assert first.task is not None
            first.task.cancel()
            await asyncio.wait([first.task], timeout=10)
            link.close()

    asyncio.run(ask_twice())


@pytest.mark.requires("uffd")
def test_pong_of_no_ping(pair: Pair, unharmed: Commuter) -> None:
    """It would make the offset, and the downtime with it, whatever the peer likes."""
    with FakeGuest("timed", "running") as guest, FakeDestination(clock="another host's") as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("timed", fake.address).id
        fake.accept_offer()
        fake.send_accept()
        ping = fake.control.receive(ClockPing)
        fake.control.send(ClockPong(sent_ns=ping.sent_ns - 1, peer_ns=time.monotonic_ns()))
        assert fake.control.refused().code == "message-invalid"
        status = wait_settled(client, migration_id)
        assert status.state == "failed"
        assert status.error is not None
        assert (status.error.code, status.error.what) == ("message-invalid", "clock_pong sent_ns")
        assert (status.error.expected, status.error.got) == (str(ping.sent_ns), str(ping.sent_ns - 1))
        assert state_of(pair, "timed") == "running"
        assert guest.told_nothing()


@pytest.mark.requires("uffd")
def test_silent_destination_does_not_silence_the_api(pair: Pair, unharmed: Commuter) -> None:
    """It was asked to prepare and never says that it has: the daemon answers, and the migration can be cancelled."""
    with FakeGuest("waits-long", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        migration_id = client.migrate("waits-long", fake.address).id
        fake.prepare(guest)
        fake.control.beside = None
        began_seconds = time.monotonic()
        assert state_of(pair, "waits-long") == "leaving"
        assert time.monotonic() - began_seconds < API_SECONDS_MAX
        assert client.status(migration_id).state == "preparing"
        client.cancel(migration_id)
        assert fake.control.receive(Cancel, Switchover) == Cancel(reason="asked by the operator")
        assert wait_settled(client, migration_id).state == "cancelled"
        assert time.monotonic() - began_seconds < 2 * API_SECONDS_MAX
        assert state_of(pair, "waits-long") == "running"
        assert guest.told_nothing()


def test_cancellation_that_comes_as_the_connection_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever turn of the event loop it comes, a task that has not ended then ends cancelled."""

    async def turns(*_: object) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    async def resolved(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))]

    async def cancel_after(count: int) -> bool:
        """Whether it was in time."""
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "sock_connect", turns)
        monkeypatch.setattr(loop, "getaddrinfo", resolved)
        task = loop.create_task(connect(Address("127.0.0.1", 1), deadline_seconds=10))
        for _ in range(count):
            await asyncio.sleep(0)
        in_time = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() is in_time
        if not in_time:
            task.result().close()
        return in_time

    outcomes = [asyncio.run(cancel_after(count)) for count in range(12)]
    assert outcomes == sorted(outcomes, reverse=True)
    assert {True, False} == set(outcomes)


def test_runtime_directory_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(HostLacksError, match="link"):
        make_private(tmp_path / "link")
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755


@pytest.mark.requires("root")
def test_runtime_directory_in_a_parent_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns the parent can put a directory of their own in the place of ours."""
    base = tmp_path / "base"
    base.mkdir()
    os.chown(base, NOBODY, NOBODY)
    monkeypatch.setenv("POSTCOPY_RUNTIME_DIR", str(base))
    with pytest.raises(HostLacksError, match=f"belongs to uid {NOBODY}"):
        make_private(base / "source")
    assert list(base.iterdir()) == []


def test_port_in_digits_that_are_no_number() -> None:
    with pytest.raises(PostcopyError, match="HOST:PORT"):
        Address.parse("127.0.0.1:²")


@pytest.mark.requires("uffd")
@pytest.mark.parametrize("kind", [FrameKind.ZERO, FrameKind.PAGES], ids=lambda kind: kind.name)
def test_two_pages_in_an_urgent_frame(pair: Pair, unharmed: Commuter, kind: FrameKind) -> None:
    """An urgent frame answers one request, for one page."""
    with FakeGuest("waits", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        pages = b"x" * 8192 if kind is FrameKind.PAGES else b""
        source.urgent.sendall(Frame(kind, 0, 3, 8192).encode() + pages)
        while not isinstance(refusal := source.control.receive(Progress, Refused), Refused):
            pass
        assert refusal.code == "frame-invalid"
        assert "frame length_bytes (" in refusal.what
        assert (refusal.expected, refusal.got) == ("4096", "8192")
        assert guest.told_nothing()
