"""Exhaustive breadth-first exploration of a small model: every reachable state is visited, nothing is sampled.

A model is a hashable state, a function that gives its labelled successors, and three checks:

- ``invariant`` of every state: what is broken in it, or None;
- ``end`` of every state without successors (a deadlock unless the model says that it is a good end);
- ``goal``: a state in which all is done. From *every* reachable state some goal must remain reachable, so a model that
  can only go round in circles is found too, not only one that stops.

Breadth first, so a counterexample is a shortest one.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Result(Generic[S]):
    states: int
    transitions: int
    broken: str | None
    """What the counterexample breaks, None when everything holds."""
    trace: tuple[str, ...]
    """The labels from an initial state to the state that is broken."""
    last: S | None
    labels: frozenset[str]
    """Every transition that was seen, so that a test can say that a model is not vacuous."""

    def __str__(self) -> str:
        if self.broken is None:
            return f"holds over {self.states} states, {self.transitions} transitions"
        steps = "\n".join(f"  {number:3} {label}" for number, label in enumerate(self.trace, 1))
        return f"{self.broken}\n{steps}\n  then: {self.last}"


def explore(
    initial: Iterable[S],
    successors: Callable[[S], Iterable[tuple[str, S]]],
    invariant: Callable[[S], str | None],
    *,
    end: Callable[[S], str | None] = lambda state: "deadlock",
    goal: Callable[[S], bool] | None = None,
    states_max: int = 2_000_000,
) -> Result[S]:
    """Visit every state reachable from ``initial``. Raises MemoryError beyond ``states_max``: never a silent part."""
    states: list[S] = list(dict.fromkeys(initial))
    number = {state: index for index, state in enumerate(states)}
    reached_by: list[tuple[int, str]] = [(-1, "")] * len(states)
    predecessors: list[list[int]] = [[] for _ in states]
    transitions = 0
    labels: set[str] = set()

    def counterexample(index: int, broken: str) -> Result[S]:
        trace: list[str] = []
        at = index
        while reached_by[at][0] >= 0:
            at, label = reached_by[at]
            trace.append(label)
        return Result(len(states), transitions, broken, tuple(reversed(trace)), states[index], frozenset(labels))

    current = 0
    while current < len(states):
        state = states[current]
        broken = invariant(state)
        if broken is not None:
            return counterexample(current, broken)
        stuck = True
        for label, following in successors(state):
            stuck = False
            transitions += 1
            labels.add(label)
            index = number.get(following)
            if index is None:
                if len(states) >= states_max:
                    raise MemoryError(f"more than {states_max} states")
                index = number[following] = len(states)
                states.append(following)
                reached_by.append((current, label))
                predecessors.append([])
            predecessors[index].append(current)
        if stuck:
            broken = end(state)
            if broken is not None:
                return counterexample(current, broken)
        current += 1

    if goal is not None:
        alive = [goal(state) for state in states]
        queue = [index for index, good in enumerate(alive) if good]
        while queue:
            for before in predecessors[queue.pop()]:
                if not alive[before]:
                    alive[before] = True
                    queue.append(before)
        if not all(alive):
            return counterexample(alive.index(False), "no way from here to the end")
    return Result(len(states), transitions, None, (), None, frozenset(labels))
