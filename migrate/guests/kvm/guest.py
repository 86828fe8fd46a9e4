"""``postcopy guest kvm``: a KVM machine as a guest process of its own; it tells the events and figures that the workload
tells."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from migrate.guest.agent import Agent, GuestRole
from migrate.guest.attaching import attach_when_there
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.kvm.native import KvmConfig, KvmMachine
from migrate.guests.workload.guest import say
from migrate.uffd import Userfaultfd
from proto.messages import Discard, GuestFailed, Message, Stepped

log = structlog.get_logger("postcopy.kvm")


@dataclass(frozen=True, slots=True)
class KvmOptions:
    guest_id: str
    socket_path: Path
    memory: Sequence[MemorySpec]
    vcpus: int = 1
    waiting: bool = False
    stay: bool = False
    verify: bool = True
    config: KvmConfig = field(default_factory=KvmConfig)


class KvmGuest:
    """What the agent drives."""

    def __init__(self, memory: GuestMemory, options: KvmOptions) -> None:
        self.kvm = KvmMachine(memory.regions, options.vcpus)
        self._options = options
        self._stepped_ns = 0
        self._said_ns = 0
        self._verifications = 0
        self._verifying = False

    def prepare(self) -> None:
        self.kvm.last_step_ns()

    def pause(self, deadline_seconds: float) -> tuple[bytes, int]:
        self.kvm.pause(deadline_seconds)
        return self.kvm.save(), self.kvm.last_step_ns()

    def resume(self, state: bytes | None) -> None:
        if state is not None:
            self.kvm.load(state)
            self._verifications = 0
        self.kvm.resume()

    def event_fd(self) -> int:
        return self.kvm.event_fd

    def event(self) -> Message | None:
        os.read(self.kvm.event_fd, 8)
        first_step_ns = self.kvm.first_step_ns()
        if first_step_ns and first_step_ns != self._stepped_ns:  # told at once, the rest on a later turn
            self._stepped_ns = first_step_ns
            os.eventfd_write(self.kvm.event_fd, 1)
            return Stepped(first_step_ns=first_step_ns)
        report = self.kvm.report()
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
        report = self.kvm.report()
        say("complete", **report.to_dict())
        if self._options.verify:
            self._verifications = report.verifications
            self._verifying = True
            self.kvm.verify()

    def discards(self) -> Discard | None:
        """It discards nothing."""
        return None

    def discarded(self) -> None:
        pass


def run(options: KvmOptions) -> None:
    """Returns when the guest has departed. Raises HostLacksError; PostcopyError ``guest-failed`` when it found itself broken."""
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


def _live(options: KvmOptions, role: GuestRole) -> None:
    """One life of the guest's memory: from its start, or from waiting, until it has departed."""
    Userfaultfd.open(user_mode_only=False).close()  # KVM's faults are the kernel's: refused here, not stuck after the switchover
    memory = GuestMemory(options.memory)
    guest = KvmGuest(memory, options)
    agent = Agent(options.guest_id, memory, guest, role)
    try:
        if role is GuestRole.RUNNING:
            guest.kvm.start(options.config)
        attached = False
        while agent.role is not GuestRole.DEPARTED:
            attach_when_there(agent, options.socket_path, again=attached)
            attached = True
            say("waiting" if agent.role is GuestRole.WAITING else "started")
            agent.run()
            if agent.undecided:
                log.error("the daemon is gone, and the page states with it: this guest stays as it is", role=str(agent.role))
                os.read(os.eventfd(0), 8)  # nothing can be decided from here; stay, holding memory and userfaultfd
    finally:
        guest.kvm.close()
        agent.close()
        memory.close()
