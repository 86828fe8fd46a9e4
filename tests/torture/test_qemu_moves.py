"""An unmodified QEMU with a real Linux in it moves forth and back between two daemons, by turns with precopy and without: no bad
page, no heartbeat lost, no error of its disk, which is at work all the while."""

from pathlib import Path

import pytest

from migrate.guests.linux.journey import Journey
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.pair import Pair

from ..failure.killing import KilledMove
from .ledger import Ledger, Scale

pytestmark = [pytest.mark.requires("uffd-full", "linux-guest"), pytest.mark.timeout(300)]
SLOWLY_BYTES_PER_SECOND = 40_000_000
GUEST = LinuxGuest(memory_mib=32, machine_mib=128, verify_ms=500)


@pytest.mark.parametrize("kind", ["memfd", pytest.param("hugetlb", marks=pytest.mark.requires("hugetlb"))])
def test_linux_travels(repository: Path, scale: Scale, ledger: Ledger, kind: str) -> None:
    moves, kills = scale.of(suite=2, torture=20), scale.of(suite=0, torture=12)
    downtimes_seconds: list[float] = []
    with Pair() as pair:
        journey = Journey(pair, GUEST, "--memory-kind", kind, image=GuestImage.find(repository / "build/guest"))
        try:
            for number in range(moves):
                status = journey.move(precopy="off" if number % 2 else "auto")
                journey.check()
                assert (status.precopy is None) == bool(number % 2)
                assert sum(status.pages.values()) >= status.pages_total
                assert status.faults["remote"].count > 0
                assert status.downtime_seconds is not None
                assert 0 < status.downtime_seconds < 5
                downtimes_seconds.append(status.downtime_seconds)
            for number in range(kills):
                killed_on_its_way(journey, source=number % 3 != 0, destination=number % 3 != 1)
            beats = len(journey.debugcon.told.beats)
        finally:
            journey.close()
    worst_ms = 1e3 * max(downtimes_seconds)
    ledger.add(
        f"Linux in a QEMU, {kind}",
        runs=moves,
        note=f"{kills} kills of daemons besides, {beats} heartbeats, STOP to RESUME {worst_ms:.0f} ms at most",
    )


def killed_on_its_way(journey: Journey, *, source: bool, destination: bool) -> None:
    """One more move, on which daemons are killed: the machine works on there."""
    with KilledMove(journey, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND) as move:
        move.reaches("postcopy")
        move.kill(source=source, destination=destination)
        assert move.ends() == "complete"
    journey.check()
