"""The API does what its document says, as schemathesis sees it: a real daemon, its unix socket, generated requests.

The document is the one that is checked in (test_api_document.py compares it with the code). Ids of guests and migrations
that the daemon has take the place of half of the generated ones: of those nearly all are unknown to it.
"""

import copy
import json
import socket
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import requests
import schemathesis
from hypothesis import settings
from requests.adapters import HTTPAdapter
from schemathesis.core.failures import Failure, FailureGroup, ServerError
from schemathesis.openapi.checks import JsonSchemaError, UndefinedContentType, UndefinedStatusCode
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from migrate.pair import DaemonProcess, Pair, wait_settled

from ..failure.fakes import FakeDestination, FakeGuest, FakeSource
from ..failure.mutants import Mutation, python_tree
from .conftest import API_PROFILE

pytestmark = pytest.mark.requires("uffd")
ANSWER_SECONDS = 10
GUEST_ID, WAITING_ID = "runs", "waits"

DOCUMENT = Path(str(resources.files("migrate.api"))) / "openapi.json"
schema = schemathesis.openapi.from_path(DOCUMENT)
known: dict[str, str] = {}
"""Ids of the migrations that the daemon has, and an address at which nobody listens."""
answered: set[tuple[str, int]] = set()
WANTED = {
    "listGuests": {200},
    "getGuest": {200, 404},
    "listMigrations": {200, 422},
    "createMigration": {201, 404, 409, 422},
    "getMigration": {200, 404, 422},
    "cancelMigration": {404, 409},
    "recoverMigration": {404, 409, 422},
    "resolveGuest": {404, 409, 422},
    "abandonMigration": {404, 409},
    "limitMigration": {404, 409, 422},
    "getMigrationLatency": {200, 404},
    "streamEvents": {200, 422},
    "streamMigrationEvents": {200, 404, 422},
    "getDaemon": {200},
    "getHealth": {200},
}


