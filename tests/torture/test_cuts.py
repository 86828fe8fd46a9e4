"""A path that is cut at seeded random moments of every phase: amid a frame, at any byte of any connection, for a while or for an
instant, slow or stalled. The guest verifies itself after each move, and runs at exactly one place, whatever happened."""

import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from migrate.pair import Pair
from proto.preamble import ConnectionKind

from ..failure.lossy_link import CutMove
from ..path.commuter import Commuter, until
from .ledger import Ledger, Scale

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
MEMORY_BYTES = 16 << 20
BUSY = ("--write-ratio", "0.5", "--threads", "2")
CUTS_A_MOVE = 2
AWAY_SECONDS = 0.3
THROTTLED_BYTES_PER_SECOND = 200e6


@pytest.fixture(scope="module")
def guest() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "torn", f"{MEMORY_BYTES >> 20}M", options=BUSY)


class Torture:
    """One move with cuts to come; what they were and came to is counted."""

    def __init__(self, guest: Commuter, dice: random.Random) -> None:
        self._guest, self._dice = guest, dice
        self.seen: Counter[str] = Counter()
        self.service_seconds: list[float] = []

    def move(self) -> None:
        dice = self._dice
        with CutMove(self._guest, precopy=dice.choice(("off", "off", 1, 2, "auto")), streams=dice.randint(1, 3)) as move:
            if dice.random() < 0.2:
                move.link.bytes_per_second = THROTTLED_BYTES_PER_SECOND
            for _ in range(CUTS_A_MOVE):
                if not self._cut(move):
                    break
            status = move.ends()
        assert status.state in ("complete", "failed"), status
        self.seen[str(status.state)] += 1
        self.seen["epochs"] += status.epoch
        if status.state == "failed":
            assert "postcopy" not in status.timeline_seconds
            until(self._guest.waiting_again, "the waiting guest waits again")

    def _cut(self, move: CutMove) -> bool:
        """False: there was nothing left to cut."""
        dice, link = self._dice, move.link
        kind = dice.choice((ConnectionKind.CONTROL, ConnectionKind.URGENT, ConnectionKind.BULK, ConnectionKind.BULK))
        from_source = kind is ConnectionKind.BULK or dice.random() < 0.5
        most_bytes = {ConnectionKind.CONTROL: 3000, ConnectionKind.URGENT: 300_000, ConnectionKind.BULK: MEMORY_BYTES}[kind]
        link.cut_at(kind, from_source=from_source, after_bytes=int(most_bytes * dice.random() ** 2))
        if not link.wait_for_cut(0.5):
            link.cut()
        self.seen["cuts"] += 1
        if move.state() in ("complete", "failed"):
            return False
        if dice.random() < 0.3:
            self._away(move)
        return True

    def _away(self, move: CutMove) -> None:
        """The path is gone for a while; how soon after it is back the guest is served again."""
        move.link.cut(until_restored=True)
        time.sleep(AWAY_SECONDS)  # time itself: attempts to dial fail meanwhile
        move.link.restore()
        begun = time.monotonic()
        move.reaches("postcopy", "complete", "failed")
        self.service_seconds.append(time.monotonic() - begun)


@pytest.mark.timeout(1500)
def test_cuts(guest: Commuter, scale: Scale, ledger: Ledger) -> None:
    torture = Torture(guest, random.Random(scale.seed))
    wanted = scale.of(suite=8, torture=300)
    while torture.seen["cuts"] < wanted:
        torture.move()
    assert guest.move().state == "complete"
    slowest = max(torture.service_seconds, default=0.0)
    assert slowest <= 1.0
    ledger.add(
        "cuts at random bytes of random connections",
        runs=torture.seen["cuts"],
        note=f"{torture.seen['complete']} moves completed, {torture.seen['failed']} ran on at the source, "
        f"{torture.seen['epochs']} epochs; served again {slowest * 1000:.0f} ms after the path was back, at most",
    )
