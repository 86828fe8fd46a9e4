"""What the guests that step by step check themselves have in common: the workload's threads and the KVM machine's vCPUs.

They tell on standard output what happens to them, an event a JSON line: ``started``, ``waiting``, ``stepped``, ``complete``,
``verified`` (with its figures), ``departed``, ``failed``. With ``stay`` one that has departed offers itself again and waits.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import structlog

from migrate.guest.agent import Agent, GuestRole
from migrate.guest.attaching import attach_when_there
from proto.messages import GuestFailed, Message, Stepped

log = structlog.get_logger("postcopy.guest")


class Report(Protocol):
    """One reading of the native side."""

    @property
    def verifications(self) -> int: ...
    @property
    def failure(self) -> object | None: ...
    def to_dict(self) -> dict[str, Any]: ...


class Native(Protocol):
    """The C side behind its one door; the two ``native.py`` document it."""

    @property
    def event_fd(self) -> int: ...
    def pause(self, deadline_seconds: float) -> None: ...
    def save(self) -> bytes: ...
    def load(self, state: bytes) -> None: ...
    def resume(self) -> None: ...
    def verify(self) -> None: ...
    def last_step_ns(self) -> int: ...
    def first_step_ns(self) -> int: ...
    def report(self) -> Report: ...


class SteppingGuest:
    """What the agent drives, but for discards, which are each guest's own."""

    def __init__(self, native: Native, *, verify: bool) -> None:
        """``verify``: check all memory once it is complete."""
        self._native, self._verify = native, verify
        self._stepped_ns = 0
        self._said_ns = 0
        self._verifications = 0
        self._verifying = False

    def prepare(self) -> None:
        self._native.last_step_ns()

    def pause(self, deadline_seconds: float) -> tuple[bytes, int]:
        self._native.pause(deadline_seconds)
        return self._native.save(), self._native.last_step_ns()

    def load(self, state: bytes) -> None:
        self._native.load(state)

    def resume(self, state: bytes | None) -> None:
        if state is not None:
            self.load(state)
            self._verifications = 0
        self._native.resume()

    def foreseen(self) -> list[int]:
        return []

    def event_fd(self) -> int:
        return self._native.event_fd

    def event(self) -> Message | None:
        os.read(self._native.event_fd, 8)
        first_step_ns = self._native.first_step_ns()
        if first_step_ns and first_step_ns != self._stepped_ns:  # told at once, the rest on a later turn
            self._stepped_ns = first_step_ns
            os.eventfd_write(self._native.event_fd, 1)
            return Stepped(first_step_ns=first_step_ns)
        report = self._native.report()
        if report.failure is not None:
            say("failed", **report.to_dict())
            return GuestFailed(reason=str(report.failure))
        if self._verifying and report.verifications > self._verifications:
            self._verifying = False
            say("verified", **report.to_dict())
        if self._stepped_ns != self._said_ns:
            self._said_ns = self._stepped_ns
            say("stepped", first_step_ns=self._stepped_ns)
        return None

    def complete(self) -> None:
        report = self._native.report()
        say("complete", **report.to_dict())
        if self._verify:
            self._verifications = report.verifications
            self._verifying = True
            self._native.verify()


def say(event: str, **facts: Any) -> None:
    if sys.stdout.isatty():  # hundreds of buckets are for programs
        facts = {name: _without_buckets(fact) if isinstance(fact, dict) else fact for name, fact in facts.items()}
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def _without_buckets(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in figures.items() if name != "buckets"}


def lives(live: Callable[[GuestRole], None], *, waiting: bool, stay: bool) -> None:
    """One life of the guest's memory, and with ``stay`` another after each departure."""
    role = GuestRole.WAITING if waiting else GuestRole.RUNNING
    gc.collect()
    gc.freeze()
    gc.disable()  # the agent answers within a downtime; it makes no cycles
    while True:
        live(role)
        say("departed")
        if not stay:
            return
        role = GuestRole.WAITING


def serve(agent: Agent, socket_path: Path, detached: Callable[[], None]) -> None:
    """Be attached until the guest has departed. ``detached``: after each daemon that is gone, unless the next one goes on."""
    attached = False
    while agent.role is not GuestRole.DEPARTED:
        attach_when_there(agent, socket_path, again=attached)
        attached = True
        say("waiting" if agent.role is GuestRole.WAITING else "started")
        agent.run()
        if agent.undecided:
            log.error("the daemon is gone, and the page states with it: this guest stays as it is", role=str(agent.role))
            os.read(os.eventfd(0), 8)  # nothing can be decided from here; stay, holding memory and userfaultfd
        if agent.role is not GuestRole.ARRIVING:  # who waits for an answer there gets it from the next daemon
            detached()
