"""Event streams: what they tell, in which order, from where on, to readers that are slow, and when they end."""

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from migrate.api.streams import STREAMS_MAX
from migrate.client import ServerEvent, parsed
from migrate.clock import monotonic_ns
from migrate.errors import DaemonUnreachableError
from migrate.events import EVENTS_KEPT, EventLog
from migrate.pair import DaemonProcess, Pair, wait_settled
from migrate.session import MigrationStatus
from migrate.switchover import WAIT_SECONDS_MAX, Quiet
from proto.messages import ClockPing, ClockPong, Prepared, Refused, Running, Switchover
from proto.states import SETTLED, TRANSITIONS, Role, State

from ..failure.fakes import FakeDestination, FakeGuest
from ..path.commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
Cli = Callable[..., subprocess.CompletedProcess[str]]
READ_SECONDS = 10.0


@pytest.fixture(scope="module")
def commuter(pair: Pair) -> Commuter:
    return Commuter(pair, "watched", "1M", options=("--pattern", "permute", "--rate", "500"))


@contextlib.contextmanager
def watching(daemon: DaemonProcess, path: str = "/v1/events", **headers: str) -> Iterator[Iterator[ServerEvent]]:
    """An open stream, as its events come."""
    with daemon.client() as client, client._http.stream("GET", path, headers=headers, timeout=READ_SECONDS) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield parsed(answer.iter_lines())


def states(events: list[ServerEvent]) -> list[State]:
    return [State(event.data["state"]) for event in events if event.event == "state"]


def numbers(events: list[ServerEvent]) -> list[int]:
    return [int(event.id.rpartition("-")[2]) for event in events if event.id is not None]


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "faults-alone"])
def test_stream_of_a_migration_tells_all_of_it(commuter: Commuter, bulk: bool) -> None:
    """At both daemons, followed from its beginning to its end: each state once, in an order that the table has."""
    with commuter.is_at.client() as source, commuter.goes_to.client() as destination:
        begun = source.migrate(commuter.guest_id, commuter.goes_to.address, bulk=bulk)
        events = {Role.SOURCE: list(source.events(begun.id)), Role.DESTINATION: list(destination.events(begun.id))}
        for role, client in ((Role.SOURCE, source), (Role.DESTINATION, destination)):
            told = events[role]
            timeline = client.status(begun.id).timeline_seconds
            assert states(told) == [State.NEW, *(State(state) for state in timeline)]
            for before, after in itertools.pairwise(states(told)):
                assert after in {to for (state, _), to in TRANSITIONS[role].items() if state is before}
            assert states(told)[-1] is State.COMPLETE
            assert [event.event for event in told[-2:]] == ["settled", "end"]
            assert told[-1].data["reason"] == "settled"
            assert MigrationStatus.model_validate(told[-2].data["migration"]) == client.status(begun.id)
            assert numbers(told) == sorted(set(numbers(told)))
            moments = [datetime.fromisoformat(event.data["at"]) for event in told if event.id is not None]
            assert moments == sorted(moments)
            assert all(event.data["migration_id"] == begun.id for event in told if event.event == "state")
        if not bulk:
            check_progress(events[Role.SOURCE])
    commuter.arrived()


def check_progress(told: list[ServerEvent]) -> None:
    """While it moves, and not too often."""
    progress = [event for event in told if event.event == "progress"]
    moments = [datetime.fromisoformat(event.data["at"]) for event in progress]
    pages = [event.data["migration"]["pages_done"] for event in progress]
    assert len(progress) >= 3  # of some 0.5 s
    assert pages == sorted(pages)
    assert pages[-1] > pages[0]
    assert all((after - before).total_seconds() > 0.19 for before, after in itertools.pairwise(moments))
    assert all(event.id is None for event in progress)


def test_taken_up_again_behind_each_event(commuter: Commuter) -> None:
    """Nothing twice, nothing left out, wherever the reader was cut off; at the end too."""
    status = commuter.move()
    with commuter.goes_to.client() as client:  # where it left from
        whole = list(client.events(status.id))
        kept = [event for event in whole if event.id is not None]
        assert kept[-1].event == "settled"
        for number, event in enumerate(kept[:-1]):
            again = list(client.events(status.id, last_event_id=event.id))
            assert [one for one in again if one.id is not None] == kept[number + 1 :]
            assert not [one for one in again if one.event == "missed"]
        again = list(client.events(status.id, last_event_id=kept[-1].id))
        assert [event.event for event in again] == ["settled", "end"]  # what it ended with can be had again


