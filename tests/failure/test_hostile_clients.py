"""Whoever can dial a daemon, while a guest moves there: floods, garbage, silence, slow readers. The guest moves on and proves
itself, the daemon answers who means well, and keeps no more than it has to."""

import contextlib
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.pair import Pair
from proto.messages import ClockPing, Discard, PageRange, Refused, control_decoder, encode
from proto.preamble import ANSWER_BYTES, NO_TOKEN, Answer, AnswerCode, ConnectionKind, Preamble

from ..path.commuter import Commuter, until
from .fakes import Connection, FakeGuest, FakeSource, place_of, receive_exactly

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
CONNECTIONS = 300
HALF_OPEN_MAX = 64
MORE_DESCRIPTORS = 40  # of what is going on besides


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: Pair) -> Commuter:
    return Commuter(pair, "good", "16M", options=("--rate", "5000"))


class Attack:
    """A client at work until the block ends, as often as it can."""

    def __init__(self, place: tuple[str, int], once: Callable[[tuple[str, int], random.Random], socket.socket | None]) -> None:
        self.rounds = 0
        self._place, self._once, self._over = place, once, threading.Event()
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="attack", daemon=True)

    def __enter__(self) -> "Attack":
        self._thread.start()
        until(lambda: self.rounds > HALF_OPEN_MAX, "it is under way")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        for sock in self._open:
            sock.close()

    def _run(self) -> None:
        dice = random.Random(1)
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                sock = self._once(self._place, dice)
                if sock is not None:
                    self._open.append(sock)
            while len(self._open) > CONNECTIONS:
                self._open.pop(0).close()
            self.rounds += 1
            self._over.wait(0.001)


def dialled(place: tuple[str, int], data: bytes) -> socket.socket:
    sock = socket.create_connection(place, 2)
    with contextlib.suppress(OSError):
        sock.sendall(data)
    return sock


def control_preamble(dice: random.Random) -> bytes:
    return Preamble(ConnectionKind.CONTROL, dice.randbytes(16), 0, 0, NO_TOKEN).encode()


def garbage(place: tuple[str, int], dice: random.Random) -> socket.socket | None:
    dialled(place, dice.randbytes(dice.randint(1, 4096))).close()
    return None


def slow_loris(place: tuple[str, int], dice: random.Random) -> socket.socket:
    return dialled(place, control_preamble(dice)[: dice.randint(0, 63)])


def silence_after_the_preamble(place: tuple[str, int], dice: random.Random) -> socket.socket:
    return dialled(place, control_preamble(dice))


def garbage_after_the_preamble(place: tuple[str, int], dice: random.Random) -> socket.socket:
    return dialled(place, control_preamble(dice) + dice.randbytes(200))


def pings_and_does_not_read(place: tuple[str, int], dice: random.Random) -> socket.socket:
    return dialled(place, control_preamble(dice) + encode(ClockPing(sent_ns=1)) * 1000)


ATTACKS = (garbage, slow_loris, silence_after_the_preamble, garbage_after_the_preamble, pings_and_does_not_read)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_guest_moves_on(guest: Commuter, attack: Callable[[tuple[str, int], random.Random], socket.socket | None]) -> None:
    """A migration begins, and ends, beside it; what the daemon holds open stays bounded."""
    before = open_files(guest.goes_to.pid)
    daemon = guest.goes_to
    with Attack(place_of(daemon.address), attack) as attacker:
        assert guest.move().state == "complete"
        assert attacker.rounds > HALF_OPEN_MAX
        until(lambda: open_files(daemon.pid) <= before + 2 * HALF_OPEN_MAX + MORE_DESCRIPTORS, "what it holds is bounded")
        with daemon.client() as client:
            assert client.migrations()


def test_history_is_not_pushed_out(pair: Pair, guest: Commuter) -> None:
    """By migrations that nobody ever offered."""
    daemon = guest.goes_to
    moved = guest.move()
    with daemon.client() as client:
        for _ in range(HALF_OPEN_MAX + 8):
            dialled(place_of(daemon.address), control_preamble(random.Random(os.urandom(8)))).close()
        until(lambda: sum(one.guest_id == "?" for one in client.migrations()) > 8, "they are known")
        assert client.status(moved.id).state == "complete"


def test_who_has_been_offered_is_let_be(pair: Pair) -> None:
    """Those that give way have said nothing; this one has, and is answered although it takes its time."""
    place = place_of(pair.destination.address)
    with FakeGuest("offered", "waiting", "3M") as waits, FakeSource(pair.destination.address, [(3 << 20, 4096)]) as source:
        waits.attach(pair.destination.runtime_dir / "guests.sock")
        source.offer()
        silent = [dialled(place, control_preamble(random.Random(seed))) for seed in range(2 * HALF_OPEN_MAX)]
        assert Answer.decode(receive_exactly(silent[0], ANSWER_BYTES)).code is AnswerCode.WELCOME
        assert Connection(silent[0], control_decoder()).receive(Refused).code == "busy"
        _, answer = source.dial(ConnectionKind.URGENT, token=source.token)
        assert answer.code is AnswerCode.WELCOME
        for sock in silent:
            sock.close()


def ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_guests_that_say_nothing(pair: Pair) -> None:
    """On the guest socket likewise: the oldest goes, one that says hello is known."""
    path = pair.destination.runtime_dir / "guests.sock"
    before = open_files(pair.destination.pid)
    silent: list[socket.socket] = []
    for _ in range(CONNECTIONS):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))  # waits for room in the listener's queue
        silent.append(sock)
    until(lambda: open_files(pair.destination.pid) <= before + HALF_OPEN_MAX + MORE_DESCRIPTORS, "the oldest have gone")
    with FakeGuest("polite", "waiting", "5M") as guest:
        until(lambda: ended(silent[-HALF_OPEN_MAX - 1]), "the queue has been accepted")
        guest.attach(path)
    for sock in silent:
        sock.close()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_guest_that_asks_and_does_not_read(pair: Pair) -> None:
    """Each `discard` is answered: who never reads the answers is let go, before they fill the daemon's memory."""
    with FakeGuest("deaf", "running") as guest:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        discards = encode(Discard(ranges=[PageRange(region=0, page_index=0, page_count=1)])) * 1000
        before = resident_bytes(pair.destination.pid)
        deadline = time.monotonic() + 30
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                guest.send(discards)
        assert time.monotonic() < deadline, "it is still heard"
        assert resident_bytes(pair.destination.pid) - before < 64 << 20
        assert "guest does not read" in pair.destination.log()


def test_descriptors_run_out(guest: Commuter) -> None:
    """A daemon that may not open one file more says so, and is itself again when it may."""
    daemon = guest.goes_to
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (open_files(daemon.pid) + 1, limits[1]))
    silent = [dialled(place_of(daemon.address), b"") for _ in range(8)]
    until(lambda: "no connection can be accepted" in daemon.log(), "it says so")
    for sock in silent:
        sock.close()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
    assert guest.move().state == "complete"
