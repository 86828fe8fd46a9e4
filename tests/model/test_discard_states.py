"""Discards over the whole state space of the page model: what was discarded reads zero; and what each of its guards prevents."""

import functools
from dataclasses import fields, replace

import pytest

from .discard_states import DiscardGuards, DiscardModel
from .explorer import Result, explore
from .page_states import Guards, Size, initial, invariant
from .page_world import World

SIZES = {
    "one page, two guest threads": Size(pages=1, guest_threads=2, accesses=2, restarts=0),
    "the same, never complete": Size(pages=1, guest_threads=2, accesses=2, restarts=0, endless=True),
    "by faults alone": Size(pages=1, guest_threads=2, accesses=2, restarts=0, bulk=False),
}
DISCARDS = 2
SMALL = Size(pages=1, guest_threads=1, accesses=2, restarts=0)
# guard -> what breaks without it
NEEDED = {"removed_refuses": "the truth is 0", "discarded_bit": "the truth is 0", "events_applied": "the truth is 0"}


@functools.cache
def check(size: Size, guards: DiscardGuards) -> Result[World]:
    model = DiscardModel(size, guards)
    worlds = [world._replace(discards=DISCARDS) for world in initial(size)]
    return explore(worlds, model.successors, invariant, end=model.end, goal=model.done)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_holds_with_all_guards(size: Size) -> None:
    result = check(size, DiscardGuards())
    assert result.broken is None, str(result)


def test_the_model_does_what_it_is_about() -> None:
    labels = check(SIZES["one page, two guest threads"], DiscardGuards()).labels
    for race in (
        "remove page 0: ABSENT",
        "remove page 0: REQUESTED",
        "remove page 0: RECEIVING",
        "remove page 0: PRESENT",
        "remove page 0: MAPPED",
        "store page 0: discarded",
        "continue page 0: EAGAIN",
        "continue page 0: a hole",
        "finds page 0 REMOVED",
        "drops page 0 = 1: REMOVED",
        "guest discards page 0 at once",
    ):
        assert any(race in label for label in labels), race


def test_every_guard_has_its_counterexample() -> None:
    assert set(NEEDED) == {field.name for field in fields(DiscardGuards)} - {field.name for field in fields(Guards)}


@pytest.mark.parametrize("guard", NEEDED)
def test_without_the_guard_it_breaks(guard: str) -> None:
    result = check(SMALL, replace(DiscardGuards(), **{guard: False}))
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert NEEDED[guard] in result.broken, f"without {guard} something else breaks: {result}"
