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
WHO = [(True, False), (False, True), (True, True)]
NAMES = ["source", "destination", "both"]


@pytest.fixture(scope="module")
def guest() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "killed", "32M", options=BUSY)


@pytest.mark.parametrize(("source", "destination"), WHO, ids=NAMES)
def test_killed_in_postcopy(guest: Commuter, source: bool, destination: bool) -> None:
    """Without bulk nothing ends before the kill: the guest runs there, and lacks what it has not touched."""
    with KilledMove(guest, precopy="off", bulk=False) as move:
        move.reaches("postcopy")
        move.kill(source=source, destination=destination)
        assert move.ends() == "complete"
