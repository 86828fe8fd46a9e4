"""One migration as a daemon keeps it, in either role: its state, figures and end, readable at any time."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from migrate.clock import monotonic_ns
from migrate.dataplane import LoopResult, LoopThread, LostRun
from migrate.errors import NotAbandonableError, NotCancellableError, NotLimitableError, PostcopyError
from migrate.record import Record, RecordBook
from migrate.refusals import Refusals, code_of
from proto.errors import ProtocolError
from proto.messages import FaultKind, LatencySummary
from proto.states import ENDED, SETTLED, Event, Role, State, advance

BULK_LIMIT_MAX = 1 << 50
"""Bytes a second that may be asked for."""

log = structlog.get_logger("postcopy.migration")


class ErrorFacts(BaseModel):
    """An error as the API tells it."""

    code: str
    what: str
    expected: str
    got: str


class FaultLatency(BaseModel):
    """Of one kind of fault, as the destination's handler sees it."""

    count: int
    p50_seconds: float
    p99_seconds: float
    max_seconds: float

    @classmethod
    def of(cls, summary: LatencySummary) -> "FaultLatency":
        return cls(
            count=summary.count,
            p50_seconds=summary.p50_ns / 1e9,
            p99_seconds=summary.p99_ns / 1e9,
            max_seconds=summary.max_ns / 1e9,
        )


class RoundInfo(BaseModel):
    """One round of precopy, once it has been sent."""

    number: int
    pages_sent: int
    pages_written: Annotated[int, Field(description="By the guest, since what was sent had been armed.")]
    bytes_written: int
    elapsed_seconds: Annotated[float, Field(description="Since precopy began.")]


class PrecopyInfo(BaseModel):
    """What crossed while the guest still ran at the source."""

    rounds_begun: int
    rounds: Annotated[list[RoundInfo], Field(description="Known at the source, which decides on them.")]
    bytes_moved: int
    stale_pages: Annotated[int, Field(description="Written again after they had been sent, as found when the guest was paused.")]
    stale_window_seconds: Annotated[
        float | None,
        Field(description="From the guest's resumption to when each precopied page was known stale or final."),
    ]
    faults_held: Annotated[
        int | None, Field(description="At the destination: in that window, on pages that were here; the source was asked.")
    ]
    faults_after: Annotated[int | None, Field(description="At the destination: after it, on pages that had not come.")]
    stale_pages_touched: Annotated[
        int | None,
        Field(description="At the destination: pages touched before they had come, and known stale then; foreseen ones too."),
    ]


class LostPages(BaseModel):
    """What was given up (`abandonMigration`): a touch of these pages is SIGBUS."""

    pages: int
    runs: Annotated[list[LostRun], Field(description="The first of them, by region and page.")]
    runs_left_off: Annotated[int, Field(description="How many more runs there are.")]


class MigrationStatus(BaseModel):
    """A migration at one moment, in base units. Wall-clock times are for people; durations come from the monotonic clock."""

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, Field(description="32 hexadecimal digits, the same at both daemons.")]
    role: Annotated[Role, Field(description="This daemon's part in it.")]
    guest_id: Annotated[str, Field(description="As the source calls it; `?` at a destination that has not been offered it yet.")]
    peer: Annotated[str, Field(description="HOST:PORT of the other daemon.")]
    state: State
    ended: Annotated[bool, Field(description="Nothing of it is left to do.")]
    settled: Annotated[bool, Field(description="Ended or stalled: nothing more happens by itself.")]
    started_at: AwareDatetime
    ended_at: Annotated[AwareDatetime | None, Field(description="When it settled.")]
    pages_total: int
    pages_done: Annotated[
        int, Field(description="Source: sent. Destination: final in the guest's memory; during precopy held there.")
    ]
    pages: Annotated[
        dict[str, int], Field(description="By their path: urgent, bulk, zero, precopy; and discarded, which took none.")
    ]
    bytes_moved: int
    faults_count: int
    faults: Annotated[dict[str, FaultLatency], Field(description="By kind, once it is complete.")]
    elapsed_seconds: float
    bytes_per_second: float
    bulk_limit_bytes_per_second: Annotated[int | None, Field(description="Of bulk and precopy together; at the source.")]
    bulk_pace_bytes_per_second: Annotated[
        int | None, Field(description="At which they go now, at most, limit included; none: as fast as they can.")
    ]
    eta_seconds: float | None
    streams: Annotated[int, Field(description="Bulk connections; from `attaching` on as many as both daemons take.")]
    downtime_seconds: Annotated[
        float | None, Field(description="The guest's: last step at the source to first step at the destination.")
    ]
    downtime_uncertainty_seconds: Annotated[float, Field(description="How far off it may be, from the clocks of two hosts.")]
    precopy: Annotated[PrecopyInfo | None, Field(description="None: every page crosses after the switchover.")]
    switched_because: Annotated[str, Field(description="At the source: why precopy ended when it did, or why there was none.")]
    epoch: Annotated[int, Field(description="How often its connections have been made anew, attempts included.")]
    lost: Annotated[LostPages | None, Field(description="At the destination, of a migration that has been abandoned.")]
    error: Annotated[ErrorFacts | None, Field(description="What it ended with; while it is paused, what was lost.")]
    timeline_seconds: Annotated[dict[str, float], Field(description="When each state was first reached, after the start.")]


