"""README's "Life of one page": every file, function, thread, counter and test that it names is there."""

import re
from pathlib import Path

import pytest

from migrate.dataplane import DESTINATION_FIGURES, SOURCE_FIGURES
from migrate.guests.workload.native import Report
from migrate.pair import Pair

from ..path.commuter import until

pytestmark = pytest.mark.requires("uffd")

GUESTS_OWN = "guest's own"
TRANSIENT = {"finish", "precopy"}  # live for the milliseconds of the last check, and of a round


def life_of_one_page(repository: Path) -> list[list[str]]:
    section = (repository / "README.md").read_text().split("## Life of one page")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] != "step"]


def test_what_the_table_names_is_there(repository: Path) -> None:
    rows = life_of_one_page(repository)
    assert len(rows) >= 8
    counters = {*DESTINATION_FIGURES, *SOURCE_FIGURES, *Report.__slots__}
    for step, place, _, counter, test in rows:
        file, function = (part.strip(" `") for part in place.split(" : "))
        assert re.search(rf"\b{function}\([^;]*\)\s*{{", (repository / file).read_text()), f"{step}: {function} in {file}"
        assert counter.strip("`") in counters, step
        test_file, test_name = test.strip("`").split("::")
        assert f"def {test_name}(" in (repository / test_file).read_text(), step


def thread_names(pid: int) -> set[str]:
    return {(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()}


def test_threads_have_the_names(repository: Path) -> None:
    named = {row[2] for row in life_of_one_page(repository)} - {GUESTS_OWN, *TRANSIENT}
    with Pair() as pair:
        pair.guest(pair.destination, "there", "16M", "--no-verify", waiting=True)
        pair.guest(pair.source, "here", "16M", "--rate", "1")
        with pair.source.client() as client:
            client.migrate("here", pair.destination.address, bulk=False)
            until(lambda: client.migrations()[0].state == "postcopy", "postcopy")
        daemons = (pair.source, pair.destination)
        until(lambda: named <= {name for daemon in daemons for name in thread_names(daemon.pid)}, f"threads {named}")
