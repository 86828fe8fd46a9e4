"""The states of a migration in both roles, and the one function that changes them. Diagrams: PROTOCOL.md."""

from enum import StrEnum

from proto.errors import IllegalTransitionError


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class State(StrEnum):
    NEW = "new"
    CONNECTING = "connecting"  # source: TCP and preamble; offer sent
    ATTACHING = "attaching"  # accepted: urgent and bulk connections are being made
    READY = "ready"  # all connections stand; source: the guest runs here; destination: waits
    PRECOPY = "precopy"  # rounds of pages are sent while the guest runs at the source
    PREPARING = "preparing"  # everything else is held back for the switchover
    PAUSING = "pausing"  # source: the guest has been told to pause
    SWITCHOVER = "switchover"  # source: the message may have been sent. destination: resume may have been sent
    POSTCOPY = "postcopy"  # the guest runs at the destination
    PAUSED = "paused"  # a connection was lost after the switchover; the source dials again, pages wait
    STALLED = "stalled"  # the same, and nothing goes on by itself: something else is wrong than the path
    COMPLETE = "complete"
    FAILED = "failed"  # before the switchover, or aborted: the guest runs on at the source
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"  # destination: the operator has given up what had not come; the guest runs on there without it
    ABORTED = "aborted"  # destination: decided and recorded that it never resumes this epoch


class Event(StrEnum):
    CONNECT = "connect"
    OFFERED = "offered"
    ACCEPTED = "accepted"
    ATTACHED = "attached"
    PRECOPY = "precopy"
    PREPARE = "prepare"
    PAUSE = "pause"
    SWITCHOVER_RECORDED = "switchover_recorded"
    RESUME_RECORDED = "resume_recorded"
    RUNNING = "running"
    COMPLETE = "complete"
    CANCEL = "cancel"
    FAILURE = "failure"  # anything that ends the attempt while the destination cannot have been told to run
    TAKEN_BACK = "taken_back"  # by a daemon that was started anew, from its record and the guest
    LOST = "lost"  # a connection or the peer's answer, when it can
    STALL = "stall"  # what no new connection can mend, when it can
    ABANDON = "abandon"  # destination: the operator gives the source up
    ABORT = "abort"  # the destination will never resume this epoch


S, E = State, Event
_BEFORE_PAUSE = (S.NEW, S.CONNECTING, S.ATTACHING, S.READY, S.PRECOPY, S.PREPARING)
TRANSITIONS: dict[Role, dict[tuple[State, Event], State]] = {
    Role.SOURCE: {
        (S.NEW, E.CONNECT): S.CONNECTING,
        (S.NEW, E.TAKEN_BACK): S.PAUSED,
        (S.CONNECTING, E.ACCEPTED): S.ATTACHING,
        (S.ATTACHING, E.ATTACHED): S.READY,
        (S.READY, E.PRECOPY): S.PRECOPY,
        (S.READY, E.PREPARE): S.PREPARING,
        (S.PRECOPY, E.PREPARE): S.PREPARING,
        (S.PREPARING, E.PAUSE): S.PAUSING,
        (S.PAUSING, E.SWITCHOVER_RECORDED): S.SWITCHOVER,
        (S.SWITCHOVER, E.RUNNING): S.POSTCOPY,
        (S.SWITCHOVER, E.ABORT): S.FAILED,
        (S.SWITCHOVER, E.LOST): S.PAUSED,
        (S.POSTCOPY, E.LOST): S.PAUSED,
        (S.POSTCOPY, E.COMPLETE): S.COMPLETE,
        (S.PAUSED, E.RUNNING): S.POSTCOPY,
        (S.PAUSED, E.COMPLETE): S.COMPLETE,
        (S.PAUSED, E.ABORT): S.FAILED,
        **{(state, E.STALL): S.STALLED for state in (S.SWITCHOVER, S.POSTCOPY, S.PAUSED)},
        **{(state, E.CANCEL): S.CANCELLED for state in _BEFORE_PAUSE},
        **{(state, E.FAILURE): S.FAILED for state in (*_BEFORE_PAUSE, S.PAUSING)},
    },
    Role.DESTINATION: {
        (S.NEW, E.OFFERED): S.ATTACHING,
        (S.NEW, E.TAKEN_BACK): S.PAUSED,
        (S.ATTACHING, E.ATTACHED): S.READY,
        (S.READY, E.PRECOPY): S.PRECOPY,
        (S.READY, E.PREPARE): S.PREPARING,
        (S.PRECOPY, E.PREPARE): S.PREPARING,
        (S.PREPARING, E.RESUME_RECORDED): S.SWITCHOVER,
        (S.PREPARING, E.ABORT): S.ABORTED,
        (S.SWITCHOVER, E.RUNNING): S.POSTCOPY,
        (S.SWITCHOVER, E.ABORT): S.ABORTED,
        (S.POSTCOPY, E.LOST): S.PAUSED,
        (S.POSTCOPY, E.COMPLETE): S.COMPLETE,
        (S.PAUSED, E.RUNNING): S.POSTCOPY,
        (S.PAUSED, E.COMPLETE): S.COMPLETE,
        **{(state, E.STALL): S.STALLED for state in (S.SWITCHOVER, S.POSTCOPY, S.PAUSED)},
        **{(state, E.ABANDON): S.ABANDONED for state in (S.PAUSED, S.STALLED)},
        **{(state, E.FAILURE): S.FAILED for state in (S.NEW, S.ATTACHING, S.READY, S.PRECOPY, S.PREPARING)},
        **{(state, E.CANCEL): S.CANCELLED for state in (S.ATTACHING, S.READY, S.PRECOPY, S.PREPARING)},
    },
}

ENDED = frozenset({S.COMPLETE, S.FAILED, S.CANCELLED, S.ABORTED, S.ABANDONED})
"""Nothing of the migration is left to do; a STALLED one is not ended."""

SETTLED = ENDED | {S.STALLED}
"""Nothing more will happen by itself."""

CANCELLABLE = frozenset(state for (state, event) in TRANSITIONS[Role.SOURCE] if event is E.CANCEL)
AFTER_SWITCHOVER = frozenset({S.SWITCHOVER, S.POSTCOPY, S.PAUSED, S.STALLED})
"""The source must not resume its guest in these (promise P4); only the destination's ABORT leads out to FAILED."""


def advance(role: Role, state: State, event: Event) -> State:
    """The next state. Raises IllegalTransitionError for an event that the table does not have."""
    try:
        return TRANSITIONS[role][state, event]
    except KeyError:
        raise IllegalTransitionError(role, state, event) from None
