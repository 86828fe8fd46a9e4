"""The one door between Python and the C data plane: everything above it is plain typed Python.

Loops block with the GIL released, each on a thread of its own (``LoopThread``), never on asyncio's executor.
"""

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from migrate.dataplane._dataplane import ffi, lib
from migrate.errors import DataPlaneError, errno_text
from proto.messages import FaultKind

REASONS: dict[int, str] = {
    lib.LOOP_STOPPED: "stopped",
    lib.LOOP_FINISHED: "finished",
    lib.LOOP_PEER_CLOSED: "peer-closed",
    lib.LOOP_CONNECTION_FAILED: "connection-failed",
    lib.LOOP_FRAME_INVALID: "frame-invalid",
    lib.LOOP_PAGE_UNASKED: "page-unasked",
    lib.LOOP_PAGE_DUPLICATE: "page-duplicate",
    lib.LOOP_MEMORY_FAILED: "memory-failed",
    lib.LOOP_USERFAULTFD_FAILED: "userfaultfd-failed",
    lib.LOOP_GUEST_GONE: "guest-gone",
    lib.LOOP_INCOMPLETE: "incomplete",
    lib.LOOP_TRACKING_FAILED: "tracking-failed",
}
FRAME_FIELDS = ("", "magic", "kind", "flags", "region", "page_index", "offset_bytes", "length_bytes")
PEER_FAULTS = frozenset({"frame-invalid", "page-unasked", "page-duplicate"})
"""Reasons that are the peer's doing, and are told to it."""
FAULT_KINDS: dict[FaultKind, int] = {"remote": lib.FAULT_REMOTE, "local": lib.FAULT_LOCAL, "zero": lib.FAULT_ZERO}
FOLDED_BOUNDS_SECONDS: tuple[float, ...] = tuple(
    lib.histogram_folded_bound_ns(i) / 1e9 for i in range(lib.HISTOGRAM_FOLDED_BUCKETS - 1)
)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """What the C side needs of one region: bytes and a memory file's descriptor, borrowed."""

    guest_address: int
    size_bytes: int
    offset_bytes: int
    page_bytes: int
    memory_fd: int


@dataclass(frozen=True, slots=True)
class LoopResult:
    """Why a loop ended; ``reason`` is one of REASONS."""

    loop: str
    reason: str
    error_number: int
    field: str
    region: int
    page_index: int
    expected: int
    got: int
    where: str

    def error(self) -> DataPlaneError:
        """The reason as an error that names what was expected and what came."""
        at = f"{self.loop} loop, region {self.region}, page {self.page_index}"
        if self.reason == "frame-invalid":
            return DataPlaneError(f"frame {self.field} ({at})", expected=self.expected, got=self.got, code=self.reason)
        if self.reason == "page-unasked":
            return DataPlaneError(at, expected="only pages that were requested", got="a page nobody asked for", code=self.reason)
        if self.reason == "page-duplicate":
            return DataPlaneError(at, expected="each page once a path", got="it a second time", code=self.reason)
        if self.reason == "incomplete":
            return DataPlaneError(at, expected="a final page state", got=self.got, code=self.reason)
        if self.reason == "tracking-failed":
            what, expected = f"pagemap of the guest ({self.where})", "all of its memory mapped and tracked"
            return DataPlaneError(what, expected=expected, got=errno_text(self.error_number), code=self.reason)
        got = errno_text(self.error_number) if self.error_number else "end of stream"
        return DataPlaneError(f"{self.loop} loop ended at {self.where}", expected="to run on", got=got, code=self.reason)


def _result(loop: str, raw: Any) -> LoopResult:
    return LoopResult(
        loop=loop,
        reason=REASONS[raw.reason],
        error_number=raw.error_number,
        field=FRAME_FIELDS[raw.field],
        region=raw.region,
        page_index=raw.page_index,
        expected=raw.expected,
        got=raw.got,
        where=ffi.string(raw.where).decode(),
    )


@dataclass(frozen=True, slots=True)
class LostRun:
    """Pages of one region, one behind the other."""

    region: int
    page_index: int
    page_count: int


