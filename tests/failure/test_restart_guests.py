"""Promise P6 for guests of other kinds: large pages of which a part is here, and virtual CPUs that wait within the kernel.

At random moments, and with a Linux under QEMU: tests/torture/test_kills.py.
"""

from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..path.commuter import Commuter
from .killing import KilledMove

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
SLOWLY_BYTES_PER_SECOND = 10_000_000
GUESTS = [
    pytest.param(
        "workload",
        ("16M:hugetlb", "--write-ratio", "0.5", "--threads", "2", "--rate", "5000"),
        id="hugetlb",
        marks=pytest.mark.requires("hugetlb"),
    ),
    pytest.param(
        "kvm",
        ("8M", "--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1"),
        id="kvm",
        marks=pytest.mark.requires("uffd-kernel", "kvm"),
    ),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.parametrize(("kind", "options"), GUESTS)
def test_killed_in_postcopy(pair: Pair, kind: str, options: tuple[str, ...]) -> None:
    """Both on the way there, the destination alone on the way back."""
    guest = Commuter(pair, f"killed-{kind}", options[0], options=options[1:], kind=kind)
    try:
        for source in (True, False):
            with KilledMove(guest, precopy="off", bulk_limit_bytes_per_second=SLOWLY_BYTES_PER_SECOND) as move:
                move.reaches("postcopy")
                move.kill(source=source, destination=True)
                assert move.ends() == "complete"
    finally:
        guest.end()
