"""The benchmark cannot rot: every scenario runs once, tiny, and its JSON holds what it should. Speeds mean nothing here."""

import json
import subprocess
from pathlib import Path

import pytest

from migrate.bench.figures import Bound, Latencies, Result
from migrate.pair import COMMAND

pytestmark = pytest.mark.requires("uffd")
SCENARIOS = ["fault-idle", "fault-under-stream", "stream", "cpu", "downtime", "downtime-scraped"]


@pytest.mark.timeout(90)
def test_every_scenario_runs(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    command = [*COMMAND, "bench", "--tiny", "--check", "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    assert run.returncode == (8 if "MISSED" in run.stdout else 0), run.stdout + run.stderr
    written = json.loads(report.read_text())
    assert set(written["environment"]) == {"cpu_model", "cores", "memory_bytes", "kernel"}
    assert [scenario["name"] for scenario in written["scenarios"]] == SCENARIOS
    for scenario in written["scenarios"]:
        assert scenario["unit"] in ("seconds", "bytes/second")
        figures = {"value"} if scenario["name"] in ("stream", "cpu") else {"p50", "p99", "n"}
        assert set(scenario["product"]) == set(scenario["floor"]) == figures
        assert set(scenario["ratio"]) == figures - {"n"}
        assert all(value > 0 for value in scenario["product"].values())


def test_scenario_that_nobody_knows() -> None:
    run = subprocess.run([*COMMAND, "bench", "warp"], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 2
    assert "expected fault-idle" in run.stderr


def test_quantiles_of_buckets() -> None:
    latencies = Latencies(least_ns=2000)
    latencies.add([(1024, 1000), (4096, 50), (8192, 50)])
    figures = latencies.figures()
    assert figures["n"] == 100
    assert 4096e-9 <= figures["p50"] <= 4352e-9
    assert 8192e-9 <= figures["p99"] <= 8704e-9


def test_bounds_hold_or_do_not() -> None:
    result = Result("x", "seconds", {"p50": 2.0}, {"p50": 1.0})
    assert Bound("ratio.p50", 2.0).holds(result)
    assert not Bound("ratio.p50", 1.9).holds(result)
    assert Bound("product.p50", 2.0, at_least=True).holds(result)
    assert not Bound("product.p50", 2.1, at_least=True).holds(result)
