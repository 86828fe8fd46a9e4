"""Model of daemons that are killed at any step of a switchover, and return: promises P4 and P6 with the decision table of
migrate/returning.py. Never do two run, and whatever was killed when, one will.

What stands for what:
  here, there       the guest's two agents: the one that leaves; the one that waits, is resumed (arriving) and whole in the end
  source            migrate/source.py, and of one that has returned ``_paused``; record: migrate/record.py
  destination       migrate/destination.py, ``decide``, ``_arriving``; its records likewise
  to_*              a guest socket or the control connection, in order. What a dead daemon has said to an agent is still read
  dial              a connection made anew, and all that is said on it up to the destination's word, in one step: a cut amid it
                    is no dial at all, and the source dials again

Pages are not in it: one step makes the guest whole while there is a connection, one loses all that are lacking (abandon).
switchover.py has the same words with cuts and refusals in all orders, and no returns from records. Each field of Guards is one
rule; False removes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Guards:
    recorded_before_pause: bool = True  # whoever returns and finds a paused guest must know that it may be resumed
    recorded_before_switchover: bool = True
    source_asks: bool = True  # with the switchover recorded, nothing but the destination's word resumes the guest
    recorded_before_resume: bool = True
    guest_speaks_first: bool = True  # with the resume recorded, only its guest says that it never ran
    agent_drains: bool = True  # it has read all of its old connection before it greets another daemon
    complete_recorded: bool = True  # at the source, before the destination is told that it may forget
    abandoned_recorded: bool = True  # before the first page is lost: whoever returns must not ask for what is lost


class World(NamedTuple):
    source: str = "ready"
    """pausing, paused, recorded, sent, postcopy, dialling, giving up, completing, failed, complete, stalled, returned, down"""
    source_record: str = ""  # begun, may run there, complete
    here: str = "running"  # paused, released
    to_here: tuple[str, ...] = ()
    here_said: tuple[str, ...] = ()
    destination: str = "ready"
    """prepared, deciding, recorded, asked, postcopy, lost, finishing, whole, aborted, abandoning, abandoned, returned,
    nothing known, down"""
    destination_record: str = ""  # begun, may run here, aborted, complete, abandoned
    there: str = "waiting"  # arriving, whole
    to_there: tuple[str, ...] = ()
    there_said: tuple[str, ...] = ()
    connected: bool = True
    to_source: tuple[str, ...] = ()
    to_destination: tuple[str, ...] = ()
    source_kills: int = 0  # that are left
    destination_kills: int = 0
    cuts: int = 0
    abandons: int = 0
    pages_lost: bool = False


Step = tuple[str, World]


def invariant(world: World) -> str | None:
    if world.here == "running" and world.there != "waiting":
        return "the guest runs at the source and at the destination"
    if world.pages_lost and world.destination == "postcopy":
        return "pages that were lost come"
    return None


def goal(world: World) -> bool:
    """One runs, and the other knows."""
    if world.source == "stalled" and world.destination == "abandoned":
        return world.pages_lost and world.there == "arriving"
    runs_here = world.here == "running" and not world.to_here and world.source in ("failed", "ready", "returned")
    return (runs_here and world.there == "waiting") or (world.here == "released" and world.there != "waiting")


class Model:
    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def successors(self, world: World) -> Iterator[Step]:
        yield from self._source(world)
        yield from self._source_hears(world)
        yield from self._here(world)
        yield from self._destination(world)
        yield from self._destination_hears(world)
        yield from self._there(world)
        yield from self._failures(world)

    # --- the source -------------------------------------------------------------------------------------------------

    def _source(self, world: World) -> Iterator[Step]:
        state = world.source
        if state == "ready" and "prepared" in world.to_source:
            begun = world._replace(source="pausing", to_source=world.to_source[1:], to_here=("pause",))
            recorded = "begun" if self.guards.recorded_before_pause else ""
            yield "source records that it begins, asks for the pause", begun._replace(source_record=recorded)
        if state == "paused":
            recorded = "may run there" if self.guards.recorded_before_switchover else world.source_record
            yield "source records the switchover", world._replace(source="recorded", source_record=recorded)
        if state == "recorded":
            sent = _say(world, "to_destination", "switchover")
            yield "source sends switchover", sent._replace(source="sent")
        if state == "sent" and not self.guards.recorded_before_switchover:
            yield "source records the switchover late", world._replace(source_record="may run there")
        if state in ("pausing", "paused") and not world.connected:
            yield "source fails before the switchover", world._replace(source="giving up", source_record="begun")
        if state == "giving up":
            yield (
                "source resumes its guest",
                world._replace(source="failed", source_record="", to_here=(*world.to_here, "resume")),
            )
        if state in ("sent", "postcopy") and not world.connected and not world.to_source:
            yield "source dials", world._replace(source="dialling")
        if state == "completing":
            let_go = world._replace(source="complete", to_here=(*world.to_here, "released"))
            yield "source lets its guest go", _say(let_go, "to_destination", "released")._replace(source_record="")
        if state == "dialling":
            yield from self._dial(world)
        if state == "returned" and world.source_record == "may run there":  # ``take_up``: with its memory, not waiting for it
            yield "source returned: asks without its guest", world._replace(source="dialling")
        if state == "returned" and not (self.guards.agent_drains and world.to_here):
            yield from self._here_greets(world)

    def _source_hears(self, world: World) -> Iterator[Step]:
        if world.source == "pausing" and "paused" in world.here_said:
            yield "source hears paused", world._replace(source="paused", here_said=())
        if world.source in ("sent", "postcopy") and world.to_source:
            word, heard = world.to_source[0], world._replace(to_source=world.to_source[1:])
            yield f"source hears {word}", self._word(heard, word)

    def _word(self, world: World, word: str) -> World:
        if word == "aborted":
            return world._replace(source="giving up", source_record="begun")
        if word == "abandoned":
            return world._replace(source="stalled")
        if word == "complete":
            recorded = "complete" if self.guards.complete_recorded else world.source_record
            told = world._replace(source="completing", source_record=recorded)
            return told if self.guards.complete_recorded else _say(told, "to_destination", "released")
        return world._replace(source="postcopy")

    def _dial(self, world: World) -> Iterator[Step]:
        known = {"aborted": "aborted", "whole": "complete", "lost": "recovered", "abandoned": "abandoned"}.get(world.destination)
        if world.destination == "returned" and world.destination_record == "abandoned":
            known = "abandoned"  # as ``answer_source`` has it
        if known is None:
            return  # down, or migration-unknown: it dials again
        joined = world._replace(connected=True, to_source=(), to_destination=())
        if known == "recovered":
            joined = joined._replace(destination="postcopy")
        yield f"dialled: {known}", self._word(joined, known)

    def _here_greets(self, world: World) -> Iterator[Step]:
        """As ``_paused`` and ``go_on`` have it."""
        record = world.source_record
        if world.here == "running":
            yield "source returned: its guest runs", world._replace(source="failed", source_record="")
        elif world.here == "paused" and record == "complete":
            yield "source returned: complete", world._replace(source="complete", source_record="", to_here=("released",))
        elif world.here == "paused" and (record == "begun" or (record and not self.guards.source_asks)):
            yield "source returned: resumes", world._replace(source="failed", source_record="", to_here=("resume",))
        elif world.here == "paused" and record:
            yield "source returned: asks", world._replace(source="dialling")

    def _here(self, world: World) -> Iterator[Step]:
        if not world.to_here:
            return
        word, rest = world.to_here[0], world.to_here[1:]
        state = {"pause": "paused", "resume": "running", "released": "released"}[word]
        said = ("paused",) if word == "pause" and world.source == "pausing" else ()
        yield f"agent here: {word}", world._replace(here=state, to_here=rest, here_said=said)

    # --- the destination --------------------------------------------------------------------------------------------

    def _destination(self, world: World) -> Iterator[Step]:
        state = world.destination
        if state == "ready" and world.connected:
            begun = world._replace(destination="prepared", destination_record="begun")
            yield "destination records that it begins, is prepared", _say(begun, "to_source", "prepared")
        if state == "prepared" and not world.connected and not world.to_destination:
            yield "destination aborts: no path", world._replace(destination="aborted", destination_record="aborted")
        if state == "deciding":
            yield "destination aborts", self._aborts(world)
            recorded = "may run here" if self.guards.recorded_before_resume else world.destination_record
            yield "destination records the resume", world._replace(destination="recorded", destination_record=recorded)
        if state == "recorded":
            yield "destination resumes", world._replace(destination="asked", to_there=("resume",))
        if state == "postcopy" and world.connected:
            yield "destination records that it is whole", world._replace(destination="finishing", destination_record="complete")
            yield "destination cannot record that it is whole", world._replace(destination="finishing")
        if state == "finishing":
            whole = world._replace(destination="whole", to_there=(*world.to_there, "complete"))
            yield "destination is whole", _say(whole, "to_source", "complete")
        if state == "postcopy" and not world.connected:
            yield "destination has lost its source", world._replace(destination="lost")
        if state == "lost" and world.abandons:
            recorded = "abandoned" if self.guards.abandoned_recorded else world.destination_record
            asked = world._replace(destination="abandoning", abandons=world.abandons - 1)
            yield "destination records that it is abandoned", asked._replace(destination_record=recorded)
        if state == "abandoning":
            yield "destination abandons", world._replace(destination="abandoned", pages_lost=True)
        if state == "abandoned" and not self.guards.abandoned_recorded:
            yield "destination records late that it is abandoned", world._replace(destination_record="abandoned")
        if state == "returned" and not (self.guards.agent_drains and world.to_there):
            yield from self._there_greets(world)

    def _aborts(self, world: World) -> World:
        return _say(world._replace(destination="aborted", destination_record="aborted"), "to_source", "aborted")

    def _destination_hears(self, world: World) -> Iterator[Step]:
        if world.destination == "prepared" and "switchover" in world.to_destination:
            yield "destination hears switchover", world._replace(destination="deciding", to_destination=())
        if world.destination == "whole" and "released" in world.to_destination:
            forgotten = world._replace(destination="nothing known", destination_record="", to_destination=())
            yield "destination hears released, forgets", forgotten
        if world.destination == "asked" and world.there_said:
            if world.there_said[0] == "refused":
                yield "destination hears that it was refused", self._aborts(world._replace(there_said=()))
            else:
                running = _say(world._replace(destination="postcopy", there_said=()), "to_source", "running")
                yield "destination hears running", running._replace(destination_record="may run here")

    def _there_greets(self, world: World) -> Iterator[Step]:
        """As ``_arriving`` and ``go_on`` have it; the record says ``may run here``."""
        state = {"waiting": "aborted", "arriving": "lost", "whole": "whole"}[world.there]
        record = {"waiting": "aborted", "arriving": "may run here", "whole": "complete"}[world.there]
        if (world.there, world.destination_record) == ("arriving", "abandoned"):
            yield "destination returned: abandons", world._replace(destination="abandoning")
            return
        yield f"destination returned: {world.there}", world._replace(destination=state, destination_record=record)

    def _there(self, world: World) -> Iterator[Step]:
        if not world.to_there:
            return
        word, taken = world.to_there[0], world._replace(to_there=world.to_there[1:])
        if word == "complete":
            yield "agent there: complete", taken._replace(there="whole")
            return
        listens = world.destination == "asked"
        yield "agent there: resumed", taken._replace(there="arriving", there_said=("running",) if listens else ())
        if listens:
            yield "agent there: refuses", taken._replace(there_said=("refused",))

    # --- what goes wrong --------------------------------------------------------------------------------------------

    def _failures(self, world: World) -> Iterator[Step]:
        if world.cuts and world.connected:
            yield "cut", world._replace(connected=False, cuts=world.cuts - 1)
        if not world.connected and (world.to_source or world.to_destination):
            yield "lost on the way", world._replace(to_source=(), to_destination=())
        if world.source_kills and world.source not in ("down", "failed", "complete"):
            dead = world._replace(source="down", connected=False, to_source=(), here_said=())
            yield "source is killed", dead._replace(source_kills=world.source_kills - 1)
        if world.destination_kills and world.destination != "down":
            dead = world._replace(destination="down", connected=False, to_destination=(), there_said=())
            yield "destination is killed", dead._replace(destination_kills=world.destination_kills - 1)
        if world.source == "down":
            yield "source returns", world._replace(source="returned")
        if world.destination == "down":
            yield self._returns(world)

    def _returns(self, world: World) -> Step:
        """As ``decide`` has it."""
        record = world.destination_record
        if record == "begun" or (record == "may run here" and not self.guards.guest_speaks_first):
            return "destination returns: it never will", world._replace(destination="aborted", destination_record="aborted")
        state = {"": "nothing known", "aborted": "aborted", "complete": "whole"}.get(record, "returned")
        return f"destination returns: {state}", world._replace(destination=state)


def _say(world: World, queue: str, word: str) -> World:
    if not world.connected:
        return world
    said: tuple[str, ...] = getattr(world, queue)
    return world._replace(**{queue: (*said, word)})  # type: ignore[arg-type]
