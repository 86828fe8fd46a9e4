"""Page states that come back to a restarted daemon are input: whoever lies is harmed, or left with a typed error; the daemon and
every other guest of its go on. The suite takes one of each sort, `make torture` every state and 20 times random bytes."""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import pytest

from migrate.errors import DeadlineError, PostcopyError
from migrate.pair import Pair

from ..failure.killing import KilledMove
from ..path.commuter import Commuter, until
from .ledger import Ledger, Scale

pytestmark = [pytest.mark.requires("uffd", "wp-async", "pagemap-scan"), pytest.mark.timeout(600)]
FORGER = (sys.executable, "-P", str(Path(__file__).with_name("forging_guest.py")))
MAPPED, HELD, DISCARDED_CLAIM = 4, 5, 0x42  # dataplane/pages.h
AT_WORK = ("--write-ratio", "0.5", "--rate", "200")
"""Its own touches bring pages too."""
SLOWLY_BYTES_PER_SECOND = 800_000
AT_ONCE = 4
OUTCOME_SECONDS = 30.0


class Liar:
    """A guest in postcopy at a destination that is about to be killed, to which it will lie."""

    def __init__(self, pair: Pair, name: str, forgery: str) -> None:
        waiting = ["--id", f"{name}-there", "--daemon", str(pair.destination.runtime_dir), "--memory", "8M", "--waiting"]
        self.process = pair.child(f"{name}-there", [forgery, "guest", "workload", *waiting], command=FORGER)
        self.process.event("waiting")
        self.guest = Commuter(pair, name, "8M", options=AT_WORK, there=self.process)
        self.move = KilledMove(self.guest, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND)
        self.move.reaches("postcopy")

    def outcome(self, pair: Pair) -> str:
        """What the guest says of itself, or the error that its migration has come to."""
        until(lambda: self.move.state_at(pair.destination) != "", "its migration is taken back")
        with pair.source.client() as client, contextlib.suppress(PostcopyError):  # who calls all pages here has ended already
            client.limit(self.move.id, None)
        with pair.destination.client() as client:
            status = client.status(self.move.id, settled_within_seconds=OUTCOME_SECONDS)
        assert status.settled, status
        try:
            return str(
                self.process.event("verified", "failed", deadline_seconds=0.1 if status.error else OUTCOME_SECONDS)["event"]
            )
        except DeadlineError:
            assert status.error is not None
            return status.error.code


def test_liars(scale: Scale, ledger: Ledger) -> None:
    random_ones = [f"random:{scale.seed + number}" for number in range(scale.of(suite=1, torture=20))]
    states = [str(state) for state in scale.of(suite=[MAPPED, HELD], torture=[*range(16), DISCARDED_CLAIM])]
    forgeries = [*states, *random_ones, *scale.of(suite=[], torture=["none"])]
    seen: Counter[str] = Counter()
    while forgeries:
        seen += lies([forgeries.pop() for _ in range(min(AT_ONCE, len(forgeries)))])
    assert seen["failed"] > 0
    note = ", ".join(f"{count} {outcome}" for outcome, count in sorted(seen.items()))
    ledger.add("forged page states", runs=seen.total(), note=f"the liars: {note}; every other guest verified")


def lies(forgeries: list[str]) -> Counter[str]:
    """All at once, and beside them a guest that does not."""
    with Pair() as pair:
        liars = [Liar(pair, f"liar-{number}", forgery) for number, forgery in enumerate(forgeries)]
        honest = Commuter(pair, "honest", "12M", options=AT_WORK)  # of another size: it moves into no liar's old self
        with KilledMove(honest, precopy="off", bulk_limit_bytes_per_second=4 * SLOWLY_BYTES_PER_SECOND) as move:
            move.reaches("postcopy")
            move.kill(source=False, destination=True)
            daemon = honest.goes_to
            outcomes = Counter(liar.outcome(pair) for liar in liars)
            with honest.is_at.client() as client:
                client.limit(move.id, None)
            assert move.ends() == "complete"
        assert honest.move().state == "complete"
        assert daemon.returncode is None
        return outcomes
