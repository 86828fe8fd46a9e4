"""``postcopy guest workload``: the workload as a guest process of its own; what it tells: stepping.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from migrate.guest.agent import Agent, GuestRole
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.stepping import SteppingGuest, lives, serve
from migrate.guests.workload.native import BLOCK_BYTES, Workload, WorkloadConfig
from proto.messages import Discard, PageRange


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


class WorkloadMachine(SteppingGuest):
    """Its threads may discard pages."""

    def __init__(self, memory: GuestMemory, options: WorkloadOptions) -> None:
        self.workload = Workload(memory.address, memory.size_bytes)
        super().__init__(self.workload, verify=options.verify)
        self._memory, self._options = memory, options

    def start(self) -> None:
        self.workload.tell_discards(True)
        self.workload.start(self._options.config)

    def load(self, state: bytes) -> None:
        self.workload.load(state)
        self.workload.tell_discards(not self._options.discard_by_event)  # events are read until `complete`

    def complete(self) -> None:
        self.workload.tell_discards(True)
        super().complete()

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


def run(options: WorkloadOptions) -> None:
    """Returns when the guest has departed. Raises PostcopyError ``guest-failed`` when it found itself broken."""
    lives(partial(_live, options), waiting=options.waiting, stay=options.stay)


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
        serve(agent, options.socket_path, machine.detached)
    finally:
        machine.workload.close()
        agent.close()
        memory.close()
