"""What a daemon says to its service manager, heard by one of our own: descriptors that are kept, given back and let go."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from migrate import notify, pair, switchover
from migrate.client import DaemonClient
from migrate.daemon import Daemon
from migrate.dataplane import MemoryRegion
from migrate.descriptor_store import DescriptorStore, StoredName
from migrate.notify import Told
from migrate.pair import Pair, Process
from migrate.record import FOLDER
from proto.messages import Prepare, Prepared, Running, Switchover
from proto.states import Role

from ..failure.fakes import FakeDestination, FakeGuest, FakeSource
from ..path.commuter import Commuter, until
from .service_manager import DEADLINE_SECONDS, ServiceManager, same_file

MIGRATION = "0123456789abcdef" * 2
# Becomes the daemon, with the descriptors that it is handed at 3, 4, … and the variables that say so, as a manager starts it.
SECOND_LIFE = """
import fcntl, os, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    _, handed, _, _ = socket.recv_fds(sock, 1, 64)
for descriptor in handed:  # recv_fds of Python 3.11 passes no flags on
    os.set_inheritable(descriptor, False)
for number, descriptor in enumerate([fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 100) for one in handed], 3):
    os.dup2(descriptor, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        yield manager


# --- the words ------------------------------------------------------------------------------------------------------


def test_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceManager(f"@postcopy-test-{os.getpid()}") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
        assert notify.notify("READY=1") is Told.YES
        assert manager.receive() == {"READY": "1"}


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", Told.NOBODY),
        ("/nowhere/at/all", Told.NOBODY),
        ("@nobody-listens", Told.NOBODY),
        ("x" * 300, Told.NO),
        (".", Told.NOBODY),
    ],
    ids=["unset", "no-such-path", "abstract", "too-long", "no-socket"],
)
def test_manager_that_is_not_there(monkeypatch: pytest.MonkeyPatch, address: str, told: Told) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify.notify("READY=1") is told


def test_full_queue_does_not_block(manager: ServiceManager) -> None:
    assert manager.fill_queue() > 0
    assert notify.notify("WATCHDOG=1") is Told.LATER
    manager.take_what_is_there()
    assert notify.notify("WATCHDOG=1") is Told.YES


