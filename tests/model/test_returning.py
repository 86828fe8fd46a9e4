"""P4 and P6 over the whole state space of killed daemons; and each guard shown to be needed."""

from dataclasses import fields, replace

import pytest

from .explorer import Result, explore
from .returning import Guards, Model, World, goal, invariant

TWICE = "the guest runs at the source and at the destination"
NOBODY = "no way from here to the end"
NEEDED = {
    "recorded_before_pause": NOBODY,
    "recorded_before_switchover": TWICE,
    "source_asks": TWICE,
    "recorded_before_resume": TWICE,
    "guest_speaks_first": TWICE,
    "agent_drains": TWICE,
    "complete_recorded": NOBODY,
    "abandoned_recorded": "pages that were lost come",
}
EVERYTHING = World(source_kills=2, destination_kills=2, cuts=1, abandons=1)


def check(world: World, guards: Guards) -> Result[World]:
    return explore([world], Model(guards).successors, invariant, end=lambda _: None, goal=goal)


@pytest.mark.parametrize(
    "world",
    [
        World(source_kills=1),
        World(destination_kills=1),
        World(source_kills=1, destination_kills=1),
        EVERYTHING,
        World(source_kills=3, destination_kills=3, cuts=2, abandons=1),
    ],
    ids=lambda world: f"{world.source_kills}-{world.destination_kills}-{world.cuts}-{world.abandons}",
)
def test_never_two_and_always_one_in_the_end(world: World) -> None:
    result = check(world, Guards())
    assert result.broken is None, str(result)


def test_the_model_does_what_it_is_about() -> None:
    labels = check(EVERYTHING, Guards()).labels
    for step in (
        "source returned: its guest runs",
        "source returned: resumes",
        "source returned: asks",
        "source returned: asks without its guest",
        "source returned: complete",
        "destination returns: it never will",
        "destination returned: waiting",
        "destination returned: arriving",
        "destination returned: whole",
        "destination returned: abandons",
        "dialled: abandoned",
        "dialled: aborted",
        "dialled: recovered",
        "dialled: complete",
    ):
        assert step in labels, sorted(labels)


def test_every_guard_has_its_counterexample() -> None:
    assert set(NEEDED) == {field.name for field in fields(Guards)}


@pytest.mark.parametrize("guard", NEEDED)
def test_without_the_guard_it_breaks(guard: str) -> None:
    result = check(EVERYTHING, replace(Guards(), **{guard: False}))
    print(f"without {guard}: {result}")
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert NEEDED[guard] in result.broken, f"without {guard} something else breaks: {result}"
