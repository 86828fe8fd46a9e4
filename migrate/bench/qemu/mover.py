"""What moves a machine, and what its guest saw of that: the same figures, from the same guest, whoever moved it.

Nothing a mover says of itself is believed but its count of bytes. Downtime is what the guest's heartbeats tell (debugcon.py):
the last at the source to the first at the destination, demand faults included; once for the thread that only beats, once for the
touching threads. Fault latencies are the guest's own touches from the switch on that took longer than FAULT_NS, less as many as
took that long before the move, when there were no faults, in as much time.
"""

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from migrate.bench.figures import Latencies
from migrate.errors import PostcopyError
from migrate.guests.linux.debugcon import Debugcon, Told, beats_between
from migrate.guests.linux.machine import GuestImage, LinuxGuest

FAULT_NS = 8_000
"""A touch that took longer was a fault, or was made so long by an interrupt in the guest or the host's scheduler. Others take
0.1 to 4 µs under TCG."""
MACHINE = ("qemu-system-x86_64", "-machine", "pc,accel=tcg")
BOOT_SECONDS = 60.0
TOLD_SECONDS = 20.0
MOVE_SECONDS = 60.0
WARM_SECONDS = 0.5
"""Of work before a move: the guest has run on, and the pages it works on are those of its pattern."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a mover knows. Times are CLOCK_MONOTONIC of this process, around all that it did."""

    begun_ns: int
    ended_ns: int
    """All memory is at the destination."""
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """Seconds, bytes, and counts of the guest's."""

    downtime_seconds: float
    """Between two heartbeats."""
    touch_gap_seconds: float
    """Between two heartbeats that tell of completed steps."""
    longest_gap_seconds: float
    """Between two heartbeats that tell of steps, from the last one at the source to the end of the move."""
    total_seconds: float
    moved_bytes: int
    lost_beats: int
    pace: float
    """Touches a second from the switch to the end, over those before the move: how much the guest got done meanwhile."""
    fault_buckets: dict[int, int]
    """Lower bound in ns, count."""

    def faults(self) -> dict[str, float]:
        latencies = Latencies()
        latencies.add(self.fault_buckets.items())
        return latencies.figures()


@dataclass(frozen=True, slots=True)
class Touches:
    """Latencies of all touches so far, as told at that time."""

    at_ns: int
    buckets: dict[int, int]

    def since(self, before: "Touches") -> tuple[float, dict[int, int]]:
        """Seconds, and the touches of that time."""
        buckets = {low_ns: count - before.buckets.get(low_ns, 0) for low_ns, count in self.buckets.items()}
        return (self.at_ns - before.at_ns) / 1e9, buckets


class Mover(ABC):
    """One machine, moved again and again by ``move``, and stopped while others are measured (``frozen``)."""

    name: str

    def __init__(self, guest: LinuxGuest, image: GuestImage, directory: Path) -> None:
        self._guest, self._image, self._directory = guest, image, directory
        self._launched = 0
        self._debugcons: list[Debugcon] = []

    @abstractmethod
    def _launch(self, command: list[str], number: int, *, arriving: bool) -> None:
        """A machine of this command line: running, or ``arriving`` and ready for what ``_migrate`` sends to it."""

    @abstractmethod
    def _migrate(self, *, precopy: bool, preempt: bool) -> Moved:
        """To the one that was launched last; the old one is gone when this returns."""

    @abstractmethod
    def _pids(self) -> list[int]:
        """Of everything that runs for the machine now."""

    @abstractmethod
    def _end(self) -> None:
        """All that was launched."""

    def launch(self) -> None:
        """It begins to boot."""
        self._launch_next(arriving=False)

    def wait_booted(self) -> None:
        self._debugcons[-1].wait_line("ready", BOOT_SECONDS)

    def move(self, *, precopy: bool, preempt: bool = False) -> Move:
        """Raises PostcopyError, also when the guest found itself broken."""
        source = self._debugcons[-1]
        destination = self._launch_next(arriving=True)
        early = _reported(source, since_ns=time.monotonic_ns())
        before = _reported(source, since_ns=early.at_ns + int(WARM_SECONDS * 1e9))
        moved = self._migrate(precopy=precopy, preempt=preempt)
        after = _reported(destination, since_ns=moved.ended_ns)
        source.close()
        self._debugcons.remove(source)
        if damage := [*source.told.damage, *destination.told.damage]:
            raise PostcopyError(f"guest moved by {self.name}", expected="to be intact", got=damage[0].fields)
        return measured(moved, source.told, destination.told, before.since(early), after)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Beside another machine's measurement it must not work."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in self._pids():
                os.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """After a move that failed."""
        self._stop()
        self.launch()
        self.wait_booted()

    def _stop(self) -> None:
        self._end()
        for debugcon in self._debugcons:
            debugcon.close()
        self._debugcons.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _launch_next(self, *, arriving: bool) -> Debugcon:
        self._launched += 1
        path = self._directory / f"{self.name}-{self._launched}"
        socket_path = path.with_suffix(".debugcon")
        debugcon = Debugcon(socket_path, arriving=arriving)
        self._debugcons.append(debugcon)
        arguments = self._guest.arguments(self._image, socket_path, serial=path.with_suffix(".serial"))
        self._launch([*MACHINE, *arguments], self._launched, arriving=arriving)
        return debugcon


def _reported(debugcon: Debugcon, since_ns: int) -> Touches:
    debugcon.wait(lambda told: told.touches_at_ns > since_ns, "a report", TOLD_SECONDS)
    with debugcon.changed:
        return Touches(debugcon.told.touches_at_ns, debugcon.told.touches)


def measured(moved: Moved, source: Told, destination: Told, quiet: tuple[float, dict[int, int]], after: Touches) -> Move:
    """``quiet``: seconds before the move, and their touches. Raises PostcopyError for a guest in two places."""
    last, first = source.beats[-1], destination.beats[0]
    if first.at_ns < last.at_ns:
        raise PostcopyError("guest", expected="to run in one place", got=f"heartbeats of both for {last.at_ns - first.at_ns} ns")
    last_stepped = next(beat for beat in reversed(source.beats) if beat.stepped)
    stepped = [last_stepped, *(beat for beat in destination.beats if beat.stepped)]
    gaps = [(begin.at_ns, end.at_ns - begin.at_ns) for begin, end in pairwise(stepped)]
    at_switch = Touches(source.touches_at_ns, source.touches)
    seconds, touches = after.since(at_switch)
    running_seconds = seconds - gaps[0][1] / 1e9
    quiet_seconds, quiet_touches = quiet
    share = running_seconds / quiet_seconds
    return Move(
        downtime_seconds=(first.at_ns - last.at_ns) / 1e9,
        touch_gap_seconds=gaps[0][1] / 1e9,
        longest_gap_seconds=max(gap_ns for began_ns, gap_ns in gaps if began_ns <= moved.ended_ns) / 1e9,
        total_seconds=(moved.ended_ns - moved.begun_ns) / 1e9,
        moved_bytes=moved.moved_bytes,
        lost_beats=beats_between(last, first),
        pace=sum(touches.values()) / seconds / (sum(quiet_touches.values()) / quiet_seconds),
        fault_buckets={
            low_ns: max(0, count - round(share * quiet_touches.get(low_ns, 0)))
            for low_ns, count in touches.items()
            if low_ns >= FAULT_NS
        },
    )
