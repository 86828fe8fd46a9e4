"""One event stream: what it has told and what is next.

It holds no queue: it reads the daemon's ring of events (migrate/events.py) as fast as its client takes them, and progress is a
migration's status at that moment. Nothing is told within a switchover.
"""

import time
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel

from migrate.api.guests import guest_info
from migrate.api.models import (
    EndEvent,
    EndReason,
    GuestEvent,
    MissedEvent,
    ProgressEvent,
    SettledEvent,
    SnapshotEvent,
    StateEvent,
)
from migrate.clock import monotonic_ns
from migrate.events import Happened
from migrate.session import Migration, MigrationStatus, utc

if TYPE_CHECKING:
    from migrate.daemon import Daemon

PROGRESS_SECONDS = 0.2
KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": here\n\n"
EVENTS_A_WRITE = 64
MODELS: dict[str, type[BaseModel]] = {"state": StateEvent, "settled": SettledEvent, "guest": GuestEvent}


class Reader:
    """``migration``: the one that it is all about; None: everything."""

    def __init__(
        self, daemon: "Daemon", migration: Migration | None, last_event_id: str | None, for_seconds: float | None
    ) -> None:
        self._daemon, self._log, self._migration = daemon, daemon.events, migration
        self._until_ns = None if for_seconds is None else monotonic_ns() + int(for_seconds * 1e9)
        self._progress_ns = self._written_ns = 0
        self._progress_told: dict[str, tuple[object, ...]] = {}
        self._settled_told = False
        self._first: list[bytes] = []
        self._position = self._begin(last_event_id)
        """Number of the last event that was read."""

    async def run(self) -> AsyncIterator[bytes]:
        """Chunks of whole events. Ends after ``end``."""
        while True:
            if self._daemon.quiet.held:
                await self._daemon.quiet.wait()
            part, self._first = self._first, []
            read = self._read(part)
            end: EndReason | None = None
            if read < EVENTS_A_WRITE:  # else there may be more, and that comes first
                part += self._progress()
                end = self._end()
                part += self._last(end) if end else []
            if part or monotonic_ns() - self._written_ns > KEEP_ALIVE_SECONDS * 1e9:
                self._written_ns = monotonic_ns()
                yield b"".join(part) or KEEP_ALIVE
            if end:
                return
            if read < EVENTS_A_WRITE and self._position == self._log.newest:  # nothing has come while that was written
                await self._log.more(self._patience_seconds())

    # --- what comes from the ring -----------------------------------------------------------------------------------

    def _begin(self, last_event_id: str | None) -> int:
        if last_event_id is not None:
            origin, _, number = last_event_id[:40].rpartition("-")
            if origin == self._log.origin and number.isascii() and number.isdigit() and int(number) <= self._log.newest:
                return int(number)
            self._first.append(written("missed", MissedEvent(at=now(), count=None)))
        if self._migration is not None:
            return self._migration.first_event - 1
        self._first.append(self._snapshot())
        return self._log.newest

    def _read(self, part: list[bytes]) -> int:
        """What is next in the ring, as text into ``part``. How many events were read, wanted or not."""
        if lost := self._log.lost_after(self._position):
            part.append(written("missed", MissedEvent(at=now(), count=lost)))
            self._position += lost
            if self._migration is None:
                self._position = self._log.newest
                part.append(self._snapshot())
        happened = self._log.after(self._position, EVENTS_A_WRITE)
        for one in happened:
            self._position = one.number
            if self._migration is None or one.migration_id == self._migration.id:
                part.append(self._told(one))
        return len(happened)

    def _told(self, one: Happened) -> bytes:
        if one.name == "settled":
            self._settled_told = True
        about = {"migration_id": one.migration_id} if one.name == "state" else {}
        event = MODELS[one.name].model_validate({"at": utc(one.at_ns), **about, **one.facts})
        return written(one.name, event, self._id(one.number))

    def _id(self, number: int) -> str:
        return f"{self._log.origin}-{number}"

    def _snapshot(self) -> bytes:
        event = SnapshotEvent(
            at=now(),
            guests=[guest_info(self._daemon, guest) for guest in self._daemon.guests.values()],
            migrations=[migration.status() for migration in self._under_way()],
        )
        return written("snapshot", event, self._id(self._log.newest))

    # --- progress and the end ---------------------------------------------------------------------------------------

    def _under_way(self) -> Iterable[Migration]:
        every = self._daemon.migrations.values() if self._migration is None else [self._migration]
        return (migration for migration in every if not migration.told)

    def _progress(self) -> list[bytes]:
        """Of each migration whose figures have changed; not more often than each PROGRESS_SECONDS."""
        if monotonic_ns() - self._progress_ns < PROGRESS_SECONDS * 1e9:
            return []
        self._progress_ns = monotonic_ns()
        statuses = {migration.id: migration.status() for migration in self._under_way()}
        changed = [status for status in statuses.values() if self._progress_told.get(status.id) != _figures(status)]
        self._progress_told = {migration_id: _figures(status) for migration_id, status in statuses.items()}
        return [written("progress", ProgressEvent(at=now(), migration=status)) for status in changed]

    def _end(self) -> EndReason | None:
        if self._migration is not None and self._migration.told:
            return "settled"
        if self._log.closed:
            return "daemon-ending"
        return "for-seconds" if self._until_ns is not None and monotonic_ns() >= self._until_ns else None

    def _last(self, reason: EndReason) -> list[bytes]:
        end = written("end", EndEvent(at=now(), reason=reason))
        if reason != "settled" or self._settled_told or self._migration is None:
            return [end]
        return [written("settled", SettledEvent(at=now(), migration=self._migration.status())), end]

    def _patience_seconds(self) -> float:
        seconds = PROGRESS_SECONDS if any(True for _ in self._under_way()) else KEEP_ALIVE_SECONDS
        return seconds if self._until_ns is None else max(0.0, min(seconds, (self._until_ns - monotonic_ns()) / 1e9))


def now() -> datetime:
    return utc(time.time_ns())


def _figures(status: MigrationStatus) -> tuple[object, ...]:
    return status.state, status.pages_total, status.pages_done, status.bytes_moved, status.faults_count, status.downtime_seconds


def written(name: str, event: BaseModel, event_id: str | None = None) -> bytes:
    """One event as it goes over the wire."""
    id_line = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{id_line}data: {event.model_dump_json()}\n\n".encode()
