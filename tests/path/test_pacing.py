"""Bulk is paced below what is in its way, follows it, and keeps to the operator's limit; answers are never kept waiting.

How fast and how exactly: `postcopy bench shaped`. The controller alone, without a clock: tests/path/pacer_main.c.
"""

import time
from collections.abc import Iterator

import pytest

from migrate.bench.shaped import LinkedPair
from migrate.bench.shaped_link import MBIT, ShapedLink
from migrate.errors import PostcopyError
from migrate.pair import Pair
from migrate.session import MigrationStatus

from .commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
LIMIT = 8 << 20
PART = LIMIT // 4
LEAD_BYTES = (1 << 20) + (256 << 10)
"""Pages are counted a run of 1 MiB before they go, and the first moment is free."""


@pytest.fixture(scope="module")
def commuter() -> Iterator[Commuter]:
    with Pair() as pair:
        yield Commuter(pair, "limited", "16M", options=("--rate", "2000", "--write-ratio", "0.1"))


def limited_bytes(status: MigrationStatus) -> int:
    return 4096 * (status.pages["bulk"] + status.pages["precopy"])


@pytest.mark.parametrize("precopy", ["off", "auto"])
def test_limit_binds_bulk_and_precopy_and_changes_while_they_run(commuter: Commuter, precopy: str) -> None:
    with commuter.is_at.client() as client:
        began = time.monotonic()
        begun = client.migrate(commuter.guest_id, commuter.goes_to.address, precopy=precopy, bulk_limit_bytes_per_second=LIMIT)
        assert begun.bulk_limit_bytes_per_second == LIMIT
        until(lambda: limited_bytes(client.status(begun.id)) > PART, "a part has gone")
        now = client.status(begun.id)
        assert limited_bytes(now) <= LIMIT * (time.monotonic() - began) + LEAD_BYTES
        assert now.bulk_pace_bytes_per_second is not None
        assert now.bulk_pace_bytes_per_second <= LIMIT
        assert client.limit(begun.id, LIMIT // 2).bulk_limit_bytes_per_second == LIMIT // 2
        began, before_bytes = time.monotonic(), limited_bytes(client.status(begun.id))
        until(lambda: limited_bytes(client.status(begun.id)) > before_bytes + PART, "another part has gone")
        assert limited_bytes(client.status(begun.id)) - before_bytes <= LIMIT / 2 * (time.monotonic() - began) + LEAD_BYTES
        assert not client.status(begun.id).settled
        assert client.limit(begun.id, None).bulk_limit_bytes_per_second is None
        ended = client.status(begun.id, settled_within_seconds=30)
        assert (ended.state, ended.bulk_pace_bytes_per_second) == ("complete", None)
        with pytest.raises(PostcopyError, match="expected one under way, got complete"):
            client.limit(begun.id, LIMIT)
    commuter.arrived()


def test_answers_are_not_limited(commuter: Commuter) -> None:
    """Bulk all but stands still; what the guest touches comes, and with it more than the limit lets bulk send."""
    with commuter.is_at.client() as client:
        begun = client.migrate(commuter.guest_id, commuter.goes_to.address, precopy="off", bulk_limit_bytes_per_second=1 << 10)
        until(lambda: client.status(begun.id).pages["urgent"] > 400, "answers")
        now = client.status(begun.id)
        assert now.pages["bulk"] * 4096 < LEAD_BYTES < now.pages["urgent"] * 4096
        client.limit(begun.id, None)
        assert client.status(begun.id, settled_within_seconds=30).state == "complete"
    commuter.arrived()


def test_only_the_source_is_told(commuter: Commuter) -> None:
    with commuter.is_at.client() as here, commuter.goes_to.client() as there:
        begun = here.migrate(commuter.guest_id, commuter.goes_to.address, bulk_limit_bytes_per_second=LIMIT)
        until(lambda: here.status(begun.id).pages["precopy"] > 0, "precopy")
        with pytest.raises(PostcopyError, match="expected to be limited at the source, got destination"):
            there.limit(begun.id, None)
        here.limit(begun.id, None)
        assert here.status(begun.id, settled_within_seconds=30).state == "complete"
    commuter.arrived()


@pytest.mark.requires("netns", "root")
def test_bottleneck_is_found_and_followed() -> None:
    """Nobody tells the daemons its rate, nor that it changes. In precopy: that can be cancelled when enough has been seen."""
    fast, slow = 400 * MBIT, 100 * MBIT
    with ShapedLink(fast) as link, LinkedPair(link, "--congestion-control", "reno") as pair:
        commuter = Commuter(pair, "follows", "192M", options=("--rate", "200", "--no-verify"))
        with pair.source.client() as client:
            begun = client.migrate(commuter.guest_id, pair.destination.address)

            def goes_at(least: float, most: float) -> bool:
                now = client.status(begun.id)
                assert not now.settled
                return least <= (now.bulk_pace_bytes_per_second or 0) <= most

            until(lambda: goes_at(0.5 * fast, fast), "just below the link's rate", 15)
            link.reshape(slow)
            until(lambda: goes_at(0.5 * slow, slow), "the link has become slower", 15)
            link.reshape(fast)
            until(lambda: goes_at(0.5 * fast, fast), "the link has become faster", 15)
            client.cancel(begun.id)
            assert client.status(begun.id, settled_within_seconds=10).state == "cancelled"
