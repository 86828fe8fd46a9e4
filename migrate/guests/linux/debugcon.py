"""The host's end of the guest's debugcon: debugcon.h says what comes; here it is read, dated and added up.

A beat is dated as it is read (CLOCK_MONOTONIC of the host): the guest's own clocks stand still with the guest. So a gap between
two beats is what the guest did not run, to about a beat (1 ms) and this process's own delay: it should do little else meanwhile.
"""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from migrate.errors import DeadlineError, PostcopyError

BEAT = 0x80
BEAT_STEPPED = 0x40
BEAT_NUMBERS = 0x40
BEAT_SECONDS = 0.001
WORDS = ("ready", "report", "touch", "disk", "failed", "disk-failed", "disk-wrong", "flipped", "fatal")
_BEATS = re.compile(rb"[\x80-\xff]")
_TEXT = re.compile(rb"[\x00-\x7f]+")
_RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Beat:
    at_ns: int
    number: int
    """Modulo BEAT_NUMBERS."""
    stepped: bool
    """The touching threads have completed a step since the beat before."""


@dataclass(frozen=True, slots=True)
class Line:
    at_ns: int
    word: str
    fields: dict[str, str]

    def number(self, name: str) -> int:
        return int(self.fields[name])


@dataclass(slots=True)
class Told:
    """What the stream has told so far, in the order of its bytes."""

    beats: list[Beat] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    """All but ``touch``."""
    arriving: bool = False
    """The machine comes from elsewhere, perhaps amid a line: what it says up to the first line's end is dropped."""
    touches: dict[int, int] = field(default_factory=dict)
    """Latency of every touch so far: lower bound of its bucket in ns, count."""
    touches_at_ns: int = 0
    _text: bytes = b""

    def feed(self, data: bytes, at_ns: int) -> None:
        """Raises PostcopyError for a line that debugcon.h does not have."""
        for byte in _BEATS.findall(data):
            self.beats.append(Beat(at_ns, byte[0] % BEAT_NUMBERS, bool(byte[0] & BEAT_STEPPED)))
        *lines, self._text = (self._text + b"".join(_TEXT.findall(data))).split(b"\n")
        if lines and self.arriving:
            del lines[0]
            self.arriving = False
        for text in lines:
            self._take(text.decode(), at_ns)

    def _take(self, text: str, at_ns: int) -> None:
        word, *rest = text.split()
        if word == "touch":
            self.touches = {int(low_ns): int(count) for low_ns, _, count in (entry.partition(":") for entry in rest)}
            self.touches_at_ns = at_ns
        elif word in WORDS:
            self.lines.append(Line(at_ns, word, {name: value for name, _, value in (entry.partition("=") for entry in rest)}))
        else:
            raise PostcopyError("guest's debugcon", expected=", ".join(WORDS), got=text[:80])

    def last(self, word: str) -> Line | None:
        return next((line for line in reversed(self.lines) if line.word == word), None)

    @property
    def damage(self) -> list[Line]:
        """Whatever the guest has found wrong with its memory or its disk; some of it is told again and again."""
        return [line for line in self.lines if line.word in ("failed", "disk-failed", "disk-wrong", "fatal")]

    @property
    def lost_beats(self) -> int:
        return sum(beats_between(before, after) for before, after in pairwise(self.beats))

    def gaps_seconds(self, *, stepped: bool = False) -> Iterator[float]:
        """Between consecutive beats; ``stepped``: between those that tell of steps."""
        beats = [beat for beat in self.beats if beat.stepped or not stepped]
        return ((after.at_ns - before.at_ns) / 1e9 for before, after in pairwise(beats))


def beats_between(before: Beat, after: Beat) -> int:
    """How many there must have been that did not come (modulo BEAT_NUMBERS)."""
    return (after.number - before.number - 1) % BEAT_NUMBERS


class Debugcon:
    """Listens where a QEMU's debugcon connects, and reads until it ends. ``told`` is read under ``changed`` only."""

    def __init__(self, path: Path, *, arriving: bool = False) -> None:
        self.told = Told(arriving=arriving)
        self.changed = threading.Condition()
        self._error: PostcopyError | None = None
        self._ended = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._read, name="debugcon")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """After QEMU has ended, or before it was started."""
        with contextlib.suppress(OSError):  # shut down: accept() returns
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def wait(self, wanted: Callable[[Told], bool], what: str, deadline_seconds: float) -> None:
        """Until ``wanted``. Raises DeadlineError; PostcopyError when the stream has ended before, or is none of ours."""
        with self.changed:
            self.changed.wait_for(lambda: wanted(self.told) or self._ended, deadline_seconds)
            if self._error is not None:
                raise self._error
            if not wanted(self.told):
                got = f"{len(self.told.beats)} heartbeats, {self.told.lines[-1:]}"
                if self._ended:
                    raise PostcopyError("guest", expected=what, got=f"its end: {got}")
                raise DeadlineError("guest", expected=f"{what} within {deadline_seconds} s", got=got)

    def wait_line(self, word: str, deadline_seconds: float) -> Line:
        """The last one of this word."""
        self.wait(lambda told: told.last(word) is not None, word, deadline_seconds)
        with self.changed:
            line = self.told.last(word)
        assert line is not None
        return line

    def _read(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                while data := connection.recv(_RECEIVE_BYTES):
                    at_ns = time.monotonic_ns()
                    with self.changed:
                        self.told.feed(data, at_ns)
                        self.changed.notify_all()
        except OSError:
            pass  # closed before it was connected, or QEMU was killed: the end all the same
        except PostcopyError as error:
            self._error = error
        finally:
            with self.changed:
                self._ended = True
                self.changed.notify_all()