class Histogram:
    """A copy of a latency histogram (nanoseconds, relative error <= 3.2 %)."""

    def __init__(self) -> None:
        self._copy = ffi.new("struct histogram_copy *")

    @property
    def count(self) -> int:
        return int(self._copy.count)

    @property
    def sum_ns(self) -> int:
        return int(self._copy.sum_ns)

    @property
    def max_ns(self) -> int:
        return int(self._copy.max_ns)

    def quantile_ns(self, share: float) -> int:
        return int(lib.histogram_quantile_ns(self._copy, share))

    def add(self, other: "Histogram") -> None:
        lib.histogram_add(self._copy, other._copy)

    def fine(self) -> list[tuple[int, int]]:
        """Every bucket that holds anything: (its lower bound in ns, count), lowest first. 16 buckets to each power of two."""
        counts = ffi.unpack(self._copy.bucket, lib.HISTOGRAM_BUCKETS)
        return [(int(lib.histogram_bucket_low_ns(bucket)), count) for bucket, count in enumerate(counts) if count]

    def folded(self) -> list[int]:
        """Cumulative counts at FOLDED_BOUNDS_SECONDS and, last, the total."""
        cumulative = ffi.new("uint64_t[]", lib.HISTOGRAM_FOLDED_BUCKETS)
        lib.histogram_fold(self._copy, cumulative)
        return list(cumulative)


def discard(region: MemoryRegion, page_index: int, page_count: int) -> None:
    """Pages of guest memory, whoever has it, become holes that read zero. Raises DataPlaneError ``memory-failed``."""
    if error_number := lib.memory_discard(_regions([region]), page_index, page_count):
        raise DataPlaneError("discard", expected="a hole in the memory file", got=errno_text(error_number), code="memory-failed")


def own(states_fd: int) -> int | None:
    """Be the one daemon that writes this guest's memory. None: we are; else the process that is (0: unknown). Raises OSError."""
    owner = ffi.new("int *")
    error_number = lib.states_lock(states_fd, owner)
    if error_number == 0:
        return None
    if error_number != errno.EAGAIN:
        raise OSError(error_number, "F_SETLK of page states")
    return int(owner[0])


def prefer_latency() -> None:
    """This thread answers others: ask the scheduler for short slices (schedule.c)."""
    lib.schedule_soon()


