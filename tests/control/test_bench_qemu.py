"""``postcopy bench qemu``: runs once, tiny; and what it makes of a guest's heartbeats and touches, exactly."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from migrate.bench.qemu import LIMITS, TINY_WAYS, WAYS, Comparison
from migrate.bench.qemu.mover import FAULT_NS, Move, Moved, Touches, measured
from migrate.errors import PostcopyError
from migrate.guests.linux.debugcon import Told
from migrate.guests.linux.machine import LinuxGuest
from migrate.pair import COMMAND

RUN_SECONDS = 100
MS = 1_000_000
FAULT = 2 * FAULT_NS
MOVE = Move(
    downtime_seconds=0.02,
    touch_gap_seconds=0.03,
    longest_gap_seconds=0.04,
    total_seconds=1.0,
    moved_bytes=1000,
    lost_beats=0,
    pace=0.5,
    fault_buckets={65536: 99, 1 << 20: 1},
)


@pytest.mark.requires("linux-guest", "uffd-full")
@pytest.mark.timeout(RUN_SECONDS + 10)
def test_both_movers_move_the_machine(repository: Path, tmp_path: Path) -> None:
    report = tmp_path / "qemu.json"
    command = [*COMMAND, "bench", "qemu", "--tiny", "--json", str(report)]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    [comparison] = json.loads(report.read_text())["scenarios"]
    assert set(comparison["ways"]) == {way.name for way in TINY_WAYS}
    for figures in comparison["ways"].values():
        assert figures["moves"] == 1
        assert 0 < figures["downtime_seconds"] <= figures["touch_gap_seconds"] <= figures["longest_gap_seconds"]
        assert figures["touch_gap_seconds"] < 10
        assert figures["moved_bytes"] > comparison["guest"]["memory_mib"] << 20


def test_without_the_guest_the_remedy_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "POSTCOPY_GUEST_IMAGE": str(tmp_path)}
    run = subprocess.run([*COMMAND, "bench", "qemu"], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 5
    assert "make guest-image" in run.stderr


# --- figures -------------------------------------------------------------------------------------------------------------


def told(beats: str, *, from_ms: int, number: int = 0) -> Told:
    """One beat a millisecond: ``S`` stepped, ``s`` not, ``.`` none came."""
    told = Told()
    for at_ms, beat in enumerate(beats, from_ms):
        if beat != ".":
            told.feed(bytes([0x80 | (beat == "S") << 6 | number % 64]), at_ms * MS)
            number += 1
    return told


def measure(source: Told, destination: Told, **changed: int) -> Move:
    moved = replace(Moved(begun_ns=2 * MS, ended_ns=20 * MS, moved_bytes=7), **changed)
    source.touches, source.touches_at_ns = {128: 1000, FAULT: 5}, 0
    after = Touches(100 * MS, {128: 1500, FAULT: 30, 4 * FAULT: 2})
    return measured(moved, source, destination, (0.2, {128: 4000, FAULT: 10}), after)


def test_downtime_is_between_the_last_beat_and_the_first() -> None:
    move = measure(told("SSSSs", from_ms=0), told("ssS....S", from_ms=10, number=5))
    assert move.downtime_seconds == pytest.approx(0.006)
    assert move.touch_gap_seconds == pytest.approx(0.009)
    assert move.longest_gap_seconds == pytest.approx(0.009)
    assert (move.lost_beats, move.moved_bytes) == (0, 7)
    assert move.total_seconds == pytest.approx(0.018)


def test_longest_gap_is_the_one_of_the_move() -> None:
    source, destination = told("SSSSS", from_ms=0), told("S...........SS" + "." * 50 + "S", from_ms=7, number=6)
    move = measure(source, destination)
    assert move.touch_gap_seconds == pytest.approx(0.003)
    assert move.longest_gap_seconds == pytest.approx(0.051), "begun before the end of the move"
    assert measure(source, destination, ended_ns=12 * MS).longest_gap_seconds == pytest.approx(0.012)
    assert move.lost_beats == 1


def test_faults_are_the_long_touches_less_those_that_are_usual() -> None:
    """0.1 s, of which 0.05 s without the guest; before, 10 long ones in 0.2 s: 2.5 are usual, and 30 - 5 were seen."""
    move = measure(told("S", from_ms=0), told("S", from_ms=50, number=1))
    assert move.fault_buckets == {FAULT: 25 - 2, 4 * FAULT: 2}
    assert move.faults()["n"] == 25
    assert move.pace == pytest.approx((500 + 25 + 2) / 0.1 / (4010 / 0.2))


def test_guest_that_runs_in_two_places_is_no_result() -> None:
    with pytest.raises(PostcopyError, match="run in one place"):
        measure(told("SSSSSSS", from_ms=0), told("SSS", from_ms=5))


def test_ratios_are_ours_over_theirs_and_held_to_their_bounds() -> None:
    comparison = Comparison(LinuxGuest())
    for way in WAYS:
        comparison.moves[way.name] += [MOVE, replace(MOVE, downtime_seconds=0.1), replace(MOVE, downtime_seconds=0.06)]
    assert comparison.figures("qemu-pure")["downtime_seconds"] == 0.06
    assert comparison.figures("qemu-pure")["downtime_seconds_p99"] == 0.1
    assert {ratio for _, ratio in comparison.ratios()} == {1.0}
    assert len(comparison.ratios()) == len(LIMITS)
    assert not comparison.holds()
    better = replace(MOVE, downtime_seconds=0.015, fault_buckets={8192: 100})
    for name in ("postcopy-pure", "postcopy-precopy"):
        comparison.moves[name] = [better]
    assert comparison.holds()
    comparison.moves["postcopy-pure"] = [replace(better, moved_bytes=1021)]
    assert not comparison.holds()
