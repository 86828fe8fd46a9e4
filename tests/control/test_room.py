"""A guest that cannot be backed is refused before the switchover, with the numbers; what it says to change is what helps."""

import contextlib
import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import uffd
from migrate.guest.memory import GuestMemory
from migrate.host.hugepages import HUGEPAGE_BYTES, pool
from migrate.pair import COMMAND, DaemonProcess, Pair, Process
from proto.messages import GuestRegion, OfferedRegion, Prepare, Prepared, Ready, Refused, Round
from proto.preamble import ConnectionKind

from ..failure.fakes import FakeDestination, FakeGuest, FakeSource
from ..path.commuter import Commuter, until
from .conftest import Cli
from .obstacles import PRIVATE, memory_cgroup

pytestmark = pytest.mark.requires("uffd")
MIB = 1 << 20
MAP_NORESERVE = 0x4000
SMALL_TMPFS = 'mount -t tmpfs -o size=8M none /dev/shm; exec "$@"'


def offers(source: FakeSource, mib: int, populated_mib: int | None) -> None:
    """A guest with one region of 4 KiB pages."""
    populated_bytes = None if populated_mib is None else populated_mib * MIB
    source.regions = [OfferedRegion(size_bytes=mib * MIB, page_bytes=4096, populated_bytes=populated_bytes)]


def refused(source: FakeSource) -> Refused:
    source.begin().send(source.offered())
    refusal = source.control.refused()
    assert refusal.code == "no-room"
    assert refusal.what == "room at the destination"
    return refusal


def states(daemon: DaemonProcess) -> dict[str, str]:
    with daemon.client() as client:
        return {guest["id"]: guest["state"] for guest in client.guests()}


# ---- tmpfs ----


@pytest.mark.requires("root")
def test_tmpfs_that_is_too_small(pair: Pair, cli: Cli) -> None:
    """The operator reads it at the source, where the guest runs on; it goes when the size is what he was told to make it."""
    arguments = ["--memory", "16M:tmpfs", "--stay", "--waiting", "--id", "narrow", "--daemon", str(pair.destination.runtime_dir)]
    command = [*PRIVATE, "sh", "-euc", SMALL_TMPFS, "sh", *COMMAND, "guest", "workload"]
    there = Process("narrow", arguments, pair.directory / "narrow.log", command=command)
    try:
        there.event("waiting")
        commuter = Commuter(pair, "wide", "16M:tmpfs", there=there)
        told = cli("migrate", commuter.guest_id, pair.destination.address, "--daemon", str(pair.source.runtime_dir))
        assert told.returncode == 3
        words = " ".join(told.stdout.split())
        remedy = "mount -o remount,size=16M /dev/shm"
        assert "room at the destination: expected 16 MiB, got at most 8 MiB on the tmpfs /dev/shm" in words
        assert remedy in words
        assert states(pair.source)["wide-here"] == "running"
        assert states(pair.destination)["narrow"] == "waiting"
        subprocess.run(["nsenter", "--mount", "--target", str(there.pid), *remedy.split()], check=True, timeout=20)
        commuter.move()
        commuter.end()
    finally:
        there.kill()


# ---- memory of a cgroup: what the daemon fills is charged to its own ----


@pytest.fixture(scope="module")
def limit(pair: Pair) -> Iterator[tuple[DaemonProcess, Path]]:
    """A destination in a cgroup of 60 MiB."""
    daemon = pair.daemon("limited")
    with memory_cgroup(60 * MIB) as directory:
        try:
            (directory / "cgroup.procs").write_text(str(daemon.pid))
            yield daemon, directory
        finally:
            daemon.end()


@pytest.fixture
def waiting(limit: tuple[DaemonProcess, Path]) -> Iterator[list[FakeGuest]]:
    """Two guests of 32 MiB and one of 1 GiB."""
    with contextlib.ExitStack() as stack:
        sizes = {"first": "32M", "second": "32M", "large": "1G"}
        guests = [stack.enter_context(FakeGuest(name, "waiting", size)) for name, size in sizes.items()]
        yield [guest.attach(limit[0].runtime_dir / "guests.sock") for guest in guests]
    until(lambda: states(limit[0]) == {}, "its guests are gone")


