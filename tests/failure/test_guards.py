"""Promises P1 to P4: each guard is there, and what it guards breaks without it.

Every scenario runs twice: with the product as it is, where it must hold, and with one guard removed, where it must not.
P7 has a file of its own (test_constant_switchover.py).
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.pair import Pair, Process
from proto.messages import Aborted, Progress, Refused, Resume, Running

from ..path.commuter import until
from .fakes import FakeDestination, FakeGuest, FakeSource, PeerEndedError, interrupted
from .mutants import NONE, Mutation, build_c, python_tree

pytestmark = pytest.mark.requires("uffd")
SCENARIO_DEADLINE_SECONDS = 50
BROKEN_RUNS_MAX = 100
PRECOPY_MOVES = ("100", "8")  # seed and number
DESTINATION_C = "migrate/dataplane/destination.c"
PLACED = "    int error_number = place_pages(region, first, page_count, bytes, path);\n"
WINDOW = "    usleep(50);\n"
PUBLISHED_FIRST = """    for (uint64_t i = first; i < first + page_count; i++)
        page_leave_receiving(&state[i], PAGE_PRESENT);
"""

# promise and guard -> the scenario, the same scenario's stage without the guard removed, and the removal
IN_C: dict[str, tuple[str, tuple[Mutation, ...], tuple[Mutation, ...]]] = {
    "P1 a page is claimed once": (
        "late-copies",
        NONE,
        (
            Mutation(
                "migrate/dataplane/pages.h",
                "while (PAGE_STATE(seen) == PAGE_ABSENT || PAGE_STATE(seen) == PAGE_REQUESTED) {",
                "while (PAGE_STATE(seen) != PAGE_RECEIVING) {",
            ),
        ),
    ),
    "P1 content is there before PRESENT says so": (
        "moves",
        (Mutation(DESTINATION_C, PLACED, WINDOW + PLACED),),
        (Mutation(DESTINATION_C, PLACED, PUBLISHED_FIRST + WINDOW + PLACED),),
    ),
    "P2 nothing is served before the guest is paused": (
        "gate",
        NONE,
        (Mutation("migrate/dataplane/serve.c", "if (wait_ready(source->open_fd, POLLIN, source->stop_fd, result))", "if (1)"),),
    ),
    "P3 nothing is unregistered before the count is complete": (
        "early-finish",
        NONE,
        (Mutation(DESTINATION_C, "if (!is_final(state)) {", "if (!is_final(state) && result->got) {"),),
    ),
}


PRECOPY_MAIN = "tests/path/precopy_main.c"
CHUNKS_MAIN = "tests/path/chunks_main.c"
ASKED_WHEN_HELD = "        if (seen == PAGE_ABSENT || seen == PAGE_HELD || seen == PAGE_HELD_ZERO)\n"
HELD_IS_REMOTE = "    case PAGE_HELD:\n    case PAGE_HELD_ZERO: /* the"
PRESENT_IS_LOCAL = "    case PAGE_PRESENT: /* received a moment ago, or */\n"
# each removed from the moves of a guest that writes flat out while it is precopied
IN_PRECOPY: dict[str, tuple[Mutation, ...]] = {
    "P2 what was written last is stale": (
        Mutation(
            "migrate/dataplane/settle.c",
            "    return source->all_stale || atomic_load_explicit(&source->pending[page]",
            "    return source->all_stale || (page > source->memory.page_total) & atomic_load_explicit(&source->pending[page]",
        ),
    ),
    "P2 a held page is asked for, not mapped": (
        Mutation("migrate/dataplane/pages.h", ASKED_WHEN_HELD, "        if (seen == PAGE_ABSENT || seen == PAGE_HELD_ZERO)\n"),
        Mutation("migrate/dataplane/fault.c", HELD_IS_REMOTE, "    case PAGE_HELD_ZERO: /* the"),
        Mutation("migrate/dataplane/fault.c", PRESENT_IS_LOCAL, f"{PRESENT_IS_LOCAL}    case PAGE_HELD:\n"),
    ),
    "P2 old bytes go before a page is zero": (
        Mutation("migrate/dataplane/destination.c", "run_pages > 0 ? place_zeroes(region, page_index, run_pages) : 0;", "0;"),
    ),
}

# removed from what several bulk connections have in common: scenario, and the removal
IN_STREAMS: dict[str, tuple[tuple[str, ...], tuple[Mutation, ...]]] = {
    "P1 the copies of a page keep to one connection": (
        ("order",),
        (
            Mutation("migrate/dataplane/precopy.c", ".stream = stream,", ".stream = (stream + rounds) % source->streams,"),
            Mutation("migrate/dataplane/precopy.c", "int source_track(", "static uint32_t rounds;\nint source_track("),
            Mutation("migrate/dataplane/precopy.c", "    uint64_t newly = 0;\n", "    uint64_t newly = 0;\n    rounds++;\n"),
        ),
    ),
    "P2 quiesced waits for the marks of all": (
        PRECOPY_MOVES,
        (Mutation("migrate/dataplane/receive.c", " + 1 == destination->streams)", " == 0)"),),
    ),
    "P2 bulk waits on every connection for what is lacking": (
        PRECOPY_MOVES,
        (
            Mutation(
                "migrate/dataplane/stream.c",
                "        return wait_ready(source->settled_fd, POLLIN, source->stop_fd, result);\n",
                "        return true;\n",
            ),
        ),
    ),
}


CLAIMS_C = "migrate/dataplane/claims.c"
# each removed from pages whose chunks come in any order, by two connections at once
IN_CHUNKS: dict[str, Mutation] = {
    "P1 a chunk is claimed once": Mutation(
        CLAIMS_C,
        "(atomic_fetch_or_explicit(at->chunk, CHUNK_CLAIMED, memory_order_acquire) & CHUNK_CLAIMED)",
        "(0)",
    ),
    "P1 PRESENT when all chunks are there": Mutation(
        CLAIMS_C, "    if (PLACED(now) == at->region->page_chunks)", "    if (PLACED(now) == 1)"
    ),
}


def run_c(program: Path, *scenario: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *scenario]
    return subprocess.run(command, capture_output=True, text=True, timeout=SCENARIO_DEADLINE_SECONDS, check=False)


def run_broken(program: Path, *scenario: str) -> subprocess.CompletedProcess[str]:
    """Without its guard. What breaks then are races: as often as it takes."""
    for _ in range(BROKEN_RUNS_MAX):
        run = run_c(program, *scenario)
        if run.returncode != 0:
            break
    return run


@pytest.fixture(scope="module")
def whole_c(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_c(repository, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("guard", IN_C)
def test_guard_in_c(guard: str, whole_c: Path, repository: Path, tmp_path: Path) -> None:
    scenario, stage, removal = IN_C[guard]
    staged = build_c(repository, tmp_path / "staged", *stage) if stage else whole_c
    held = run_c(staged, scenario)
    assert (held.returncode, held.stdout) == (0, f"{scenario}: held\n"), held.stderr
    broken = run_broken(build_c(repository, tmp_path / "mutant", *removal), scenario)
    assert broken.returncode == 1
    assert "failed:" in broken.stderr


@pytest.fixture(scope="module")
def precopying(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With every guard it holds."""
    whole = build_c(repository, tmp_path_factory.mktemp("precopy"), main=PRECOPY_MAIN)
    for scenario, said in ((PRECOPY_MOVES, "precopy: held\n"), (("order",), "order: held\n")):
        held = run_c(whole, *scenario)
        assert (held.returncode, held.stdout) == (0, said), held.stderr