def test_stored_descriptor_is_the_one(manager: ServiceManager) -> None:
    descriptor = os.memfd_create("kept")
    assert notify.store("a name", descriptor) is Told.YES
    assert manager.receive() == {"FDSTORE": "1", "FDNAME": "a name", "FDPOLL": "0"}
    assert same_file(manager.stored["a name"], descriptor)
    os.close(descriptor)
    assert notify.unstore("a name") is Told.YES
    assert manager.receive() == {"FDSTOREREMOVE": "1", "FDNAME": "a name"}
    assert notify.store("not open", 1 << 20) is Told.NO


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("3000000", None, 1.5),
        ("3000000", str(os.getpid()), 1.5),
        ("3000000", "1", None),
        ("", None, None),
        ("0", None, None),
        ("soon", None, None),
    ],
    ids=["whoever reads", "ours", "another's", "none", "zero", "no number"],
)
def test_watchdog_period(
    manager: ServiceManager, monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, seconds: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert notify.watchdog_period_seconds() == seconds
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert notify.watchdog_period_seconds() is None


def test_handed_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is meant for this process; closed at exec; the variables are gone."""
    kept = os.memfd_create("kept")
    first, second = os.dup2(kept, 200), os.dup2(kept, 201)
    os.close(kept)
    monkeypatch.setattr(notify, "FIRST_DESCRIPTOR", first)
    for pid in ("1", "", str(os.getpid())):
        given = {"LISTEN_PID": pid, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one", "ELSE": "stays"}
        taken = notify.take_descriptors(given)
        assert given == {"ELSE": "stays"}
        assert taken == ([("one", first), ("unknown", second)] if pid == str(os.getpid()) else [])
        assert os.get_inheritable(first) is (not taken)
    os.close(second)
    beyond = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "999999", "LISTEN_FDNAMES": "one:two"}
    assert notify.take_descriptors(beyond)[0] == ("one", first)
    for number in ("", "-1", "two", "9" * 5000):
        assert notify.take_descriptors({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number}) == []
    os.close(first)


def test_names_are_what_a_manager_takes() -> None:
    longest = StoredName(Role.DESTINATION, MIGRATION, "userfaultfd", "g" * 64)
    assert len(str(longest)) <= 122 <= 255
    assert str(longest).isascii()
    assert ":" not in str(longest)
    assert StoredName.parse(str(longest)) == longest
    for other in ("", "unknown", "postcopy.socket", str(longest) + ":", f"source.{MIGRATION}.memory-0.", "source.0.memory-0.web"):
        assert StoredName.parse(other) is None


# --- the store against a manager that is slow -----------------------------------------------------------------------


@pytest.fixture
def memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("guest")
    yield descriptor
    os.close(descriptor)


def link_with(descriptor: int) -> SimpleNamespace:
    region = MemoryRegion(guest_address=0, size_bytes=4096, offset_bytes=0, page_bytes=4096, memory_fd=descriptor)
    return SimpleNamespace(guest_id="web", regions=[region, region], userfaultfd=-1)


def test_removal_waits_for_room_and_comes_before_what_is_stored_next(manager: ServiceManager, memory_file: int) -> None:
    """Out of order, the manager would ignore the file that it has, and then drop it."""

    async def scenario() -> None:
        store, link = DescriptorStore(), link_with(memory_file)
        await store.save(Role.SOURCE, MIGRATION, link)
        manager.receive()
        assert len(manager.stored) == 1  # two regions, one file
        manager.fill_queue()
        saving = asyncio.ensure_future(store.save(Role.SOURCE, "f" * 32, link))  # the same guest's next migration
        await asyncio.sleep(0)
        assert not saving.done()
        manager.take_what_is_there()
        await saving

    asyncio.run(scenario())
    manager.take_what_is_there()
    told = [message for message in manager.messages if "FDNAME" in message]
    assert [("FDSTORE" in message, message["FDNAME"][7:15]) for message in told] == [
        (True, "01234567"),
        (False, "01234567"),
        (True, "ffffffff"),
    ]
    assert list(manager.stored) == [f"source.{'f' * 32}.memory-0.web"]


def test_manager_that_takes_nothing_does_not_hold_a_migration_up(
    manager: ServiceManager, memory_file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.descriptor_store.STORE_SECONDS_MAX", 0.05)
    manager.fill_queue()
    asyncio.run(asyncio.wait_for(DescriptorStore().save(Role.SOURCE, MIGRATION, link_with(memory_file)), 5))
    manager.take_what_is_there()
    assert manager.stored == {}


def test_without_a_manager_nothing_is_done(memory_file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr("migrate.descriptor_store.store", lambda name, descriptor: pytest.fail("stored"))
    asyncio.run(DescriptorStore().save(Role.SOURCE, MIGRATION, link_with(memory_file)))


def test_no_watchdog_message_within_a_switchover(
    manager: ServiceManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switchover, "WAIT_SECONDS_MAX", 30.0)

    async def scenario() -> None:
        daemon = Daemon("source", tmp_path / "runtime", listen_at=None, metrics_at=None, insecure=False)
        async with daemon.quiet:
            alive = asyncio.ensure_future(daemon._say_alive(3600))
            for _ in range(10):
                await asyncio.sleep(0)
            with pytest.raises(BlockingIOError):
                manager.receive(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert manager.receive(0) == {"WATCHDOG": "1"}
        alive.cancel()

    asyncio.run(scenario())


# --- daemons --------------------------------------------------------------------------------------------------------


class ManagedDaemon(Process):
    """One that is ready, under a manager of the test's."""

    def __init__(self, directory: Path, manager: ServiceManager, role: str = "source", **environment: str) -> None:
        self.runtime_dir = directory / "runtime"
        options = ["--runtime-dir", str(self.runtime_dir), "--metrics", "off"]
        options += ["--listen", "127.0.0.1:0"] if role == "destination" else []
        super().__init__("managed", [role, *options], directory / "log", {"NOTIFY_SOCKET": manager.address, **environment})
        manager.until_told(READY="1")

    def guest_memory_files(self) -> int:
        """How many of its descriptors are a guest's memory."""
        links = [os.readlink(entry) for entry in Path(f"/proc/{self.pid}/fd").iterdir() if entry.is_symlink()]
        return sum("memfd:postcopy-guest" in link for link in links)


def test_watchdog_of_a_daemon(manager: ServiceManager, tmp_path: Path) -> None:
    daemon = ManagedDaemon(tmp_path, manager, WATCHDOG_USEC="100000")
    try:
        manager.until(lambda: manager.messages.count({"WATCHDOG": "1"}) >= 3, "it is alive, again and again")
    finally:
        daemon.kill()


def test_reload_of_a_daemon(manager: ServiceManager, tmp_path: Path) -> None:
    """Begun behind the manager's request and over when it is ready: so sd_notify(3) has it. Without TLS nothing is read."""
    daemon = ManagedDaemon(tmp_path, manager)
    try:
        asked_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        manager.messages.clear()
        daemon.signal(signal.SIGHUP)
        manager.until(lambda: len(manager.messages) == 2, "begun, over")
        assert manager.messages[0].pop("RELOADING") == "1"
        assert int(manager.messages[0].pop("MONOTONIC_USEC")) >= asked_us
        assert manager.messages == [{}, {"READY": "1"}]
        assert "nothing to read anew" in daemon.log()
    finally:
        daemon.kill()


@pytest.mark.requires("uffd")
def test_both_daemons_store_what_their_guest_hangs_on_until_it_is_whole() -> None:
    with (
        Pair() as two,
        ServiceManager(two.directory / "source.notify") as here,
        ServiceManager(two.directory / "destination.notify") as there,
    ):
        guest = Commuter(two, "kept", "2M", "1M")
        migration_id = guest.move().id
        here.until(lambda: len(here.messages) >= 4, "stored and removed")
        there.until(lambda: len(there.messages) >= 6, "stored and removed")
        files = [f"source.{migration_id}.memory-{index}.kept-here" for index in (0, 1)]
        assert told_by(here) == [("FDSTORE", name) for name in files] + [("FDSTOREREMOVE", name) for name in files]
        parts = [f"destination.{migration_id}.{part}.kept-there" for part in ("memory-0", "memory-1", "userfaultfd")]
        assert told_by(there) == [("FDSTORE", name) for name in parts] + [("FDSTOREREMOVE", name) for name in parts]
        assert here.stored == there.stored == {}


def told_by(manager: ServiceManager) -> list[tuple[str, str]]:
    return [(next(iter(message)), message["FDNAME"]) for message in manager.messages]


@pytest.mark.requires("uffd")
@pytest.mark.parametrize("goes_first", ["source", "guest"])
def test_destination_stores_memory_and_userfaultfd_and_drops_them_with_its_guest(
    manager: ServiceManager, tmp_path: Path, goes_first: str
) -> None:
    daemon = ManagedDaemon(tmp_path, manager, "destination")
    address = json.loads((daemon.runtime_dir / "daemon.json").read_text())["migration_address"]
    try:
        with FakeGuest("waits", "waiting") as guest, FakeSource(address) as fake:
            guest.attach(daemon.runtime_dir / "guests.sock")
            fake.attach()
            manager.until(lambda: len(manager.stored) == 2, "memory and userfaultfd")  # before prepare, so before any pause
            names = {name.split(".")[2]: descriptor for name, descriptor in manager.stored.items()}
            assert same_file(names["memory-0"], guest.memory.files[0])
            assert os.readlink(f"/proc/self/fd/{names['userfaultfd']}") == "anon_inode:[userfaultfd]"
            fake.control.beside = guest
            fake.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
            fake.control.receive(Prepared)
            fake.control.send(Switchover(epoch=0, state=b"a state", last_step_ns=0))
            assert guest.resumed() == b"a state"
            fake.control.receive(Running)
            if goes_first == "source":
                fake.control.close()
                until(lambda: "migration paused" in daemon.log(), "paused")
                manager.take_what_is_there()
                assert len(manager.stored) == 2  # it may still be saved
            else:
                guest.connection.close()
                manager.until(lambda: not manager.stored, "its guest is gone")
        manager.until(lambda: not manager.stored, "nobody is left to whom pages could come")
        until(lambda: daemon.guest_memory_files() == 0, "nor does the daemon keep them")
    finally:
        daemon.kill()


@pytest.mark.requires("uffd")
def test_failed_migration_leaves_nothing_stored(manager: ServiceManager, tmp_path: Path) -> None:
    daemon = ManagedDaemon(tmp_path, manager)
    try:
        with FakeGuest("stays", "running") as guest, FakeDestination() as fake:
            guest.attach(daemon.runtime_dir / "guests.sock")
            start_migration(daemon, "stays", fake.address)
            fake.prepare(guest)
            manager.until(lambda: len(manager.stored) == 1, "stored")
            fake.control.close()
            manager.until(lambda: not manager.stored, "removed")
    finally:
        daemon.kill()


@pytest.mark.requires("uffd")
def test_memory_outlives_guest_and_daemon_and_is_held_by_its_next_life(manager: ServiceManager, tmp_path: Path) -> None:
    with FakeGuest("web", "running") as guest:
        os.pwrite(guest.memory.files[0], b"the only copy", 8192)
        first = ManagedDaemon(tmp_path, manager)
        try:
            with FakeDestination() as fake:
                guest.attach(first.runtime_dir / "guests.sock")
                start_migration(first, "web", fake.address)
                fake.prepare(guest)  # the guest has not been paused yet
                manager.take_what_is_there()
                [(name, descriptor)] = manager.stored.items()
                assert same_file(descriptor, guest.memory.files[0])
                fake.until_switchover_of(guest)
        finally:
            first.kill()
        kept = os.dup(guest.memory.files[0])  # to attach with once more, below
    manager.messages.clear()
    shutil.rmtree(tmp_path / "runtime" / FOLDER)  # and nobody knows what it was for: test_stored_guests.py
    second = second_life(tmp_path, manager, {name: descriptor, "no-such-thing": descriptor})
    try:
        manager.until_told(STATUS="holding memory of guests from before a restart: web")
        assert {"FDSTOREREMOVE": "1", "FDNAME": "no-such-thing"} in manager.messages
        assert os.pread(descriptor, 13, 8192) == b"the only copy"
        assert second.guest_memory_files() == 1
        assert '"guest": "web"' in second.log()
        assert "its memory is held" in second.log()
        with FakeGuest("web", "running") as another:  # of the same name, but it is not the one with the pages
            another.attach(second.runtime_dir / "guests.sock")
            manager.take_what_is_there()
            assert name in manager.stored
        with FakeGuest("again", "running") as again:
            os.close(again.memory.files[0])
            again.memory.files[0] = kept
            again.attach(second.runtime_dir / "guests.sock")
            manager.until(lambda: name not in manager.stored, "let go")
            manager.until_told(STATUS="")
            assert second.guest_memory_files() == 1  # what it has just brought
        until(lambda: second.guest_memory_files() == 0, "nothing leaks")
    finally:
        second.kill()


def second_life(directory: Path, manager: ServiceManager, handed: dict[str, int], role: str = "source") -> ManagedDaemon:
    """The manager starts the daemon again, with these descriptors."""
    for name in handed.keys() - manager.stored.keys():
        manager.stored[name] = os.dup(handed[name])
    path = directory / "handed"
    with socket.create_server(str(path), family=socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(DEADLINE_SECONDS)
        handing = pool.submit(hand_over, listener, list(handed.values()))
        with mock.patch.object(pair, "COMMAND", (sys.executable, "-P", "-c", SECOND_LIFE, str(path), *pair.COMMAND)):
            daemon = ManagedDaemon(directory, manager, role, LISTEN_FDS=str(len(handed)), LISTEN_FDNAMES=":".join(handed))
        handing.result()
    path.unlink()
    return daemon


def hand_over(listener: socket.socket, descriptors: list[int]) -> None:
    sock, _ = listener.accept()
    with sock:
        socket.send_fds(sock, [b"."], descriptors)


def start_migration(daemon: ManagedDaemon, guest_id: str, address: str) -> None:
    with DaemonClient(daemon.runtime_dir) as client:
        client.migrate(guest_id, address)