@pytest.mark.requires("cgroup")
def test_guests_that_arrive_at_once_do_not_count_the_same_room(
    limit: tuple[DaemonProcess, Path], waiting: list[FakeGuest]
) -> None:
    """Each fits alone."""
    daemon, directory = limit
    with FakeSource(daemon.address, guest_id="first") as first, FakeSource(daemon.address, guest_id="second") as second:
        for source in (first, second):
            offers(source, 32, 32)
        assert first.offer().waiting_guest_id == "first"
        refusal = refused(second)
        assert refusal.expected == "32 MiB, beside 32 MiB that other arriving guests still fill"
        assert f"within {directory}/memory." in refusal.got
        assert "(60 MiB); echo " in refusal.got
    until(lambda: states(daemon)["first"] == "waiting", "the first has been given back")
    with FakeSource(daemon.address, guest_id="second") as second:
        offers(second, 32, 32)
        assert second.offer().waiting_guest_id == "second"


@pytest.mark.requires("cgroup")
def test_only_what_is_populated_needs_room(limit: tuple[DaemonProcess, Path], waiting: list[FakeGuest]) -> None:
    """A large guest fits by what it uses; one that does not say might use all of it."""
    daemon, _ = limit
    for populated_mib in (None, 1024, 61):
        with FakeSource(daemon.address, guest_id="large") as source:
            offers(source, 1024, populated_mib)
            assert refused(source).expected == ("61 MiB" if populated_mib == 61 else "1 GiB")
        until(lambda: states(daemon)["large"] == "waiting", "it waits on")
    with FakeSource(daemon.address, guest_id="large") as source:
        offers(source, 1024, 32)
        assert source.offer().waiting_guest_id == "large"


@pytest.mark.requires("cgroup")
@pytest.mark.parametrize("message", [Round, Prepare])
def test_guest_that_grows_is_refused_before_the_switchover(
    limit: tuple[DaemonProcess, Path], waiting: list[FakeGuest], message: type[Round] | type[Prepare]
) -> None:
    """Asked again with each round and when the switchover is next, by what is populated then."""
    daemon, _ = limit
    grows = next(guest for guest in waiting if guest.guest_id == "large")
    with FakeSource(daemon.address, guest_id="large") as source:
        offers(source, 1024, 1)
        source.precopy = message is Round
        source.attach()
        source.control.beside = grows
        if message is Round:
            source.control.send(Round(number=1, pages=1, populated_bytes=[32 * MIB]))
            source.control.send(Round(number=2, pages=1, populated_bytes=[512 * MIB]))
        else:
            source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0, populated_bytes=[512 * MIB]))
        refusal = source.control.receive(Refused, Prepared)
        assert isinstance(refusal, Refused)
        assert (refusal.code, refusal.expected) == ("no-room", "512 MiB")
    until(lambda: states(daemon)["large"] == "waiting", "it waits on")
    assert grows.told_nothing()


@pytest.mark.requires("cgroup")
def test_other_numbers_of_regions_are_refused(limit: tuple[DaemonProcess, Path], waiting: list[FakeGuest]) -> None:
    with FakeSource(limit[0].address, guest_id="first") as source:
        offers(source, 32, 0)
        source.attach()
        source.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0, populated_bytes=[0, 0]))
        refusal = source.control.refused()
        assert (refusal.code, refusal.expected, refusal.got) == ("message-invalid", "1 of them", "2")


@pytest.mark.requires("cgroup")
def test_limit_of_a_cgroup_and_the_change_that_helps(pair: Pair) -> None:
    """Version 1 has two limits, of memory alone and with swap: each is named in turn."""
    daemon = pair.daemon("narrow-cgroup")
    with memory_cgroup(48 * MIB) as directory:
        try:
            (directory / "cgroup.procs").write_text(str(daemon.pid))
            there = pair.guest(daemon, "lifted", "64M", "--stay", waiting=True)
            guest = pair.guest(pair.source, "lifts", "64M", "--stay")
            guest.event("stepped")
            refusals = 0
            while (ended := pair.move("lifts", pair.source, daemon)).error is not None:
                assert (ended.state, ended.error.code, ended.error.expected) == ("failed", "no-room", "64 MiB")
                what, _, remedy = ended.error.got.partition("; ")
                assert f" within {directory}/memory." in what
                subprocess.run(["sh", "-euc", remedy], check=True, timeout=20)
                refusals += 1
                assert refusals <= 2
            assert refusals >= 1
            assert ended.state == "complete"
            assert there.event("verified", "failed")["event"] == "verified"
            guest.kill()
            there.kill()
        finally:
            daemon.end()


# ---- huge pages ----


