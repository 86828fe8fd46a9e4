"""What a bad source does in precopy: before the switchover the guest waits again, empty; after it, it is stalled."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from migrate.pair import Pair
from proto.frame import Frame, FrameKind
from proto.messages import (
    Aborted,
    Cancel,
    Complete,
    GuestComplete,
    Prepare,
    Prepared,
    Progress,
    Quiesced,
    Refused,
    Released,
    Round,
    Running,
    Switchover,
)

from ..path.commuter import until
from .fakes import FakeGuest, FakeSource, interrupted
from .memory_child import PAGE_BYTES
from .precopy_fakes import PrecopySource, bits, content_of, mark, pages, zeroes

pytestmark = pytest.mark.requires("uffd", "wp-async", "pagemap-scan")
PAGES = 256
SMALL = ((1 << 20, PAGE_BYTES),)
HUGE = ((4 << 20, 2 << 20),)
COMPLETE = Complete(downtime_ns=None, downtime_uncertainty_ns=0, faults={}, pages={})


@pytest.fixture
def waits(pair: Pair) -> Iterator[FakeGuest]:
    with FakeGuest("waits", "waiting") as guest:
        yield guest.attach(pair.destination.runtime_dir / "guests.sock")


@pytest.fixture
def source(pair: Pair) -> Iterator[PrecopySource]:
    with PrecopySource(pair.destination.address, SMALL) as source:
        yield source


def specs(regions: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{size_bytes >> 10}K" for size_bytes, _ in regions]


def state_of(pair: Pair, guest_id: str) -> str:
    with pair.destination.client() as client:
        return str(next(one["state"] for one in client.guests() if one["id"] == guest_id))


def is_empty(guest: FakeGuest) -> bool:
    """A hole throughout; of hugetlbfs, which keeps its reservation, zero."""
    [file], [region] = guest.memory.files, guest.memory.regions
    if region.page_bytes > PAGE_BYTES:
        return not any(os.pread(file, region.size_bytes, 0))
    try:
        return os.lseek(file, 0, os.SEEK_DATA) < 0
    except OSError as error:
        return error.errno == errno.ENXIO


def waits_again(pair: Pair, guest: FakeGuest) -> None:
    """As if nothing had been tried; and the next migration takes it, and finds nothing of the one before."""
    until(lambda: state_of(pair, guest.guest_id) == "waiting", f"{guest.guest_id} waits again")
    assert is_empty(guest)
    assert guest.told_nothing()
    [region] = guest.memory.regions
    shape = (region.size_bytes, region.page_bytes)
    with PrecopySource(pair.destination.address, [shape], guest.guest_id) as source:
        source.begin_round()
        source.bulk.sendall(Frame(FrameKind.ZERO, 0, 0, region.size_bytes).encode())
        source.quiesce()
        assert is_empty(guest)
        source.control.beside = guest
        source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
        source.control.receive(Prepared)
        source.control.send(Switchover(epoch=0, state=b"next", last_step_ns=0))
        assert guest.resumed() == b"next"
        page_count = region.size_bytes // region.page_bytes
        source.bulk.sendall(Frame(FrameKind.STALE, 0, 0, region.size_bytes).encode() + bytes((page_count + 7) // 8))
        guest.connection.receive(GuestComplete)
        assert is_empty(guest)
        finish(source)


def finish(source: FakeSource) -> Complete:
    source.control.receive(Running)
    while not isinstance(message := source.control.receive(Progress, Complete), Complete):
        pass
    source.control.send(Released())
    source.control.receive_end()
    return message


def stalls(pair: Pair, guest: FakeGuest) -> None:
    """It stands where it is, told nothing more."""
    until(lambda: state_of(pair, guest.guest_id) == "lost", f"{guest.guest_id} is stalled")
    assert guest.told_nothing()


def refusal_of(source: FakeSource) -> Refused:
    while not isinstance(message := source.control.receive(Running, Progress, Refused), Refused):
        pass
    source.control.receive_end()
    return message


def test_what_a_source_says_decides(source: PrecopySource, waits: FakeGuest) -> None:
    """A good one, which the bad ones below are held against: last copies count, stale ones are lacking, others are final."""
    source.begin_round()
    source.send_all()
    source.bulk.sendall(pages(7, b"later".ljust(PAGE_BYTES)) + zeroes(8, 2) + zeroes(20, 1) + pages(20, content_of(20)))
    source.until_running(waits)
    source.bulk.sendall(bits(FrameKind.STALE, {3, 9, 255}, PAGES))
    assert source.receive_lacks(PAGES) == {3, 9, 255}
    source.bulk.sendall(pages(3, b"final".ljust(PAGE_BYTES)) + zeroes(9, 1) + pages(255, b"last".ljust(PAGE_BYTES)))
    waits.connection.receive(GuestComplete)
    wanted = [content_of(page) for page in range(PAGES)]
    wanted[3], wanted[7], wanted[255] = (one.ljust(PAGE_BYTES) for one in (b"final", b"later", b"last"))
    wanted[8] = wanted[9] = bytes(PAGE_BYTES)
    assert os.pread(waits.memory.files[0], 1 << 20, 0) == b"".join(wanted)
    assert os.lseek(waits.memory.files[0], 8 * PAGE_BYTES, os.SEEK_DATA) == 10 * PAGE_BYTES


EARLY_FRAMES = {
    "stale before mark": (bits(FrameKind.STALE, (), PAGES), "kind", "4"),
    "lacks of a source": (bits(FrameKind.LACKS, (), PAGES), "kind", "6"),
    "request of a source": (Frame(FrameKind.REQUEST, 0, 0, PAGE_BYTES).encode(), "kind", "1"),
    "mark of a region": (mark(region=1), "region", "1"),
    "mark with a page": (mark(page_index=1), "page_index", "1"),
    "mark with a length": (mark(length_bytes=PAGE_BYTES), "length_bytes", "4096"),
    "pages beyond the end": (Frame(FrameKind.PAGES, 0, PAGES - 1, 2 * PAGE_BYTES).encode(), "length_bytes", "8192"),
}


@pytest.mark.parametrize("name", EARLY_FRAMES)
def test_frame_in_a_round(pair: Pair, source: PrecopySource, waits: FakeGuest, name: str) -> None:
    sent, field, got = EARLY_FRAMES[name]
    source.begin_round()
    source.bulk.sendall(pages(5, content_of(5)) + sent)
    refusal = source.control.refused()
    assert refusal.code == "frame-invalid"
    assert refusal.what.startswith(f"frame {field} (")
    assert refusal.got == got
    waits_again(pair, waits)


HUGETLB = pytest.mark.requires("hugetlb")


@pytest.mark.parametrize(
    ("phase", "memory"),
    [
        ("before mark", "1M"),
        ("after mark", "1M"),
        ("quiesced", "1M"),
        ("prepared", "1M"),
        pytest.param("before mark", "4M:hugetlb", marks=HUGETLB),
        pytest.param("prepared", "4M:hugetlb", marks=HUGETLB),
    ],
)
def test_source_that_dies_before_the_switchover(pair: Pair, phase: str, memory: str) -> None:
    regions = SMALL if memory == "1M" else HUGE
    with FakeGuest("waits", "waiting", memory) as guest:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        with PrecopySource(pair.destination.address, regions) as source:
            source.begin_round()
            source.send_all()
            if phase == "after mark":
                source.bulk.sendall(mark())
            elif phase != "before mark":
                source.quiesce()
            if phase == "prepared":
                source.control.beside = guest
                source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
                source.control.receive(Prepared)
            until(lambda: not is_empty(guest), "precopied pages are here")
        waits_again(pair, guest)


def test_source_that_dies_before_the_stale_set(pair: Pair, waits: FakeGuest) -> None:
    with PrecopySource(pair.destination.address, SMALL) as source:
        source.until_running(waits)
    with pair.destination.client() as client:
        assert interrupted(client, source.migration_id.hex()).state == "paused"
    assert waits.told_nothing()


def test_mark_never_comes(pair: Pair, source: PrecopySource, waits: FakeGuest) -> None:
    """A round may take long: the destination waits as long as the source stays, which can still call it off."""
    source.begin_round()
    source.send_all()
    source.control.send(Cancel(reason="enough"))
    source.control.receive_end()
    waits_again(pair, waits)


NOW = Prepare(clock_offset_ns=0, clock_uncertainty_ns=0)
GONE = Switchover(epoch=0, state=b"", last_step_ns=0)
FIRST = Round(number=1, pages=0)


@pytest.mark.parametrize(("after", "said"), [("a round", NOW), ("a round", GONE), ("mark", GONE)])
def test_switchover_that_is_too_early(pair: Pair, source: PrecopySource, waits: FakeGuest, after: str, said: Prepare) -> None:
    """Without mark pages may be in flight still; and there is no switchover that nobody has prepared."""
    source.begin_round()
    if after == "mark":
        source.quiesce()
    source.control.send(said)
    refusal = source.control.refused()
    assert refusal.code == "message-unexpected"
    assert refusal.got == type(said).__name__.lower()
    waits_again(pair, waits)


def test_round_without_precopy(pair: Pair, waits: FakeGuest) -> None:
    with FakeSource(pair.destination.address, SMALL) as source:
        source.attach()
        source.control.send(FIRST)
        refusal = source.control.refused()
        assert (refusal.code, refusal.got) == ("message-unexpected", "round")
    waits_again(pair, waits)


def test_round_behind_prepare(pair: Pair, source: PrecopySource, waits: FakeGuest) -> None:
    """P4: the switchover could be on its way, so this side says that it will never resume."""
    source.prepare(waits)
    source.control.send(FIRST)
    assert "round" in source.control.receive(Aborted).reason
    assert source.control.refused().code == "message-unexpected"
    waits_again(pair, waits)


def test_round_in_postcopy(pair: Pair, source: PrecopySource, waits: FakeGuest) -> None:
    source.until_running(waits)
    source.control.send(FIRST)
    assert refusal_of(source).got == "round"
    stalls(pair, waits)


def test_rounds_told_behind_mark(source: PrecopySource, waits: FakeGuest) -> None:
    """They are another connection's: the last ones may come behind mark."""
    source.begin_round()
    source.bulk.sendall(mark())
    for number in range(2, 50):
        source.control.send(Round(number=number, pages=0))
    source.control.receive(Quiesced)
    source.control.beside = waits
    source.control.send(NOW)
    source.control.receive(Prepared)


