"""When a connection is lost after the switchover the migration is paused, not over (P5): what counts as lost, how often to dial.

The loss of any one connection ends the epoch: all are closed, the loops joined, the figures kept. The source dials again, with a
number of epoch that the destination has not seen; what was in flight is asked for once more (dataplane/epoch.c). Before the
switchover nothing is made again: there the guest runs on at the source, and a new migration is as good.

A daemon that was started anew and cannot take its guest back, since its host lacks descriptors or memory for the moment, tries
again likewise.
"""

import itertools
from collections.abc import Iterator

from migrate.errors import ConnectionLostError, DataPlaneError, DeadlineError, PeerNameError, TlsError
from proto.errors import ProtocolError

DIAL_DEADLINE_SECONDS = 0.5
"""Of one attempt: a lost SYN is sent again after a second, a new attempt sooner."""
RETRY_SECONDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Between two attempts; the last one from then on, so that service resumes within a second of the path's return."""
LOST_IN_DATA_PLANE = frozenset({"peer-closed", "connection-failed"})
ANSWERS_THAT_MAY_CHANGE = frozenset({"busy", "migration-unknown", "epoch-stale", "tls-required", "name-not-allowed"})
"""To a preamble: a daemon that is ending, or has begun anew, or has not yet seen that the last epoch is over, or is another."""


def is_lost(error: BaseException) -> bool:
    """A new connection may mend it; anything else is what a peer, a guest or this host has done."""
    if isinstance(error, DataPlaneError):
        return error.code in LOST_IN_DATA_PLANE
    return isinstance(error, ConnectionLostError | DeadlineError | OSError)


def may_pass(error: BaseException) -> bool:
    """Of an attempt to dial again: the next one may be better. Whoever comes between and cannot prove who he is ends nothing."""
    return (
        is_lost(error)
        or isinstance(error, TlsError | PeerNameError)
        or (isinstance(error, ProtocolError) and error.code in ANSWERS_THAT_MAY_CHANGE)
    )


def may_pass_here(error: BaseException) -> bool:
    """Of an attempt to take a guest back: this host lacks something now, such as descriptors (EMFILE) or memory (ENOMEM)."""
    return isinstance(error, OSError | MemoryError) or (isinstance(error, DataPlaneError) and error.code == "memory-failed")


def delays_seconds() -> Iterator[float]:
    """Before each attempt, without end."""
    return itertools.chain(RETRY_SECONDS, itertools.repeat(RETRY_SECONDS[-1]))