class Migration:
    """What both roles share. Subclasses drive it in ``run``, which never raises."""

    role: Role

    def __init__(self, migration_id: bytes, guest_id: str, peer: str, on_end: Callable[["Migration"], None]) -> None:
        self.migration_id = migration_id
        self.guest_id = guest_id
        self.peer = peer
        self.state = State.NEW
        self.epoch = 0
        self.reconnects = 0  # epochs that another one has followed
        self.error: ErrorFacts | None = None
        self.lost: LostPages | None = None
        self.switched_because = ""
        self.bulk_limit_bytes_per_second: int | None = None
        self.pages_total = 0
        self.streams = 1
        self.downtime_ns: int | None = None
        self.downtime_uncertainty_ns = 0
        self.faults: dict[FaultKind, LatencySummary] = {}
        self.task: asyncio.Task[None] | None = None
        self._on_end = on_end
        self.before_switchover: Callable[[], Awaitable[None]] | None = None
        """Awaited once all connections stand, before anything is held back: what is done here costs no downtime."""
        self._started_ns = monotonic_ns()
        self._started_wall_ns = time.time_ns()
        self._ended_ns: int | None = None
        self._ended_wall_ns: int | None = None
        self._timeline: dict[str, int] = {}
        self._threads: list[LoopThread] = []
        self._loop = asyncio.get_running_loop()
        self.counted = False  # in the daemon's totals
        self.on_advance: Callable[[Migration], None] = lambda _: None
        self.records = RecordBook()  # the daemon's
        self.record: Record | None = None  # what it says of this migration
        self.refusals = Refusals()  # the daemon's
        self.first_event = 0  # the daemon's events from this number on may be about it
        self._settled = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self.log = log.bind(migration=self.id, guest=guest_id, role=str(self.role))

    @property
    def id(self) -> str:
        return self.migration_id.hex()

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def settled(self) -> bool:
        """Nothing more will happen by itself."""
        return self.state in SETTLED

    def advance(self, event: Event) -> None:
        self.state = advance(self.role, self.state, event)
        self._timeline.setdefault(str(self.state), monotonic_ns())
        self.on_advance(self)
        self.wake()

    def keep_record(self, **changes: object) -> None:
        """Before the act that it describes. Raises OSError: then that must not follow."""
        if self.record is not None:
            self.record = self.record.changed(**changes)
            self.records.write(self.record)

    def stage_record(self, **changes: object) -> None:
        """The same for an act within a downtime: ``commit_record`` is left."""
        if self.record is not None:
            self.record = self.record.changed(**changes)
            self.records.stage(self.record)

    def commit_record(self) -> None:
        if self.record is not None:
            self.records.commit(self.id)

    def end_record(self) -> None:
        """Nothing hangs on it any more."""
        if self.record is not None:
            self.record = None
            self.records.remove(self.id)

    @property
    def told(self) -> bool:
        """Settled, and its last figures and its error are known."""
        return self._ended_ns is not None

    def end(self, error: Exception | None = None) -> None:
        """After the last ``advance``: keep what is to be known and tell the daemon."""
        self._ended_ns, self._ended_wall_ns = monotonic_ns(), time.time_ns()
        if error is not None:
            self.error = error_facts(error)
        self.before_switchover = self.task = None  # what is kept of it is what it tells
        self._settled.set()
        self.wake()
        self._on_end(self)

    async def changed(self) -> None:
        """Until it advances, or ends."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def wake(self) -> None:
        """Whoever waits for a change looks again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_settled(self, seconds: float) -> None:
        """Until it has ended or stalled, or that long."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._settled.wait()

    def typed(self, error: Exception) -> Exception:
        """What nobody foresaw ends this migration with a typed error too, and leaves its trace in the log."""
        if isinstance(error, PostcopyError | ProtocolError | OSError):
            return error
        self.log.error("internal error", exc_info=error)
        return PostcopyError(f"{type(error).__name__}: {error}", code="internal")

    def start_loop(self, name: str, run: Callable[[], LoopResult]) -> None:
        """A C loop on a thread of its own; ``loop_ended`` is told on the event loop."""
        epoch = self.epoch

        def ended(result: LoopResult) -> None:
            if self.epoch == epoch:  # else of connections that have been replaced
                self.loop_ended(result)

        self._threads.append(LoopThread(name, run, lambda result: _post(self._loop, lambda: ended(result))))

    def join_loops(self) -> None:
        """After the plane has been told to stop; takes microseconds."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    async def on_own_thread(self, name: str, function: Callable[[], LoopResult]) -> LoopResult:
        """Run a blocking C call on a thread of its own and wait for its result; ``join_loops`` waits for it too."""
        future: asyncio.Future[LoopResult] = self._loop.create_future()

        def deliver(result: LoopResult) -> None:
            if not future.done():
                future.set_result(result)

        thread = LoopThread(name, function, lambda result: _post(self._loop, lambda: deliver(result)))
        self._threads.append(thread)
        result = await future
        thread.join()  # it has said its last word: a migration may call a thousand times
        if thread in self._threads:
            self._threads.remove(thread)
        return result

    def cannot_take_back(self, error: Exception) -> None:
        """After a restart; it is tried again. Said in the log once for each reason."""
        facts = error_facts(error)
        if facts != self.error:
            self.error = facts
            self.log.error("guest not taken back yet, trying again", reason=str(error), peer=self.peer)
        self.wake()

    def loop_ended(self, result: LoopResult) -> None:
        raise NotImplementedError

    def cancel(self, reason: str) -> None:
        """Only the source can, and only before the switchover. Raises NotCancellableError."""
        raise NotCancellableError(
            f"migration {self.id}", expected="to be asked at the source", got=f"{reason} at the {self.role}"
        )

    async def abandon(self) -> None:
        """Only the destination can, and only while the guest waits there for pages. Raises NotAbandonableError."""
        raise NotAbandonableError(f"migration {self.id}", expected="to be asked at the destination", got=f"the {self.role}")

    def limit_bulk(self, bytes_per_second: int | None) -> None:
        """Only at the source, until it has settled. Raises NotLimitableError."""
        raise NotLimitableError(f"bulk of migration {self.id}", expected="to be limited at the source", got=str(self.role))

    def bulk_pace(self) -> int | None:
        """Bytes a second; None: nothing limits it, or it is sent elsewhere."""
        return None

    def figures(self) -> dict[str, int]:
        """The C side's counters, live or as they were at the end."""
        raise NotImplementedError

    def pages_done(self) -> int:
        raise NotImplementedError

    def pages_by_path(self) -> dict[str, int]:
        raise NotImplementedError

    def faults_count(self) -> int:
        raise NotImplementedError

    def precopy_info(self) -> PrecopyInfo | None:
        raise NotImplementedError

    def status(self) -> MigrationStatus:
        now_ns = self._ended_ns or monotonic_ns()
        figures = self.figures()
        moved_bytes = sum(figures.get(f"bytes_{path}", 0) for path in ("urgent", "bulk", "precopy"))
        since_ns = self._timeline.get("precopy", self._timeline.get("switchover", now_ns))
        streaming_seconds = max(now_ns - since_ns, 0) / 1e9
        done = self.pages_done()
        rate = done / streaming_seconds if streaming_seconds > 0 else 0.0
        left = self.pages_total - done
        return MigrationStatus(
            id=self.id,
            role=self.role,
            guest_id=self.guest_id,
            peer=self.peer,
            state=self.state,
            ended=self.ended,
            settled=self.settled,
            started_at=utc(self._started_wall_ns),
            ended_at=None if self._ended_wall_ns is None else utc(self._ended_wall_ns),
            pages_total=self.pages_total,
            pages_done=done,
            pages=self.pages_by_path(),
            bytes_moved=moved_bytes,
            faults_count=self.faults_count(),
            faults={kind: FaultLatency.of(summary) for kind, summary in self.faults.items()},
            elapsed_seconds=(now_ns - self._started_ns) / 1e9,
            bytes_per_second=moved_bytes / streaming_seconds if streaming_seconds > 0 else 0.0,
            bulk_limit_bytes_per_second=self.bulk_limit_bytes_per_second,
            bulk_pace_bytes_per_second=self.bulk_pace(),
            eta_seconds=left / rate if rate > 0 and not self.settled else None,
            streams=self.streams,
            downtime_seconds=None if self.downtime_ns is None else self.downtime_ns / 1e9,
            downtime_uncertainty_seconds=self.downtime_uncertainty_ns / 1e9,
            precopy=self.precopy_info(),
            switched_because=self.switched_because,
            epoch=self.epoch,
            lost=self.lost,
            error=self.error,
            timeline_seconds={state: (at_ns - self._started_ns) / 1e9 for state, at_ns in self._timeline.items()},
        )


def utc(wall_ns: int) -> datetime:
    """Of CLOCK_REALTIME nanoseconds."""
    return datetime.fromtimestamp(wall_ns / 1e9, UTC)


def error_facts(error: Exception) -> ErrorFacts:
    if isinstance(error, PostcopyError | ProtocolError):
        return ErrorFacts(code=error.code, what=error.what, expected=error.expected, got=error.got)
    return ErrorFacts(code=code_of(error), what=f"{type(error).__name__}: {error}", expected="", got="")


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From a loop's thread; a daemon that has ended meanwhile no longer listens."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
