"""The benchmark cannot rot: every scenario runs once, tiny, and its JSON holds what it should. Speeds mean nothing here."""

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from migrate import bench
from migrate.bench import resolvers
from migrate.bench.figures import Bound, Latencies, Result
from migrate.bench.floor import bare_c
from migrate.errors import HostLacksError
from migrate.pair import COMMAND

from ..failure.mutants import COMPILER, Mutation

pytestmark = pytest.mark.requires("uffd")
SCENARIOS = ["fault-idle", "fault-idle-polling", "fault-under-stream", "random", "stream", "cpu", "sequential"]
SCENARIOS += ["downtime", "downtime-scraped", "hybrid", "tracking", "shaped", "streams", "hostile", "huge-urgent", "huge-stream"]
VALUE = {"stream", "cpu", "sequential", "huge-stream"}
BARE = {"random", "tracking", "shaped", "streams"}
"""Figures of the product alone."""


@pytest.mark.timeout(260)  # half a minute of work, on a busy machine
@pytest.mark.requires("hugetlb")
def test_every_scenario_runs(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    command = [*COMMAND, "bench", "--tiny", "--check", "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == (8 if "MISSED" in run.stdout else 0), run.stdout + run.stderr
    written = json.loads(report.read_text())
    assert set(written["environment"]) == {"cpu_model", "cores", "memory_bytes", "kernel"}
    assert [scenario["name"] for scenario in written["scenarios"]] == SCENARIOS
    for scenario in written["scenarios"]:
        if scenario["name"] in BARE:
            assert scenario["product"] == scenario["floor"] == {}
            assert scenario["figures"]
            continue
        assert scenario["unit"] in ("seconds", "bytes/second")
        figures = {"value"} if scenario["name"] in VALUE else {"p50", "p99", "n"}
        assert set(scenario["product"]) == set(scenario["floor"]) == figures
        assert set(scenario["ratio"]) == figures - {"n"}
        assert all(value > 0 for value in scenario["product"].values())


def test_shaped_wants_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, it is refused; among all it is left out, and that is said."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(bench, "USUAL", {"shaped": bench.SCENARIOS["shaped"]})
    with pytest.raises(HostLacksError, match="this is uid 1000; run as root"):
        bench.run(["shaped"], None, check=True, tiny=True)
    assert bench.run([], None, check=True, tiny=True)
    assert "left out: shaped link" in capsys.readouterr().out


@pytest.mark.requires("kvm", "uffd-kernel")
def test_kvm_scenario_runs(tmp_path: Path) -> None:
    report = tmp_path / "kvm.json"
    command = [*COMMAND, "bench", "kvm", "--tiny", "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    [scenario] = json.loads(report.read_text())["scenarios"]
    assert scenario["product"]["n"] == 4
    assert scenario["figures"]["faults"] > 1000
    assert scenario["figures"]["fault_p50_over_floor"] > 0


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


# --- the ways to resolve a fault, side by side ---------------------------------------------------------------------------


def test_every_way_to_resolve_runs(tmp_path: Path) -> None:
    report = tmp_path / "resolvers.json"
    command = [*COMMAND, "bench", "resolvers", "--tiny", "--check", "--json", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    touches, bulk = run.stdout.split("bulk: ns a page")
    assert [name for name in resolvers.WAYS if f"│{name}" not in touches] == []
    written = json.loads(report.read_text())
    assert set(written["environment"]) == {"cpu_model", "cores", "memory_bytes", "kernel"}
    [comparison] = written["scenarios"]
    assert {key: comparison[key] for key in ("name", "unit", "rounds")} == {"name": "resolvers", "unit": "seconds", "rounds": 1}
    ways = {way["name"]: way for way in comparison["ways"]}
    assert list(ways) == list(resolvers.WAYS)
    if lacks := ways["continue-hugetlb"]["lacks"]:
        assert f"continue-hugetlb {lacks}" in " ".join(bulk.split())
        del ways["continue-hugetlb"]
    for name, way in ways.items():
        in_place, filled = name.startswith("sigbus-"), name.startswith(("continue-", "move-"))
        one_thread_or_cpu = in_place or len(os.sched_getaffinity(0)) == 1
        assert list(way["touches"]) == ["unpinned", "one-cpu", *([] if one_thread_or_cpu else ["two-cpus"])]
        for figures in way["touches"].values():
            assert figures["n"] == (8 if name == "continue-hugetlb" else 64)
            assert 0 < figures["p50"] <= figures["p99"]
            assert figures["cpu_seconds_per_page"] > 0
        calls = ["1", "4"] if name == "continue-hugetlb" else ["1", "4", "16", "64", "256", "512"]
        assert list(way["bulk_seconds_per_page"]) == ([] if in_place else calls)
        assert all(seconds > 0 for seconds in way["bulk_seconds_per_page"].values())
        assert (way["fill_seconds_per_page"] is not None) == filled


@pytest.mark.requires("hugetlb")
def test_resolving_huge_pages() -> None:
    way = resolvers.of_rounds([bare_c(resolvers.PROGRAM, "continue-hugetlb", pages=8, bulk_pages=16)] * 2)
    assert (way.lacks, way.page_bytes, way.touches["one-cpu"].n) == ("", 2 << 20, 16)
    assert list(way.bulk_seconds_per_page) == [1, 4, 16]
    assert way.fill_seconds_per_page


def test_too_few_huge_pages_are_told_in_the_table() -> None:
    way = resolvers.of_rounds([bare_c(resolvers.PROGRAM, "continue-hugetlb", bulk_pages=1 << 20)])
    lacks = "needs 1048576 free pages of 2 MiB: set vm.nr_hugepages to 1048576 more than are in use"
    assert way.to_dict() == {"name": "continue-hugetlb", "lacks": lacks}
    touches, bulk = resolvers.tables(resolvers.Comparison(1, [way]))
    assert (touches.row_count, bulk.row_count) == (1, 1)
    assert bulk.caption == f"continue-hugetlb {lacks}"


def test_tables_fit_a_terminal_of_100_columns() -> None:
    """Each way by its whole name, each figure uncut: a table that is too wide takes the room from its first column."""
    touches = resolvers.Touches(p50=1234.5e-6, p99=9999.9e-6, cpu_seconds_per_page=99.9e-6, n=64)
    ways = [resolvers.Way(name, touches=dict.fromkeys(resolvers.PLACEMENTS, touches)) for name in resolvers.WAYS]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(next(resolvers.tables(resolvers.Comparison(1, ways))))
    lines = console.export_text().splitlines()
    for name in resolvers.WAYS:
        [row] = [line for line in lines if re.match(f"│{name} *│", line)]
        assert (row.count("1234.5"), row.count("9999.9"), row.count("99.9")) == (3, 3, 6)


def test_way_that_nobody_knows() -> None:
    run = subprocess.run([resolvers.PROGRAM, "warp"], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 2
    assert run.stderr.split("ways: ")[1].split() == list(resolvers.WAYS)


RESOLVER_C = ("migrate/bench/resolvers*.[ch]", "migrate/bench/floor*.h", "migrate/bench/floor_[mp]*.c")
CORE_C = ("migrate/dataplane/histogram.[ch]", "migrate/uffd/*.[ch]")
WAYS_C = "migrate/bench/resolvers_ways.c"
COPIED = "    struct uffdio_copy request"
STORED = "memcpy(area->alias + page * area->page_bytes, area->hot, count * area->page_bytes);"
PLACED = "    pwrite_from_hot(area, page, count);\n    resolve_continue(area, page, count);\n"
ZEROES = ", .modes = MISSING, .resolve = resolve_zeropage"
SPOILT = (
    Mutation(WAYS_C, COPIED, f"    area_make_hot(area, page ^ 1, count);\n{COPIED}"),
    Mutation(WAYS_C, STORED, STORED.replace("count * area->page_bytes", "count * area->page_bytes - 8")),
    Mutation(WAYS_C, PLACED, "    pwrite_from_hot(area, page, count);\n"),
    Mutation(WAYS_C, "MINOR, .resolve = resolve_continue, .fill = fill_file", "MINOR, .resolve = resolve_continue"),
    Mutation(WAYS_C, f"ANONYMOUS{ZEROES}", f"ANONYMOUS{ZEROES.replace('zeropage', 'copy')}"),
    Mutation(WAYS_C, ".features = UFFD_FEATURE_MOVE", ".features = UINT64_C(1) << 40"),
)
FOUND = {
    "copy-shmem": "the content of a page is not as it should be",  # its neighbour's
    "sigbus-copy-anon": "the content of a touched page is not as it should be",
    "zeropage-anon": "the content of a page is not as it should be",  # not zero
    "store-shmem": "the content of a page is not as it should be",  # its last word never came
    "continue-shmem": "UFFDIO_CONTINUE: Bad address",  # of a hole
    "pwrite-shmem": "the deadline passed",  # never mapped
}


@pytest.fixture(scope="module")
def spoilt(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with ways that do not do their job."""
    directory = tmp_path_factory.mktemp("spoilt")
    for source in (path for pattern in (*RESOLVER_C, *CORE_C) for path in repository.glob(pattern)):
        copied = directory / source.relative_to(repository)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copied)
    for mutation in SPOILT:
        mutation.apply(directory)
    sources = [str(path) for path in directory.rglob("*.c")]
    subprocess.run([*COMPILER, "-O0", "-o", "spoilt", *sources], cwd=directory, check=True, timeout=40)
    return directory / "spoilt"


@pytest.mark.parametrize("way", FOUND)
def test_way_that_does_not_do_its_job_is_found(way: str, spoilt: Path) -> None:
    command = [spoilt, way, "--pages=16", "--bulk-pages=16", "--deadline-seconds=1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert FOUND[way] in run.stderr


def test_kernel_without_a_feature_is_told_in_the_table(spoilt: Path) -> None:
    assert bare_c(spoilt, "move-anon") == {"name": "move-anon", "lacks": "needs UFFDIO_MOVE, Linux 6.8 or later"}


def test_readme_has_a_row_for_every_way(repository: Path) -> None:
    section = (repository / "README.md").read_text().split("## Resolvers")[1].split("\n## ")[0]
    assert [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")] == list(resolvers.WAYS)
