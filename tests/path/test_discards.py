"""Pages that the guest discards are zero from then on, before, during and after the switchover, by events and by messages.

The guest checks itself: a page that it has discarded must read zero until it has written it again. The races alone, without
Python, are in tests/path/discard_main.c.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.pair import Pair
from migrate.uffd import Feature, Userfaultfd
from proto.messages import Discard, Discarded, PageRange, Welcome, encode

from ..failure.fakes import FakeGuest
from ..failure.mutants import Mutation, build_c
from .commuter import Commuter

pytestmark = pytest.mark.requires("uffd")
BUSY = ("--threads", "2", "--write-ratio", "0.5", "--zero-ratio", "0.1", "--discard-ratio", "0.3")
MOVES: tuple[str | int, ...] = ("off", 2) * 2
MAIN = "tests/path/discard_main.c"
RUN_DEADLINE_SECONDS = 50


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.requires("wp-async", "pagemap-scan")
@pytest.mark.parametrize("by", ["event", "message"])
def test_guest_that_discards(pair: Pair, by: str) -> None:
    """There and back, with and without precopy; after each arrival it checks every page."""
    guest = Commuter(pair, f"by-{by}", "8M", "8M:tmpfs", options=(*BUSY, "--discard-by", by))
    never_came = 0
    for precopy in MOVES:
        reaches = guest.goes_to
        status = guest.move(precopy=precopy)
        with reaches.client() as client:
            never_came += client.status(status.id).pages.get("discarded", 0)
    assert never_came > 0
    guest.end()


def test_without_a_migration_it_holds_at_once(pair: Pair) -> None:
    with FakeGuest("idle", "running") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        os.pwrite(guest.memory.files[0], b"\1" * (1 << 20), 0)
        ranges = [PageRange(region=0, page_index=1, page_count=2), PageRange(region=0, page_index=255, page_count=1)]
        guest.connection.send(Discard(ranges=ranges))
        guest.connection.receive(Discarded)
        content = os.pread(guest.memory.files[0], 1 << 20, 0)
    zero = {page for page in range(256) if content[page * 4096 : (page + 1) * 4096] == bytes(4096)}
    assert zero == {1, 2, 255}


@pytest.mark.parametrize(
    ("role", "page_index", "code", "got"),
    [("running", 255, "message-invalid", "'page_index': 255"), ("waiting", 0, "message-unexpected", "one")],
    ids=["beyond its region", "while it waits"],
)
def test_discard_is_refused(pair: Pair, role: str, page_index: int, code: str, got: str) -> None:
    with FakeGuest("liar", "running" if role == "running" else "waiting") as guest:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        guest.connection.send(Discard(ranges=[PageRange(region=0, page_index=page_index, page_count=2)]))
        refusal = guest.connection.refused()
    assert refusal.code == code
    assert got in refusal.got


@pytest.mark.parametrize("means", ["zero", "keep"])
def test_events_are_for_who_says_what_they_mean(pair: Pair, means: str) -> None:
    """Without ``remove_means`` the same userfaultfd is refused: tests/failure/test_bad_guests.py."""
    with FakeGuest("eventful", "waiting") as guest:
        events = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.EVENT_REMOVE
        os.close(guest.userfaultfd)  # which has the ranges; the next one takes them
        guest.userfaultfd = Userfaultfd.open(events, user_mode_only=True).detach()
        guest.connect(pair.destination.runtime_dir / "guests.sock")
        guest.send(encode(guest.hello(remove_means=means)), guest.descriptors())
        guest.connection.receive(Welcome)


READ = "    ssize_t read_bytes = events_read(context->destination, message, sizeof(message));\n"
APPLIED = "    events_applied(destination);\n"
TOLD = "        destination_discard(move->destination, 0, page, 1, &result);\n"
PAUSE = "    usleep(20);\n"
AFTER_READ = Mutation("migrate/dataplane/fault.c", READ, READ + PAUSE)
BEFORE_TOLD = Mutation(MAIN, TOLD, PAUSE + TOLD)
# Seeds of discard_main.c of one kind, one in six.
EVENTS, MESSAGES, EVENTS_AFTER_PRECOPY = 0, 1, 3
# The product, slower where it matters.
STAGE = (AFTER_READ, BEFORE_TOLD, Mutation("migrate/dataplane/destination.c", APPLIED, PAUSE + APPLIED))
GUARDS: dict[str, tuple[int, tuple[Mutation, ...]]] = {
    "what is being received when it is discarded is not published": (
        EVENTS,
        (*STAGE, Mutation("migrate/dataplane/pages.h", "    while (!(seen & PAGE_DISCARDED))\n", "    for (;;)\n")),
    ),
    "bulk waits for the events that are being read": (
        EVENTS,
        (AFTER_READ, BEFORE_TOLD, Mutation("migrate/dataplane/destination.c", APPLIED, PAUSE)),
    ),
    "what came between a discard and its message is punched": (
        MESSAGES,
        (*STAGE, Mutation("migrate/dataplane/discard.c", "punch ? place_hole(region, page_index, run_pages) : 0", "0")),
    ),
    "a discard at the source is sent again": (
        EVENTS_AFTER_PRECOPY,
        (Mutation("migrate/dataplane/precopy.c", "    if (!source->pending) /* nothing has been sent */\n", ""),),
    ),
}


def run_c(program: Path, seed: int, moves: int, step: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(seed), str(moves), str(step)]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_DEADLINE_SECONDS, check=False)


@pytest.fixture(scope="module")
def staged(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With every guard it holds, however slow."""
    held = run_c(build_c(repository, tmp_path_factory.mktemp("staged"), *STAGE, main=MAIN), EVENTS, 2, MESSAGES - EVENTS)
    assert (held.returncode, held.stdout) == (0, "discards: held\n"), held.stderr


@pytest.mark.parametrize("guard", GUARDS)
def test_guard(guard: str, staged: None, repository: Path, tmp_path: Path) -> None:
    seed, removal = GUARDS[guard]
    broken = run_c(build_c(repository, tmp_path, *removal, main=MAIN), seed, 80, 6)  # ends with the first that is broken
    assert broken.returncode == 1
    assert "failed:" in broken.stderr
