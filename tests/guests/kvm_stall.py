"""A KVM machine whose memory nobody fills but this process: it withholds one page, and tells what becomes of a pause meanwhile.

    python -P kvm_stall.py FIRST END    the first of these pages that is touched comes late

Run as a process of its own, which is killed if it hangs. A guest is made and paused; its copy arrives behind a userfaultfd,
and each fault is answered but for that one. A pause with a short deadline is tried; where it failed, the guest has to run on,
and a longer one ends when the page comes. At last the guest verifies all of its memory.
"""

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable

from migrate.errors import PauseFailedError
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.kvm.native import KvmConfig, KvmMachine, Phase
from migrate.uffd import Userfaultfd

PAGES = 2048
PAGE_BYTES = 4096
DEADLINE_SECONDS = 20.0
SHORT_SECONDS = 0.3


class Filler:
    """Answers faults from the source's file."""

    def __init__(self, source: int, there: GuestMemory) -> None:
        self._source, self._there = source, there
        self._userfaultfd = Userfaultfd.adopt(there.register())

    def next_fault(self, deadline_seconds: float) -> int | None:
        """The page waited for."""
        if not select.select([self._userfaultfd], [], [], deadline_seconds)[0]:
            return None
        [event] = self._userfaultfd.read_events(1)
        return (event.address - self._there.address) // PAGE_BYTES

    def give(self, page: int) -> None:
        os.pwrite(self._there.files[0], os.pread(self._source, PAGE_BYTES, page * PAGE_BYTES), page * PAGE_BYTES)
        self._userfaultfd.continue_(self._there.address + page * PAGE_BYTES, PAGE_BYTES)

    def give_until(self, done: Callable[[], bool]) -> None:
        """Every page that is waited for, until the guest has done something."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not done():
            assert time.monotonic() < deadline
            if (page := self.next_fault(0.01)) is not None:
                self.give(page)


def paused_seconds(machine: KvmMachine, deadline_seconds: float) -> float | None:
    """None: it could not be, within its deadline."""
    began = time.monotonic()
    try:
        machine.pause(deadline_seconds)
    except PauseFailedError:
        assert time.monotonic() - began >= deadline_seconds
        assert machine.report().phase is Phase.RUNNING
        return None
    return time.monotonic() - began


def pause_as_it_comes(machine: KvmMachine, filler: Filler, page: int) -> None:
    """A pause that is asked for first waits for the page, and no longer."""
    outcome: list[float | None] = []
    pauser = threading.Thread(target=lambda: outcome.append(paused_seconds(machine, DEADLINE_SECONDS)))
    pauser.start()
    pauser.join(SHORT_SECONDS)
    assert pauser.is_alive()
    filler.give(page)
    pauser.join(DEADLINE_SECONDS)
    assert outcome != [None]
    machine.resume()


def arrive(spec: list[MemorySpec]) -> tuple[KvmMachine, Filler]:
    here, there = GuestMemory(spec), GuestMemory(spec)
    source = KvmMachine(here.regions, 1)
    source.start(KvmConfig(write_per_mille=300))
    assert select.select([source.event_fd], [], [], DEADLINE_SECONDS)[0]
    source.pause(DEADLINE_SECONDS)
    filler = Filler(here.files[0], there)
    machine = KvmMachine(there.regions, 1)
    machine.load(source.save())
    machine.resume()
    return machine, filler


def main() -> None:
    withheld = range(int(sys.argv[1]), int(sys.argv[2]))
    machine, filler = arrive([MemorySpec(PAGES * PAGE_BYTES, "memfd")])
    while (page := filler.next_fault(DEADLINE_SECONDS)) not in withheld:
        assert page is not None
        filler.give(page)
    seconds = paused_seconds(machine, SHORT_SECONDS)
    if seconds is None:
        pause_as_it_comes(machine, filler, page)
    else:
        machine.resume()
        assert filler.next_fault(DEADLINE_SECONDS) == page  # the same instruction again
        filler.give(page)
    machine.verify()
    filler.give_until(lambda: machine.report().verifications > 0 or machine.report().phase is Phase.FAILED)
    print(json.dumps({"page": page, "paused_seconds": seconds, "failure": str(machine.report().failure)}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