@pytest.mark.parametrize("last_event_id", ["", "1", "0badcafe-1", "x-y", "9" * 100, "{origin}-999999999", "{origin}-²"])
def test_an_id_of_another_run_is_said_to_be_missed(pair: Pair, commuter: Commuter, last_event_id: str) -> None:
    with watching(pair.source) as events:
        origin = str(next(events).id).partition("-")[0]
    with pair.source.client() as client:
        wanted = last_event_id.format(origin=origin).encode()
        with client._http.stream("GET", "/v1/events?for_seconds=0", headers=[(b"last-event-id", wanted)]) as answer:
            told = list(parsed(answer.iter_lines()))
    assert [event.event for event in told if event.event != "progress"] == ["missed", "snapshot", "end"]
    assert told[0].data["count"] is None


def test_all_events_from_a_snapshot_on(pair: Pair) -> None:
    with watching(pair.destination) as events:
        snapshot = next(events)
        assert snapshot.event == "snapshot"
        with pair.destination.client() as client:
            assert snapshot.data["guests"] == client.guests()
        assert snapshot.data["migrations"] == []
        with FakeGuest("comes", "waiting") as guest:
            guest.attach(pair.destination.runtime_dir / "guests.sock")
            attached = next(events)
        detached = next(events)
    told = [(one.event, one.data["guest_id"], one.data["change"], one.data["state"]) for one in (attached, detached)]
    assert told == [("guest", "comes", "attached", "waiting"), ("guest", "comes", "detached", "waiting")]
    assert numbers([snapshot, attached, detached]) == [n := numbers([snapshot])[0], n + 1, n + 2]
    with watching(pair.destination, "/v1/events?for_seconds=0", **{"last-event-id": str(attached.id)}) as events:
        assert next(events) == detached


def test_a_stream_ends_after_the_seconds_that_were_asked_for(pair: Pair) -> None:
    begun_ns = monotonic_ns()
    with watching(pair.source, "/v1/events?for_seconds=0.3") as events:
        *_, last = events
    assert (last.event, last.data["reason"]) == ("end", "for-seconds")
    assert (monotonic_ns() - begun_ns) / 1e9 > 0.3


def test_nothing_is_told_within_a_switchover(pair: Pair) -> None:
    """It is told afterwards. The source answers its peer's clock meanwhile: its loop was free to tell."""
    with pair.source.client() as client:
        with FakeGuest("quiet", "running") as guest, FakeDestination() as fake, open_stream(pair.source) as stream:
            guest.attach(pair.source.runtime_dir / "guests.sock")
            begun = client.migrate("quiet", fake.address)
            fake.prepare(guest)
            fake.control.send(Prepared())
            guest.pauses()
            epoch = fake.control.receive(Switchover).epoch
            all_that_is_there(stream)
            for _ in range(20):
                fake.control.send(ClockPing(sent_ns=monotonic_ns()))
                fake.control.receive(ClockPong)
            assert all_that_is_there(stream) == b""
            fake.control.send(Running(epoch=epoch))
            text = b""
            while b'"state":"postcopy"' not in text:
                text += stream.recv(1 << 16)
            assert b'"state":"switchover"' in text
            fake.control.send(Refused(code="failed", what="the destination", expected="to go on", got="its end"))
        assert wait_settled(client, begun.id).state == "stalled"
        told = list(client.events(begun.id))
    order = [State.NEW, State.CONNECTING, State.ATTACHING, State.READY, State.PREPARING, State.PAUSING, State.SWITCHOVER]
    assert states(told) == [*order, State.POSTCOPY, State.STALLED]
    assert told[-2].event == "settled"
    assert told[-2].data["migration"]["error"]["code"] == "failed"


def all_that_is_there(stream: socket.socket) -> bytes:
    stream.setblocking(False)
    try:
        return stream.recv(1 << 20)
    except BlockingIOError:
        return b""
    finally:
        stream.settimeout(READ_SECONDS)


def test_within_a_switchover_an_event_is_an_append_and_wakes_no_one() -> None:
    async def watch() -> tuple[list[str], float]:
        quiet = Quiet()
        log = EventLog(quiet)
        order: list[str] = []

        async def read() -> None:
            await log.more(5)
            order.append("read")

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        async with quiet:
            log.append("state", "m", {})
            for _ in range(3):  # as often as the loop goes round, nobody has been woken
                await asyncio.sleep(WAIT_SECONDS_MAX / 10)
            order.append("free")
        freed_ns = monotonic_ns()
        await reader
        return order, (monotonic_ns() - freed_ns) / 1e9

    order, seconds = asyncio.run(watch())
    assert order == ["free", "read"]
    assert seconds < 1


