"""An unmodified QEMU with a real Linux in it moves forth and back between two daemons: no bad page, no heartbeat lost, no I/O
error. POSTCOPY_QEMU_MOVES says how often (``make torture``: 20)."""

import os
from pathlib import Path

import pytest

from migrate.guests.linux.journey import Journey
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.pair import Pair

pytestmark = [pytest.mark.requires("uffd-full", "linux-guest"), pytest.mark.timeout(900)]
MOVES = int(os.environ.get("POSTCOPY_QEMU_MOVES", "2"))
GUEST = LinuxGuest(memory_mib=32, machine_mib=128, verify_ms=500)


@pytest.mark.parametrize("kind", ["memfd", pytest.param("hugetlb", marks=pytest.mark.requires("hugetlb"))])
def test_moves_forth_and_back(repository: Path, kind: str) -> None:
    """By turns with precopy and without."""
    with Pair() as pair:
        journey = Journey(pair, GUEST, "--memory-kind", kind, image=GuestImage.find(repository / "build/guest"))
        try:
            for number in range(MOVES):
                status = journey.move(precopy="off" if number % 2 else "auto")
                journey.check()
                assert sum(status.pages.values()) >= status.pages_total
                assert status.downtime_seconds is not None
                assert 0 < status.downtime_seconds < 5
                assert status.faults["remote"].count > 0
                assert (status.precopy is None) == bool(number % 2)
        finally:
            journey.close()
