"""Precopy over the whole state space of its model, attempts that fail and the guest that comes after included."""

from dataclasses import fields, replace
from functools import cache

import pytest

from .explorer import Result, explore
from .page_states import Guards, invariant
from .page_world import World
from .precopy_states import PrecopyGuards, PrecopyModel, PrecopySize, initial

FAILING = "one page, two rounds; the attempt may fail and another guest come"
SIZES = {
    FAILING: PrecopySize(pages=1, guest_threads=1, accesses=2, failures=True),
    "the same, never complete": PrecopySize(pages=1, guest_threads=1, accesses=2, failures=True, endless=True),
    "one page, two guest threads": PrecopySize(pages=1, guest_threads=2, accesses=2, rounds=1),
    "two pages": PrecopySize(pages=2, guest_threads=1, accesses=1, rounds=1, writes=1),
}
SMALL = PrecopySize(pages=1, guest_threads=1, accesses=2, rounds=1, early=False)
TOUCHED = replace(SMALL, early=True)
ENDLESS = replace(TOUCHED, endless=True)
FAILS = replace(SMALL, failures=True)

# guard -> where its absence shows, and what breaks then
NEEDED = {
    "arm_before_read": (SMALL, "reads 0, the truth is 2"),
    "quiesced": (SMALL, "reads 0, the truth is 2"),
    "scan_after_pause": (SMALL, "reads 0, the truth is 2"),
    "judge_compares": (SMALL, "reads -1"),  # complete, while the answer to a fault is being placed
    "held_asks": (SMALL, "reads 0, the truth is 2"),
    "clear_old": (replace(SMALL, rounds=2), "reads 1, the truth is 0"),
    "wanted_outlives_hold": (ENDLESS, "deadlock"),
    "clean": (FAILS, "reads 1, the truth is 0"),
    "clean_urgent": (replace(FAILS, early=True), "reads 0, the truth is 11"),
    "wake_when_offered": (replace(ENDLESS, failures=True), "deadlock"),
    "clean_at_attach": (FAILS, "reads 1, the truth is 0"),
}
# guards of page_states.py that precopy hangs on as well
SHARED = {
    "gate": (TOUCHED, "is mapped before the source has paused"),
    "missing_registered": (TOUCHED, "is mapped before the source has paused"),
    "wanted": (ENDLESS, "deadlock"),
    "claim": (SMALL, "reads -1"),
    "count_before_unregister": (SMALL, "reads 0, the truth is 2"),
}


@cache
def check(size: PrecopySize, guards: PrecopyGuards) -> Result[World]:
    model = PrecopyModel(size, guards)
    return explore(initial(size), model.successors, invariant, end=model.end, goal=model.done)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_holds_with_all_guards(size: PrecopySize) -> None:
    result = check(size, PrecopyGuards())
    assert result.broken is None, str(result)


@pytest.mark.parametrize(
    "race",
    [
        "judges page 0 HELD, final",
        "judges page 0 HELD, stale",
        "judges page 0 HELD_ZERO, final",
        "judges page 0 HELD_ZERO, stale",
        "judges page 0 REQUESTED, final: not held",
        "judges page 0 RECEIVING, stale: not held",
        "judges page 0 MAPPED, stale: not held",
        "drops precopied page 0 = 0: REQUESTED",
        "fault_thread finds page 0 HELD",
        "fault_thread finds page 0 HELD_ZERO",
        "bulk_thread hold page 0, wanted: asks",
        "fault_thread drops page 0 = 2: PRESENT",
        "mapping ahead",
        "resume refused",
        "attempt fails",
        "clean; another guest comes: (11,)",
        "daemon dies, guest attaches; another guest comes: (0,)",
    ],
)
def test_the_model_does_what_it_is_about(race: str) -> None:
    """What the guards are for does occur; otherwise their holding would say nothing."""
    labels = check(SIZES[FAILING], PrecopyGuards()).labels
    assert any(race in label for label in labels), sorted(labels)


def test_every_guard_has_its_counterexample() -> None:
    shared = {field.name for field in fields(Guards)}
    assert set(NEEDED) == {field.name for field in fields(PrecopyGuards)} - shared
    assert set(SHARED) < shared


@pytest.mark.parametrize("guard", [*NEEDED, *SHARED])
def test_without_the_guard_it_breaks(guard: str) -> None:
    size, breaks = {**NEEDED, **SHARED}[guard]
    result = check(size, replace(PrecopyGuards(), **{guard: False}))
    print(f"without {guard}: {result}")
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert breaks in result.broken, f"without {guard} something else breaks: {result}"
