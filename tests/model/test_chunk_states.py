"""A page in chunks over its whole state space, with and without a discard; and what each of its guards prevents."""

import functools
from dataclasses import fields, replace

import pytest

from .chunk_states import ChunkGuards, ChunkModel, World, done, end, invariant
from .explorer import Result, explore

# guard -> what breaks without it
NEEDED = {
    "all_placed": "the truth is (1, 1)",
    "chunk_claim": "it reads (1, -1)",
    "writers_counted": "the truth is (0, 0)",
    "closed_refuses": "the truth is (0, 0)",
    "last_writer_looks": "deadlock",
    "wanted": "deadlock",
}


@functools.cache
def check(guards: ChunkGuards) -> Result[World]:
    return explore([World(), World(discards=1), World(discards=2)], ChunkModel(guards).successors, invariant, end=end, goal=done)


def test_holds_with_all_guards() -> None:
    result = check(ChunkGuards())
    assert result.broken is None, str(result)


def test_the_model_does_what_it_is_about() -> None:
    labels = check(ChunkGuards()).labels
    for race in (
        "urgent claim 0: taken",
        "urgent begin 0: closed",
        "bulk publish 0: discarded",
        "bulk drops chunk 0: MAPPED",
        "bulk drops chunk 0: REMOVED",
        "discard close 0: not now",
        "bulk hole 0",
        "discard mark 0: here",
        "fault: RECEIVING, wanted",
        "fault: REMOVED",
    ):
        assert any(race in label for label in labels), race


def test_every_guard_has_its_counterexample() -> None:
    assert set(NEEDED) == {field.name for field in fields(ChunkGuards)}


@pytest.mark.parametrize("guard", NEEDED)
def test_without_the_guard_it_breaks(guard: str) -> None:
    result = check(replace(ChunkGuards(), **{guard: False}))
    assert result.broken is not None, f"without {guard} nothing breaks: {result}"
    assert NEEDED[guard] in str(result.broken), f"without {guard} something else breaks: {result}"
