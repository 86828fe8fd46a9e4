"""Model of a page that comes in chunks (migrate/dataplane/claims.c): P1 and P2 of it, and what was discarded reads zero.

One page of two chunks; two connections that bring both, each in its own order; a guest thread that reads and writes the page; a
discard by message. What stands for what:
  connection         the fault loop (urgent) or the receive loop (bulk): begin_write, write_chunk, publish, remove_if_quiet
  discard            claims_discard, on a thread of its own; the guest leaves the page alone until it is answered
  fault              fault.c: WANTED, or CONTINUE of what is PRESENT, a zero page of what is REMOVED
Each atomic access is a step of its own; the copy of a chunk is two, torn in between.

Left out: REMOVE events (discard_states.py shows what ties them to the bytes), and precopy, whose chunks are written under the
claim of the whole page (precopy_states.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TORN = -1
CONNECTIONS = ("urgent", "bulk")
FINAL = ("PRESENT", "MAPPED", "REMOVED")


@dataclass(frozen=True)
class ChunkGuards:
    all_placed: bool = True  # PRESENT when all chunks are in place, not the first
    chunk_claim: bool = True  # a chunk is written by who claimed it
    writers_counted: bool = True  # a discarded page is closed only when nobody writes any of it
    closed_refuses: bool = True  # and no chunk begins once it is closed
    last_writer_looks: bool = True  # who has written looks whether the page was discarded meanwhile
    wanted: bool = True  # whoever publishes the page wakes who waits


class World(NamedTuple):
    state: str = "ABSENT"
    wanted: bool = False
    discarded: bool = False
    claimed: tuple[bool, ...] = (False, False)
    placed: int = 0
    writers: int = 0
    closed: bool = False
    cache: tuple[int, ...] = (0, 0)
    mapped: bool = False
    truth: tuple[int, ...] = (1, 1)
    jobs: tuple[tuple[str, int] | None, ...] = (None, None, None)  # of the two connections, and of the discard: next step, chunk
    to_come: tuple[tuple[int, ...], ...] = ((0, 1), (1, 0))
    guest: str = "runs"  # faults, sleeps, discards
    accesses: int = 2
    discards: int = 0
    broken: str | None = None


Step = tuple[str, World]


def invariant(world: World) -> str | None:
    return world.broken


def done(world: World) -> bool:
    whole = world.state in FINAL and not any(world.to_come) and not any(world.jobs)
    return whole and world.guest == "runs" and world.accesses == 0


def end(world: World) -> str | None:
    return None if done(world) else "deadlock"


def _at(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


class ChunkModel:
    def __init__(self, guards: ChunkGuards) -> None:
        self.guards = guards

    def successors(self, world: World) -> Iterator[Step]:
        for c, job in enumerate(world.jobs):
            if job is not None:
                yield from self._job(world, c, *job)
            elif c < len(CONNECTIONS) and world.to_come[c]:
                yield from self._receive(world, c, world.to_come[c][0])
        yield from self._guest(world)

    def _set(self, world: World, c: int, job: tuple[str, int] | None, **fields: object) -> World:
        return world._replace(jobs=(*world.jobs[:c], job, *world.jobs[c + 1 :]), **fields)  # type: ignore[arg-type]

    def _receive(self, world: World, c: int, chunk: int) -> Iterator[Step]:
        """page_receive_chunk."""
        rest = (*world.to_come[:c], world.to_come[c][1:], *world.to_come[c + 1 :])
        if world.state in FINAL or world.discarded:
            yield f"{CONNECTIONS[c]} drops chunk {chunk}: {world.state}", world._replace(to_come=rest)
        else:
            taken = self._set(world, c, ("claim", chunk), to_come=rest, state="RECEIVING")
            yield f"{CONNECTIONS[c]} receives chunk {chunk}", taken

    def _job(self, world: World, c: int, step: str, chunk: int) -> Iterator[Step]:
        name = CONNECTIONS[c] if c < len(CONNECTIONS) else "discard"
        label = f"{name} {step} {chunk}"
        if step == "claim":
            if world.claimed[chunk] and self.guards.chunk_claim:
                yield f"{label}: taken", self._set(world, c, None)
            else:
                claimed = tuple(one or i == chunk for i, one in enumerate(world.claimed))
                yield label, self._set(world, c, ("begin", chunk), claimed=claimed)
        elif step == "begin":
            if world.closed and self.guards.closed_refuses:
                yield f"{label}: closed", self._set(world, c, None)
            else:
                yield label, self._set(world, c, ("half", chunk), writers=world.writers + 1)
        elif step in ("half", "whole"):
            content = _at(world.cache, chunk, TORN if step == "half" else 1)
            yield label, self._set(world, c, ("whole" if step == "half" else "end", chunk), cache=content)
        elif step == "end":
            placed = world.placed + 1
            whole = placed >= (2 if self.guards.all_placed else 1)
            following = ("publish" if whole else "look", chunk)
            yield label, self._set(world, c, following, placed=placed, writers=world.writers - 1)
        elif step == "publish":
            if world.discarded or world.state != "RECEIVING":
                yield f"{label}: discarded", self._set(world, c, ("look", chunk))
            else:
                wanted = world.wanted and self.guards.wanted
                published = self._set(world, c, ("continue", int(wanted)), state="PRESENT", wanted=False)
                yield label, published
        elif step == "continue":
            woken = "runs" if world.guest == "sleeps" and chunk else world.guest
            yield label, self._set(world, c, None, mapped=True, state="MAPPED", guest=woken)
        elif step == "look":
            looks = world.discarded and self.guards.last_writer_looks
            yield label, self._set(world, c, ("close", chunk) if looks else None)
        else:
            yield from self._remove(world, c, step, label)

    def _remove(self, world: World, c: int, step: str, label: str) -> Iterator[Step]:
        discards = c == len(CONNECTIONS)
        guest = "runs" if discards else world.guest  # it is answered
        if step == "mark":
            if world.state in FINAL:
                yield f"{label}: here", self._set(world, c, ("punch", 0))
            else:
                yield label, self._set(world, c, ("close", 0), state="RECEIVING", discarded=True)
        elif step == "punch":
            yield label, self._set(world, c, None, cache=(0, 0), mapped=False, guest=guest)
        elif step == "close":
            if world.closed or (world.writers and self.guards.writers_counted):
                yield f"{label}: not now", self._set(world, c, None, guest=guest)
            else:
                yield label, self._set(world, c, ("hole", 0), closed=True)
        elif step == "hole":
            yield label, self._set(world, c, ("leave", 0), cache=(0, 0))
        elif step == "leave":
            woken = "runs" if world.wanted and guest == "sleeps" else guest
            fields: dict[str, object] = {"mapped": world.wanted} if world.wanted else {}
            yield label, self._set(world, c, None, state="REMOVED", discarded=False, wanted=False, guest=woken, **fields)

    # --- the guest, and its fault ---

    def _guest(self, world: World) -> Iterator[Step]:
        if world.guest == "faults":
            if world.state in FINAL:
                yield f"fault: {world.state}", world._replace(mapped=True, guest="runs")
            else:
                yield f"fault: {world.state}, wanted", world._replace(wanted=True, guest="sleeps")
        if world.guest != "runs":
            return
        if world.discards:
            job = self._set(world, len(CONNECTIONS), ("mark", 0), discards=world.discards - 1)
            yield "guest discards", job._replace(guest="discards", truth=(0, 0))
        if not world.accesses:
            return
        if not world.mapped:
            yield "guest touches", world._replace(guest="faults")
        elif world.cache != world.truth:
            yield "guest reads", world._replace(broken=f"it reads {world.cache}, the truth is {world.truth}")
        else:
            version = max(*world.truth, 1) + 1
            content = (version, version)
            yield "guest writes", world._replace(accesses=world.accesses - 1, cache=content, truth=content)
