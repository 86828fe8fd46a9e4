"""Whoever is turned away as often as he can dial: each is counted, and the log has a bounded number of lines for it."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrate.pair import DaemonProcess
from migrate.refusals import KINDS_MAX, REASONS_MAX, Kind, Refusals
from proto.errors import ProtocolError
from proto.messages import Running, encode
from proto.preamble import NO_TOKEN, ConnectionKind, Preamble

from ..path.commuter import until
from .fakes import FakeGuest, place_of

FLOOD = 300
SILENT_MAX = 64
INTERVALS_MAX = 6  # of ten seconds: that a test may take at all


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path, "destination")
    yield daemon
    daemon.end()


def refused(daemon: DaemonProcess) -> dict[tuple[str, str], float]:
    text = httpx.get(f"http://{daemon.metrics_address}/metrics", trust_env=False, timeout=10).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {(s.labels["socket"], s.labels["reason"]): s.value for s in families["postcopy_connections_refused"].samples}


def dial(daemon: DaemonProcess, sent: bytes) -> None:
    """Until it is turned away."""
    with socket.create_connection(place_of(daemon.address), 10) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        try:
            while sock.recv(4096):
                pass
        except ConnectionError:
            pass


def lines_told(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    """All, also what is told at its end."""
    daemon.end()
    return [line for line in map(json.loads, daemon.log().splitlines()) if line["event"] == event]


def is_bounded(lines: list[dict[str, Any]], code: str, count: int) -> None:
    """One for the first, one for all that followed in an interval; together they are all."""
    of_code = [line for line in lines if line["code"] == code]
    assert "held_back" not in of_code[0]
    assert 2 <= len(of_code) <= 1 + INTERVALS_MAX
    assert sum(line.get("held_back", 1) for line in of_code) == count


def garbage() -> bytes:
    return b"GET " + random.randbytes(60)


def other_version() -> bytes:
    return Preamble(ConnectionKind.CONTROL, random.randbytes(16), 0, 0, NO_TOKEN, major=2).encode()


def other_migration() -> bytes:
    return Preamble(ConnectionKind.URGENT, random.randbytes(16), 0, 0, random.randbytes(16)).encode()


@pytest.mark.parametrize(
    ("sent", "code"), [(garbage, "magic-wrong"), (other_version, "version-unsupported"), (other_migration, "migration-unknown")]
)
def test_flood_of_refused_connections(daemon: DaemonProcess, sent: Callable[[], bytes], code: str) -> None:
    """From a new port each, with new bytes each."""
    for _ in range(FLOOD):
        dial(daemon, sent())
    until(lambda: refused(daemon) == {("migration", code): FLOOD}, "all are counted")
    is_bounded(lines_told(daemon, "connection refused"), code, FLOOD)


def test_flood_of_those_that_say_nothing(daemon: DaemonProcess) -> None:
    place = place_of(daemon.address)
    silent = [socket.create_connection(place, 10) for _ in range(SILENT_MAX + FLOOD)]
    until(lambda: sum(refused(daemon).values()) >= FLOOD, "who gave way is counted")  # on a slow machine some had had their time
    gave_way = int(refused(daemon)["migration", "busy"])
    is_bounded(lines_told(daemon, "connection refused"), "busy", gave_way)
    for sock in silent:
        sock.close()


def test_flood_of_migrations_that_offer_nothing(daemon: DaemonProcess) -> None:
    for _ in range(FLOOD):
        dial(daemon, Preamble(ConnectionKind.CONTROL, random.randbytes(16), 0, 0, NO_TOKEN).encode())
    is_bounded(lines_told(daemon, "migration did not happen"), "connection-lost", FLOOD)


def test_flood_of_guests(daemon: DaemonProcess) -> None:
    path = daemon.runtime_dir / "guests.sock"
    for _ in range(FLOOD):
        with FakeGuest("liar", "running") as guest:
            guest.connect(path)
            guest.send(encode(Running(epoch=0)))
            assert guest.connection.refused().code == "message-unexpected"
    assert refused(daemon) == {("guests", "message-unexpected"): FLOOD}
    is_bounded(lines_told(daemon, "guest refused"), "message-unexpected", FLOOD)


def test_requests_that_are_none_make_no_line(daemon: DaemonProcess) -> None:
    for _ in range(20):
        with socket.create_connection(place_of(daemon.metrics_address), 10) as sock:
            sock.sendall(b"no request\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 400"
    daemon.end()
    assert "Invalid HTTP" not in daemon.log()


class Watched(Refusals):
    def __init__(self, interval_seconds: float) -> None:
        super().__init__(interval_seconds)
        self.nothing_held = asyncio.Event()

    def _interval_over(self, kind: Kind) -> None:
        super()._interval_over(kind)
        if not self._held:
            self.nothing_held.set()


def test_bounded_whoever_dials() -> None:
    """Any number of peers and reasons: what is kept is bounded, no refusal is lost, and all is over when it is."""

    async def flood() -> list[dict[str, Any]]:
        refusals, told = Watched(interval_seconds=0.05), []
        told_by_code: Counter[str] = Counter()

        def tell(_: str, **facts: Any) -> None:
            told.append(facts)
            told_by_code["all"] += facts.get("held_back", 1)

        for i in range(20_000):
            error = ProtocolError(f"reason-{i % 500}", "what", expected="", got=i)
            refusals.count("migration", error.code)
            refusals.tell(tell, "connection refused", error, f"192.0.{i % 251}.{i % 241}")
        assert len(refusals._held) == KINDS_MAX + 1
        assert len(told) == KINDS_MAX + 1
        assert len(refusals.counts) == REASONS_MAX + 1
        assert sum(refusals.counts.values()) == 20_000
        async with asyncio.timeout(10):
            await refusals.nothing_held.wait()
        assert told_by_code["all"] == 20_000
        return told

    assert len(asyncio.run(flood())) <= 2 * (KINDS_MAX + 1)
