"""What a bad guest says to its daemon: refused by name, the connection closed, its descriptors let go, all others untouched."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest

from migrate.guest._guest import ffi as guest_ffi
from migrate.guest._guest import lib as guest_lib
from migrate.pair import Pair
from migrate.uffd import Feature, Userfaultfd
from migrate.uffd._uffd import ffi, lib
from proto.messages import GuestPrepared, Pause, Running, Welcome, encode

from ..path.commuter import Commuter, until
from .fakes import FakeGuest, PeerEndedError, framed, oversized

pytestmark = [pytest.mark.requires("uffd"), pytest.mark.usefixtures("unharmed")]
HUGE_BYTES = 2 << 20
SHMEM = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM


@dataclass
class Lie:
    """What is sent in place of the truth."""

    data: bytes
    descriptors: Sequence[int]


def plain_userfaultfd(features: Feature) -> int:
    """As a guest opens it that does not know what this is about."""
    return Userfaultfd.open(features, user_mode_only=True).detach()


def anonymous_memory(guest: FakeGuest) -> Lie:
    address = guest_lib.mapping_reserve(1 << 20)  # private and anonymous: minor faults do not exist there
    other = plain_userfaultfd(SHMEM)
    hello = guest.hello(regions=[guest.region(guest_address=int(guest_ffi.cast("uintptr_t", address)))])
    return Lie(encode(hello), [guest.memory.files[0], other])


def without_api(guest: FakeGuest) -> Lie:
    opened = ffi.new("struct uffd_opened *")
    lib.uffd_open(1, opened)
    assert opened.fd >= 0
    return Lie(encode(guest.hello()), [guest.memory.files[0], opened.fd])


def with_events(guest: FakeGuest, events: Feature) -> Lie:
    other = plain_userfaultfd(SHMEM | events)
    return Lie(encode(guest.hello()), [guest.memory.files[0], other])


def reopened(descriptor: int, flags: int) -> int:
    """The same file by a descriptor that can do less."""
    return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)


def file_of(directory: str, size_bytes: int = 1 << 20) -> int:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(size_bytes)
        return os.dup(file.fileno())


def two_regions(guest: FakeGuest, **second: int) -> Lie:
    half = 512 << 10
    behind = {"guest_address": guest.memory.regions[0].guest_address + half, "offset_bytes": half, **second}
    regions = [guest.region(size_bytes=half), guest.region(size_bytes=half, **behind)]
    return Lie(encode(guest.hello(regions=regions)), guest.descriptors())


def raw_hello(guest: FakeGuest, **changed: object) -> bytes:
    return framed(msgpack.packb({**guest.hello().model_dump(), **changed}))


def not_on_tmpfs(guest: FakeGuest, directory: Path) -> Lie:
    return Lie(encode(guest.hello()), [file_of(str(directory)), guest.userfaultfd])


# name -> what is sent, the code of the refusal, and words in what it names, expected and got
LIES: dict[str, tuple[Callable[[FakeGuest], Lie], str, tuple[str, ...]]] = {
    "no descriptors": (lambda g: Lie(encode(g.hello()), []), "guest-refused", ("2: 1 memory files and a userfaultfd", "got 0")),
    "no userfaultfd": (lambda g: Lie(encode(g.hello()), g.memory.files), "guest-refused", ("expected 2", "got 1")),
    "one too many": (lambda g: Lie(encode(g.hello()), [*g.descriptors(), 0]), "guest-refused", ("expected 2", "got 3")),
    "seventy": (lambda g: Lie(encode(g.hello()), g.memory.files * 70), "guest-refused", ("descriptors", "<= 66", "more")),
    "a file as userfaultfd": (
        lambda g: Lie(encode(g.hello()), [g.memory.files[0], g.memory.files[0]]),
        "userfaultfd-refused",
        ("UFFDIO_REGISTER", "userfaultfd", "ENOTTY"),
    ),
    "anonymous memory": (anonymous_memory, "userfaultfd-refused", ("MISSING|MINOR", "shmem or hugetlbfs", "EINVAL")),
    "no UFFDIO_API": (without_api, "userfaultfd-refused", ("MISSING|MINOR", "minor faults", "EINVAL")),
    "events": (
        lambda g: with_events(g, Feature.EVENT_REMOVE),
        "userfaultfd-refused",
        ("userfaultfd features", "no events", f"got {Feature.EVENT_REMOVE:#x}"),
    ),
    "a userfaultfd by its path alone": (
        lambda g: Lie(encode(g.hello()), [g.memory.files[0], reopened(g.userfaultfd, os.O_PATH)]),
        "guest-refused",
        ("descriptors passed with hello", "usable ones", "Bad file descriptor"),
    ),
    "memory to read": (
        lambda g: Lie(encode(g.hello()), [reopened(g.memory.files[0], os.O_RDONLY), g.userfaultfd]),
        "guest-refused",
        ("region 0 memory file", "open for reading and writing"),
    ),
    "memory by its path alone": (
        lambda g: Lie(encode(g.hello()), [reopened(g.memory.files[0], os.O_PATH), g.userfaultfd]),
        "guest-refused",
        ("region 0 memory file", "open for reading and writing"),
    ),
    "another range": (
        lambda g: Lie(encode(g.hello(regions=[g.region(guest_address=4096)])), g.descriptors()),
        "userfaultfd-refused",
        ("at 0x1000",),
    ),
    "a pipe as memory": (
        lambda g: Lie(encode(g.hello()), [os.pipe()[0], g.userfaultfd]),
        "guest-refused",
        ("region 0 memory file", "tmpfs (memfd) or hugetlbfs", "filesystem 0x"),
    ),
    "beyond its file": (
        lambda g: Lie(encode(g.hello(regions=[g.region(size_bytes=2 << 20)])), g.descriptors()),
        "guest-refused",
        ("region 0 end", "<= 1048576", "2097152"),
    ),
    "offset beyond its file": (
        lambda g: Lie(encode(g.hello(regions=[g.region(offset_bytes=4096)])), g.descriptors()),
        "guest-refused",
        ("region 0 end", "<= 1048576", "1052672"),
    ),
    "huge pages of a memfd": (
        lambda g: Lie(encode(g.hello(regions=[g.region(page_bytes=HUGE_BYTES, size_bytes=HUGE_BYTES)])), g.descriptors()),
        "guest-refused",
        ("region 0 page_bytes", "4096", str(HUGE_BYTES)),
    ),
    "pages of 8 KiB": (
        lambda g: Lie(raw_hello(g, regions=[{**g.region().model_dump(), "page_bytes": 8192}]), g.descriptors()),
        "message-invalid",
        ("page_bytes", "4096", "8192"),
    ),
    "addresses that overlap": (
        lambda g: two_regions(g, guest_address=g.memory.regions[0].guest_address + 4096),
        "guest-refused",
        ("addresses that do not overlap", "twice"),
    ),
    "one part of a file twice": (
        lambda g: two_regions(g, offset_bytes=0),
        "guest-refused",
        ("ranges of a memory file that do not overlap", "0 twice"),
    ),
    "a file that is not passed": (
        lambda g: Lie(raw_hello(g, regions=[{**g.region().model_dump(), "memory_file": 1}]), g.descriptors()),
        "message-invalid",
        ("memory_file < memory_files (1)",),
    ),
    "another major version": (lambda g: Lie(encode(g.hello(major=2)), g.descriptors()), "version-unsupported", ("1.x", "2.0")),
    "not a hello": (lambda g: Lie(encode(Running(epoch=0)), g.descriptors()), "message-unexpected", ("hello", "Running")),
    "a daemon's message": (
        lambda g: Lie(encode(Welcome(major=1, minor=0, software="")), []),
        "message-unexpected",
        ("hello", "Welcome"),
    ),
    "oversized": (lambda g: Lie(oversized(), []), "message-too-large", ("1048576", "1048577")),
    "garbage": (lambda g: Lie(framed(b"\xc1"), []), "message-invalid", ("a msgpack map",)),
    "an unknown field": (lambda g: Lie(raw_hello(g, nice="yes"), g.descriptors()), "message-invalid", ("nice", "yes")),
    "an unknown role": (lambda g: Lie(raw_hello(g, role="king"), g.descriptors()), "message-invalid", ("role", "king")),
    "no regions": (lambda g: Lie(raw_hello(g, regions=[]), g.descriptors()), "message-invalid", ("regions", "an array of 0")),
}


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    with FakeGuest("liar", "waiting") as guest:
        yield guest


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def check_refused(pair: Pair, guest: FakeGuest, lie: Lie, code: str, words: Sequence[str]) -> None:
    before = open_descriptors(pair.destination.pid)
    guest.connect(pair.destination.runtime_dir / "guests.sock")
    guest.send(lie.data, lie.descriptors)
    refusal = guest.connection.refused()
    assert refusal.code == code
    text = f"{refusal.what}: expected {refusal.expected}, got {refusal.got}"
    for word in words:
        assert word in text
    assert any(  # the first of its kind within ten seconds
        "guest refused" in line and code in line and refusal.what[:30] in line for line in pair.destination.log().splitlines()
    )
    with pair.destination.client() as client:
        assert "liar" not in [one["id"] for one in client.guests()]
    until(lambda: open_descriptors(pair.destination.pid) <= before, "what was passed is closed")


@pytest.mark.parametrize("name", LIES)
def test_guest_is_refused(pair: Pair, guest: FakeGuest, name: str) -> None:
    lie_of, code, words = LIES[name]
    check_refused(pair, guest, lie_of(guest), code, words)


def test_file_that_is_not_in_memory(pair: Pair, guest: FakeGuest, repository: Path) -> None:
    lie = not_on_tmpfs(guest, repository)
    check_refused(pair, guest, lie, "guest-refused", ("region 0 memory file", "tmpfs (memfd) or hugetlbfs", "filesystem 0x"))


@pytest.mark.requires("hugetlb")
def test_small_pages_of_hugetlbfs(pair: Pair, guest: FakeGuest) -> None:
    file = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(file, HUGE_BYTES)
    lie = Lie(encode(guest.hello()), [file, guest.userfaultfd])
    check_refused(pair, guest, lie, "guest-refused", ("region 0 page_bytes", str(HUGE_BYTES), "4096"))
    os.close(file)


@pytest.mark.requires("root")
def test_events_of_forks(pair: Pair, guest: FakeGuest) -> None:
    """Only CAP_SYS_PTRACE may ask for these: whoever reads them gets a descriptor in the child's place."""
    words = ("userfaultfd features", "no events", f"got {Feature.EVENT_FORK:#x}")
    check_refused(pair, guest, with_events(guest, Feature.EVENT_FORK), "userfaultfd-refused", words)


