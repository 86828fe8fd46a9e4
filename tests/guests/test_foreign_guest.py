"""A guest that shares no line with the product, written from PROTOCOL.md alone, moves and proves itself: foreign_guest.c.

It knows from its count of steps what every page must hold, and says ``verified`` or ``failed``. Its agent is also asked
by a daemon that is nothing but a socket in this test, for what the real ones never ask.
"""

import fcntl
import os
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from migrate.pair import DaemonProcess, Pair, Process, wait_settled
from proto.messages import (
    Hello,
    Message,
    Pause,
    Paused,
    PauseFailed,
    Resume,
    ResumeFailed,
    Running,
    Welcome,
    encode,
    guest_decoder,
)

from ..path.commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
STRICT = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-pthread"]
COMPILE_DEADLINE_SECONDS = 50
DEADLINE_SECONDS = 20.0
PAGE_BYTES = 4096
SIZE_BYTES = 8 << 20
PAGES = SIZE_BYTES // PAGE_BYTES
SEED = 20
MOVES = {"bulk": True, "faults alone": False}
Start = Callable[..., Process]
_M = TypeVar("_M", bound=Message)


@pytest.fixture(scope="module")
def source_text(repository: Path) -> str:
    return (repository / "tests/guests/foreign_guest.c").read_text()


