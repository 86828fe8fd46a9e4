"""The server of cases: what fails, hangs or leaves something behind is told, ended and reaped."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.uffd import Mode

from .cases import TOUCHED_WITHOUT_END, CaseServer, InAChild, case
from .memory import SHMEM, Kind, Memory, byte_at


def told_what_differs(status: int, said: str) -> None:
    assert status == 1
    assert "assert 1 == 2" in said


def killed_at_its_deadline(status: int, said: str) -> None:
    assert status == -signal.SIGKILL
    assert said.startswith("not done after 0.5 s")
    left_nothing(status, said)


def left_nothing(_: int, said: str) -> None:
    pids = re.findall(r"^started (\d+)$", said, re.MULTILINE)
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def did_not_die(status: int, _: str) -> None:
    assert status == TOUCHED_WITHOUT_END


CHECKS: dict[str, Callable[[int, str], None]] = {
    "test_case_that_fails": told_what_differs,
    "test_case_that_hangs": killed_at_its_deadline,
    "test_case_that_leaves_a_process": left_nothing,
    "test_case_that_does_not_die": did_not_die,
}


@pytest.fixture
def in_a_child(case_server: CaseServer, request: pytest.FixtureRequest) -> InAChild:
    """In place of the one that wants success: what the server says of the case is looked at."""
    return lambda _: CHECKS[request.node.originalname](*case_server.run(request.node.nodeid))


@case()
def test_case_that_fails() -> None:
    one = 1
    assert one == 2


@case([SHMEM], deadline_seconds=0.5)
def test_case_that_hangs(kind: Kind) -> None:
    """In a fault that nobody resolves, and so does a child that it has forked."""
    memory = Memory(kind)
    memory.open()
    memory.register(Mode.MISSING)
    child = os.fork()
    if child == 0:
        signal.pause()
    print(f"started {os.getpid()}\nstarted {child}", flush=True)
    byte_at(memory.at(0))


@case()
def test_case_that_leaves_a_process() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    print(f"started {child}")


@case(dies_of=signal.SIGBUS)
def test_case_that_does_not_die() -> None:
    pass