def test_name_that_is_taken(pair: Pair, commuter: Commuter) -> None:
    with FakeGuest(commuter.waits.name, "waiting") as guest:
        guest.connect(commuter.goes_to.runtime_dir / "guests.sock")
        guest.send(encode(guest.hello()), guest.descriptors())
        refusal = guest.connection.refused()
    assert refusal.code == "guest-id-taken"
    assert refusal.got == commuter.waits.name


@pytest.mark.parametrize("message", [Running(epoch=0), GuestPrepared(), Pause(deadline_ms=1)], ids=lambda message: message.type)
def test_answer_to_nothing(pair: Pair, guest: FakeGuest, message: Running | GuestPrepared | Pause) -> None:
    """A guest that is known already says what nobody asked for: it is let go, by name."""
    guest.attach(pair.destination.runtime_dir / "guests.sock")
    guest.connection.send(message)
    refusal = guest.connection.refused()
    assert refusal.code == "message-unexpected"
    assert refusal.expected == "nothing now"


def test_guest_that_says_nothing_and_goes(pair: Pair, guest: FakeGuest) -> None:
    before = open_descriptors(pair.destination.pid)
    guest.connect(pair.destination.runtime_dir / "guests.sock")
    guest.send(encode(guest.hello())[:7], guest.descriptors())  # in the middle of a message, descriptors passed
    guest.connection.close()
    until(lambda: open_descriptors(pair.destination.pid) <= before, "what was passed is closed")
    with pytest.raises((PeerEndedError, OSError)):
        guest.connection.receive(Welcome)
