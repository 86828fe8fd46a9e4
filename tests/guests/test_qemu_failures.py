"""What goes wrong with a QEMU: refused before anything is touched, or undone, with the VM running on at the source."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli import EXIT_CODES
from migrate.guests.linux.journey import Journey
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.guests.qemu.process import CAPABILITIES
from migrate.pair import COMMAND, Pair, Process

pytestmark = pytest.mark.requires("uffd", "qemu")
DEADLINE_SECONDS = 20.0
GUEST = LinuxGuest(memory_mib=16, machine_mib=128)
BARE = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", "128M", "-smp", "2"]
"""As GUEST's machine; nothing runs in it."""


def start(pair: Pair, name: str, words: list[str], *, waiting: bool) -> Process:
    daemon = pair.destination if waiting else pair.source
    options = ["--id", name, "--daemon", str(daemon.runtime_dir), *(["--waiting"] if waiting else [])]
    guest = pair.child(name, ["guest", "qemu", *options, "--", *words])
    guest.event("waiting" if waiting else "started")
    return guest


@pytest.fixture(scope="module")
def journey(repository: Path) -> Iterator[Journey]:
    with Pair() as pair:
        journey = Journey(pair, GUEST, image=GuestImage.find(repository / "build/guest"))
        journey.waits.end()  # each test has its own destination
        try:
            yield journey
        finally:
            journey.close()


def refused_by(journey: Journey, name: str, words: list[str]) -> tuple[Process, str]:
    """Another QEMU waits there; what the attempt to move ended with. The VM has run on here, nothing of it lost."""
    other = start(journey.pair, name, words, waiting=True)
    status = journey.pair.move(journey.runs.name, journey.is_at, journey.goes_to)
    assert status.state == "failed"
    assert status.error is not None
    journey.beats(200)
    journey.check()
    return other, f"{status.error.code}: expected {status.error.expected}, got {status.error.got}"


@pytest.mark.requires("uffd-full", "linux-guest")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "difference", "got"),
    [("other-type", ["-M", "q35"], "QEMU pc-q35-7.2 with 2 qemu64-x86_64-cpu"), ("other-cpus", ["-smp", "1"], "with 1 qemu64")],
)
def test_other_machine_is_refused_before_anything_is_touched(
    journey: Journey, name: str, difference: list[str], got: str
) -> None:
    other, error = refused_by(journey, name, [*BARE, *difference])
    assert error.startswith("no-guest-fits: expected 128 MiB of 4 KiB pages, QEMU pc-i440fx-7.2 with 2 qemu64-x86_64-cpu, got ")
    assert got in error
    assert '"STOP"' not in journey.runs.log()
    other.end()


@pytest.mark.requires("uffd-full", "linux-guest")
@pytest.mark.timeout(120)
def test_state_that_the_destination_does_not_take_runs_on_at_the_source(journey: Journey) -> None:
    """Same type, a device less: QEMU finds that as it loads, when the VM has been paused; and then it does move."""
    other, error = refused_by(journey, "no-serial", BARE)
    assert "aborted" in error
    assert "got device state: expected one of the same machine, got " in error
    assert "Unknown savevm section or instance 'serial'" in other.log()
    assert other.event("refused", "ended", deadline_seconds=DEADLINE_SECONDS)["event"] == "refused"
    other.event("waiting", deadline_seconds=DEADLINE_SECONDS)  # a new one, for the next
    other.end()
    journey.waits = start(journey.pair, "right", journey.words, waiting=True)
    journey.move()
    journey.check()


@pytest.mark.parametrize("signal_name", ["kill", "end"])
def test_qemu_ends_with_its_agent(tmp_path: Path, signal_name: str) -> None:
    with Pair() as pair:
        guest = pair.child("bare", ["guest", "qemu", "--id", "bare", "--daemon", str(pair.source.runtime_dir), "--", *BARE])
        ended = os.pidfd_open(guest.event("started")["pid"])
        getattr(guest, signal_name)()
        assert select.select([ended], [], [], DEADLINE_SECONDS)[0]
        os.close(ended)


@pytest.mark.parametrize(
    ("capabilities", "blocked", "expected", "got"),
    [
        ("events,late-block-activate", "", "migration capability x-ignore-shared", "none"),
        (
            ",".join(CAPABILITIES),
            "the VM holds a mounted host directory",
            "a machine that can be migrated",
            "mounted host directory",
        ),
        (",".join([*CAPABILITIES, "twice"]), "", "success", "EBUSY"),
    ],
)
def test_qemu_that_cannot_be_moved_says_so(tmp_path: Path, capabilities: str, blocked: str, expected: str, got: str) -> None:
    program = [sys.executable, "-P", str(Path(__file__).with_name("fake_qemu.py")), capabilities, blocked]
    command = [*COMMAND, "guest", "qemu", "--daemon", str(tmp_path), "--", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == EXIT_CODES["failed"], done.stderr
    assert f"expected {expected}" in done.stderr
    assert got in done.stderr
    assert done.stdout == ""


def test_program_that_is_no_qemu(tmp_path: Path) -> None:
    command = [*COMMAND, "guest", "qemu", "--daemon", str(tmp_path), "--", "false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == EXIT_CODES["guest-failed"]
    assert "expected to run, got its end" in done.stderr


def test_guest_that_powers_off_ends_its_agent(tmp_path: Path) -> None:
    """isa-debug-exit would need a guest: QEMU's own monitor does as well."""
    with Pair() as pair:
        path = tmp_path / "hmp"
        words = [*BARE, "-monitor", f"unix:{path},server=on,wait=off"]
        guest = pair.child("off", ["guest", "qemu", "--id", "off", "--daemon", str(pair.source.runtime_dir), "--", *words])
        guest.event("started")
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(path))
            monitor.sendall(b"quit\n")
            assert guest.event("ended", deadline_seconds=DEADLINE_SECONDS) == {"event": "ended", "status": 0}
            assert guest.wait() == 0


@pytest.mark.requires("uffd-full")
def test_disk_that_is_read_by_dma_moves_without_precopy() -> None:
    """Declared by the agent, since what a device writes into pinned pages behind a scan is not seen."""
    with Pair() as pair:
        disk = pair.directory / "disk"
        disk.write_bytes(bytes(1 << 20))
        words = [*BARE, "-drive", f"file={disk},format=raw,if=virtio,cache=none"]
        start(pair, "direct", words, waiting=False)
        arrives = start(pair, "arrives", words, waiting=True)
        status = pair.move("direct", pair.source, pair.destination)
        assert status.state == "complete", status.error
        assert status.switched_because == "no precopy: the guest declares direct-io: its writes cannot all be seen"
        arrives.event("complete", deadline_seconds=DEADLINE_SECONDS)
