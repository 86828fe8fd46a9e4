"""P1, P2, P3 over the whole state space of the page model; and each guard shown to be needed by what happens without it."""

from dataclasses import fields, replace

import pytest

from .explorer import Result, explore
from .page_states import Guards, Model, Size, initial, invariant
from .page_world import World

SIZES = {
    "one page, two guest threads, two restarts": Size(pages=1, guest_threads=2, accesses=3, restarts=2),
    "the same, never complete": Size(pages=1, guest_threads=2, accesses=3, restarts=2, endless=True),
    "one page, by faults alone": Size(pages=1, guest_threads=2, accesses=3, restarts=1, endless=True, bulk=False),
    "two pages": Size(pages=2, guest_threads=1, accesses=2, restarts=1),
    "two pages, never complete": Size(pages=2, guest_threads=2, accesses=2, restarts=0, endless=True),
}
SMALL = Size(pages=1, guest_threads=1, accesses=2, restarts=1)
ENDLESS = replace(SMALL, endless=True)

# guard -> where its absence shows, and what breaks then
NEEDED = {
    "claim": (SMALL, "reads -1"),  # torn: written over while the guest has it mapped
    "present_after_bytes": (SMALL, "reads -1"),
    "present_before_continue": (SMALL, "page 0 reads"),
    "wanted": (ENDLESS, "deadlock"),
    "wake_on_eexist": (ENDLESS, "deadlock"),
    "gate": (SMALL, "reads 0, the truth is 2"),
    "missing_registered": (SMALL, "reads 0, the truth is 1"),
    "count_before_unregister": (SMALL, "reads 0, the truth is 1"),
    "guest_keeps_duplicate": (SMALL, "reads 0, the truth is 1"),
    "receiving_restarts_absent": (SMALL, "EFAULT"),
    "wake_all_on_restart": (ENDLESS, "deadlock"),
}


def check(size: Size, guards: Guards) -> Result[World]:
    model = Model(size, guards)
    return explore(initial(size), model.successors, invariant, end=model.end, goal=model.done)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_holds_with_all_guards(size: Size) -> None:
    result = check(size, Guards())
    assert result.broken is None, str(result)


def test_the_model_does_what_it_is_about() -> None:
    """The races that the guards are for do occur; otherwise their holding would say nothing."""
    labels = check(SIZES["one page, two guest threads, two restarts"], Guards()).labels
    for race in (
        "drops page 0 = 1: MAPPED",
        "drops page 0 = 0: ZERO",
        "finds page 0 RECEIVING",
        "finds page 0 PRESENT",
        "finds page 0 MAPPED",
        "finds page 0 ZERO",
        "continue page 0 DONTWAKE",
        "wake page 0",
        "zeropage page 0",
        "complete: map, unregister",
    ):
        assert any(race in label for label in labels), race


def test_every_guard_has_its_counterexample() -> None:
    assert set(NEEDED) == {field.name for field in fields(Guards)}


@pytest.mark.parametrize("guard", NEEDED)
def test_without_the_guard_it_breaks(guard: str) -> None:
    size, breaks = NEEDED[guard]
    result = check(size, replace(Guards(), **{guard: False}))
    print(f"without {guard}: {result}")
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert breaks in result.broken, f"without {guard} something else breaks: {result}"
