"""The server of cases (cases.py), started at the first case of a session; and, in the server itself, its loop."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import host

from .cases import LAST_WORDS, SOCKET_VARIABLE, CaseServer, InAChild, serve


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In the server: serve instead of running what was collected."""
    if SOCKET_VARIABLE not in os.environ:
        return None
    serve({item.nodeid: item for item in session.items})
    return True


@pytest.fixture(scope="session")
def case_server(repository: Path) -> Iterator[CaseServer]:
    server = CaseServer(repository, host.PROBES)
    yield server
    server.close()


@pytest.fixture
def in_a_child(case_server: CaseServer, request: pytest.FixtureRequest) -> InAChild:
    """Run the body of this very test; it fails with what the case said."""

    def run(expected_status: int) -> None:
        status, said = case_server.run(request.node.nodeid)
        assert status == expected_status, f"the case ended with {status}:\n{said}"
        assert (LAST_WORDS in said) == (expected_status < 0), f"the case ended too early:\n{said}"

    return run