@pytest.mark.parametrize("guard", IN_PRECOPY)
def test_guard_of_precopy(guard: str, precopying: None, repository: Path, tmp_path: Path) -> None:
    broken = run_broken(build_c(repository, tmp_path, *IN_PRECOPY[guard], main=PRECOPY_MAIN), *PRECOPY_MOVES)
    assert broken.returncode == 1
    assert "failed:" in broken.stderr


@pytest.mark.parametrize("guard", IN_STREAMS)
def test_guard_of_streams(guard: str, precopying: None, repository: Path, tmp_path: Path) -> None:
    scenario, removal = IN_STREAMS[guard]
    broken = run_broken(build_c(repository, tmp_path, *removal, main=PRECOPY_MAIN), *scenario)
    assert broken.returncode == 1
    assert "failed:" in broken.stderr


@pytest.fixture(scope="module")
def in_chunks(repository: Path, tmp_path_factory: pytest.TempPathFactory, hugetlb_pool: int) -> None:
    """With every guard it holds."""
    held = run_c(build_c(repository, tmp_path_factory.mktemp("chunks"), main=CHUNKS_MAIN), "scattered")
    assert (held.returncode, held.stdout) == (0, "scattered: held\n"), held.stderr


@pytest.mark.parametrize("guard", IN_CHUNKS)
@pytest.mark.requires("hugetlb")
def test_guard_of_chunks(guard: str, in_chunks: None, repository: Path, tmp_path: Path) -> None:
    broken = run_broken(build_c(repository, tmp_path, IN_CHUNKS[guard], main=CHUNKS_MAIN), "scattered")
    assert broken.returncode == 1
    assert "failed:" in broken.stderr


# --- the same with real daemons and guests, or with fakes where a real one cannot be made to fail at that moment -------


Scenario = Callable[[Pair], str]
"""Raises AssertionError when something is wrong with the test; what broke, or nothing."""


def busy_guest_moves(pair: Pair) -> str:
    arrives = pair.guest(pair.destination, "there", "4M", waiting=True)
    pair.guest(pair.source, "here", "4M", "--threads", "2", "--write-ratio", "1").event("stepped")
    with pair.source.client() as client:
        client.migrate("here", pair.destination.address, precopy="off")
        outcome = arrives.event("verified", "failed", deadline_seconds=SCENARIO_DEADLINE_SECONDS / 2)
    return "" if outcome["event"] == "verified" else str(outcome["failure"])


