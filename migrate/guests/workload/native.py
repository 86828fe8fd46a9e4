"""The one door between Python and the workload's native threads; workload.h documents what lies behind it.

Python never touches the guest memory: every touch is made by C threads. Calls release the GIL, so that a page fault
that is resolved by this very process cannot deadlock with it.
"""

import errno
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

from migrate.errors import PauseFailedError, PostcopyError, errno_text
from migrate.guests.workload._workload import ffi, lib

BLOCK_BYTES: int = lib.WORKLOAD_BLOCK_BYTES
THREADS_MAX: int = lib.WORKLOAD_THREADS_MAX


class Pattern(IntEnum):
    SEQUENTIAL = lib.WORKLOAD_SEQUENTIAL
    RANDOM = lib.WORKLOAD_RANDOM
    ZIPF = lib.WORKLOAD_ZIPF
    CHASE = lib.WORKLOAD_CHASE
    PERMUTE = lib.WORKLOAD_PERMUTE


class Phase(IntEnum):
    IDLE = lib.WORKLOAD_IDLE
    RUNNING = lib.WORKLOAD_RUNNING
    PAUSED = lib.WORKLOAD_PAUSED
    FAILED = lib.WORKLOAD_FAILED


class FailureKind(IntEnum):
    LOST = lib.WORKLOAD_PAGE_LOST
    STALE = lib.WORKLOAD_PAGE_STALE
    TORN = lib.WORKLOAD_PAGE_TORN
    SWAPPED = lib.WORKLOAD_PAGE_SWAPPED
    ZEROED = lib.WORKLOAD_PAGE_ZEROED
    WRITE_LOST = lib.WORKLOAD_WRITE_LOST
    WRITE_REPEATED = lib.WORKLOAD_WRITE_REPEATED
    ROLLED_BACK = lib.WORKLOAD_ROLLED_BACK
    GONE = lib.WORKLOAD_PAGE_GONE


_WORDS: dict[FailureKind, str] = {
    FailureKind.LOST: "lost: it holds no page's content where version {0.expected} was expected",
    FailureKind.STALE: "stale: version {0.expected} was expected, it holds version {0.got}",
    FailureKind.TORN: "torn: version {0.expected} was expected, parts of it are of version {0.got} or of none",
    FailureKind.SWAPPED: "swapped: the content of page {0.expected} was expected, it holds that of page {0.got}",
    FailureKind.ZEROED: "zeroed: version {0.expected} was expected, it reads as zeroes",
    FailureKind.WRITE_LOST: "lost writes: {0.expected} were made, it counts {0.got}",
    FailureKind.WRITE_REPEATED: "repeated writes: {0.expected} were made, it counts {0.got}",
    FailureKind.ROLLED_BACK: "rolled back: they agree with each other and sum up to {0.got:#x}, not to the root {0.expected:#x}",
    FailureKind.GONE: "gone: a touch of it was SIGBUS",
}


class WorkloadFailedError(PostcopyError):
    """The guest found its own memory damaged; ``Workload.report().failure`` says where."""

    code = "guest-failed"


class StateRefusedError(PostcopyError):
    """Not a saved state, of another version, or of a guest with another memory size."""

    code = "state-refused"


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """What the threads do; ``rate_per_second`` counts the steps of all threads together, 0 is flat out."""

    threads: int = 1
    pattern: Pattern = Pattern.RANDOM
    write_per_mille: int = 0
    rate_per_second: int = 0
    zero_per_mille: int = 0
    discard_per_mille: int = 0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """Which page was wrong and how; ``expected`` and ``got`` are what the kind speaks of (versions, counts, pages)."""

    kind: FailureKind
    thread: int
    block_index: int
    block_count: int
    expected: int
    got: int

    def __str__(self) -> str:
        last = self.block_index + self.block_count - 1
        pages = f"page {self.block_index}" if self.block_count == 1 else f"pages {self.block_index} to {last}"
        where = f"{pages} of {BLOCK_BYTES // 1024} KiB (offset {self.block_index * BLOCK_BYTES:#x}, thread {self.thread})"
        return f"{where} {_WORDS[self.kind].format(self)}"


@dataclass(frozen=True, slots=True)
class Touches:
    """A latency histogram in short; the quantiles are exact to 3.2 %."""

    count: int
    sum_seconds: float
    p50_seconds: float
    p99_seconds: float
    max_seconds: float
    buckets: tuple[tuple[int, int], ...]
    """Lower bound in ns and count of every bucket that is not empty."""


@dataclass(frozen=True, slots=True)
class Report:
    """One reading; ``*_step_ns`` are CLOCK_MONOTONIC of this host, 0 for none. Field by field as in workload.h."""

    phase: Phase
    verifications: int
    steps: int
    writes: int
    discards: int
    last_step_ns: int
    first_step_ns: int
    failure: Failure | None
    touch: Touches
    first_touch: Touches

    def to_dict(self) -> dict[str, Any]:
        """Plain values for msgpack and JSON; the failure in words, or None."""
        return {
            "phase": self.phase.name.lower(),
            "verifications": self.verifications,
            "steps": self.steps,
            "writes": self.writes,
            "discards": self.discards,
            "last_step_ns": self.last_step_ns,
            "first_step_ns": self.first_step_ns,
            "failure": None if self.failure is None else str(self.failure),
            "touch": asdict(self.touch),
            "first_touch": asdict(self.first_touch),
        }