def compiled(repository: Path, program: Path, *options: str) -> Path:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    command = [*compiler, *STRICT, *options, str(repository / "tests/guests/foreign_guest.c"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(repository, tmp_path_factory.mktemp("foreign") / "foreign-guest", "-O2")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Start]:
    """``start(role, runtime_dir, name)``: attached when it returns, ended when the test does."""
    with ExitStack() as stack:

        def start(
            role: str, at: Path, name: str, *, seed: int = SEED, steps: int | None = None, program: Path = program
        ) -> Process:
            arguments = [role, str(at / "guests.sock"), name, str(SIZE_BYTES), str(seed)]
            if steps is not None:
                arguments.append(str(steps))
            guest = Process(name, arguments, tmp_path / f"{name}.log", command=[str(program)])
            stack.callback(guest.kill)
            return guest

        yield start


def waiting(start: Start, daemon: DaemonProcess, name: str, **options: object) -> Process:
    guest = start("waiting", daemon.runtime_dir, name, **options)
    guest.event("waiting")
    return guest


def running(start: Start, daemon: DaemonProcess, name: str, **options: object) -> Process:
    """One that has written every page once."""
    guest = start("running", daemon.runtime_dir, name, **options)
    guest.event("round", deadline_seconds=DEADLINE_SECONDS)
    return guest


def memory_of(guest: Process) -> Path:
    links = Path(f"/proc/{guest.pid}/fd").iterdir()
    return next(link for link in links if str(link.readlink()).startswith("/memfd:foreign-guest"))


def check_arrived(left: Process, arrived: Process) -> None:
    """The same sequence of steps goes on there, and every page is what it says."""
    paused = left.event("paused")["number"]
    assert arrived.event("resumed")["number"] == paused
    verified = arrived.event("verified", "failed", deadline_seconds=DEADLINE_SECONDS)
    assert verified["event"] == "verified", verified
    assert verified["number"] >= paused
    left.event("released")
    assert left.wait() == 0, left.log()


def test_it_includes_nothing_of_the_product(source_text: str) -> None:
    includes = re.findall(r"^\s*#\s*include\s*(.*)$", source_text, re.MULTILINE)
    assert len(includes) > 10
    assert [name for name in includes if not re.fullmatch(r"<[a-z_/]+\.h>", name)] == []


@pytest.mark.parametrize("bulk", MOVES.values(), ids=MOVES.keys())
def test_it_moves_there_and_back(pair: Pair, start: Start, bulk: bool) -> None:
    names = [f"{place}-{'bulk' if bulk else 'faults'}" for place in ("here", "there", "back")]
    there = waiting(start, pair.destination, names[1])
    here = running(start, pair.source, names[0])
    status = pair.move(names[0], pair.source, pair.destination, bulk=bulk)
    assert status.state == "complete", status.error
    check_arrived(here, there)
    with memory_of(there).open("rb") as memory:
        assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK
    back = waiting(start, pair.source, names[2])
    status = pair.move(names[1], pair.destination, pair.source, bulk=bulk)
    assert status.state == "complete", status.error
    assert status.downtime_seconds is not None
    assert status.pages_total == PAGES
    if not bulk:
        assert status.pages["urgent"] + status.pages["zero"] == PAGES
    check_arrived(there, back)


def test_it_moves_beside_a_guest_at_work(pair: Pair, start: Start) -> None:
    """Both at once, each to the daemon that the other one leaves."""
    commuter = Commuter(pair, "native", "16M")
    try:
        there, here = waiting(start, pair.source, "beside"), running(start, pair.destination, "beside")
        with pair.source.client() as source, pair.destination.client() as destination:
            moves = [
                (source, source.migrate(commuter.guest_id, pair.destination.address)),
                (destination, destination.migrate("beside", pair.source.address)),
            ]
            for client, status in moves:
                settled = wait_settled(client, status.id, DEADLINE_SECONDS)
                assert settled.state == "complete", settled.error
        check_arrived(here, there)
        commuter.arrived()
    finally:
        commuter.end()


@pytest.mark.requires("asan")
def test_it_moves_under_sanitizers(pair: Pair, start: Start, repository: Path, tmp_path: Path) -> None:
    sanitized = compiled(
        repository, tmp_path / "sanitized", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    there = waiting(start, pair.destination, "sanitized", program=sanitized)
    here = running(start, pair.source, "sanitized", program=sanitized)
    assert pair.move("sanitized", pair.source, pair.destination).state == "complete"
    check_arrived(here, there)
    assert here.log() + there.log() == ""


# --- that the checks can fail ---------------------------------------------------------------------------------------


def damage(guest: Process, *page_indices: int) -> None:
    """One bit of each page, behind the guest's back."""
    with memory_of(guest).open("r+b", buffering=0) as memory:
        for page_index in page_indices:
            offset_bytes = page_index * PAGE_BYTES + 1000
            byte = os.pread(memory.fileno(), 1, offset_bytes)[0]
            assert os.pwrite(memory.fileno(), bytes([byte ^ 1]), offset_bytes) == 1


def check_failed(daemon: DaemonProcess, guest: Process, *page_indices: int) -> None:
    assert guest.event("broken", "verified", deadline_seconds=DEADLINE_SECONDS)["number"] in page_indices
    assert guest.event("failed", "verified")["event"] == "failed"
    assert guest.wait() == 1
    until(lambda: f'"{guest.name}", "reason": "a page does not hold' in daemon.log(), "the daemon has heard of it")


def test_a_step_finds_damage(pair: Pair, start: Start) -> None:
    guest = running(start, pair.source, "busy")
    guest.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, guest.pid, os.WSTOPPED)
    damage(guest, 5, 6)  # it may just be about to write one of them
    guest.signal(signal.SIGCONT)
    check_failed(pair.source, guest, 5, 6)


@pytest.mark.parametrize("page_indices", [(), (7,)], ids=["intact", "damaged"])
def test_verifying_finds_damage(pair: Pair, start: Start, page_indices: tuple[int, ...]) -> None:
    """Nothing but the check of all memory sees it: this guest makes no step after its first round, on neither side."""
    name = f"idle-{len(page_indices)}"
    there = waiting(start, pair.destination, name, steps=PAGES)
    here = running(start, pair.source, name, steps=PAGES)
    damage(here, *page_indices)
    status = pair.move(name, pair.source, pair.destination)
    assert status.state == "complete", status.error
    assert status.downtime_seconds is None
    if page_indices:
        check_failed(pair.destination, there, *page_indices)
    else:
        check_arrived(here, there)


# --- what it refuses, and what it does without its daemon -------------------------------------------------------------


def test_another_guests_state_is_refused(pair: Pair, start: Start) -> None:
    """The guest runs on at the source, and the one that waited waits on."""
    there = waiting(start, pair.destination, "choosy", seed=SEED + 1)
    here = running(start, pair.source, "choosy")
    status = pair.move("choosy", pair.source, pair.destination)
    assert status.state == "failed"
    assert status.error is not None
    assert status.error.code == "aborted"
    assert here.event("paused")["number"] == here.event("resumed")["number"]
    right = running(start, pair.source, "right", seed=SEED + 1)
    assert pair.move("right", pair.source, pair.destination).state == "complete"
    check_arrived(right, there)


def wide_text(text: str) -> bytes:
    return b"\xdb" + struct.pack(">I", len(text)) + text.encode()


WIDE_PAUSE = (
    b"\xdf\0\0\0\2" + wide_text("deadline_ms") + b"\xd3" + struct.pack(">q", 1000) + wide_text("type") + wide_text("pause")
)
"""As wide as msgpack has its ints and lengths, and ``type`` last."""


class BareDaemon:
    """The other end of one guest socket, and nothing behind it."""

    def __init__(self, listener: socket.socket) -> None:
        self.socket, _ = listener.accept()
        self.socket.settimeout(DEADLINE_SECONDS)
        self._decoder = guest_decoder()
        data, self.descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 65)
        self._messages = self._decoder.feed(data)
        self.hello = self.receive(Hello)
        self.send(Welcome(major=1, minor=7, software="bare"))

    def send(self, message: Message) -> None:
        self.socket.sendall(encode(message))

    def receive(self, kind: type[_M]) -> _M:
        while not self._messages:
            data = self.socket.recv(1 << 16)
            assert data, f"the guest closed instead of {kind.__name__}"
            self._messages = self._decoder.feed(data)
        message = self._messages.pop(0)
        assert isinstance(message, kind), message
        return message

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        self.socket.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "guests.sock"))
        listener.listen()
        listener.settimeout(DEADLINE_SECONDS)
        yield listener


