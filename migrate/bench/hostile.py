"""The scenario `hostile`: first touches without bulk, with a hostile client at both daemons' TCP ports and without, in turns.

The client dials a thousand times a second. Over each connection it sends garbage, or half a greeting or a request and no more, or
so much to be answered that it does not read; of the last CONNECTIONS it lets none go. That it is here, and not on a host of its
own, takes CPU time from the guest and the daemons, and counts against us.
"""

import contextlib
import random
import socket
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence

from migrate.bench.figures import Bound, Latencies, Result
from migrate.bench.scenarios import MIB, Shuttle, bench_pair
from migrate.pair import Pair
from proto.messages import ClockPing, encode
from proto.preamble import NO_TOKEN, ConnectionKind, Preamble

CONNECTIONS = 300
PAUSE_SECONDS = 0.001
DIAL_SECONDS = 2.0
UNDER_WAY = 100


def _preamble(dice: random.Random) -> bytes:
    return Preamble(ConnectionKind.CONTROL, dice.randbytes(16), 0, 0, NO_TOKEN).encode()


def _request(dice: random.Random) -> bytes:
    return b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"x" * dice.randint(1, 4096)


TO_DAEMON: tuple[Callable[[random.Random], bytes], ...] = (
    lambda dice: dice.randbytes(dice.randint(1, 4096)),
    lambda dice: _preamble(dice)[: dice.randint(0, 63)],
    _preamble,
    lambda dice: _preamble(dice) + dice.randbytes(200),
    lambda dice: _preamble(dice) + encode(ClockPing(sent_ns=1)) * 1000,
)
TO_HTTP: tuple[Callable[[random.Random], bytes], ...] = (
    lambda dice: dice.randbytes(dice.randint(1, 4096)),
    lambda dice: _request(dice)[: dice.randint(0, 60)],
    _request,
    lambda dice: _request(dice) + b"\r\n\r\n",
)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


class HostileClient:
    """``with``: at work until the block ends, on a thread of its own."""

    def __init__(self, pair: Pair) -> None:
        daemons = (pair.source, pair.destination)
        self._targets = [(_place(daemon.address), TO_DAEMON) for daemon in daemons]
        self._targets += [(_place(daemon.metrics_address), TO_HTTP) for daemon in daemons]
        self.attempts = 0
        self._open: list[socket.socket] = []
        self._over, self._under_way = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hostile")

    def __enter__(self) -> "HostileClient":
        self._thread.start()
        self._under_way.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for sock in self._open:
            sock.close()

    def _run(self) -> None:
        dice = random.Random(1)
        while not self._over.wait(PAUSE_SECONDS):
            place, tricks = dice.choice(self._targets)
            with contextlib.suppress(OSError):
                self._open.append(_dialled(place, dice.choice(tricks)(dice)))
            if len(self._open) > CONNECTIONS:
                self._open.pop(0).close()
            self.attempts += 1
            if self.attempts == UNDER_WAY:
                self._under_way.set()


def _dialled(place: tuple[str, int], data: bytes) -> socket.socket:
    sock = socket.create_connection(place, DIAL_SECONDS)
    with contextlib.suppress(OSError):
        sock.sendall(data)
    return sock


class Side:
    """Its rounds: a round's p99 is a lottery while others use the machine, so medians of theirs are quoted."""

    def __init__(self) -> None:
        self._p50: list[float] = []
        self._p99: list[float] = []
        self._n = 0.0

    def add(self, buckets: Iterable[Sequence[int]]) -> None:
        latencies = Latencies()
        latencies.add(buckets)
        figures = latencies.figures()
        self._p50.append(figures["p50"])
        self._p99.append(figures["p99"])
        self._n += figures["n"]

    def figures(self) -> dict[str, float]:
        return {"p50": statistics.median(self._p50), "p99": statistics.median(self._p99), "n": self._n}


def hostile(tiny: bool) -> Result:
    """Beside it the same without it, in place of a floor."""
    size_bytes, rounds = (4 * MIB, 1) if tiny else (64 * MIB, 9)
    attacked, alone = Side(), Side()
    attempts = 0
    with bench_pair() as pair:
        shuttle = Shuttle(pair, "attacked", size_bytes, "--pattern", "permute", "--write-ratio", "0")
        for _ in range(rounds):
            shuttle.move(bulk=False, warmed=True)
            alone.add(shuttle.first_touches())
            with HostileClient(pair) as client:
                shuttle.move(bulk=False, warmed=True)
            attacked.add(shuttle.first_touches())
            attempts += client.attempts
    figures: dict[str, float] = {"connections": attempts, "rounds": rounds}
    return Result("hostile", "seconds", attacked.figures(), alone.figures(), (Bound("ratio.p99", 1.5),), figures)