def test_ring_is_bounded_and_says_what_is_gone() -> None:
    log = EventLog(Quiet(), kept=10)
    assert (log.lost_after(0), log.after(0, 64)) == (0, [])
    for number in range(1, 26):
        log.append("state", "m", {"number": number})
    assert log.newest == 25
    assert [one.number for one in log.after(0, 64)] == list(range(16, 26))
    assert [one.number for one in log.after(20, 3)] == [21, 22, 23]
    assert log.after(25, 64) == []
    assert [log.lost_after(number) for number in (0, 14, 15, 25)] == [15, 1, 0, 0]


# --- slow readers, too many readers, the end of the daemon -----------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path, "source", listens=False)
    yield daemon
    daemon.end()


def open_stream(daemon: DaemonProcess, path: str = "/v1/events", receive_bytes: int = 1 << 16) -> socket.socket:
    """A reader that reads when it is told to, with what it was sent first."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(READ_SECONDS)
    sock.connect(str(daemon.runtime_dir / "api.sock"))
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: daemon\r\n\r\n".encode())
    assert sock.recv(12) == b"HTTP/1.1 200"
    return sock


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def attach_and_go(daemon: DaemonProcess, times: int) -> None:
    for _ in range(times):
        with FakeGuest("g" * 64, "running") as guest:
            guest.attach(daemon.runtime_dir / "guests.sock")


def test_slow_reader_costs_nothing_and_is_told_what_it_missed(pair: Pair) -> None:
    """It does not read while far more events happen than are kept and than its socket holds; then it does."""
    daemon = pair.source
    with open_stream(daemon, receive_bytes=4096) as slow:
        attach_and_go(daemon, EVENTS_KEPT)
        before_kb = resident_kb(daemon.pid)
        attach_and_go(daemon, EVENTS_KEPT)
        assert resident_kb(daemon.pid) - before_kb < 1024
        text = b""
        while b"event: missed" not in text or b"event: snapshot" not in text.rpartition(b"event: missed")[2]:
            text += slow.recv(1 << 20)
        missed = text.rpartition(b"event: missed\ndata: ")[2].partition(b"\n")[0]
        assert json.loads(missed)["count"] > 0
    with daemon.client() as client:
        until(lambda: "g" * 64 not in [guest["id"] for guest in client.guests()], "all are gone")


def test_streams_are_bounded_and_others_are_still_served(pair: Pair) -> None:
    with contextlib.ExitStack() as stack, pair.destination.client() as client:
        for _ in range(STREAMS_MAX):
            stack.enter_context(open_stream(pair.destination))
        answer = client._http.get("/v1/events")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:postcopy:too-busy"
        assert client.daemon()["limits"]["streams"] == STREAMS_MAX
        stack.close()

        def opens() -> bool:
            with client._http.stream("GET", "/v1/events?for_seconds=0") as answer:
                return answer.status_code == 200

        until(opens, "a place is free again")


@pytest.mark.parametrize("reads", [True, False], ids=["reader", "one that does not read"])
def test_open_stream_does_not_hold_up_the_end(daemon: DaemonProcess, reads: bool) -> None:
    with open_stream(daemon, receive_bytes=4096) as sock:
        if not reads:
            attach_and_go(daemon, 1500)
        begun = time.monotonic()
        daemon.signal(15)
        assert daemon.wait() == 0
        assert time.monotonic() - begun < 3
        text = b""
        while part := sock.recv(1 << 20):
            text += part
        if reads:
            assert b'"reason":"daemon-ending"' in text.rpartition(b"event: end")[2]
            assert text.endswith(b"\r\n0\r\n\r\n")
    assert "Traceback" not in daemon.log()


def test_client_knows_a_stream_that_broke_off(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        events = client.events()
        assert next(events).event == "snapshot"
        daemon.kill()
        with pytest.raises(DaemonUnreachableError):
            list(events)


# --- the command ------------------------------------------------------------------------------------------------------------


def test_events_command(cli: Cli, commuter: Commuter) -> None:
    status = commuter.move()
    run = cli("events", status.id[:12], "--daemon", str(commuter.is_at.runtime_dir))
    assert run.returncode == 0
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [line[-1] for line in lines if line[1] == "state"][-2:] == ["postcopy", "complete"]
    assert {line[2] for line in lines[:-1]} == {status.id[:12]}
    assert lines[-1][1:] == ["end", "settled"]
    as_json = cli("events", status.id, "--json", "--daemon", str(commuter.is_at.runtime_dir))
    told: list[Any] = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert [one["event"] for one in told][-2:] == ["settled", "end"]
    assert told[-2]["data"]["migration"]["state"] == "complete"
    assert State(told[-2]["data"]["migration"]["state"]) in SETTLED
