"""Several bulk connections over the whole state space of their model; and what each of its guards prevents."""

import functools
from dataclasses import fields, replace

import pytest

from .explorer import Result, explore
from .stream_order import Guards, Model, World, done, end, initial, invariant

STALE_IS_FINAL = "is final as"
NEVER = "never becomes final"
# guards taken away -> what breaks then
NEEDED = {
    ("partitioned",): STALE_IS_FINAL,
    ("all_marks",): STALE_IS_FINAL,
    ("source_waits", "destination_waits"): NEVER,
}
ALONE_ENOUGH = ("source_waits", "destination_waits")
"""Either holds where the other is missing: the source's is the protocol's rule, the destination's does not depend on its peer."""


@functools.cache
def check(pages: int, streams: int, guards: Guards) -> Result[World]:
    worlds = [initial(pages, streams, rounds=2, writes=2)]
    return explore(worlds, Model(guards).successors, invariant, end=end, goal=done)


@pytest.mark.parametrize(("pages", "streams"), [(1, 2), (2, 2), (2, 3)])
def test_holds_with_all_guards(pages: int, streams: int) -> None:
    result = check(pages, streams, Guards())
    assert result.broken is None, str(result)


def test_the_model_does_what_it_is_about() -> None:
    labels = check(2, 2, Guards()).labels
    for race in (
        "sender 1 sends page 1 = 1",
        "receiver 1 holds page 1 = 2",
        "receiver 0 says LACKS (True, True)",
        "sender 1 sends final page 0 = 2",
        "receiver 1 takes final page 0 = 2",
    ):
        assert race in labels, race


def test_every_guard_has_its_counterexample() -> None:
    assert {guard for guards in NEEDED for guard in guards} == {field.name for field in fields(Guards)}


@pytest.mark.parametrize("guards", NEEDED, ids=" and ".join)
def test_without_the_guard_it_breaks(guards: tuple[str, ...]) -> None:
    result = check(2, 2, replace(Guards(), **dict.fromkeys(guards, False)))
    assert result.broken is not None, f"without {guards} nothing breaks: {result}"
    assert NEEDED[guards] in result.broken, f"without {guards} something else breaks: {result}"


@pytest.mark.parametrize("guard", ALONE_ENOUGH)
def test_either_side_may_be_the_one_that_waits(guard: str) -> None:
    result = check(2, 2, replace(Guards(), **{guard: False}))
    assert result.broken is None, str(result)
