"""The C core without Python: its mains as they are built for use, and under AddressSanitizer with UndefinedBehaviorSanitizer and
under ThreadSanitizer. What they do and check themselves: tests/path/dataplane_main.c, tests/guests/workload_main.c.

Builds stay in build-plain, build-asan and build-tsan at the root, so that the next run compiles only what changed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from migrate import host
from migrate.bench.certificates import Authority

BUILD_DEADLINE_SECONDS = 120.0
RUN_DEADLINE_SECONDS = 50.0
OPTIONS = {"plain": "none", "asan": "address,undefined", "tsan": "thread"}
RUNTIMES = {"plain": None, "asan": b"__asan_init", "tsan": b"__tsan_init"}
MAINS = (
    "dataplane-main",
    "precopy-main",
    "discard-main",
    "chunks-main",
    "restore-main",
    "pacer-main",
    "tls-main",
    "workload-main",
    "kvm-main",
    "kvm-state-main",
)
STRICT = {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}

BUILDS = [
    pytest.param("plain"),
    pytest.param("asan", marks=pytest.mark.requires("asan")),
    pytest.param("tsan", marks=pytest.mark.requires("tsan")),
]


def run(command: list[str], deadline_seconds: float) -> str:
    """Standard output; fails with all that was said when the command does. The child is killed and reaped at the deadline."""
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, **STRICT, "PATH": beside_python}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=deadline_seconds, check=False)
    said = f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert "runtime error" not in done.stderr, said
    return done.stdout


def built(repository: Path, kind: str, mains: Sequence[str]) -> Path:
    """The build directory of one kind of build, with these programs in it."""
    directory = repository / f"build-{kind}"
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    options = ["-Dpython=disabled", f"-Db_sanitize={OPTIONS[kind]}"]
    try:
        run([*meson, "setup", "--reconfigure", *options, str(directory), str(repository)], BUILD_DEADLINE_SECONDS)
    except AssertionError:  # left behind by another meson, or by one that was killed
        shutil.rmtree(directory, ignore_errors=True)
        run([*meson, "setup", *options, str(directory), str(repository)], BUILD_DEADLINE_SECONDS)
    run([*meson, "compile", "-C", str(directory), *mains], BUILD_DEADLINE_SECONDS)
    runtime = RUNTIMES[kind]
    for name in mains:
        assert runtime is None or runtime in (directory / name).read_bytes(), f"{name} is not built under {OPTIONS[kind]}"
    return directory


@pytest.fixture(scope="module", params=BUILDS)
def programs(request: pytest.FixtureRequest, repository: Path) -> Path:
    """The build directory of one kind of build."""
    return built(repository, request.param, MAINS)


def run_main(program: Path, *arguments: str) -> list[str]:
    prefix, why = host.sanitizer_prefix(program.with_name("dataplane-main"))  # which without arguments only starts
    assert why == ""
    return run([*prefix, str(program), *arguments], RUN_DEADLINE_SECONDS).splitlines()


@pytest.mark.timeout(180)  # may compile first
def test_tls(programs: Path, tmp_path: Path) -> None:
    files = Authority(tmp_path / "authority").issue(tmp_path / "host", "host.test")
    scenarios = ["bytes", "requests", "full", "in-order", "cut", "changed"]
    assert run_main(programs / "tls-main", str(files), *scenarios) == [f"{scenario}: held" for scenario in scenarios]


@pytest.mark.timeout(180)  # may compile first
@pytest.mark.requires("uffd")
def test_data_plane(programs: Path) -> None:
    scenarios = ["moves", "streams", "faults-only", "late-copies", "bad-frames", "readahead", "patience", "foreseen"]
    assert run_main(programs / "dataplane-main", *scenarios) == [f"{scenario}: held" for scenario in scenarios]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd", "hugetlb")
def test_data_plane_on_hugetlbfs(programs: Path) -> None:
    assert run_main(programs / "dataplane-main", "hugetlb") == ["hugetlb: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd")
def test_precopy(programs: Path) -> None:
    """Seeded moves of a guest that writes flat out until it is paused, and the clean-up of one that came to nothing."""
    assert run_main(programs / "precopy-main", "1", "6") == ["precopy: held"]
    assert run_main(programs / "precopy-main", "order") == ["order: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd", "hugetlb")
def test_precopy_on_hugetlbfs(programs: Path) -> None:
    assert run_main(programs / "precopy-main", "1", "1", "hugetlb") == ["precopy: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd")
def test_discards(programs: Path) -> None:
    """Of a guest at the destination, by events and by messages, just ahead of what comes by bulk and in what is held."""
    assert run_main(programs / "discard-main", "0", "6") == ["discards: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd", "hugetlb")
def test_discards_on_hugetlbfs(programs: Path) -> None:
    """An event alone; after precopy what keeps the data, and messages."""
    assert run_main(programs / "discard-main", "0", "3", "5", "hugetlb") == ["discards: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd", "hugetlb")
def test_large_pages_in_pieces(programs: Path) -> None:
    """In any order, by two connections at once, cut, discarded when half is here, and a small page asked for between."""
    scenarios = ["scattered", "cut", "bad-pieces", "discards", "between"]
    assert run_main(programs / "chunks-main", *scenarios) == [f"{scenario}: held" for scenario in scenarios]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd")
def test_restoring(programs: Path) -> None:
    """Page states of an earlier life, of which every byte is random."""
    assert run_main(programs / "restore-main", "1", "6") == ["restore: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("uffd", "hugetlb")
def test_restoring_on_hugetlbfs(programs: Path) -> None:
    assert run_main(programs / "restore-main", "1", "2", "hugetlb") == ["restore: held"]


@pytest.mark.timeout(180)
def test_pacer(programs: Path) -> None:
    """Its controller on a simulated link, and what waits for it on several threads."""
    scenarios = ["finds", "follows", "full-socket", "hiccups", "open-path", "longer-path", "limited", "threads", "blind"]
    assert run_main(programs / "pacer-main", *scenarios) == [f"{scenario}: held" for scenario in scenarios]


@pytest.mark.timeout(180)
def test_workload(programs: Path) -> None:
    patterns = ["sequential", "random", "zipf", "chase", "permute"]
    assert run_main(programs / "workload-main", "1000", "10") == [f"{pattern}: held" for pattern in patterns]


@pytest.mark.timeout(180)
@pytest.mark.requires("kvm")
def test_kvm_guest(programs: Path) -> None:
    assert run_main(programs / "kvm-main", "4", "3") == ["commute: held", "damaged: held", "rolled-back: held"]


@pytest.mark.timeout(180)
@pytest.mark.requires("kvm")
def test_kvm_state(programs: Path) -> None:
    """Its parser on 6,000 states that were cut, flipped, spliced or made up, their checksums right."""
    assert run_main(programs / "kvm-state-main", "1", "6000") == ["state: held"]
