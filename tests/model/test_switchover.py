"""P4 and P5 over the whole state space of the switchover model; and each guard shown to be needed."""

from dataclasses import fields, replace

import pytest

from .explorer import Result, explore
from .switchover import Failures, Guards, Model, World, end, invariant, one_running_end

TWICE = "the guest runs at the source and at the destination"
NEEDED = {
    "resume_on_failure": "given up, yet the guest does not run at the source",
    "silent_after_record": TWICE,
    "record_before_send": TWICE,
    "abort_recorded_first": TWICE,
    "refuse_after_abort": TWICE,
    "no_abort_after_resume": TWICE,
    "agent_knows_epoch": "the same state was loaded twice",
    "refusal_is_true": TWICE,
    "agent_drains": TWICE,
}
EVERYTHING = Failures(cuts=1, reconnects=1, source_crashes=1, destination_crashes=1)


def check(failures: Failures, guards: Guards) -> Result[World]:
    return explore([World(left=failures)], Model(guards).successors, invariant, end=end)


@pytest.mark.parametrize(
    "failures",
    [
        Failures(cuts=1),
        Failures(cuts=1, reconnects=1),
        EVERYTHING,
        Failures(cuts=2, reconnects=2, source_crashes=2, destination_crashes=2),
    ],
    ids=str,
)
def test_never_two_and_never_none_before_the_record(failures: Failures) -> None:
    result = check(failures, Guards())
    assert result.broken is None, str(result)


@pytest.mark.parametrize("failures", [Failures(), Failures(cuts=1, reconnects=1), Failures(cuts=2, reconnects=2)], ids=str)
def test_exactly_one_runs_in_the_end(failures: Failures) -> None:
    """Without any failure; and where every cut is followed by a reconnection, in which the destination says what it did."""
    result = explore([World(left=failures)], Model(Guards()).successors, invariant, end=one_running_end)
    assert result.broken is None, str(result)


def test_a_cut_without_reconnection_may_leave_the_guest_paused() -> None:
    """What P4 costs: the check above is not empty, and the paused end is found when nothing reconnects."""
    result = explore([World(left=Failures(cuts=1))], Model(Guards()).successors, invariant, end=one_running_end)
    assert result.broken == "nobody runs at the end", str(result)
    assert result.last is not None
    assert result.last.source_record
    assert result.last.source == "stalled"


def test_the_model_does_what_it_is_about() -> None:
    labels = check(EVERYTHING, Guards()).labels
    for race in (
        "destination refuses switchover: abort mark",
        "source daemon dies and returns: switchover recorded",
        "destination daemon returns, old resume taken: resume again",
        "destination daemon returns, old resume discarded: waits for the greeting",
        "agent refused: destination records abort",
        "reconnected: running",
        "reconnected: aborted",
    ):
        assert race in labels, sorted(labels)


def test_every_guard_has_its_counterexample() -> None:
    assert set(NEEDED) == {field.name for field in fields(Guards)}


@pytest.mark.parametrize("guard", NEEDED)
def test_without_the_guard_it_breaks(guard: str) -> None:
    result = check(EVERYTHING, replace(Guards(), **{guard: False}))
    print(f"without {guard}: {result}")
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert NEEDED[guard] in result.broken, f"without {guard} something else breaks: {result}"
