"""Real guests, real daemons, real TCP: what moves, moves whole, and is moved again."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import PostcopyError
from migrate.pair import Pair, Process, wait_settled
from proto.frame import FRAME_CHUNK_BYTES

from .commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
MOVES = 3
FRAME_BYTES = 24


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def commute(pair: Pair, name: str, *memory: str, options: tuple[str, ...]) -> None:
    commuter = Commuter(pair, name, *memory, options=options)
    try:
        for _ in range(MOVES):
            status = commuter.move()
            assert sum(status.pages.values()) >= status.pages_total
            assert status.downtime_seconds is not None
            assert 0 < status.downtime_seconds < 1
            assert status.downtime_uncertainty_seconds == 0
            assert status.faults["remote"].count > 0
    finally:
        commuter.end()


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize(
    ("memory", "pattern"),
    [
        ("64M", "random"),
        ("64M:tmpfs", "zipf"),
        pytest.param("64M:hugetlb", "chase", marks=pytest.mark.requires("hugetlb")),
    ],
)
def test_busy_guest_moves_there_and_back(pair: Pair, memory: str, pattern: str, threads: str) -> None:
    """Writing flat out all the while; verified page by page after every move."""
    name = f"{memory.replace(':', '-')}-{threads}"
    commute(pair, name, memory, options=("--pattern", pattern, "--threads", threads, "--write-ratio", "0.5"))


@pytest.mark.parametrize("pattern", ["sequential", "permute"])
def test_orderly_guest_moves_there_and_back(pair: Pair, pattern: str) -> None:
    commute(pair, pattern, "16M", options=("--pattern", pattern, "--write-ratio", "1", "--zero-ratio", "0.3"))


@pytest.mark.requires("hugetlb")
def test_two_regions_of_two_page_sizes(pair: Pair) -> None:
    commute(pair, "mixed", "32M:hugetlb", "16M", "16M:tmpfs", options=("--threads", "2", "--write-ratio", "0.5"))


def allocated_bytes(guest: Process) -> int:
    """Of the guest's memory file."""
    descriptors = Path(f"/proc/{guest.pid}/fd").iterdir()
    return sum(os.stat(fd).st_blocks * 512 for fd in descriptors if "postcopy-guest" in os.readlink(fd))


def test_zero_pages_cost_no_memory_until_they_are_touched(pair: Pair) -> None:
    arrives = pair.guest(pair.destination, "sparse-there", "64M", "--no-verify", waiting=True)
    guest = pair.guest(pair.source, "sparse", "64M", "--zero-ratio", "0.9", "--rate", "400", "--write-ratio", "0")
    status = pair.move("sparse", pair.source, pair.destination)
    assert status.state == "complete", status.error
    with pair.destination.client() as client:
        there = client.status(status.id)
    assert there.pages["zero"] > 0.85 * status.pages_total
    arrived_bytes = allocated_bytes(arrives)
    content_bytes = (there.pages["urgent"] + there.pages["bulk"] + there.pages["precopy"]) * 4096
    assert content_bytes <= arrived_bytes < content_bytes + (8 << 20)  # the guest reads on, 400 pages a second
    assert arrived_bytes < 16 << 20
    assert there.bytes_moved < content_bytes + (1 << 20)
    until(lambda: allocated_bytes(arrives) >= arrived_bytes + 50 * 4096, "pages are allocated as they are touched")
    guest.kill()
    arrives.kill()


