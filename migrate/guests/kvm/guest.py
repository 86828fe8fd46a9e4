"""``postcopy guest kvm``: a KVM machine as a guest process of its own; it tells the events and figures that the workload
tells."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from migrate.guest.agent import Agent, GuestRole
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.kvm.native import KvmConfig, KvmMachine
from migrate.guests.stepping import SteppingGuest, lives, serve
from migrate.uffd import Userfaultfd
from proto.messages import Discard


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


class KvmGuest(SteppingGuest):
    """It discards nothing."""

    def __init__(self, machine: KvmMachine, *, verify: bool) -> None:
        super().__init__(machine, verify=verify)
        self._machine = machine

    def foreseen(self) -> list[int]:
        return self._machine.foreseen()

    def discards(self) -> Discard | None:
        return None

    def discarded(self) -> None:
        pass


def run(options: KvmOptions) -> None:
    """Returns when the guest has departed. Raises HostLacksError; PostcopyError ``guest-failed`` when it found itself broken."""
    lives(partial(_live, options), waiting=options.waiting, stay=options.stay)


def _live(options: KvmOptions, role: GuestRole) -> None:
    """One life of the guest's memory: from its start, or from waiting, until it has departed."""
    Userfaultfd.open(user_mode_only=False).close()  # KVM's faults are the kernel's: refused here, not stuck after the switchover
    memory = GuestMemory(options.memory)
    machine = KvmMachine(memory.regions, options.vcpus)
    guest = KvmGuest(machine, verify=options.verify)
    agent = Agent(options.guest_id, memory, guest, role)
    try:
        if role is GuestRole.RUNNING:
            machine.start(options.config)
        serve(agent, options.socket_path, guest.discarded)
    finally:
        machine.close()
        agent.close()
        memory.close()
