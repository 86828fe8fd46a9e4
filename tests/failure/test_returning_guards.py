"""Promises P4 and P6 of daemons that were killed: each guard of their return is there, and what it guards breaks without it.

The first life is the product as it is, unless a scenario begins by ending it; the second is that too, or lacks one guard.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.errors import PostcopyError
from migrate.pair import Pair
from proto.messages import Resume
from proto.preamble import AnswerCode

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource
from .killing import slain
from .mutants import Mutation, build_c, python_tree
from .precopy_fakes import TouchedGuest
from .returning_fakes import LEAVING_DESCRIPTORS, Arriving, Leaving, short_of_descriptors, told_of
from .test_guards import run_broken, run_c
from .test_restart_abandoned import Kept

pytestmark = pytest.mark.requires("uffd", "uffd-poison")
TWO_OWNERS = "runs at the source and at the destination"
LATE = "pages that were lost come"
SOURCE_PY, DESTINATION_PY, RETURNING_PY = "migrate/source.py", "migrate/destination.py", "migrate/returning.py"
TAKEN_BACK = "        self.advance(Event.TAKEN_BACK)\n"
RESTARTED = "                plane.restarted()\n"
TAKES_BACK_LATE = "                self.advance(Event.TAKEN_BACK)\n"
RESTORE_C = "migrate/dataplane/restore.c"

Scenario = Callable[[Pair], str]
"""What broke, or nothing."""


def source_cannot_take_back(pair: Pair) -> str:
    """It has no descriptor left for its data plane; the guest may run at the destination, whatever is asked for now."""
    with FakeGuest("cramped", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.until_switchover_of(guest)
        with short_of_descriptors(slain(pair, pair.source), LEAVING_DESCRIPTORS) as daemon:
            leaving.guest_returns()
            until(lambda: told_of(daemon, leaving.id, "Too many open files") == 1, "it could not take back")
            with daemon.client() as client, contextlib.suppress(PostcopyError):
                client.cancel(leaving.id)
        with daemon.client() as client:
            until(lambda: client.status(leaving.id).epoch > 0 or client.status(leaving.id).ended, "it goes on")
        return "" if guest.told_nothing() else TWO_OWNERS


def destination_cannot_take_back(pair: Pair) -> str:
    """Its guest keeps no page states, and what it has done since it was resumed is nowhere else."""
    with FakeGuest("forgets", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        guest.connection.receive(Resume)
        os.pwrite(guest.memory.files[0], b"done since", 0)
        arriving.kill()
        arriving.guest_returns(role="arriving", epoch=0)
        with pair.destination.client() as client:
            assert client.status(source.migration_id.hex(), settled_within_seconds=10).settled
        return "" if os.pread(guest.memory.files[0], 10, 0) == b"done since" else "its memory is emptied"


def source_is_killed_behind_switchover(pair: Pair) -> str:
    with FakeGuest("behind", "running") as guest, FakeDestination() as fake:
        leaving = Leaving(pair, guest, fake)
        fake.until_switchover_of(guest)
        leaving.kill()
        with pair.source.client() as client:
            until(lambda: state_of(client.guests(), "behind") in ("leaving", "running"), "decided")
        return "" if guest.told_nothing() else TWO_OWNERS


def state_of(guests: list[dict[str, object]], guest_id: str) -> object:
    return next((one["state"] for one in guests if one["id"] == guest_id), "")


def destination_is_killed_behind_resume(pair: Pair) -> str:
    """Its guest runs, and has not come back yet."""
    with FakeGuest("silent", "waiting") as guest, FakeSource(pair.destination.address) as source:
        arriving = Arriving(pair, guest, source)
        source.say_switchover()
        assert guest.resumed() == b"a state"
        arriving.kill()
        os.close(arriving.states_fd)
        return "" if arriving.dial(1) is AnswerCode.MIGRATION_UNKNOWN else TWO_OWNERS


def destination_is_killed_behind_abandon(pair: Pair) -> str:
    """What is lost there must not be asked for by the next one: it would come where the guest has met SIGBUS."""
    slain(pair, pair.destination)  # the guard is of the life that is given to the guest first
    with TouchedGuest("behind-abandon") as guest, FakeSource(pair.destination.address, guest_id="behind-abandon") as source:
        kept = Kept(pair, guest, source)
        kept.is_given_up()
        kept.kill()
        kept.returns()
        os.close(kept.states_fd)
        until(lambda: kept.status().state == "abandoned" or kept.awaits_its_source(), "decided")
        return "" if kept.status().state == "abandoned" else LATE


IN_PYTHON: dict[str, tuple[Scenario, tuple[Mutation, ...], str]] = {
    "P4 the source has taken back before anything can fail": (
        source_cannot_take_back,
        (
            Mutation(SOURCE_PY, TAKEN_BACK, ""),
            Mutation(SOURCE_PY, RESTARTED, RESTARTED + TAKES_BACK_LATE),
        ),
        TWO_OWNERS,
    ),
    "P6 the destination has taken back before anything can fail": (
        destination_cannot_take_back,
        (
            Mutation(DESTINATION_PY, TAKEN_BACK, ""),
            Mutation(DESTINATION_PY, "        plane.wake()\n", "        plane.wake()\n        self.advance(Event.TAKEN_BACK)\n"),
        ),
        "its memory is emptied",
    ),
    "P4 a guest whose switchover may have been sent is not resumed": (
        source_is_killed_behind_switchover,
        (Mutation(RETURNING_PY, '    if not record.may_run_there or record.verdict == "aborted":\n', "    if True:\n"),),
        TWO_OWNERS,
    ),
    "P4 nobody but its guest says that it never ran": (
        destination_is_killed_behind_resume,
        (Mutation(RETURNING_PY, "not record.may_run_there and not record.verdict:\n", "not record.verdict:\n"),),
        TWO_OWNERS,
    ),
    "P3 what is given up is recorded before it is lost": (
        destination_is_killed_behind_abandon,
        (Mutation(DESTINATION_PY, 'self.keep_record(verdict="abandoned")', "pass"),),
        LATE,
    ),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.parametrize("guard", IN_PYTHON)
def test_guard_in_python(pair: Pair, guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, removal, harm = IN_PYTHON[guard]
    assert scenario(pair) == ""
    monkeypatch.setenv("PYTHONPATH", os.fspath(python_tree(tmp_path, *removal)))
    try:
        assert scenario(pair) == harm
    finally:
        monkeypatch.undo()
        for daemon in (pair.source, pair.destination):
            slain(pair, daemon)


IN_C: dict[str, Mutation] = {
    "P6 a page that was lost is not here": Mutation(
        RESTORE_C, "    case PAGE_REMOVED:\n", "    case PAGE_REMOVED:\n    case PAGE_LOST:\n"
    ),
    "P6 a page that was being received is not here": Mutation(
        RESTORE_C,
        "return byte & PAGE_DISCARDED ? PAGE_REMOVED : PAGE_ABSENT;",
        "return byte & PAGE_DISCARDED ? PAGE_REMOVED : PAGE_PRESENT;",
    ),
}
RESTORE_MAIN, RESTORES = "tests/path/restore_main.c", ("1", "2")


@pytest.fixture(scope="module")
def restoring(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With every guard it holds."""
    held = run_c(build_c(repository, tmp_path_factory.mktemp("restore"), main=RESTORE_MAIN), *RESTORES)
    assert (held.returncode, held.stdout) == (0, "restore: held\n"), held.stderr


@pytest.mark.parametrize("guard", IN_C)
def test_guard_in_c(guard: str, restoring: None, repository: Path, tmp_path: Path) -> None:
    broken = run_broken(build_c(repository, tmp_path, IN_C[guard], main=RESTORE_MAIN), *RESTORES)
    assert broken.returncode == 1
    assert "failed:" in broken.stderr
