"""Promises P4 and P6 between two real daemons: either or both are killed and started anew, and the guest runs at one place."""

import random
import time
from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..path.commuter import Commuter
from .killing import KilledMove

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
BUSY = ("--write-ratio", "0.5", "--threads", "2")
WHO = [
    pytest.param((True, False), id="source"),
    pytest.param((False, True), id="destination"),
    pytest.param((True, True), id="both"),
]


@pytest.fixture(scope="module")
def guest() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "killed", "32M", options=BUSY)


@pytest.mark.parametrize("who", WHO)
def test_killed_in_precopy(guest: Commuter, who: tuple[bool, bool]) -> None:
    """P5: the guest runs on at the source, as if nothing had been tried."""
    with KilledMove(guest, precopy=1000) as move:
        move.reaches("precopy")
        move.kill(source=who[0], destination=who[1])
        assert move.ends() == "here"


@pytest.mark.parametrize("who", WHO)
def test_killed_in_postcopy(guest: Commuter, who: tuple[bool, bool]) -> None:
    """Without bulk nothing ends before the kill: the guest runs there, and lacks what it has not touched."""
    with KilledMove(guest, precopy="off", bulk=False) as move:
        move.reaches("postcopy")
        move.kill(source=who[0], destination=who[1])
        assert move.ends() == "complete"


@pytest.mark.parametrize("who", WHO)
def test_killed_around_the_switchover(guest: Commuter, who: tuple[bool, bool]) -> None:
    dice = random.Random(1)
    for _ in range(2):
        with KilledMove(guest, precopy=1) as move:
            time.sleep(dice.uniform(0.0, 0.1))  # time itself: a seeded moment
            move.kill(source=who[0], destination=who[1])
            move.ends()
    assert guest.move().state == "complete"
