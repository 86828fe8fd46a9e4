"""What happens in a daemon, for those who watch it: one bounded ring of events, which each reader reads at its own pace.

Nothing is queued for a reader: one that is slow finds the oldest events gone and is told so (``missed``), and costs the
daemon no memory. Within a switchover an event is one append: readers are woken when it is over, and a little later than
that, so that the guest's first step there comes before their work here.
"""

import asyncio
import contextlib
import os
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from migrate.switchover import Quiet

EVENTS_KEPT = 512
WAKE_SECONDS = 0.005
"""How long a reader sleeps on after an event: what happens in one burst is told in one piece."""


class Happened(NamedTuple):
    """``name``: state, settled or guest. ``migration_id``: empty for the latter. ``facts``: as the API tells them."""

    number: int
    at_ns: int
    name: str
    migration_id: str
    facts: dict[str, object]


class EventLog:
    """Numbers grow by one from 1 on; ``origin`` tells this daemon's from those of the one that ran here before it."""

    def __init__(self, quiet: Quiet, kept: int = EVENTS_KEPT) -> None:
        self.origin = os.urandom(4).hex()
        self.newest = 0
        self.closed = False
        self.readers = 0
        self._ring: deque[Happened] = deque(maxlen=kept)
        self._quiet = quiet
        self._waiting = 0
        self._more = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        quiet.on_free = self._wake_soon

    def append(self, name: str, migration_id: str, facts: dict[str, object]) -> None:
        self.newest += 1
        self._ring.append(Happened(self.newest, time.time_ns(), name, migration_id, facts))
        if self._waiting and not self._quiet.held:
            self._wake_soon()

    def lost_after(self, number: int) -> int:
        """How many events behind that number are no longer here."""
        oldest = self._ring[0].number if self._ring else self.newest + 1
        return max(0, oldest - 1 - number)

    def after(self, number: int, limit: int) -> list[Happened]:
        """The first ones behind that number that are still here."""
        skipped = max(0, number - self._ring[0].number + 1) if self._ring else 0
        return list(islice(self._ring, skipped, skipped + limit))

    async def more(self, seconds: float) -> None:
        """Until something has happened, the log is closed, or that long."""
        if self.closed:
            return
        self._waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._more.wait()
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """The daemon ends: readers take what is left and go."""
        self.closed = True
        self._wake()

    def _wake_soon(self) -> None:
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WAKE_SECONDS, self._wake)

    def _wake(self) -> None:
        self._timer = None
        if self._quiet.held and not self.closed:
            return  # a second switchover has begun: its end wakes them
        self._more.set()
        self._more = asyncio.Event()
