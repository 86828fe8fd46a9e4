"""The scenario `tracking`: what a guest loses by being tracked, told by its own steps.

A process of its own (``python -m migrate.bench.tracking``) is guest and source daemon in one: the guest steps flat out, beside it
the calls of precopy that a daemon makes. Windows of three kinds take turns: not tracked at all; tracked, and scanned every
100 ms; tracked while rounds go out over loopback as fast as they can.
"""

import contextlib
import json
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from migrate.bench.figures import Bound, Result
from migrate.dataplane import LoopResult, MemoryRegion, SourcePlane
from migrate.errors import PostcopyError
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guest.tracking import WriteTracking
from migrate.guests.workload.native import BLOCK_BYTES, Pattern, Workload, WorkloadConfig

MIB = 1 << 20
SCAN_EVERY_SECONDS = 0.1
WRITE_PER_MILLE = 1
"""Of its steps, which are about a million a second; each writes a page and the guest's own table of pages."""
DEADLINE_SECONDS = 120
SINK = "import socket, sys; peer = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\nwhile peer.recv(1 << 20): pass"


class Tracked:
    """A guest at work and what its daemon does to it."""

    def __init__(self, memory: GuestMemory, workload: Workload) -> None:
        self._memory, self._workload = memory, workload
        self.written_pages = 0

    def steps_a_second(self, seconds: float) -> float:
        begun_steps, begun = self._workload.report().steps, time.monotonic()
        time.sleep(seconds)
        return (self._workload.report().steps - begun_steps) / (time.monotonic() - begun)

    @contextlib.contextmanager
    def plane(self) -> Iterator[SourcePlane]:
        """Armed: the guest is tracked while this lasts."""
        regions = [
            MemoryRegion(region.guest_address, region.size_bytes, region.offset_bytes, region.page_bytes, descriptor)
            for region, descriptor in zip(self._memory.regions, self._memory.files, strict=True)
        ]
        tracking, plane = WriteTracking(self._memory.regions), SourcePlane(regions)
        try:
            plane.track(tracking.pagemap_fd)
            finished(plane.precopy_arm())
            yield plane
        finally:
            plane.close()
            tracking.close()

    def scanned(self, seconds: float) -> float:
        self.written_pages = 0
        with self.plane() as plane:

            def scan() -> None:
                finished(plane.precopy_count())
                figures = plane.figures()  # nothing is ever sent: every page is pending, and counted as if written
                self.written_pages += figures["pages_written"] - figures["pages_pending"]
                finished(plane.precopy_collect())

            with repeated(scan, SCAN_EVERY_SECONDS):
                return self.steps_a_second(seconds)

    def streamed(self, seconds: float, sock: socket.socket) -> float:
        with self.plane() as plane:

            def sent_round() -> None:
                finished(plane.precopy_send(sock.fileno()))
                finished(plane.precopy_count())
                finished(plane.precopy_collect())

            with repeated(sent_round, 0):
                return self.steps_a_second(seconds)


def finished(result: LoopResult) -> None:
    if result.reason != "finished":
        raise result.error()


@contextlib.contextmanager
def repeated(call: Callable[[], None], pause_seconds: float) -> Iterator[None]:
    """On a thread of its own, until the block ends; what it raises is raised here."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.wait(pause_seconds):
                call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="precopy")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def sink() -> Iterator[socket.socket]:
    """A connection over loopback to a process that reads and forgets."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-P", "-c", SINK, str(server.getsockname()[1])]) as reader,
    ):
        try:
            sock, _ = server.accept()
            with sock:
                yield sock
        finally:
            reader.kill()


def run_guest(size_bytes: int, window_seconds: float, rounds: int, seed: int) -> dict[str, list[float]]:
    """Steps a second in every window; ``rewritten``: share of all pages written a second, as the scans find."""
    seen: dict[str, list[float]] = {"plain": [], "tracked": [], "streamed": [], "rewritten": []}
    memory = GuestMemory([MemorySpec(size_bytes, "memfd")])
    with Workload(memory.address, memory.size_bytes) as workload, sink() as sock:
        workload.start(WorkloadConfig(pattern=Pattern.RANDOM, write_per_mille=WRITE_PER_MILLE, seed=seed))
        poll = select.poll()
        poll.register(workload.event_fd, select.POLLIN)
        if not poll.poll(DEADLINE_SECONDS * 1000):
            raise TimeoutError(f"the guest has made no step within {DEADLINE_SECONDS} s")
        guest = Tracked(memory, workload)
        for _ in range(rounds):
            seen["plain"].append(guest.steps_a_second(window_seconds))
            seen["tracked"].append(guest.scanned(window_seconds))
            seen["rewritten"].append(guest.written_pages / (size_bytes / BLOCK_BYTES) / window_seconds)
            seen["streamed"].append(guest.streamed(window_seconds, sock))
    memory.close()
    return seen


def tracking(tiny: bool) -> Result:
    """Of a guest that touches its memory at random and rewrites about 1 % of it a second: its steps beside those untracked."""
    size_bytes, window_seconds, rounds = (16 * MIB, 0.2, 2) if tiny else (1024 * MIB, 1.0, 15)
    command = [sys.executable, "-P", "-m", "migrate.bench.tracking", str(size_bytes), str(window_seconds), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    if done.returncode != 0:
        raise PostcopyError("bench tracking", expected="a guest that can be tracked", got=done.stderr.strip().splitlines()[-1])
    seen: dict[str, list[float]] = json.loads(done.stdout)
    tracked, streamed = (
        statistics.median(1 - slow / plain for slow, plain in zip(seen[way], seen["plain"], strict=True))
        for way in ("tracked", "streamed")
    )
    figures = {
        "windows": rounds,
        "slow_down": tracked,
        "slow_down_while_rounds_are_sent": streamed,
        "pages_rewritten_a_second_ratio": statistics.median(seen["rewritten"]),
        "steps_a_second": statistics.median(seen["plain"]),
    }
    return Result("tracking", "", {}, {}, (Bound("figures.slow_down", 0.05),), figures)


if __name__ == "__main__":
    json.dump(run_guest(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), seed=1), sys.stdout)
