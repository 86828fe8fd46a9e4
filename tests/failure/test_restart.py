"""Promises P5 and P6 between two real daemons: either or both are killed and started anew, and the guest runs at one place.

At random moments: tests/torture/test_kills.py; between the words of the switchover: test_restart_steps.py.
"""

from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..path.commuter import Commuter
from .killing import KilledMove

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
BUSY = ("--write-ratio", "0.5", "--threads", "2", "--rate", "5000")
SLOWLY_BYTES_PER_SECOND = 10_000_000
WHO = [
    pytest.param((True, False), id="source"),
    pytest.param((False, True), id="destination"),
    pytest.param((True, True), id="both"),
]


@pytest.fixture(scope="module")
def guest() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "killed", "32M", options=BUSY)


@pytest.mark.parametrize("who", WHO[2:])
def test_killed_in_precopy(guest: Commuter, who: tuple[bool, bool]) -> None:
    """P5: the guest runs on at the source, as if nothing had been tried."""
    with KilledMove(guest, precopy=1000) as move:
        move.reaches("precopy")
        move.kill(source=who[0], destination=who[1])
        assert move.ends() == "here"


@pytest.mark.parametrize("who", WHO)
def test_killed_in_postcopy(guest: Commuter, who: tuple[bool, bool]) -> None:
    """Bulk is slow enough for nothing to end before the kill: the guest runs there, and lacks what it has not touched. The next
    daemon knows of no limit."""
    with KilledMove(guest, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND) as move:
        move.reaches("postcopy")
        move.kill(source=who[0], destination=who[1])
        assert move.ends() == "complete"