@dataclass(frozen=True)
class BadSet:
    """What is sent as the stale set, and the field at fault."""

    frames: bytes
    field: str
    expected: str
    got: str
    regions: tuple[tuple[int, int], ...] = SMALL


STALE = FrameKind.STALE
LONG = ((128 << 20) + PAGE_BYTES, PAGE_BYTES)
BAD_SETS = {
    "a gap": BadSet(bits(STALE, (), 8) + bits(STALE, (), 8, first=9), "page_index", "8", "9"),
    "a gap at the start": BadSet(bits(STALE, (), 8, first=8), "page_index", "0", "8"),
    "one twice": BadSet(bits(STALE, (), 8) * 2, "page_index", "8", "0"),
    "beyond the end": BadSet(bits(STALE, (), PAGES + 8), "length_bytes", str(1 << 20), str((1 << 20) + 8 * PAGE_BYTES)),
    "part of a page": BadSet(Frame(STALE, 0, 0, 2048).encode(), "length_bytes", "4096", "2048"),
    "another region": BadSet(Frame(STALE, 1, 0, 1 << 20).encode(), "region", "0", "1", (*SMALL, *SMALL)),
    "too many pages": BadSet(bits(STALE, (), 32769), "length_bytes", str(128 << 20), str(LONG[0]), (LONG,)),
    "a second set": BadSet(bits(STALE, range(PAGES), PAGES) * 2, "kind", "12", "4"),
    "pages before it": BadSet(pages(0, content_of(0)), "kind", "16", "2"),
    "zeroes before it": BadSet(zeroes(0, 1), "kind", "16", "3"),
    "mark again": BadSet(mark(), "kind", "16", "5"),
    "lacks": BadSet(bits(FrameKind.LACKS, (), PAGES), "kind", "16", "6"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_stale_set(pair: Pair, name: str) -> None:
    bad = BAD_SETS[name]
    with (
        FakeGuest("waits", "waiting", *specs(bad.regions)) as guest,
        PrecopySource(pair.destination.address, bad.regions) as source,
    ):
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.begin_round()
        source.until_running(guest)
        source.bulk.sendall(bad.frames)
        refusal = refusal_of(source)
        assert refusal.code == "frame-invalid"
        assert refusal.what.startswith(f"frame {bad.field} (")
        assert (refusal.expected, refusal.got) == (bad.expected, bad.got)
        stalls(pair, guest)


def test_stale_set_that_is_cut(pair: Pair, waits: FakeGuest) -> None:
    with PrecopySource(pair.destination.address, SMALL) as source:
        source.until_running(waits)
        source.bulk.sendall(bits(STALE, (), PAGES)[:-1])
        source.bulk.close()
        with pair.destination.client() as client:
            assert interrupted(client, source.migration_id.hex()).state == "paused"
    assert waits.told_nothing()


def test_pages_behind_mark(pair: Pair, source: PrecopySource, waits: FakeGuest) -> None:
    """They are read once the guest runs: too late to call it off, and refused, for they may not be final (P2)."""
    source.begin_round()
    source.bulk.sendall(mark() + pages(0, content_of(0)))
    source.control.receive(Quiesced)
    source.quiesced = True
    source.until_running(waits)
    refusal = refusal_of(source)
    assert (refusal.code, refusal.got) == ("frame-invalid", "2")
    assert is_empty(waits)
    stalls(pair, waits)


def test_page_twice_behind_the_stale_set(pair: Pair, source: PrecopySource, waits: FakeGuest) -> None:
    source.until_running(waits)
    source.bulk.sendall(bits(STALE, {4, 5}, PAGES))
    assert source.receive_lacks(PAGES) == {4, 5}
    source.bulk.sendall(pages(4, content_of(4)) * 2)
    refusal = refusal_of(source)
    assert refusal.code == "page-duplicate"
    assert "page 4" in refusal.what
    stalls(pair, waits)


def test_bits_beyond_the_last_page(pair: Pair) -> None:
    """They are nobody's."""
    regions = ((5 * PAGE_BYTES, PAGE_BYTES),)
    with FakeGuest("waits", "waiting", *specs(regions)) as guest, PrecopySource(pair.destination.address, regions) as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        source.until_running(guest)
        source.bulk.sendall(bits(STALE, (), 5, beyond=3))
        assert source.receive_lacks(5) == set()
        guest.connection.receive(GuestComplete)


@pytest.mark.parametrize("which", ["bulk", "urgent"])
def test_data_connection_that_has_ended(pair: Pair, source: PrecopySource, waits: FakeGuest, which: str) -> None:
    """P4: this side can still say that it never resumes the guest, which then runs on where its pages are."""
    source.prepare(waits)
    getattr(source, which).close()
    source.control.send(GONE)
    while not isinstance(message := source.control.receive(Aborted, Refused), Aborted):
        pass
    assert which in message.reason or "fault loop" in message.reason
    waits_again(pair, waits)
