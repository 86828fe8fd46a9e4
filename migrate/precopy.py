"""When precopy ends: another round is worth it only while it leaves less behind than the last one did.

Pure decisions over the figures of a round; the rounds themselves are migrate/rounds.py and dataplane/precopy.c.
"""

from dataclasses import dataclass

SHRINKS_BELOW = 0.75
"""The next round is expected to leave at most this share of what is written now; else the guest writes as fast as pages go."""
ROUNDS_MAX = 1000
DEADLINE_SECONDS_MAX = 1e6
"""What may be asked for; told by each round's figures, so bounded."""


@dataclass(frozen=True, slots=True)
class PrecopyPolicy:
    """``rounds``: None decides by the figures, 0 is pure postcopy, N makes exactly so many (``--precopy auto|off|N``).

    ``stale_bytes_max``: few enough to switch over at once. ``deadline_seconds``: of precopy; a
    round that has begun is finished.
    """

    rounds: int | None = None
    rounds_max: int = 30
    stale_bytes_max: int = 1 << 20
    deadline_seconds: float | None = None


AUTO = PrecopyPolicy()


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """One round as it ended: ``number`` from 1, pages sent in it, what has been written since they were armed for it."""

    number: int
    pages_sent: int
    pages_written: int
    bytes_written: int
    elapsed_seconds: float


def reason_to_switch(policy: PrecopyPolicy, last: RoundFigures) -> str | None:
    """Why precopy ends after this round; None: one more."""
    if policy.rounds is not None and last.number >= policy.rounds:
        return f"{policy.rounds} rounds were asked for"
    if policy.deadline_seconds is not None and last.elapsed_seconds >= policy.deadline_seconds:
        return f"the deadline of {policy.deadline_seconds:g} s has passed"
    if policy.rounds is not None:
        return None
    if last.number >= policy.rounds_max:
        return f"{policy.rounds_max} rounds are the most"
    if last.bytes_written <= policy.stale_bytes_max:
        return f"{last.bytes_written} bytes are stale, {policy.stale_bytes_max} are few enough"
    if last.pages_written > SHRINKS_BELOW * last.pages_sent:
        figures = f"{last.pages_written} pages were written while {last.pages_sent} went out"
        return f"another round would not shrink the stale set: {figures}"
    return None