class UnixSession(requests.Session):
    """requests over a unix socket, whatever the host's name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.trust_env = False
        self.pair: Pair | None = None

        class Connection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(ANSWER_SECONDS)
                sock.connect(str(path))
                return sock

        class Pool(HTTPConnectionPool):
            ConnectionCls = Connection

        adapter = HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {"http": Pool}
        self.mount("http://", adapter)


@pytest.fixture(scope="module")
def session() -> Iterator[UnixSession]:
    """To a daemon with a guest that runs, one that waits, and a failed migration in either role."""
    with Pair() as pair, FakeGuest(GUEST_ID, "running") as runs, FakeGuest(WAITING_ID, "waiting") as waits:
        for guest in (runs, waits):
            guest.attach(pair.destination.runtime_dir / "guests.sock")
        with FakeDestination() as nobody:
            known["destination"] = nobody.address
        with UnixSession(pair.destination.runtime_dir / "api.sock") as session:
            session.pair = pair
            yield session


def have_migrated(session: UnixSession) -> None:
    """A migration that has failed in either role: the last that ended are kept, and long runs make hundreds."""
    assert session.pair is not None
    address = session.pair.destination.address
    with session.pair.destination.client() as client:
        listed = {migration.id: migration.settled for migration in client.migrations()}
        if {known.get("as_source"), known.get("as_destination")} <= listed.keys():
            return
        for begun in (migration_id for migration_id, settled in listed.items() if not settled):
            wait_settled(client, begun)
        if known.get("as_source") not in listed:
            known["as_source"] = client.migrate(GUEST_ID, known["destination"]).id
        if known.get("as_destination") not in listed:
            with FakeSource(address) as source:
                source.offer()
                known["as_destination"] = source.migration_id.hex()
        for role in ("as_source", "as_destination"):
            assert wait_settled(client, known[role]).state == "failed"


def choice(value: object) -> int:
    """The same in every run."""
    return crc32(repr(value).encode("utf-8", "replace"))


def use_what_there_is(case: schemathesis.Case, session: UnixSession) -> None:
    parameters = case.path_parameters
    if "migration_id" in parameters and choice(parameters) & 1:
        have_migrated(session)
        parameters["migration_id"] = known[("as_source", "as_destination")[choice(parameters) >> 1 & 1]]
    if "guest_id" in parameters and choice(parameters) & 1:
        parameters["guest_id"] = GUEST_ID
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if isinstance(case.body, dict) and "guest_id" in case.body and positive and choice(case.body) & 1:
        case.body["guest_id"] = (GUEST_ID, WAITING_ID)[choice(case.body) >> 1 & 1]
        case.body["destination"] = known["destination"]


def end_streams(case: schemathesis.Case) -> None:
    """At once, instead of after some generated time."""
    try:
        valid = float(case.query.get("for_seconds", 0)) >= 0
    except (TypeError, ValueError):
        valid = False
    if case.path.endswith("/events") and valid:
        case.query["for_seconds"] = 0


@schema.parametrize()
@settings(settings.get_profile(API_PROFILE))
@pytest.mark.timeout(24 * 3600)
def test_operation(case: schemathesis.Case, session: UnixSession) -> None:
    use_what_there_is(case, session)
    end_streams(case)
    answered.add((case.operation.definition.raw["operationId"], call_and_validate(case, session).status_code))


def test_good_and_bad_answers_were_among_them(session: UnixSession) -> None:
    """Of the operations that were tried just now; else the checks would have had little to look at."""
    for operation in {name for name, _ in answered}:
        assert WANTED[operation] <= {status for name, status in answered if name == operation}, operation


def call_and_validate(case: schemathesis.Case, session: UnixSession) -> schemathesis.Response:
    return case.call_and_validate(base_url="http://daemon", session=session, timeout=ANSWER_SECONDS)


# --- and that it would have been seen ---------------------------------------------------------------------------------


def remove(document: Any, *path: str) -> None:
    for key in path[:-1]:
        document = document[key]
    del document[path[-1]]


def change(document: Any, value: object, *path: str) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


NO_GUEST = {"path_parameters": {"guest_id": "nobody"}}
AT_ONCE = {"query": {"for_seconds": 0}}
REFUSED = ("paths", "/v1/guests/{guest_id}", "get", "responses")
LIES: dict[str, tuple[Callable[[Any], object], str, dict[str, dict[str, Any]], type[Failure]]] = {
    "a field that is not there": (
        lambda d: d["components"]["schemas"]["GuestInfo"]["required"].append("colour"),
        "listGuests",
        {},
        JsonSchemaError,
    ),
    "a field of another type": (
        lambda d: change(d, {"type": "string"}, "components", "schemas", "Limits", "properties", "streams"),
        "getDaemon",
        {},
        JsonSchemaError,
    ),
    "a status that is not documented": (lambda d: remove(d, *REFUSED, "404"), "getGuest", NO_GUEST, UndefinedStatusCode),
    "another media type": (
        lambda d: change(d, {"application/json": {}}, *REFUSED, "404", "content"),
        "getGuest",
        NO_GUEST,
        UndefinedContentType,
    ),
    "an event that is not documented": (
        lambda d: d["components"]["schemas"]["Event"]["oneOf"].pop(4),
        "streamEvents",
        AT_ONCE,
        JsonSchemaError,
    ),
    "another thing in an event": (
        lambda d: d["components"]["schemas"]["SnapshotEvent"]["required"].append("colour"),
        "streamEvents",
        AT_ONCE,
        JsonSchemaError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_document_that_lies_is_caught(lie: str, session: UnixSession) -> None:
    change_document, operation_id, arguments, failure = LIES[lie]
    document = json.loads(DOCUMENT.read_text())
    call_and_validate(case_of(document, operation_id, arguments), session)
    change_document(document)
    with pytest.raises(FailureGroup) as caught:
        call_and_validate(case_of(document, operation_id, arguments), session)
    assert {type(one) for one in caught.value.exceptions} == {failure}


def case_of(document: Any, operation_id: str, arguments: dict[str, dict[str, Any]]) -> schemathesis.Case:
    operation = schemathesis.openapi.from_dict(copy.deepcopy(document)).find_operation_by_id(operation_id)
    return operation.Case(**copy.deepcopy(arguments))


BREAKS = Mutation("migrate/api/guests.py", "        size_bytes=guest.size_bytes,", '        size_bytes={"secret": 1}["other"],')


def test_a_handler_that_breaks_is_caught_and_says_nothing_of_its_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(python_tree(tmp_path / "tree", BREAKS)))
    daemon = DaemonProcess(tmp_path, "source")
    try:
        with FakeGuest(GUEST_ID, "running") as guest, UnixSession(daemon.runtime_dir / "api.sock") as session:
            guest.attach(daemon.runtime_dir / "guests.sock")
            with pytest.raises(FailureGroup) as caught:
                call_and_validate(schema.find_operation_by_id("listGuests").Case(), session)
            assert {type(one) for one in caught.value.exceptions} == {ServerError}
            answer = session.get("http://daemon/v1/guests", timeout=ANSWER_SECONDS)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:postcopy:internal"
            assert "secret" not in answer.text
            assert "Traceback" not in answer.text
            assert "KeyError('other')" in daemon.log()
    finally:
        daemon.end()
