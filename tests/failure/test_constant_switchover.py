"""P7: nothing of what happens between pause and running grows with guest memory.

Counted, not timed (counted/sitecustomize.py): bytecodes, page faults and message bytes of both daemons and both agents, for a
guest of 16 MiB and one of 1 GiB. A walk over all pages that slips into one of them is seen.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from migrate.pair import Pair

from .mutants import Mutation, python_tree

pytestmark = pytest.mark.requires("uffd")
SIZES = ("16M", "1G")
MOVES = 4
WHO = {"source", "destination", "guest_pause", "guest_resume"}
MEASURES = ("bytecodes", "faults", "message_bytes")
SLACK = {"bytecodes": 500, "faults": 16, "message_bytes": 16}
"""Far below one for each of the 258048 pages that one guest has more, or for each 4096 bytes of a map of them."""
GUEST_OPTIONS = ("--stay", "--no-verify", "--zero-ratio", "1", "--write-ratio", "0", "--rate", "100")

Counts = dict[str, dict[str, int]]


def counted(monkeypatch: pytest.MonkeyPatch, directory: Path, tree: Path | None = None) -> dict[str, Counts]:
    """By size: the least that each of WHO needed in any of the moves."""
    path = directory / "counts"
    counting = Path(__file__).parent / "counted"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(one) for one in (counting, tree) if one is not None))
    monkeypatch.setenv("POSTCOPY_COUNTS", str(path))
    least: dict[str, Counts] = {}
    with Pair() as pair:
        for size in SIZES:
            path.write_text("")
            there = pair.guest(pair.destination, f"there-{size}", size, *GUEST_OPTIONS, waiting=True)
            here = pair.guest(pair.source, f"here-{size}", size, *GUEST_OPTIONS)
            for _ in range(MOVES // 2):
                assert pair.move(here.name, pair.source, pair.destination).state == "complete"
                here.event("waiting")
                assert pair.move(there.name, pair.destination, pair.source).state == "complete"
                there.event("waiting")
            least[size] = least_of(path)
            here.kill()
            there.kill()
    return least


def least_of(path: Path) -> Counts:
    seen: defaultdict[str, list[dict[str, int]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        count = json.loads(line)
        seen[count["what"]].append(count)
    assert {who: len(counts) for who, counts in seen.items()} == dict.fromkeys(WHO, MOVES)
    return {who: {measure: min(count[measure] for count in counts) for measure in MEASURES} for who, counts in seen.items()}


def grown(least: dict[str, Counts]) -> list[tuple[str, str]]:
    small, large = (least[size] for size in SIZES)
    return [(who, measure) for who in WHO for measure in MEASURES if large[who][measure] > small[who][measure] + SLACK[measure]]


def test_switchover_of_a_large_guest_takes_what_a_small_one_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    least = counted(monkeypatch, tmp_path)
    assert grown(least) == []
    assert least["1G"]["source"]["message_bytes"] > 100  # so it is counted
    assert least["1G"]["guest_resume"]["bytecodes"] > 100


RECORDED = "            self.advance(Event.SWITCHOVER_RECORDED)\n"
RESUMED = "            self.advance(Event.RESUME_RECORDED)\n"
LOADED = "        self.workload.load(state)\n"
WALKS = {
    "a walk over all pages at the source": (
        Mutation("migrate/source.py", RECORDED, f"{RECORDED}            for _ in range(self.pages_total): pass\n"),
        ("source", "bytecodes"),
    ),
    "a map of all pages at the destination": (
        Mutation("migrate/destination.py", RESUMED, f'{RESUMED}            self.map = b"x" * (16 * self.pages_total)\n'),
        ("destination", "faults"),
    ),
    "a walk over all pages at the guest": (
        Mutation(
            "migrate/guests/workload/guest.py",
            LOADED,
            f"        for _ in range(self._options.memory[0].size_bytes >> 12): pass\n{LOADED}",
        ),
        ("guest_resume", "bytecodes"),
    ),
}


@pytest.mark.parametrize("walk", WALKS)
def test_growth_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, walk: str) -> None:
    mutation, where = WALKS[walk]
    least = counted(monkeypatch, tmp_path, python_tree(tmp_path / "tree", mutation))
    assert where in grown(least)
