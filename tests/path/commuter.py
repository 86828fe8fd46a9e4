"""A guest that moves there and back between two daemons, verified after each move: one guest's life for many tests."""

import time
from collections.abc import Callable
from typing import Any

from migrate.pair import DaemonProcess, Pair, Process
from migrate.session import MigrationStatus

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.005


class Commuter:
    """Two workload guests that stay: one runs, the other waits, and they change roles with each move."""

    waits: Process
    runs: Process
    goes_to: DaemonProcess
    is_at: DaemonProcess

    def __init__(self, pair: Pair, name: str, *memory: str, options: tuple[str, ...] = (), there: Process | None = None) -> None:
        """``there``: one that waits at the destination already."""
        extra = [argument for more in memory[1:] for argument in ("--memory", more)]
        arguments = [memory[0], *extra, "--stay", *options]
        self.pair = pair
        self.waits = there or pair.guest(pair.destination, f"{name}-there", *arguments, waiting=True)
        self.runs = pair.guest(pair.source, f"{name}-here", *arguments)
        self.goes_to, self.is_at = pair.destination, pair.source
        self.runs.event("stepped", deadline_seconds=DEADLINE_SECONDS)

    @property
    def guest_id(self) -> str:
        return self.runs.name

    def move(self, *, bulk: bool = True, **precopy: str | float) -> MigrationStatus:
        """To the other daemon; complete and verified there when this returns. Raises AssertionError."""
        status = self.pair.move(self.guest_id, self.is_at, self.goes_to, bulk=bulk, **precopy)
        assert status.state == "complete", status.error
        self.arrived()
        return status

    def arrived(self) -> dict[str, Any]:
        """After a migration that is complete: the guest has checked all of its memory, and its old self waits again."""
        verified = self.waits.event("verified", "failed", deadline_seconds=DEADLINE_SECONDS)
        assert verified["event"] == "verified", verified
        self.runs.event("waiting", deadline_seconds=DEADLINE_SECONDS)
        self.waits, self.runs = self.runs, self.waits
        self.goes_to, self.is_at = self.is_at, self.goes_to
        return verified

    def end(self) -> None:
        """Both of its processes."""
        self.runs.kill()
        self.waits.kill()


def until(condition: Callable[[], bool], what: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Look at what tells no one when it changes, such as a log file. Raises AssertionError."""
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(POLL_SECONDS)
