"""What a test may ask of the machine: ``@pytest.mark.requires("uffd", "hugetlb")``. Names and probes: migrate/host/.

What the machine truly lacks is deselected, and the summary says why and what to change. A feature named in
POSTCOPY_REQUIRE (comma-separated; ``make test`` names all that the machine has) is never deselected: its tests run, and
fail where it is not there. Nothing is ever skipped.
"""

import fcntl
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import host
from migrate.host.suite import ADMINISTRATOR_PATH, ZRAM_SCRIPT

HUGETLB_PAGES = host.HUGEPAGES_WANTED
POOL = host.POOL_2M / "nr_hugepages"
ZRAM_BYTES = 256 << 20
SWAPS = Path("/proc/swaps")
FREE = host.POOL_2M / "free_hugepages"
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


@pytest.fixture(scope="session")
def hugetlb_pool() -> Iterator[int]:
    """HUGETLB_PAGES free pages of 2 MiB, each touched once (a first touch takes milliseconds); given back afterwards."""
    added = HUGETLB_PAGES if os.access(POOL, os.W_OK) else 0  # where we may not, enough are free, or the probe had said so
    if added:
        with POOL.open("r+") as pool:
            fcntl.flock(pool, fcntl.LOCK_EX)
            POOL.write_text(str(int(POOL.read_text()) + added))
    giver = subprocess.Popen(
        ["sh", "-euc", GIVE_BACK, "sh", str(POOL), str(added)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        free = int(FREE.read_text())
        assert free >= HUGETLB_PAGES, f"the kernel found memory for {free} of {HUGETLB_PAGES} pages of 2 MiB"
        touch(HUGETLB_PAGES)
        yield HUGETLB_PAGES
    finally:
        giver.communicate(timeout=30)
    assert giver.returncode == 0


def touch(pages: int) -> None:
    """Have the kernel clear the pages and give them back to the pool."""
    descriptor = os.memfd_create("postcopy-pool", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(descriptor, pages * host.HUGEPAGE_BYTES)
        with mmap.mmap(descriptor, pages * host.HUGEPAGE_BYTES) as mapping:
            for page in range(pages):
                mapping[page * host.HUGEPAGE_BYTES] = 1
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
    for feature, fixture in (("hugetlb", "hugetlb_pool"), ("zram", "zram_swap")):
        if feature in features_of(request.node):
            request.getfixturevalue(fixture)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The clone that these tests lie in."""
    return Path(__file__).resolve().parent.parent
