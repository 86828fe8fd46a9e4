"""The state tables of both roles, cell by cell, and the diagrams in PROTOCOL.md that show them."""

import re
from pathlib import Path

import pytest

from proto.errors import IllegalTransitionError
from proto.states import AFTER_SWITCHOVER, CANCELLABLE, ENDED, TRANSITIONS, Event, Role, State, advance

PROTOCOL = (Path(__file__).parents[2] / "proto/PROTOCOL.md").read_text()
RESUMED_AT_SOURCE = {State.FAILED, State.CANCELLED}
"""Ends of the source's table in which its guest runs on."""


def diagram(role: Role) -> tuple[dict[tuple[str, str], str], set[str], set[str]]:
    """Arrows, first states and ends of the diagram under the role's heading."""
    text = re.search(rf"^### States of the {role}\n.*?```mermaid\nstateDiagram-v2\n(.*?)```", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert text is not None, f"PROTOCOL.md has no state diagram of the {role}"
    arrows: dict[tuple[str, str], str] = {}
    first, ends = set(), set()
    for line in text[1].splitlines():
        arrow = re.fullmatch(r"\s*(\S+) --> (\S+?)(?: : (\w+))?\s*", line)
        assert arrow is not None, f"not an arrow: {line!r}"
        start, stop, event = arrow.groups()
        if start == "[*]":
            first.add(stop)
        elif stop == "[*]":
            ends.add(start)
        else:
            assert (start, event) not in arrows, f"twice: {line!r}"
            arrows[start, event] = stop
    return arrows, first, ends


@pytest.mark.parametrize("role", Role)
def test_diagram_is_the_table(role: Role) -> None:
    arrows, first, ends = diagram(role)
    assert arrows == {(str(state), str(event)): str(after) for (state, event), after in TRANSITIONS[role].items()}
    assert first == {"new"}
    assert ends == {str(state) for state in ENDED & reachable(role, State.NEW)}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("role", Role)
def test_every_cell(role: Role, state: State, event: Event) -> None:
    """Against the diagram, which is written by hand: allowed leads where it is drawn to, everything else is refused."""
    arrows, _, _ = diagram(role)
    if (state, event) in arrows:
        assert advance(role, state, event) == arrows[state, event]
    else:
        with pytest.raises(IllegalTransitionError) as caught:
            advance(role, state, event)
        assert (caught.value.role, caught.value.state, caught.value.event) == (role, state, event)


def reachable(role: Role, start: State, without: frozenset[Event] = frozenset()) -> set[State]:
    seen, queue = {start}, [start]
    while queue:
        here = queue.pop()
        for (state, event), after in TRANSITIONS[role].items():
            if state == here and event not in without and after not in seen:
                seen.add(after)
                queue.append(after)
    return seen


def test_every_state_is_reached_by_some_role() -> None:
    assert set(State) - reachable(Role.SOURCE, State.NEW) - reachable(Role.DESTINATION, State.NEW) == set()


@pytest.mark.parametrize("role", Role)
def test_every_arrow_starts_where_one_can_be(role: Role) -> None:
    assert {state for state, _ in TRANSITIONS[role]} <= reachable(role, State.NEW)


@pytest.mark.parametrize("role", Role)
def test_an_end_is_an_end(role: Role) -> None:
    """Nothing leads out of an end, and out of everything else something does, but for a stalled source: its memory is kept."""
    leave = {state for state, _ in TRANSITIONS[role]}
    assert not ENDED & leave
    assert reachable(role, State.NEW) - ENDED - leave == ({State.STALLED} if role is Role.SOURCE else set())


def test_an_abandoned_guest_runs_at_the_destination() -> None:
    """P4. No way of a source is called so, and a destination can be it only after the switchover."""
    assert State.ABANDONED not in reachable(Role.SOURCE, State.NEW)
    before = {state for (state, _), after in TRANSITIONS[Role.DESTINATION].items() if after is State.ABANDONED}
    assert before <= AFTER_SWITCHOVER


@pytest.mark.parametrize("state", sorted(AFTER_SWITCHOVER))
def test_after_the_switchover_only_an_abort_resumes_the_source(state: State) -> None:
    """P4. With every event but the destination's word that it never will, no way leads back to a guest that runs here."""
    assert not reachable(Role.SOURCE, state, without=frozenset({Event.ABORT})) & RESUMED_AT_SOURCE


def test_an_abort_does_resume_the_source() -> None:
    assert State.FAILED in reachable(Role.SOURCE, State.SWITCHOVER)


def test_before_the_switchover_any_failure_leaves_the_source_running() -> None:
    """P5. Every state before the record takes a failure, and it ends where the guest runs on."""
    before = reachable(Role.SOURCE, State.NEW, without=frozenset({Event.SWITCHOVER_RECORDED, Event.TAKEN_BACK})) - ENDED
    assert before.isdisjoint(AFTER_SWITCHOVER)
    for state in before:
        assert advance(Role.SOURCE, state, Event.FAILURE) is State.FAILED


def test_an_aborted_destination_takes_no_event() -> None:
    for event in Event:
        with pytest.raises(IllegalTransitionError):
            advance(Role.DESTINATION, State.ABORTED, event)


def test_cancellable_is_before_the_pause() -> None:
    assert not CANCELLABLE & (AFTER_SWITCHOVER | ENDED | {State.PAUSING})
    assert {State.READY, State.PRECOPY, State.PREPARING} <= CANCELLABLE