class Unreserved(GuestMemory):
    """Huge pages of which the guest has reserved none (MAP_NORESERVE): a file larger than the pool can be mapped so."""

    def __init__(self, pages: int) -> None:
        self.size_bytes = pages * HUGEPAGE_BYTES
        self.files = [os.memfd_create("postcopy-guest", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)]
        os.ftruncate(self.files[0], self.size_bytes)
        self._mapping = mmap.mmap(self.files[0], self.size_bytes, flags=mmap.MAP_SHARED | MAP_NORESERVE)
        self._held = ctypes.c_char.from_buffer(self._mapping)
        address = ctypes.addressof(self._held)
        region = {"guest_address": address, "size_bytes": self.size_bytes, "page_bytes": HUGEPAGE_BYTES}
        self.regions = [GuestRegion.model_validate({**region, "offset_bytes": 0, "memory_file": 0})]

    def register(self) -> int:
        userfaultfd = uffd.open_for_postcopy(hugetlb=True)
        uffd.register_for_postcopy(userfaultfd, self.regions[0].guest_address, self.size_bytes)
        return userfaultfd.detach()

    def allocated_pages(self) -> int:
        return os.fstat(self.files[0]).st_blocks * 512 // HUGEPAGE_BYTES

    def close(self) -> None:
        del self._held
        self._mapping.close()
        os.close(self.files[0])


def huge(source: FakeSource, pages: int) -> None:
    source.regions = [OfferedRegion(size_bytes=pages * HUGEPAGE_BYTES, page_bytes=HUGEPAGE_BYTES, populated_bytes=0)]


@pytest.mark.requires("hugetlb")
def test_pool_that_is_too_small(pair: Pair) -> None:
    """Nothing is taken from it: reserving is all or nothing. Populated or not, a guest needs all of its huge pages."""
    there = pool(HUGEPAGE_BYTES)
    assert there is not None
    pages = there.total + there.overcommit + 4096  # more than other suites that run beside this one add to the pool
    memory = Unreserved(pages)
    guest = FakeGuest("too-large", "waiting", memory)
    with guest, FakeSource(pair.destination.address, guest_id="too-large") as source:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        huge(source, pages)
        refusal = refused(source)
        assert refusal.expected == f"{pages} pages of 2 MiB"
        assert refusal.got.startswith(f"pages of 2 MiB: {pages} needed, ")
        assert " in the pool, " in refusal.got
        assert "; sysctl vm.nr_hugepages=" in refusal.got
        assert memory.allocated_pages() == 0
        until(lambda: states(pair.destination)["too-large"] == "waiting", "it waits on")


@pytest.mark.requires("hugetlb")
def test_huge_pages_are_here_when_a_guest_is_accepted(pair: Pair) -> None:
    """Whoever wants some afterwards: they are taken. When the migration comes to nothing they are free again, and reserved."""
    memory = Unreserved(8)
    with FakeGuest("unreserved", "waiting", memory) as guest:
        guest.attach(pair.destination.runtime_dir / "guests.sock")
        for _ in range(2):
            with FakeSource(pair.destination.address, guest_id="unreserved") as source:
                huge(source, 8)
                source.offer()
                assert memory.allocated_pages() == 8
            until(lambda: states(pair.destination)["unreserved"] == "waiting", "it has been given back")
            assert memory.allocated_pages() == 0


# ---- what the source says ----


def test_source_says_what_is_populated(pair: Pair) -> None:
    """In the offer, and again when the switchover is next: pages that its guest has never used are none."""
    with FakeGuest("counted", "running", "16M") as guest, FakeDestination() as fake, pair.source.client() as client:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        written = [os.pwrite(guest.memory.files[0], b"x", page * 4096) for page in (0, 7, 4095)]
        begun = client.migrate("counted", fake.address)
        offer = fake.accept_offer()
        assert [region.populated_bytes for region in offer.regions] == [len(written) * 4096]
        fake.send_accept()
        fake.urgent, fake.bulk = fake.greet(ConnectionKind.URGENT), fake.greet(ConnectionKind.BULK)
        os.pwrite(guest.memory.files[0], b"x", 9 * 4096)
        fake.control.beside = guest
        fake.control.send(Ready())
        assert fake.control.receive(Prepare).populated_bytes == [4 * 4096]
        fake.control.send(Refused(code="no-room", what="room", expected="this", got="that"))
        fake.control.close()
        ended = client.status(begun.id, settled_within_seconds=10)
        assert (ended.state, ended.error and ended.error.code) == ("failed", "no-room")
        assert guest.told_nothing(), "it has not been paused"