@pytest.mark.parametrize("memory", ["8M", "8M:tmpfs", pytest.param("64M:hugetlb", marks=pytest.mark.requires("hugetlb"))])
def test_without_bulk_every_page_is_asked_for_and_sent_once(pair: Pair, memory: str) -> None:
    name = f"asks-{memory.replace(':', '-')}"
    commuter = Commuter(pair, name, memory, options=("--pattern", "permute", "--zero-ratio", "0.2"))
    status = commuter.move(bulk=False)
    pages = status.pages_total
    with commuter.is_at.client() as client:
        there = client.status(status.id)
    assert there.faults["remote"].count == pages  # one fault a page,
    assert there.faults_count == pages  # and no other,
    assert status.faults_count == pages  # each asked for once,
    assert there.pages == status.pages  # answered once,
    assert there.pages["urgent"] + there.pages["zero"] == pages  # as urgent,
    assert there.pages["bulk"] == 0
    page_bytes = 2 << 20 if "hugetlb" in memory else 4096
    frames = pages * max(page_bytes // FRAME_CHUNK_BYTES, 1)  # a large page comes in pieces
    assert there.bytes_moved == status.bytes_moved == frames * FRAME_BYTES + there.pages["urgent"] * page_bytes  # and not twice
    commuter.end()


def test_several_guests_at_once(pair: Pair) -> None:
    names = ("first", "second", "third")
    arrive = [pair.guest(pair.destination, f"{name}-there", "16M", waiting=True) for name in names]
    leave = [pair.guest(pair.source, name, "16M", "--seed", str(seed)) for seed, name in enumerate(names)]
    with pair.source.client() as client:
        begun = [client.migrate(name, pair.destination.address) for name in names]
        ended = [wait_settled(client, one.id) for one in begun]
    assert [(one.state, one.guest_id) for one in ended] == [("complete", name) for name in names]
    for guest in arrive:
        assert guest.event("verified", "failed", deadline_seconds=20)["event"] == "verified"
    for guest in leave:
        guest.event("departed")
        assert guest.wait() == 0
    for guest in arrive:
        guest.kill()


def test_guest_in_postcopy_is_nobodys_source(pair: Pair) -> None:
    """Not at the daemon that it leaves, nor at the one where its memory is still arriving; afterwards it moves."""
    commuter = Commuter(pair, "slow", "1M", options=("--pattern", "permute", "--rate", "500"))
    with commuter.is_at.client() as here, commuter.goes_to.client() as there:
        begun = here.migrate(commuter.guest_id, commuter.goes_to.address, bulk=False)
        for client, guest_id, state in ((here, commuter.guest_id, "leaving"), (there, commuter.waits.name, "arriving")):
            until(lambda: here.status(begun.id).state == "postcopy", "postcopy")
            with pytest.raises(PostcopyError, match=f"expected running here as a whole, got {state}") as refusal:
                client.migrate(guest_id, pair.source.address)
            assert refusal.value.code == "guest-busy"
            answer = client._http.post("/v1/migrations", json={"guest_id": guest_id, "destination": pair.source.address})
            assert answer.status_code == 409
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:postcopy:guest-busy"
            assert answer.json()["got"] == state
        assert here.status(begun.id).state == "postcopy"
        assert wait_settled(here, begun.id).state == "complete"
    commuter.arrived()
    commuter.move()
    commuter.end()


def test_who_cannot_be_moved(pair: Pair) -> None:
    waits = pair.guest(pair.source, "waits", "4M", waiting=True)
    with pair.source.client() as client:
        with pytest.raises(PostcopyError, match="got waiting") as refusal:
            client.migrate("waits", pair.destination.address)
        assert refusal.value.code == "guest-busy"
        with pytest.raises(PostcopyError, match=r"guest nobody: expected one of .*waits.*, got no such guest") as refusal:
            client.migrate("nobody", pair.destination.address)
        assert refusal.value.code == "not-found"
    waits.kill()


def test_nobody_waits_there_or_only_one_of_another_size(pair: Pair) -> None:
    """Refused with what there is; the guest runs on here, and goes when the right one waits."""
    other = pair.guest(pair.destination, "other-size", "8M", waiting=True)
    guest = pair.guest(pair.source, "picky", "4M", "--stay")
    for got in ("other-size: 8 MiB of 4 KiB pages", "no waiting guest at all"):
        status = pair.move("picky", pair.source, pair.destination)
        assert status.state == "failed"
        assert status.error is not None
        assert (status.error.code, status.error.expected, status.error.got) == ("no-guest-fits", "4 MiB of 4 KiB pages", got)
        other.kill()
        with pair.destination.client() as client:
            until(lambda: "other-size" not in [one["id"] for one in client.guests()], "the daemon sees that it is gone")
    right = pair.guest(pair.destination, "right-size", "4M", waiting=True)
    assert pair.move("picky", pair.source, pair.destination).state == "complete"
    assert right.event("verified", "failed")["event"] == "verified"
    guest.kill()
    right.kill()


def test_moved_on_to_a_third_daemon(pair: Pair) -> None:
    third = pair.daemon("third")
    guests = [pair.guest(pair.destination, "on-2", "8M", waiting=True), pair.guest(third, "on-3", "8M", waiting=True)]
    first = pair.guest(pair.source, "on-1", "8M", "--threads", "2")
    assert pair.move("on-1", pair.source, pair.destination).state == "complete"
    assert guests[0].event("verified", "failed")["event"] == "verified"
    assert pair.move("on-2", pair.destination, third).state == "complete"
    assert guests[1].event("verified", "failed")["event"] == "verified"
    assert first.wait() == 0
    assert guests[0].wait() == 0
    guests[1].kill()
