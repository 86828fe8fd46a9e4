"""Who is turned away: counted, each, and told in a bounded number of lines, however often and from wherever somebody dials.

The first refusal of a kind is told at once. Those that follow are held back, and told by one line with their number when
INTERVAL_SECONDS are over; an interval without any forgets the kind. A kind is who it was and what of the reason is our own words:
what a peer makes up (``got``) begins no new one. KINDS_MAX kinds have lines of their own, what comes beyond them shares one.
So there are at most 2 * (KINDS_MAX + 1) lines an interval, and no more is kept.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from migrate.errors import PostcopyError
from proto.errors import ProtocolError

INTERVAL_SECONDS = 10.0
KINDS_MAX = 64
REASONS_MAX = 64
_OTHERS = ("others",)
_MORE = "other"
Kind = tuple[str, ...]


def code_of(error: BaseException) -> str:
    if isinstance(error, PostcopyError | ProtocolError):
        return error.code
    return "connection-failed" if isinstance(error, OSError) else "internal"


@dataclass(slots=True)
class _Held:
    """Of one kind, since its last line: how many, and the line that the last of them would have been."""

    line: Callable[..., object]
    timer: asyncio.TimerHandle
    count: int = 0


class Refusals:
    """``counts``: by socket and reason, exact."""

    def __init__(self, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self.counts: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._interval_seconds = interval_seconds
        self._held: dict[Kind, _Held] = {}

    def count(self, socket: str, reason: str) -> None:
        if (socket, reason) not in self.counts and len(self.counts) >= REASONS_MAX:
            reason = _MORE
        self.counts[socket, reason] += 1

    def tell(self, tell: Callable[..., object], event: str, error: Exception, who: str, **facts: object) -> None:
        """``tell``: a logger's method. ``who``: for whom such refusals are alike."""
        of_error = (error.what, error.expected) if isinstance(error, PostcopyError | ProtocolError) else (type(error).__name__,)
        kind: Kind = (event, who, code_of(error), *of_error)
        line = partial(tell, event, **facts, code=code_of(error), reason=str(error))
        if kind not in self._held and len(self._held) >= KINDS_MAX:
            kind = _OTHERS
        held = self._held.get(kind)
        if held is None:
            self._held[kind] = _Held(line, self._later(kind))
            line()
            return
        held.count += 1
        held.line = line

    def close(self) -> None:
        """What has been held back is told now."""
        for held in self._held.values():
            held.timer.cancel()
            self._tell_held(held)
        self._held.clear()

    def _later(self, kind: Kind) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._interval_seconds, self._interval_over, kind)

    def _interval_over(self, kind: Kind) -> None:
        held = self._held[kind]
        if held.count == 0:
            del self._held[kind]
            return
        self._tell_held(held)
        held.timer = self._later(kind)

    @staticmethod
    def _tell_held(held: _Held) -> None:
        if held.count > 0:
            held.line(held_back=held.count)  # this one, the last of them, included
            held.count = 0