def touches(ffi: Any, lib: Any, copy: Any) -> Touches:
    """Of a ``struct histogram_copy``, with the extension that it comes from."""
    return Touches(
        count=copy.count,
        sum_seconds=copy.sum_ns / 1e9,
        p50_seconds=lib.histogram_quantile_ns(ffi.addressof(copy), 0.50) / 1e9,
        p99_seconds=lib.histogram_quantile_ns(ffi.addressof(copy), 0.99) / 1e9,
        max_seconds=copy.max_ns / 1e9,
        buckets=tuple((lib.histogram_bucket_low_ns(i), count) for i, count in enumerate(copy.bucket) if count),
    )


def _failure(raw: Any) -> Failure | None:
    if raw.kind == lib.WORKLOAD_INTACT:
        return None
    return Failure(FailureKind(raw.kind), raw.thread, raw.block_index, raw.block_count, raw.expected, raw.got)


class Workload:
    """Native threads at work on ``size_bytes`` of mapped memory at ``address``, which stay the caller's and must
    outlive this object. One thread at a time may control it; ``report`` and ``verify`` may be called by any."""

    def __init__(self, address: int, size_bytes: int) -> None:
        pointer = lib.workload_create(ffi.cast("void *", address), size_bytes)
        if pointer == ffi.NULL:
            raise PostcopyError("workload memory", expected="at least 2 whole blocks of 4096 bytes", got=errno_text(ffi.errno))
        self._owned: Any = ffi.gc(pointer, lib.workload_destroy)
        self._state = ffi.new("uint8_t[]", lib.WORKLOAD_STATE_BYTES_MAX)  # made here: save lies in the downtime

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop and join the threads; waits for one that is in a page fault."""
        owned, self._owned = self._owned, None
        if owned is not None:
            ffi.release(owned)

    @property
    def _pointer(self) -> Any:
        if self._owned is None:
            raise ValueError("the workload is closed")
        return self._owned

    @property
    def event_fd(self) -> int:
        """Readable after a first step since resume, a finished verification, a failure. Borrowed: not to be closed."""
        return int(lib.workload_event_fd(self._pointer))

    def prepare(self, threads: int) -> None:
        """Make the threads before the state arrives, so that load has none to make when the guess is right."""
        self._check("prepare", lib.workload_prepare(self._pointer, threads))

    def start(self, config: WorkloadConfig) -> None:
        """Fill the memory, which must read zero, and step; returns at once, ``event_fd`` tells of the first step."""
        raw = ffi.new("struct workload_config *", asdict(config))
        self._check("start", lib.workload_start(self._pointer, raw))

    def pause(self, deadline_seconds: float) -> None:
        """Stop all threads between two steps. Raises PauseFailedError after ``deadline_seconds`` from now (they run on)."""
        self._check("pause", lib.workload_pause(self._pointer, time.monotonic_ns() + int(deadline_seconds * 1e9)))

    def save(self) -> bytes:
        """What the guest needs, besides its memory, to run on elsewhere. Paused only."""
        size_bytes = self._check("save", lib.workload_save(self._pointer, self._state, lib.WORKLOAD_STATE_BYTES_MAX))
        return bytes(ffi.buffer(self._state, size_bytes))

    def load(self, state: bytes) -> None:
        """Take over what ``save`` gave; paused then. Raises StateRefusedError."""
        result = lib.workload_load(self._pointer, state, len(state))
        if result == -errno.EINVAL:
            raise StateRefusedError("workload state", expected="one of this version and memory size", got=f"{len(state)} bytes")
        self._check("load", result)

    def resume(self) -> None:
        self._check("resume", lib.workload_resume(self._pointer))

    def verify(self) -> None:
        """Ask for one check of all memory against the root; ``event_fd``, then ``Report.verifications`` tell the end."""
        lib.workload_verify(self._pointer)

    def tell_discards(self, tell: bool) -> None:
        """Whether a thread that has discarded a block waits until that has been told (``discards``) and holds (``discarded``)."""
        lib.workload_tell_discards(self._pointer, tell)

    def discards(self) -> list[int]:
        """Blocks discarded and not told of before."""
        blocks = ffi.new("uint64_t[]", THREADS_MAX)
        return list(ffi.unpack(blocks, lib.workload_discards(self._pointer, blocks)))

    def discarded(self) -> None:
        """All that have been told of are known."""
        lib.workload_discarded(self._pointer)

    def reset_touches(self) -> None:
        lib.workload_reset_touches(self._pointer)

    def last_step_ns(self) -> int:
        """As in the report, without the rest: read within a downtime."""
        return int(lib.workload_last_step_ns(self._pointer))

    def first_step_ns(self) -> int:
        return int(lib.workload_first_step_ns(self._pointer))

    def report(self) -> Report:
        raw = ffi.new("struct workload_report *")
        lib.workload_read(self._pointer, raw)
        return Report(
            phase=Phase(raw.phase),
            verifications=raw.verifications,
            steps=raw.steps,
            writes=raw.writes,
            discards=raw.discards,
            last_step_ns=raw.last_step_ns,
            first_step_ns=raw.first_step_ns,
            failure=_failure(raw.failure),
            touch=touches(ffi, lib, raw.touch),
            first_touch=touches(ffi, lib, raw.first_touch),
        )

    def _check(self, call: str, result: int) -> int:
        """The one place where an errno becomes an exception."""
        if result >= 0:
            return result
        if result == -errno.ETIMEDOUT:
            raise PauseFailedError("pause", expected="every thread between two steps", got="a thread that stays in a page fault")
        if result == -errno.EBADMSG:
            raise WorkloadFailedError(f"{call}: the guest has failed: {self.report().failure}")
        raise PostcopyError(f"workload {call} in phase {self.report().phase.name.lower()}", expected="0", got=errno_text(-result))
