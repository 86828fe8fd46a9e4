"""Model of the switchover: promises P4 (the guest runs in one place) and P5 (before it, any failure leaves the source running).

What stands for what:
  source        migrate/source.py: pause, record, send `switchover`, wait for `running` or `aborted`
  destination   migrate/destination.py: receive it, record, send `resume` to the agent, or record an abort and send `aborted`
  agent         migrate/guest/agent.py of the waiting guest: the authority on whether the guest runs
  record        the file in a daemon's runtime directory, written before the act that it describes; survives a crash
  to_*          the control connection, in order; after a cut nothing is sent, and what was in flight is still read or lost
  agent socket  the unix socket to the agent; ends with the daemon's process

Crashes and one reconnection are here in more orders than the daemons have them; their records and how they return: returning.py.
A source that cannot learn what happened leaves its guest paused (state "stalled"): allowed, a person decides.
Each field of Guards is one rule; False removes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Guards:
    resume_on_failure: bool = True  # whatever fails before the record, the source resumes its guest
    silent_after_record: bool = True  # once switchover is recorded, only `aborted` lets the source resume
    record_before_send: bool = True  # the source records before it sends
    abort_recorded_first: bool = True  # the destination records the abort before it sends `aborted`
    refuse_after_abort: bool = True  # with an abort mark no `switchover` of the epoch is taken any more
    no_abort_after_resume: bool = True  # after `resume` was sent only the agent's refusal allows an abort
    agent_knows_epoch: bool = True  # the agent loads a state once an epoch; a second `resume` only says what happened
    refusal_is_true: bool = True  # `resume_failed` only where the guest never ran: a repeated resume is answered `running`
    agent_drains: bool = True  # before it greets a new daemon the agent has processed or discarded all of the old socket


@dataclass(frozen=True)
class Failures:
    cuts: int = 0
    reconnects: int = 0
    source_crashes: int = 0
    destination_crashes: int = 0


class World(NamedTuple):
    source: str = "ready"  # ready, paused, recorded, sent, postcopy, failed (guest runs on), stalled
    source_guest: bool = True
    source_record: bool = False
    destination: str = "ready"  # ready, deciding, recorded, resuming, postcopy, aborting, aborted, down, failed
    destination_record: str = ""  # "", "resume", "abort"
    agent_loads: int = 0  # how often a state was loaded; it runs from the first on
    agent_refused: bool = False
    connected: bool = True
    noticed: tuple[bool, bool] = (True, True)  # source, destination know what became of the connection
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    to_agent: tuple[str, ...] = ()
    old_to_agent: tuple[str, ...] = ()  # what a dead daemon left in its socket
    to_daemon: tuple[str, ...] = ()
    left: Failures = Failures()


Step = tuple[str, World]


def invariant(world: World) -> str | None:
    if world.source_guest and world.agent_loads:
        return "the guest runs at the source and at the destination"
    if world.agent_loads > 1:
        return "the same state was loaded twice: the guest was set back"
    if world.source == "failed" and not world.source_guest:
        return "given up, yet the guest does not run at the source"
    return None


def end(world: World) -> str | None:
    """Where nothing moves any more: paused for good only where the destination could not be asked."""
    if not world.source_record and not world.source_guest:
        return "nothing was recorded, yet the guest is left paused at the source"
    return None


def one_running_end(world: World) -> str | None:
    """Without failures, and with one reconnection for every cut: somebody runs in the end."""
    return None if world.source_guest or world.agent_loads else "nobody runs at the end"


class Model:
    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def successors(self, world: World) -> Iterator[Step]:
        yield from self._source(world)
        if world.destination != "down":
            yield from self._destination(world)
            yield from self._destination_hears_agent(world)
        yield from self._agent(world)
        yield from self._failures(world)

    def _source(self, world: World) -> Iterator[Step]:
        resumed = world._replace(source="failed", source_guest=True)
        if world.source == "ready" and world.connected:
            yield "source pauses its guest", world._replace(source="paused", source_guest=False)
        if world.source in ("ready", "paused"):
            given_up = resumed if self.guards.resume_on_failure else world._replace(source="failed")
            yield "source gives up (failure or cancel)", given_up
        recorded, sent = {"source_record": True}, {"to_destination": _send(world, world.to_destination, "switchover")}
        first, second = (recorded, sent) if self.guards.record_before_send else (sent, recorded)
        verb = {True: "records", False: "sends"}
        if world.source == "paused":
            yield f"source {verb[self.guards.record_before_send]} switchover", _set(world, source="recorded", **first)
        if world.source == "recorded":
            yield f"source {verb[not self.guards.record_before_send]} switchover", _set(world, source="sent", **second)
        if world.source in ("sent", "stalled") and world.to_source:
            heard = world._replace(to_source=world.to_source[1:])
            if world.to_source[0] == "running":
                yield "source hears running", heard._replace(source="postcopy")
            else:
                yield "source hears aborted, resumes its guest", heard._replace(source="failed", source_guest=True)
        if world.source in ("sent", "postcopy", "stalled") and not world.noticed[0]:
            stalled = world._replace(source="stalled") if self.guards.silent_after_record else resumed
            yield "source notices the cut", stalled._replace(noticed=(True, world.noticed[1]), to_source=())

    def _destination(self, world: World) -> Iterator[Step]:
        state, mark = world.destination, world.destination_record
        if world.to_destination and state in ("ready", "aborting", "aborted", "failed"):
            heard = world._replace(to_destination=world.to_destination[1:])
            if mark == "abort" and self.guards.refuse_after_abort:
                yield "destination refuses switchover: abort mark", heard
            elif state != "failed":
                yield "destination receives switchover", heard._replace(destination="deciding")
        if not world.noticed[1]:
            noticed = world._replace(noticed=(world.noticed[0], True), to_destination=())
            yield "destination notices the cut", noticed._replace(destination="failed" if state == "ready" else state)
        if state == "deciding":
            yield "destination records resume", world._replace(destination="recorded", destination_record="resume")
        if state == "recorded":
            yield "destination sends resume", world._replace(destination="resuming", to_agent=(*world.to_agent, "resume"))
        if state in ("ready", "deciding") or (state == "resuming" and not self.guards.no_abort_after_resume):
            yield from self._abort(world)
        if state == "aborting":
            if self.guards.abort_recorded_first:
                sent = _send(world, world.to_source, "aborted")
                yield "destination sends aborted", world._replace(destination="aborted", to_source=sent)
            else:
                yield "destination records abort", world._replace(destination="aborted", destination_record="abort")

    def _abort(self, world: World) -> Iterator[Step]:
        if self.guards.abort_recorded_first:
            yield "destination records abort", world._replace(destination="aborting", destination_record="abort")
        else:
            sent = _send(world, world.to_source, "aborted")
            yield "destination sends aborted", world._replace(destination="aborting", to_source=sent)

    def _destination_hears_agent(self, world: World) -> Iterator[Step]:
        if not world.to_daemon:
            return
        word, heard = world.to_daemon[0], world._replace(to_daemon=world.to_daemon[1:])
        if word == "running":
            sent = _send(world, world.to_source, "running")
            yield "destination hears running, tells the source", heard._replace(destination="postcopy", to_source=sent)
        elif word == "resume_failed":
            yield from (("agent refused: " + label, after) for label, after in self._abort(heard))
        else:  # hello of an agent whose guest does not run, after a crash of this daemon with `resume` recorded
            yield "agent greets: not run; resume again", heard._replace(destination="recorded")
            yield from (("agent greets: not run; " + label, after) for label, after in self._abort(heard))

    def _agent(self, world: World) -> Iterator[Step]:
        if world.old_to_agent:
            yield "agent takes an old resume", self._load(world._replace(old_to_agent=()), answer=False)
        if world.to_agent:
            taken = world._replace(to_agent=world.to_agent[1:])
            if world.agent_refused:
                yield "agent refused before, refuses", taken._replace(to_daemon=(*world.to_daemon, "resume_failed"))
                return
            if world.agent_loads and not self.guards.refusal_is_true:
                yield "agent refuses a second resume", taken._replace(to_daemon=(*world.to_daemon, "resume_failed"))
                return
            yield "agent takes resume", self._load(taken, answer=True)
            if not world.agent_loads:
                refused = taken._replace(agent_refused=True, to_daemon=(*world.to_daemon, "resume_failed"))
                yield "agent refuses the state", refused

    def _load(self, world: World, *, answer: bool) -> World:
        if world.agent_refused:
            return world
        loads = world.agent_loads if world.agent_loads and self.guards.agent_knows_epoch else world.agent_loads + 1
        return world._replace(agent_loads=loads, to_daemon=(*world.to_daemon, "running") if answer else world.to_daemon)

    def _failures(self, world: World) -> Iterator[Step]:
        left = world.left
        cut = world._replace(connected=False, noticed=(False, False))  # each side reads on until it notices
        if left.cuts and world.connected:
            yield "cut", cut._replace(left=_less(left, "cuts"))
        if left.reconnects and not world.connected and world.destination != "down" and world.noticed == (True, True):
            verdict = {"postcopy": ("running",), "aborted": ("aborted",)}.get(world.destination)
            if verdict is None and world.destination == "failed":  # it never will: says so once it is recorded
                verdict, world = ("aborted",), world._replace(destination="aborted", destination_record="abort")
            if verdict is not None and world.source == "stalled":
                joined = world._replace(connected=True, to_source=verdict, left=_less(left, "reconnects"))
                yield f"reconnected: {verdict[0]}", joined
        if left.source_crashes and world.source not in ("failed",):
            crashed = cut._replace(left=_less(left, "source_crashes"), noticed=(True, False), to_source=())
            if world.source_record:
                yield "source daemon dies and returns: switchover recorded", crashed._replace(source="stalled")
            else:
                yield "source daemon dies and returns: nothing recorded", crashed._replace(source="failed", source_guest=True)
        if left.destination_crashes and world.destination != "down":
            old = world.to_agent or world.old_to_agent
            dead = cut._replace(left=_less(left, "destination_crashes"), noticed=(False, True))
            dead = dead._replace(to_destination=(), to_agent=(), to_daemon=(), old_to_agent=old)
            yield "destination daemon dies", dead._replace(destination="down")
        if world.destination == "down":
            yield from self._destination_returns(world)

    def _destination_returns(self, world: World) -> Iterator[Step]:
        """The agent attaches to a new daemon and says what it did; its old socket is processed or discarded before."""
        befores = [("", world)]
        if self.guards.agent_drains and world.old_to_agent:
            drained = world._replace(old_to_agent=())
            befores = [(", old resume discarded", drained), (", old resume taken", self._load(drained, answer=False))]
        for how, back in befores:
            label = f"destination daemon returns{how}"
            if back.destination_record == "resume":
                yield f"{label}: resume again", back._replace(destination="recorded")
                greeting = "running" if back.agent_loads else "hello"
                yield f"{label}: waits for the greeting", back._replace(destination="resuming", to_daemon=(greeting,))
            elif back.destination_record == "abort":
                yield f"{label}: abort mark", back._replace(destination="aborted")
            else:
                yield f"{label}: nothing recorded", back._replace(destination="failed")


def _send(world: World, queue: tuple[str, ...], message: str) -> tuple[str, ...]:
    return (*queue, message) if world.connected else queue


def _set(world: World, **fields: object) -> World:
    return world._replace(**fields)  # type: ignore[arg-type]


def _less(left: Failures, kind: str) -> Failures:
    counts = {name: getattr(left, name) for name in ("cuts", "reconnects", "source_crashes", "destination_crashes")}
    return Failures(**{**counts, kind: counts[kind] - 1})
