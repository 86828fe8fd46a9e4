"""What a test may ask of the machine: ``@pytest.mark.requires("uffd", "hugetlb")``. Names and probes: migrate/host/.

What the machine truly lacks is deselected, and the summary says why and what to change. A feature named in
POSTCOPY_REQUIRE (comma-separated; ``make test`` names all that the machine has) is never deselected: its tests run, and
fail where it is not there. Nothing is ever skipped.
"""

import contextlib
import fcntl
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import host
from migrate.host.suite import ADMINISTRATOR_PATH, ZRAM_SCRIPT

HUGETLB_PAGES = host.HUGEPAGES_WANTED
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
FOUND_WITHIN_SECONDS = 20.0
ZRAM_BYTES = 256 << 20
SWAPS = Path("/proc/swaps")
# A process of its own, at the end of its input: also when this one is killed. By difference: suites may run side by side.
GIVE_BACK = """
read -r _ || :
exec 9<"$1"
flock 9
echo $(($(cat "$1") - $2)) >"$1"
"""
DESELECTED: pytest.StashKey[dict[str, list[str]]] = pytest.StashKey()


def features_of(item: pytest.Item) -> list[str]:
    """What the test's markers name, each once."""
    return list(dict.fromkeys(str(name) for mark in item.iter_markers("requires") for name in mark.args))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="the long version of what tests/torture does")
    parser.addoption("--fuzz-runs", type=int, default=1500, help="inputs that tests/fuzz makes for each parser")
    parser.addoption("--torture-seed", type=int, default=1, help="other random moments")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(feature, ...): deselect this test where the machine lacks a feature")
    config.stash[DESELECTED] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    required = {name.strip() for name in os.environ.get("POSTCOPY_REQUIRE", "").split(",")} - {""}
    named = required.union(*(features_of(item) for item in items))
    if unknown := named - host.PROBES.keys():
        raise pytest.UsageError(f"no such feature: {', '.join(sorted(unknown))}; there are {', '.join(host.PROBES)}")
    lacking = {name for name in named - required if not host.feature(name).available}
    kept: list[pytest.Item] = []
    away: list[pytest.Item] = []
    for item in items:
        missing = [name for name in features_of(item) if name in lacking]
        (away if missing else kept).append(item)
        for name in missing:
            config.stash[DESELECTED].setdefault(name, []).append(item.nodeid)
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, tests in config.stash[DESELECTED].items():
        terminalreporter.section(f"{len(tests)} deselected for lack of {name}")
        terminalreporter.line(str(host.feature(name)))
        for test in tests:
            terminalreporter.line(f"  {test}")


@contextlib.contextmanager
def pages_of(pool: Path, wanted: int, page_bytes: int, size_flag: int) -> Iterator[int]:
    """So many free pages, each touched once (a first touch takes 2 ms a MiB); given back afterwards."""
    count = pool / "nr_hugepages"
    added = wanted if os.access(count, os.W_OK) else 0  # where we may not, enough are free, or the probe had said so
    if added:
        with count.open("r+") as locked:
            fcntl.flock(locked, fcntl.LOCK_EX)
            before = int(count.read_text())
            deadline = time.monotonic() + FOUND_WITHIN_SECONDS
            count.write_text(str(before + added))
            while int(count.read_text()) < before + added and time.monotonic() < deadline:  # what other tests hold is in the way
                COMPACT_MEMORY.write_text("1")
                count.write_text(str(before + added))
            added = int(count.read_text()) - before  # as many as the kernel found
    giver = subprocess.Popen(
        ["sh", "-euc", GIVE_BACK, "sh", str(count), str(added)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        free = int((pool / "free_hugepages").read_text())
        assert free >= wanted, f"the kernel found memory for {free} of {wanted} pages of {page_bytes >> 20} MiB"
        touch(wanted, page_bytes, size_flag)
        yield wanted
    finally:
        giver.communicate(timeout=30)
    assert giver.returncode == 0


@pytest.fixture(scope="session")
def hugetlb_pool() -> Iterator[int]:
    """HUGETLB_PAGES free pages of 2 MiB."""
    with pages_of(host.POOL_2M, HUGETLB_PAGES, host.HUGEPAGE_BYTES, os.MFD_HUGE_2MB) as pages:
        yield pages


@pytest.fixture(scope="session")
def gigantic_pool() -> Iterator[int]:
    """Two free pages of 1 GiB."""
    with pages_of(host.POOL_1G, host.GIGANTIC_PAGES_WANTED, 1 << 30, os.MFD_HUGE_1GB) as pages:
        yield pages


def touch(pages: int, page_bytes: int, size_flag: int) -> None:
    """Have the kernel clear the pages and give them back to the pool."""
    descriptor = os.memfd_create("postcopy-pool", os.MFD_CLOEXEC | os.MFD_HUGETLB | size_flag)
    try:
        os.ftruncate(descriptor, pages * page_bytes)
        with mmap.mmap(descriptor, pages * page_bytes) as mapping:
            for page in range(pages):
                mapping[page * page_bytes] = 1
    finally:
        os.close(descriptor)


@pytest.fixture
def zram_swap() -> Iterator[Path]:
    """The device of ZRAM_BYTES more of swap. Off and given back by a process of its own, also when this one is killed."""
    environment = {**os.environ, "PATH": ADMINISTRATOR_PATH}
    command = ["sh", "-euc", ZRAM_SCRIPT, "sh", str(ZRAM_BYTES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as giver:
        try:
            assert giver.stdout is not None
            device = Path(giver.stdout.readline().strip())
            assert str(device) in SWAPS.read_text(), giver.communicate(timeout=10)[1]
            yield device
        finally:
            _, said = giver.communicate(timeout=30)
    assert giver.returncode == 0, said
    assert not device.exists(), said


@pytest.fixture(autouse=True)
def _what_the_marker_names(request: pytest.FixtureRequest) -> None:
    """``requires("hugetlb")`` is enough: the pool is there before the test begins; with "zram" there is swap."""
    for feature, fixture in (("hugetlb", "hugetlb_pool"), ("gigantic", "gigantic_pool"), ("zram", "zram_swap")):
        if feature in features_of(request.node):
            request.getfixturevalue(fixture)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The clone that these tests lie in."""
    return Path(__file__).resolve().parent.parent