def test_it_is_resumed_once(start: Start, listener: socket.socket, tmp_path: Path) -> None:
    start("waiting", tmp_path, "once")
    daemon = BareDaemon(listener)
    try:
        assert (daemon.hello.role, len(daemon.descriptors)) == ("waiting", 2)
        daemon.socket.sendall(struct.pack("<I", len(WIDE_PAUSE)) + WIDE_PAUSE)
        daemon.receive(PauseFailed)
        daemon.send(Resume(epoch=3, state=b"not one of mine"))
        assert daemon.receive(ResumeFailed).epoch == 3
        state = struct.pack("<3Q", SEED, SIZE_BYTES, PAGES)
        for _ in range(2):
            daemon.send(Resume(epoch=4, state=state))
            assert daemon.receive(Running).epoch == 4
        daemon.send(Resume(epoch=5, state=state))
        assert daemon.receive(ResumeFailed).epoch == 5
        ready, _, _ = select.select([daemon.descriptors[-1]], [], [], DEADLINE_SECONDS)
        assert ready, "its worker waits for a page"
    finally:
        daemon.close()


def steps_made(daemon: BareDaemon) -> int:
    """As its state says, between a pause and a resume."""
    daemon.send(Pause(deadline_ms=10_000))
    seed, size_bytes, steps = struct.unpack("<3Q", daemon.receive(Paused).state)
    assert (seed, size_bytes) == (SEED, SIZE_BYTES)
    daemon.send(Resume(epoch=0, state=None))
    return int(steps)


def test_it_outlives_its_daemon(start: Start, listener: socket.socket, tmp_path: Path) -> None:
    guest = start("running", tmp_path, "survivor")
    first = BareDaemon(listener)
    first.socket.sendall(struct.pack("<I", 2) + b"\x81\xc0")  # a map that ends early
    guest.event("detached")
    first.close()
    second = BareDaemon(listener)
    try:
        assert second.hello == first.hello
        assert len(second.descriptors) == 1
        first_steps = steps_made(second)
        until(lambda: steps_made(second) > first_steps, "it runs on after each pause", DEADLINE_SECONDS)
    finally:
        second.close()


def test_wrong_usage(program: Path) -> None:
    guest = subprocess.run([program, "walking"], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert guest.returncode == 1
    assert "usage: foreign-guest running|waiting" in guest.stdout