def daemon_is_killed_in_postcopy(pair: Pair) -> str:
    """The guest stands still on a page that is not here; it must not run on with zeroes."""
    arrives = pair.guest(pair.destination, "there", "16M", waiting=True)
    pair.guest(pair.source, "here", "16M", "--rate", "1000").event("stepped")
    with pair.source.client() as client:
        begun = client.migrate("here", pair.destination.address, bulk=False)
        until(lambda: client.status(begun.id).state == "postcopy", "postcopy")
        arrives.event("stepped")  # the last that its agent has to read
        pair.destination.kill()
    until(lambda: waits_in_a_fault(arrives.pid) or has_found_itself_broken(arrives), "it stands still, or it does not")
    return "found itself broken" if has_found_itself_broken(arrives) else ""


def has_found_itself_broken(guest: Process) -> bool:
    """It ended over it; or its threads have signalled it to an agent that, without a daemon, does not read that any more."""
    counts = (text.partition("eventfd-count:")[2].split() for text in descriptors_of(guest.pid))
    return guest.returncode is not None or any(int(count[0], 16) > 0 for count in counts if count)


def descriptors_of(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # a descriptor, or the process, that has just gone
        for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
            yield descriptor.read_text()


def waits_in_a_fault(pid: int) -> bool:
    try:
        return any((task / "wchan").read_text() == "handle_userfault" for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def control_is_cut_after_switchover(pair: Pair) -> str:
    """The destination has the state and may run the guest; who runs it?"""
    with FakeGuest("here", "running") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        begun = client.migrate("here", fake.address)
        fake.prepare(guest)
        fake.until_switchover_of(guest)
        fake.control.close()
        interrupted(client, begun.id)
        if guest.told_nothing():
            return ""
        assert guest.connection.receive(Resume).state is None
        return "runs at the source and at the destination"


def guest_is_gone_after_resume(pair: Pair) -> str:
    """It may have run, and what it did may have been seen: the source must not hear that it never will."""
    with FakeGuest("there", "waiting") as guest, FakeSource(pair.destination.address) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.switch_over(guest)
        assert guest.connection.receive(Resume).state == b"a state"
        source.control.beside = None
        guest.connection.close()
        try:
            said = source.control.receive(Aborted, Refused, Running, Progress)
        except PeerEndedError:
            return ""
        if isinstance(said, Refused):
            return ""
        assert isinstance(said, Aborted)
        return "runs at the source and at the destination"


IN_PYTHON: dict[str, tuple[Scenario, Mutation, str]] = {
    "P2 bulk begins after the switchover": (
        busy_guest_moves,
        Mutation(
            "migrate/source.py",
            "            self._begin_stream()\n",
            "            self._begin_stream()\n"
            "            self._plane.open_bulk()\n"
            '            while self._plane.figures()["pages_bulk"] == 0:\n                await asyncio.sleep(0)\n',
        ),
        "page",
    ),
    "P3 missing faults are registered with minor ones": (
        busy_guest_moves,
        Mutation(
            "migrate/uffd/postcopy.py",
            "MODES_POSTCOPY = Mode.MISSING | Mode.MINOR\n",
            "MODES_POSTCOPY = Mode.MINOR\n",
        ),
        "page",  # zeroed, or what the guest made of the zeroes that it read
    ),
    "P3 the guest keeps its own duplicate": (
        daemon_is_killed_in_postcopy,
        Mutation(
            "migrate/guest/agent.py",
            "        self.role = GuestRole.ARRIVING\n",
            "        self.role = GuestRole.ARRIVING\n        self.close()\n",
        ),
        "broken",
    ),
    "P4 the source resumes nothing once the switchover may have been sent": (
        control_is_cut_after_switchover,
        Mutation(
            "migrate/source.py",
            '                self.log.warning("migration paused: the path is lost',
            '                self._guest_runs_on()\n                self.log.warning("migration paused: the path is lost',
        ),
        "at the source and at the destination",
    ),
    "P4 the destination aborts nothing once the guest may have been resumed": (
        guest_is_gone_after_resume,
        Mutation(
            "migrate/destination.py",
            "        if self.state in (State.SWITCHOVER, State.POSTCOPY, State.PAUSED):\n            self.advance(Event.STALL)\n",
            "        if self.state in (State.SWITCHOVER, State.POSTCOPY, State.PAUSED):\n            self._abort(str(error))\n",
        ),
        "at the source and at the destination",
    ),
}


@pytest.mark.parametrize("guard", IN_PYTHON)
def test_guard_in_python(guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, removal, harm = IN_PYTHON[guard]
    with Pair() as pair:
        assert scenario(pair) == ""
    monkeypatch.setenv("PYTHONPATH", os.fspath(python_tree(tmp_path, removal)))
    with Pair() as pair:
        broken = scenario(pair)
    assert broken != ""
    assert harm in broken