class LoopThread:
    """One C loop on one thread; ``on_end`` is called on that thread with the result."""

    def __init__(self, name: str, run: Callable[[], LoopResult], on_end: Callable[[LoopResult], None]) -> None:
        self._thread = threading.Thread(target=lambda: on_end(run()), name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()


class _Plane:
    """What both halves share: the C object's lifetime and the calls of its loops."""

    def __init__(self, pointer: Any, regions: Any, destroy: Callable[[Any], None]) -> None:
        self._pointer: Any = ffi.gc(pointer, destroy)
        self._regions = regions

    def _run(self, loop: str, function: Callable[..., None], *arguments: int) -> LoopResult:
        raw = ffi.new("struct loop_result *")
        function(self._pointer, *arguments, raw)
        return _result(loop, raw)

    def close(self) -> None:
        """Only after every loop has returned."""
        ffi.release(self._pointer)


def _regions(regions: Sequence[MemoryRegion]) -> Any:
    array = ffi.new("struct memory_region[]", len(regions))
    for slot, region in zip(array, regions, strict=True):
        slot.guest_address = region.guest_address
        slot.size_bytes = region.size_bytes
        slot.offset_bytes = region.offset_bytes
        slot.page_bytes = region.page_bytes
        slot.memory_fd = region.memory_fd
    return array


def _created(pointer: Any, error_number: int) -> Any:
    if pointer == ffi.NULL:
        raise DataPlaneError(
            "guest memory", expected="mappable regions of whole pages", got=errno_text(error_number), code="memory-failed"
        )
    return pointer


class DestinationPlane(_Plane):
    """The destination half. Raises DataPlaneError ``memory-failed`` when the memory cannot be mapped."""

    def __init__(self, regions: Sequence[MemoryRegion], userfaultfd: int) -> None:
        array, error = _regions(regions), ffi.new("int *")
        pointer = lib.destination_create(array, len(regions), userfaultfd, error)
        super().__init__(_created(pointer, error[0]), array, lib.destination_destroy)

    def poll(self, poll_ns: int) -> None:
        """Before the loops begin: how long the fault loop looks for work before it sleeps, at most."""
        lib.destination_poll(self._pointer, poll_ns)

    def removed_is_zero(self) -> None:
        """Before the loops begin: the guest's REMOVE events make pages zero that are not here yet."""
        lib.destination_removed_is_zero(self._pointer)

    def discard(self, region: int, page_index: int, page_count: int) -> LoopResult:
        """The guest, resumed here, has discarded these pages and leaves them alone meanwhile: they are zero when this returns."""
        return self._run("discard", lib.destination_discard, region, page_index, page_count)

    def fault_loop(self, urgent_socket: int) -> LoopResult:
        return self._run("fault", lib.fault_loop, urgent_socket)

    def streams(self, streams: int) -> None:
        """Before the loops begin: so many bulk connections there are."""
        lib.destination_streams(self._pointer, streams)

    def receive_loop(self, bulk_socket: int, stream: int, *, precopy: bool) -> LoopResult:
        return self._run("receive", lib.receive_loop, bulk_socket, stream, precopy)

    def open(self) -> None:
        """The guest has been resumed here: what comes unasked from now on is final (P2)."""
        lib.destination_open(self._pointer)

    def foresee(self, pages: Sequence[int]) -> None:
        """Once, before the guest is resumed here: pages that it will touch first, by their numbers through all regions."""
        lib.destination_foresee(self._pointer, pages, len(pages))

    def clean(self) -> LoopResult:
        """Before a migration, and after one that came to nothing: the waiting memory is empty."""
        return self._run("clean", lib.destination_clean)

    def back(self) -> LoopResult:
        """Every huge page is allocated; ``stop`` ends it. ``memory-failed`` with ENOMEM or ENOSPC: there is no room."""
        return self._run("room", lib.destination_back)

    def next_epoch(self) -> None:
        """Once every loop has returned: they may begin anew, with other connections."""
        lib.destination_next_epoch(self._pointer)

    @property
    def states_fd(self) -> int:
        """The page states, for the guest to keep; borrowed."""
        return int(lib.destination_states_fd(self._pointer))

    def restore(self, states_fd: int) -> LoopResult:
        """On a new plane: what the states of an earlier life say. The guest must keep ours before a loop begins."""
        return self._run("restore", lib.destination_restore, states_fd)

    def wake(self) -> None:
        """Whoever waits for a page faults anew."""
        lib.destination_wake(self._pointer)

    @property
    def settled(self) -> bool:
        """No page is held any more: there was no precopy, or its stale set has been applied."""
        return bool(lib.destination_is_settled(self._pointer))

    @property
    def can_abandon(self) -> bool:
        """Whether the kernel has UFFDIO_POISON."""
        return bool(lib.destination_can_abandon(self._pointer))

    def abandon(self) -> LoopResult:
        """What has not come never will: a touch of it is SIGBUS from now on. Beside a fault loop, which stays."""
        return self._run("abandon", lib.destination_abandon)

    def lost(self, run_max: int) -> tuple[list[LostRun], int]:
        """The first runs of what ``abandon`` gave up, and how many there are."""
        runs = ffi.new("struct page_run[]", run_max)
        run_count = int(lib.destination_lost(self._pointer, runs, run_max))
        told = runs[0 : min(run_count, run_max)]
        return [LostRun(run.region, run.page_index, run.page_count) for run in told], run_count

    def finish(self) -> LoopResult:
        return self._run("finish", lib.destination_finish)

    def stop(self) -> None:
        lib.destination_stop(self._pointer)

    @property
    def marked_fd(self) -> int:
        """Readable once no precopied byte is in flight, on any connection."""
        return int(lib.destination_marked_fd(self._pointer))

    @property
    def final_fd(self) -> int:
        """Readable once every page is final."""
        return int(lib.destination_final_fd(self._pointer))

    def figures(self) -> dict[str, int]:
        raw = ffi.new("struct destination_figures *")
        lib.destination_read(self._pointer, raw)
        return {name: getattr(raw, name) for name in DESTINATION_FIGURES}

    def latency(self, kind: FaultKind) -> Histogram:
        histogram = Histogram()
        lib.destination_latency(self._pointer, FAULT_KINDS[kind], histogram._copy)
        return histogram


class SourcePlane(_Plane):
    """The source half. Raises DataPlaneError ``memory-failed``."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        array, error = _regions(regions), ffi.new("int *")
        pointer = lib.source_create(array, len(regions), error)
        super().__init__(_created(pointer, error[0]), array, lib.source_destroy)

    def poll(self, poll_ns: int) -> None:
        """Before the loops begin: how long the serve loop looks for requests before it sleeps, at most."""
        lib.source_poll(self._pointer, poll_ns)

    def streams(self, streams: int) -> None:
        """Before precopy and before the loops begin: so many bulk connections there are."""
        lib.source_streams(self._pointer, streams)

    def unpaced(self) -> None:
        """Before the loops begin: bulk goes as fast as it can, whoever else is on the path."""
        lib.source_unpaced(self._pointer)

    def limit(self, bytes_per_second: int | None) -> None:
        """At any time: bulk and precopy together go no faster; None: as the controller finds alone (dataplane/pacer.h)."""
        lib.source_limit(self._pointer, bytes_per_second or 0)

    def pace(self) -> int | None:
        """Bytes a second at which bulk and precopy go now, at most; None: as fast as they can."""
        return int(lib.source_pace(self._pointer)) or None

    def track(self, pagemap_fd: int) -> None:
        """Precopy is next: what the guest writes is seen through its pagemap, borrowed until ``close``."""
        if error_number := lib.source_track(self._pointer, pagemap_fd):
            got = errno_text(error_number)
            raise DataPlaneError("precopy", expected="a byte for each page", got=got, code="memory-failed")

    def precopy_check(self, pagemap_fd: int) -> LoopResult:
        """Whether it shows what the guest writes, in all of its memory."""
        return self._run("precopy", lib.precopy_check, pagemap_fd)

    def precopy_arm(self) -> LoopResult:
        return self._run("precopy", lib.precopy_arm)

    def precopy_send(self, bulk_socket: int, stream: int) -> LoopResult:
        """One round: all that is pending and belongs to this connection."""
        return self._run("precopy", lib.precopy_send, bulk_socket, stream)

    def precopy_count(self) -> LoopResult:
        return self._run("precopy", lib.precopy_count)

    def precopy_collect(self) -> LoopResult:
        return self._run("precopy", lib.precopy_collect)

    def precopy_end(self, bulk_socket: int) -> LoopResult:
        """The mark: no precopied page follows on this connection."""
        return self._run("precopy", lib.precopy_end, bulk_socket)

    def discarded(self, region: int, page_index: int, page_count: int) -> None:
        """These pages are holes by now: what has been sent of them is stale."""
        lib.source_discarded(self._pointer, region, page_index, page_count)

    def serve_loop(self, urgent_socket: int) -> LoopResult:
        return self._run("serve", lib.serve_loop, urgent_socket)

    def stream_loop(self, bulk_socket: int, stream: int) -> LoopResult:
        return self._run("stream", lib.stream_loop, bulk_socket, stream)

    def open(self) -> None:
        """The guest is paused for good: its pages are final and may be sent (P2)."""
        lib.source_open(self._pointer)

    def restarted(self) -> None:
        """On a new plane of a guest that an earlier daemon had paused: nothing is known of what it precopied."""
        lib.source_restarted(self._pointer)

    def next_epoch(self, *, settled: bool) -> None:
        """Once every loop has returned: they may begin anew. ``settled``: as the destination says of itself."""
        lib.source_next_epoch(self._pointer, settled)

    def open_bulk(self) -> None:
        lib.source_open_bulk(self._pointer)

    def stop(self) -> None:
        lib.source_stop(self._pointer)

    def figures(self) -> dict[str, int]:
        raw = ffi.new("struct source_figures *")
        lib.source_read(self._pointer, raw)
        return {name: getattr(raw, name) for name in SOURCE_FIGURES}


DESTINATION_FIGURES = tuple(name for name, _ in ffi.typeof("struct destination_figures").fields)
SOURCE_FIGURES = tuple(name for name, _ in ffi.typeof("struct source_figures").fields)
