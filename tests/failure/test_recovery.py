"""Promise P5 between two real daemons: a path that is cut after the switchover is made again; no byte is wrong."""

from collections.abc import Iterator

import pytest

from migrate.client import DaemonClient
from migrate.pair import Pair
from migrate.session import MigrationStatus
from proto.preamble import ConnectionKind

from ..path.commuter import Commuter, until
from .lossy_link import LossyLink

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


class CutMove:
    """One move of a commuter over a link of its own."""

    def __init__(self, guest: Commuter, **options: str | float | bool) -> None:
        self.guest = guest
        self.link = LossyLink(guest.goes_to.address)
        with guest.is_at.client() as client:
            self.id = client.migrate(guest.guest_id, self.link.address, **options).id

    def __enter__(self) -> "CutMove":
        return self

    def __exit__(self, *_: object) -> None:
        self.link.__exit__(None, None, None)

    def state(self) -> str:
        with self.guest.is_at.client() as client:
            return str(client.status(self.id).state)

    def reaches(self, *states: str) -> None:
        until(lambda: self.state() in states, " or ".join(states))

    def ends(self, client: DaemonClient | None = None) -> MigrationStatus:
        with self.guest.is_at.client() as client:
            status = client.status(self.id, settled_within_seconds=30)
        if status.state == "complete":
            self.guest.arrived()
        return status


def test_cut_in_postcopy(pair: Pair) -> None:
    """All connections are lost while pages come, thrice: the move goes on from what the destination lacks."""
    guest = Commuter(pair, "cut", "64M", options=("--write-ratio", "0.5"))
    with CutMove(guest, precopy="off") as move:
        for megabytes in (8, 16, 24):
            move.link.cut_at(ConnectionKind.BULK, from_source=True, after_bytes=megabytes << 20)
            assert move.link.wait_for_cut(20)
        status = move.ends()
        assert status.state == "complete"
        assert move.link.cuts >= 3
    guest.end()
