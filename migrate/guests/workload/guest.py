"""``postcopy guest workload``: the workload as a guest process of its own, and what it tells on standard output.

Each event is one JSON line: ``started``, ``waiting``, ``stepped``, ``complete``, ``verified`` (with its figures),
``departed``, ``failed``. With ``stay`` a guest that has departed offers itself again as a waiting one.
"""

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from migrate.guest.agent import Agent, GuestRole
from migrate.guest.attaching import attach_when_there
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.workload.native import BLOCK_BYTES, Workload, WorkloadConfig
from proto.messages import Discard, GuestFailed, Message, PageRange, Stepped

log = structlog.get_logger("postcopy.workload")


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    guest_id: str
    socket_path: Path
    memory: Sequence[MemorySpec]
    waiting: bool = False
    stay: bool = False
    verify: bool = True
    discard_by_event: bool = True
    config: WorkloadConfig = field(default_factory=WorkloadConfig)


class WorkloadMachine:
    """What the agent drives."""

    def __init__(self, memory: GuestMemory, options: WorkloadOptions) -> None:
        self.workload = Workload(memory.address, memory.size_bytes)
        self._memory, self._options = memory, options
        self._stepped_ns = 0
        self._said_ns = 0
        self._verifications = 0
        self._verifying = False

    def start(self) -> None:
        self.workload.tell_discards(True)
        self.workload.start(self._options.config)

    def prepare(self) -> None:
        self.workload.last_step_ns()

    def pause(self, deadline_seconds: float) -> tuple[bytes, int]:
        self.workload.pause(deadline_seconds)
        return self.workload.save(), self.workload.last_step_ns()

    def resume(self, state: bytes | None) -> None:
        if state is not None:
            self.workload.load(state)
            self.workload.tell_discards(not self._options.discard_by_event)  # events are read until `complete`
            self._verifications = 0
        self.workload.resume()

    def event_fd(self) -> int:
        return self.workload.event_fd

    def event(self) -> Message | None:
        os.read(self.workload.event_fd, 8)
        first_step_ns = self.workload.first_step_ns()
        if first_step_ns and first_step_ns != self._stepped_ns:  # told at once, the rest on a later turn
            self._stepped_ns = first_step_ns
            os.eventfd_write(self.workload.event_fd, 1)
            return Stepped(first_step_ns=first_step_ns)
        report = self.workload.report()
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

    def discards(self) -> Discard | None:
        ranges = [self._page(block) for block in self.workload.discards()]
        return Discard(ranges=ranges) if ranges else None

    def _page(self, block: int) -> PageRange:
        address = self._memory.address + block * BLOCK_BYTES
        for index, region in enumerate(self._memory.regions):
            offset_bytes = address - region.guest_address
            if 0 <= offset_bytes < region.size_bytes:
                return PageRange(region=index, page_index=offset_bytes // region.page_bytes, page_count=1)
        raise ValueError(f"block {block} is in no region")

    def discarded(self) -> None:
        self.workload.discarded()

    def detached(self) -> None:
        """The daemon is gone, and what it was told of: a guest that is whole here needs no answer."""
        self.workload.discards()
        self.workload.discarded()

    def complete(self) -> None:
        self.workload.tell_discards(True)
        report = self.workload.report()
        say("complete", **report.to_dict())
        if self._options.verify:
            self._verifications = report.verifications
            self._verifying = True
            self.workload.verify()


def say(event: str, **facts: Any) -> None:
    if sys.stdout.isatty():  # hundreds of buckets are for programs
        facts = {name: _without_buckets(fact) if isinstance(fact, dict) else fact for name, fact in facts.items()}
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def _without_buckets(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in figures.items() if name != "buckets"}


def run(options: WorkloadOptions) -> None:
    """Returns when the guest has departed. Raises PostcopyError ``guest-failed`` when it found itself broken."""
    role = GuestRole.WAITING if options.waiting else GuestRole.RUNNING
    gc.collect()
    gc.freeze()
    gc.disable()  # the agent answers within a downtime; it makes no cycles
    while True:
        _live(options, role)
        say("departed")
        if not options.stay:
            return
        role = GuestRole.WAITING


def _live(options: WorkloadOptions, role: GuestRole) -> None:
    """One life of the guest's memory: from its start, or from waiting, until it has departed."""
    memory = GuestMemory(options.memory)
    machine = WorkloadMachine(memory, options)
    agent = Agent(options.guest_id, memory, machine, role, "zero" if options.discard_by_event else None)
    try:
        if role is GuestRole.WAITING:
            machine.workload.prepare(options.config.threads)
        else:
            machine.start()
        attached = False
        while agent.role is not GuestRole.DEPARTED:
            attach_when_there(agent, options.socket_path, again=attached)
            attached = True
            say("waiting" if agent.role is GuestRole.WAITING else "started")
            agent.run()
            if agent.undecided:
                log.error("the daemon is gone, and the page states with it: this guest stays as it is", role=str(agent.role))
                os.read(os.eventfd(0), 8)  # nothing can be decided from here; stay, holding memory and userfaultfd
            if agent.role is not GuestRole.ARRIVING:  # who waits for an answer there gets it from the next daemon
                machine.detached()
    finally:
        machine.workload.close()
        agent.close()
        memory.close()
