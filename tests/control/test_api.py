"""The HTTP API as an operator's programs use it: guests, migrations and their history, the daemon, and every way to be refused.

What its document promises is test_api_conformance.py's; events are test_api_events.py's.
"""

import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

from migrate import __version__
from migrate.api.guard import BODY_BYTES_MAX
from migrate.client import DaemonClient
from migrate.daemon import ENDED_MIGRATIONS_KEPT
from migrate.dataplane import Histogram
from migrate.dataplane._dataplane import lib
from migrate.pair import DaemonProcess, Pair, wait_settled
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR

from ..failure.fakes import FakeDestination, FakeGuest, FakeSource
from ..path.commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
JSON = {"content-type": "application/json"}


@pytest.fixture
def client(pair: Pair) -> Iterator[DaemonClient]:
    with pair.source.client() as client:
        yield client


@pytest.fixture(scope="module")
def commuter(pair: Pair) -> Commuter:
    return Commuter(pair, "api", "1M", "2M", options=("--pattern", "permute", "--rate", "3000", "--zero-ratio", "0.2"))


def asked(client: DaemonClient, method: str, path: str, **how: Any) -> httpx.Response:
    return client._http.request(method, path, **how)


def got(client: DaemonClient, path: str) -> Any:
    answer = asked(client, "GET", path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def at(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    assert moment.utcoffset() == timedelta(0), text
    return moment


# --- guests and the daemon --------------------------------------------------------------------------------------------


def test_guest(client: DaemonClient, commuter: Commuter) -> None:
    facts = {
        "id": "api-here",
        "state": "running",
        "size_bytes": 3 << 20,
        "shape": "1 MiB of 4 KiB pages + 2 MiB of 4 KiB pages",
        "regions": [{"size_bytes": 1 << 20, "page_bytes": 4096}, {"size_bytes": 2 << 20, "page_bytes": 4096}],
        "pid": commuter.runs.pid,
        "migration_id": None,
    }
    assert got(client, "/v1/guests/api-here") == facts
    assert facts in got(client, "/v1/guests")


def test_daemon(pair: Pair, client: DaemonClient, commuter: Commuter) -> None:
    before = got(client, "/v1/daemon")
    told = got(client, "/v1/daemon")
    assert told["uptime_seconds"] > before["uptime_seconds"] > 0
    assert at(told.pop("started_at")) < datetime.now(UTC)
    limits = told.pop("limits")
    assert limits["ended_migrations_kept"] == ENDED_MIGRATIONS_KEPT
    assert limits["body_bytes"] == BODY_BYTES_MAX
    guests = len(got(client, "/v1/guests"))
    del told["uptime_seconds"], told["migrations_ended"]
    assert told == {
        "role": "destination",  # it listens
        "version": __version__,
        "protocol": f"{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}",
        "pid": pair.source.pid,
        "migration_address": pair.source.address,
        "metrics_address": pair.source.metrics_address,
        "insecure": False,
        "tls": None,
        "stopping": False,
        "guests": guests,
        "migrations_active": 0,
    }


def test_health(client: DaemonClient) -> None:
    assert got(client, "/v1/health") == {"status": "ready"}


def test_its_document(client: DaemonClient) -> None:
    answer = asked(client, "GET", "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == (resources.files("migrate.api") / "openapi.json").read_bytes()


def test_daemon_that_ends_is_not_ready_and_takes_nothing_new(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "source", listens=False)
    try:
        with FakeGuest("held", "running") as held, FakeGuest("other", "running") as other, FakeDestination() as fake:
            for guest in (held, other):
                guest.attach(daemon.runtime_dir / "guests.sock")
            with daemon.client() as client:
                client.migrate("held", fake.address)
                fake.switch_over(held)
                until(lambda: client.migrations()[0].state == "postcopy", "postcopy")
                daemon.signal(15)
                until(lambda: bool(client.daemon()["stopping"]), "it is ending")
                refused(asked(client, "GET", "/v1/health"), 503, "daemon-ending")
                body = {"guest_id": "other", "destination": fake.address}
                refused(asked(client, "POST", "/v1/migrations", json=body), 503, "daemon-ending")
    finally:
        daemon.end()


# --- migrations -------------------------------------------------------------------------------------------------------


def test_migration_from_its_creation_to_its_history(commuter: Commuter) -> None:
    source, destination = commuter.is_at, commuter.goes_to
    with source.client() as here, destination.client() as there:
        body = {"guest_id": commuter.guest_id, "destination": destination.address, "bulk": False}
        began = datetime.now(UTC)
        created = asked(here, "POST", "/v1/migrations", json=body)
        assert created.status_code == 201
        assert created.headers["location"] == f"/v1/migrations/{created.json()['id']}"
        assert created.json()["ended_at"] is None
        until(lambda: here.status(created.json()["id"]).state == "postcopy", "postcopy")
        for daemon, guest, state in ((here, commuter.runs, "leaving"), (there, commuter.waits, "arriving")):
            facts = got(daemon, f"/v1/guests/{guest.name}")
            assert (facts["state"], facts["migration_id"]) == (state, created.json()["id"])
        done = got(here, f"{created.headers['location']}?settled_within_seconds=20")
        assert (done["state"], done["role"]) == ("complete", "source")
        assert began <= at(done["started_at"]) <= at(done["ended_at"]) <= datetime.now(UTC)
        elapsed_seconds = (at(done["ended_at"]) - at(done["started_at"])).total_seconds()
        assert elapsed_seconds == pytest.approx(done["elapsed_seconds"], abs=0.05)
        assert got(here, created.headers["location"]) == done  # it stays as it was
        until(lambda: there.status(done["id"]).settled, "both know")
        there_done = got(there, f"/v1/migrations/{done['id'][:12]}")
        assert (there_done["state"], there_done["role"], there_done["ended"]) == ("complete", "destination", True)
        assert got(there, f"/v1/guests/{commuter.waits.name}")["migration_id"] is None
    commuter.arrived()


def test_latency_in_all_its_buckets(commuter: Commuter) -> None:
    status = commuter.move(bulk=False)
    with commuter.is_at.client() as here, commuter.goes_to.client() as left:
        kinds = here.latency(status.id)["kinds"]
        assert kinds.keys() == {"remote", "local", "zero"}
        for kind, latency in kinds.items():
            buckets = latency["buckets"]
            assert sum(count for _, count in buckets) == latency["count"] == status.faults[kind].count
            assert buckets == sorted(buckets)
            assert all(count > 0 for _, count in buckets)
        remote = kinds["remote"]
        assert remote["count"] == status.pages_total
        assert remote["buckets"][-1][0] <= remote["max_ns"] < remote["buckets"][-1][0] * 17 / 16 + 1
        low_ns = sum(low * count for low, count in remote["buckets"])
        assert low_ns <= remote["sum_ns"] < low_ns * 17 / 16 + remote["count"]
        answer = asked(left, "GET", f"/v1/migrations/{status.id}/latency")
        assert refused(answer, 404, "not-found")["expected"].startswith("to be asked at the destination")


def test_fine_buckets_are_those_of_the_histogram() -> None:
    histogram = Histogram()
    assert histogram.fine() == []
    bounds = [int(lib.histogram_bucket_low_ns(bucket)) for bucket in range(lib.HISTOGRAM_BUCKETS)]
    assert bounds == sorted(set(bounds))
    assert (bounds[0], bounds[16], bounds[17]) == (64, 128, 136)
    histogram._copy.bucket[17], histogram._copy.bucket[0] = 5, 2
    assert histogram.fine() == [(64, 2), (136, 5)]


def test_list_and_its_filters(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "both")
    try:
        with daemon.client() as client, FakeGuest("one", "running") as one, FakeGuest("two", "running") as two:
            for guest in (one, two):
                guest.attach(daemon.runtime_dir / "guests.sock")
            with FakeDestination() as nobody:
                address = nobody.address
            failed = [client.migrate(guest_id, address).id for guest_id in ("one", "two")]
            for migration_id in failed:
                wait_settled(client, migration_id)
            with FakeSource(daemon.address, guest_id="two") as source, FakeDestination() as fake:
                source.begin().send(source.offered())
                source.control.refused()
                taken = source.migration_id.hex()
                stands = client.migrate("one", fake.address).id
                fake.accept_offer()
                until(lambda: len(got(client, "/v1/migrations?settled=true")) == 3, "three have failed")
                every = [stands, taken, failed[1], failed[0]]
                for query, wanted in (
                    ("", every),
                    ("limit=2", every[:2]),
                    ("settled=false", [stands]),
                    ("settled=true", every[1:]),
                    ("state=failed", every[1:]),
                    ("state=connecting", [stands]),
                    ("state=complete", []),
                    ("role=destination", [taken]),
                    ("guest_id=two", [taken, failed[1]]),
                    ("guest_id=two&role=source", [failed[1]]),
                    ("guest_id=three", []),
                    ("state=failed&limit=1", [taken]),
                ):
                    assert [status["id"] for status in got(client, f"/v1/migrations?{query}")] == wanted, query
                client.cancel(stands)
                assert client.status(stands, settled_within_seconds=10).state == "cancelled"
    finally:
        daemon.end()


def test_history_keeps_the_last_ones(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "source")
    try:
        with FakeDestination() as nobody:
            address = nobody.address
        with daemon.client() as client, FakeGuest("often", "running") as guest:
            guest.attach(daemon.runtime_dir / "guests.sock")
            ids = []
            for _ in range(ENDED_MIGRATIONS_KEPT + 6):
                ids.append(client.migrate("often", address).id)
                assert wait_settled(client, ids[-1]).state == "failed"
            assert [status.id for status in client.migrations()] == ids[: -ENDED_MIGRATIONS_KEPT - 1 : -1]
            assert client.daemon()["migrations_ended"] == ENDED_MIGRATIONS_KEPT
            refused(asked(client, "GET", f"/v1/migrations/{ids[0]}"), 404, "not-found")
            assert client.status(ids[-1]).error is not None
    finally:
        daemon.end()


def test_cancel(client: DaemonClient, pair: Pair) -> None:
    with FakeGuest("stays", "running") as guest, FakeDestination() as fake:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        begun = client.migrate("stays", fake.address)
        fake.accept_offer()
        answer = asked(client, "POST", f"/v1/migrations/{begun.id}/cancel")
        assert answer.status_code == 200
        assert answer.json()["id"] == begun.id
        ended = client.status(begun.id, settled_within_seconds=10)
        assert (ended.state, ended.ended_at is not None) == ("cancelled", True)
        refused(asked(client, "POST", f"/v1/migrations/{begun.id}/cancel"), 409, "not-cancellable")
        assert got(client, "/v1/guests/stays")["state"] == "running"


def test_limit(client: DaemonClient, pair: Pair) -> None:
    """Before anything is sent as well as later; once it has settled there is nothing to limit."""
    with FakeGuest("limited", "running") as guest, FakeDestination() as fake:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        begun = client.migrate("limited", fake.address, bulk_limit_bytes_per_second=1000)
        assert begun.bulk_limit_bytes_per_second == 1000
        fake.accept_offer()
        path = f"/v1/migrations/{begun.id}"
        for limit in (5_000_000, None):
            answer = asked(client, "PATCH", path, json={"bulk_limit_bytes_per_second": limit})
            assert answer.status_code == 200
            assert answer.json()["bulk_limit_bytes_per_second"] == limit
        for wrong in ({}, {"bulk_limit_bytes_per_second": 0}, {"bulk_limit_bytes_per_second": "1M"}, {"bulk": False}):
            refused(asked(client, "PATCH", path, json=wrong), 422, "request-invalid")
        client.cancel(begun.id)
        assert client.status(begun.id, settled_within_seconds=10).state == "cancelled"
        refused(asked(client, "PATCH", path, json={"bulk_limit_bytes_per_second": 1}), 409, "not-limitable")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Its problem, whole."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem.keys() == {"type", "title", "status", "detail", "expected", "got"}
    assert (problem["type"], problem["status"]) == (f"urn:postcopy:{code}", status)
    assert problem["title"] == code.replace("-", " ")
    assert problem["detail"]
    return problem


GOOD = {"guest_id": "nobody", "destination": "127.0.0.1:7641"}
HALF = json.dumps({**GOOD, "guest_id": "\ud800"})
READS: dict[str, tuple[str, str, int, str, str]] = {
    "no such path": ("GET", "/v2/guests", 404, "not-found", "GET /v2/guests"),
    "a slash too many": ("GET", "/v1/guests/", 404, "not-found", "GET /v1/guests/"),
    "no such guest": ("GET", "/v1/guests/nobody", 404, "not-found", "guest nobody: expected one of"),
    "no such migration": ("GET", "/v1/migrations/zz", 404, "not-found", "migration zz: expected one migration, got 0"),
    "nothing to cancel": ("POST", "/v1/migrations/zz/cancel", 404, "not-found", "migration zz"),
    "nothing to watch": ("GET", "/v1/migrations/zz/events", 404, "not-found", "migration zz"),
    "nothing to measure": ("GET", "/v1/migrations/zz/latency", 404, "not-found", "migration zz"),
    "another method": ("DELETE", "/v1/guests", 405, "method-not-allowed", "DELETE /v1/guests"),
    "a wait too long": ("GET", "/v1/migrations/zz?settled_within_seconds=61", 422, "request-invalid", "got '61'"),
    "a state of no table": ("GET", "/v1/migrations?state=flying", 422, "request-invalid", "query.state: "),
    "none at all": ("GET", "/v1/migrations?limit=0", 422, "request-invalid", "query.limit: "),
}
CREATIONS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no such guest": ({"json": GOOD}, 404, "not-found", "guest nobody"),
    "no body": ({}, 422, "request-invalid", "got nothing"),
    "not JSON": ({"content": "{", "headers": JSON}, 400, "request-malformed", "body: "),
    "deep JSON": ({"content": "[" * 60_000, "headers": JSON}, 400, "request-malformed", "body"),
    "no UTF-8": ({"content": b"\xff\xfe{", "headers": JSON}, 400, "request-malformed", "body"),
    "a form": ({"data": GOOD}, 415, "media-type", "got application/x-www-form-urlencoded"),
    "no type": ({"content": json.dumps(GOOD)}, 415, "media-type", "got no content-type"),
    "too large": ({"content": b"x" * 70_000}, 413, "request-too-large", "<= 65536 bytes"),
    "too large in pieces": ({"content": [b"x" * 1000] * 70}, 413, "request-too-large", "<= 65536 bytes"),
    "a list": ({"json": [GOOD]}, 422, "request-invalid", "body: "),
    "a field missing": ({"json": {"guest_id": "x"}}, 422, "request-invalid", "body.destination: Field required, got nothing"),
    "a field too many": ({"json": {**GOOD, "colour": 1}}, 422, "request-invalid", "body.colour: "),
    "another type": ({"json": {**GOOD, "bulk": "yes"}}, 422, "request-invalid", "body.bulk: "),
    "a guest of no name": ({"json": {**GOOD, "guest_id": "\n"}}, 422, "request-invalid", "guest_id: "),
    "half of a character": ({"content": HALF, "headers": JSON}, 422, "request-invalid", "guest_id: "),
    "no port": (
        {"json": {**GOOD, "destination": "host"}},
        422,
        "request-invalid",
        "body.destination: Input should be HOST:PORT or [IPv6]:PORT, got 'host'",
    ),
}


@pytest.mark.parametrize("read", READS)
def test_refused_as_a_problem(client: DaemonClient, read: str) -> None:
    method, path, status, code, detail = READS[read]
    assert detail in refused(asked(client, method, path), status, code)["detail"]


@pytest.mark.parametrize("creation", CREATIONS)
def test_creation_refused_as_a_problem(client: DaemonClient, creation: str) -> None:
    how, status, code, detail = CREATIONS[creation]
    assert detail in refused(asked(client, "POST", "/v1/migrations", **how), status, code)["detail"]


def test_what_the_path_does_take(client: DaemonClient) -> None:
    for path, allow in (("/v1/migrations", "GET, POST"), ("/v1/guests", "GET"), ("/v1/migrations/x/cancel", "POST")):
        answer = asked(client, "PUT", path)
        refused(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == allow


def test_busy_guest(client: DaemonClient, pair: Pair) -> None:
    with FakeGuest("idle", "waiting") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        answer = asked(client, "POST", "/v1/migrations", json={**GOOD, "guest_id": "idle"})
        assert refused(answer, 409, "guest-busy")["got"] == "waiting"


def test_beyond_loopback(client: DaemonClient, pair: Pair) -> None:
    with FakeGuest("here", "running") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        answer = asked(client, "POST", "/v1/migrations", json={"guest_id": "here", "destination": "[2001:db8::1]:7641"})
        assert refused(answer, 403, "listen-refused")["got"] == "[2001:db8::1]:7641"


def said_to(pair: Pair, *parts: bytes) -> tuple[bytes, bytes]:
    """Head and body of what the daemon answers before it closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(os.fspath(pair.source.runtime_dir / "api.sock"))
        for part in parts:
            sock.sendall(part)
        said = b""
        while part := sock.recv(4096):
            said += part
    head, _, body = said.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ((b"\x16\x03\x01 not a request\r\n\r\n",), 400, "request-malformed"),
        ((b"GET /v1/health HTTP/1.1\r\nx: ", b"y" * 40_000), 431, "request-too-large"),
    ],
    ids=["no HTTP", "a head without end"],
)
def test_what_is_no_request_is_refused_as_a_problem_too(pair: Pair, parts: tuple[bytes, ...], status: int, code: str) -> None:
    head, body = said_to(pair, *parts)
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["type"] == f"urn:postcopy:{code}"
