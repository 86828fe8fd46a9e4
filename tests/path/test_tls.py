"""Moves with TLS on every connection: the same guests, the same promises."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.bench.certificates import Authority
from migrate.pair import Pair

from .commuter import Commuter

pytestmark = pytest.mark.requires("uffd")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both daemons have one certificate: each is source and destination in turn."""
    directory: Path = tmp_path_factory.mktemp("tls")
    files = Authority(directory / "authority").issue(directory / "host", "host.test")
    with Pair(arguments=("--tls-dir", str(files), "--tls-allow", "host.test")) as pair:
        yield pair


@pytest.mark.parametrize(
    ("memory", "precopy", "streams"),
    [
        ("48M", 2, 2),
        pytest.param("64M:hugetlb", 1, 1, marks=pytest.mark.requires("hugetlb")),
    ],
)
def test_busy_guest_moves_there_and_back(pair: Pair, memory: str, precopy: str | int, streams: int) -> None:
    name = f"{memory.replace(':', '-')}-{precopy}-{streams}"
    commuter = Commuter(pair, name, memory, options=("--write-ratio", "0.3"))
    try:
        for _ in range(2):
            status = commuter.move(precopy=precopy, streams=streams)
            assert (status.streams, status.epoch) == (streams, 0)
    finally:
        commuter.end()
