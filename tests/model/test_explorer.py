"""The explorer itself: finds what is broken, by a shortest way, and visits everything."""

from collections.abc import Iterator

import pytest

from .explorer import explore


def walk(state: int) -> Iterator[tuple[str, int]]:
    """0 -> 1 -> 2 -> 1 ..., and 0 -> 3 the end: from 1 and 2 there is no way to it, though nothing stops."""
    yield from {0: [("into", 1), ("end", 3)], 1: [("round", 2)], 2: [("back", 1)], 3: []}[state]


def step(state: int) -> Iterator[tuple[str, int]]:
    if state < 10:
        yield "one", state + 1
    if state <= 8:
        yield "two", state + 2


def test_visits_every_state_and_transition() -> None:
    result = explore([0], step, lambda state: None, end=lambda state: None)
    assert (result.broken, result.states, result.transitions) == (None, 11, 19)
    assert result.labels == {"one", "two"}


def test_counterexample_is_a_shortest_one() -> None:
    result = explore([0], step, lambda state: "seven" if state == 7 else None)
    assert result.broken == "seven"
    assert len(result.trace) == 4
    assert result.last == 7
    assert "seven" in str(result)


def test_a_state_without_successors_is_a_deadlock() -> None:
    result = explore([0], step, lambda state: None)
    assert (result.broken, result.last) == ("deadlock", 10)


def test_a_circle_that_never_ends_is_found() -> None:
    result = explore([0], walk, lambda state: None, end=lambda state: None, goal=lambda state: state == 3)
    assert result.broken == "no way from here to the end"
    assert result.trace == ("into",)


def test_too_many_states_is_an_error_not_a_part() -> None:
    with pytest.raises(MemoryError, match="more than 5 states"):
        explore([0], step, lambda state: None, states_max=5)
