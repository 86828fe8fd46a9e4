"""The Linux test guest tells what it does, and finds damage that was done to its memory and to its disk. One machine for all."""

import re
import socket
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import pytest

from migrate.errors import PostcopyError
from migrate.guests.linux.debugcon import WORDS, Debugcon, Line, Told, beats_between
from migrate.guests.linux.machine import PAGE_BYTES, GuestImage, LinuxGuest
from migrate.pair import Process

BOOT_DEADLINE_SECONDS = 40.0
DEADLINE_SECONDS = 20.0
PAGE = 2000
GUEST = LinuxGuest(memory_mib=16, machine_mib=128, write_percent=10, verify_ms=50, report_ms=50, corrupt=PAGE, corrupt_ms=1500)
DISK_BYTES = 1 << 20


@dataclass(frozen=True)
class Ran:
    told: Told
    """Until its memory was found broken and its disk too."""
    host_seconds: float
    guest_seconds: float
    """Between the same two reports."""


@pytest.fixture(scope="module")
def ran(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Boots, works, finds the byte that it flipped itself, and then what was done to its disk."""
    directory = tmp_path_factory.mktemp("linux")
    disk = directory / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    image = GuestImage.find(repository / "build/guest")
    arguments = GUEST.arguments(image, directory / "debugcon", serial=directory / "serial", disk=disk)
    with Debugcon(directory / "debugcon") as debugcon:
        command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg"]
        qemu = Process("qemu", arguments, directory / "log", command=command)
        try:
            debugcon.wait_line("ready", BOOT_DEADLINE_SECONDS)
            debugcon.wait_line("failed", DEADLINE_SECONDS)
            debugcon.wait(lambda told: _reads(told) > 100, "100 blocks read back", DEADLINE_SECONDS)
            with debugcon.changed:
                assert [line for line in debugcon.told.damage if line.word != "failed"] == []
            disk.write_bytes(b"\xff" * DISK_BYTES)
            debugcon.wait_line("disk-wrong", DEADLINE_SECONDS)
        finally:
            qemu.kill()
    told = debugcon.told
    first, *_, last = (line for line in told.lines if line.word == "report")
    seconds = ((last.at_ns - first.at_ns) / 1e9, (last.number("ns") - first.number("ns")) / 1e9)
    return Ran(told, *seconds)


def _reads(told: Told) -> int:
    disk = told.last("disk")
    return 0 if disk is None else disk.number("reads")


def _first(told: Told, word: str) -> Line:
    return next(line for line in told.lines if line.word == word)


@pytest.mark.requires("linux-guest")
@pytest.mark.timeout(120)
def test_heartbeats_come_and_none_is_lost(ran: Ran) -> None:
    assert len(ran.told.beats) > 100
    assert ran.told.lost_beats == 0
    report = ran.told.last("report")
    assert report is not None
    assert report.number("beats") <= len(ran.told.beats)
    assert all(before.at_ns <= after.at_ns for before, after in pairwise(ran.told.beats))


@pytest.mark.requires("linux-guest")
def test_heartbeats_tell_whether_the_touching_thread_works(ran: Ran) -> None:
    failed = _first(ran.told, "failed")
    worked = [beat.stepped for beat in ran.told.beats if beat.at_ns < _first(ran.told, "flipped").at_ns]
    after = [beat.stepped for beat in ran.told.beats if beat.at_ns > failed.at_ns]
    assert sum(worked) > len(worked) / 2
    assert after
    assert not any(after)


@pytest.mark.requires("linux-guest")
def test_clock_of_the_guest_is_the_host_s(ran: Ran) -> None:
    """What its histogram says in ns are ns: its TSC was calibrated at boot, on a machine that may have been busy."""
    assert ran.guest_seconds == pytest.approx(ran.host_seconds, rel=0.05, abs=0.1)


@pytest.mark.requires("linux-guest")
def test_touches_are_counted_and_timed(ran: Ran) -> None:
    report = ran.told.last("report")
    assert report is not None
    assert report.number("verifications") > 0
    steps, writes = report.number("steps"), report.number("writes")
    assert sum(ran.told.touches.values()) >= 2 * steps  # table and page; a verification touches too
    assert writes / steps == pytest.approx(GUEST.write_percent / 100, rel=0.2)


@pytest.mark.requires("linux-guest")
def test_wrong_byte_is_found_and_named(ran: Ran) -> None:
    flipped = _first(ran.told, "flipped")
    assert (flipped.number("page"), flipped.number("byte")) == (PAGE, PAGE_BYTES // 2)
    failed, *again = [line for line in ran.told.damage if line.word == "failed"]
    assert all(line.fields == failed.fields for line in again)
    assert failed.at_ns >= flipped.at_ns
    assert (failed.fields["kind"], failed.number("page"), failed.number("pages")) == ("torn", PAGE, 1)
    assert failed.number("expected") != failed.number("got")


@pytest.mark.requires("linux-guest")
def test_disk_is_read_back_and_a_wrong_block_is_named(ran: Ran) -> None:
    disk = ran.told.last("disk")
    assert disk is not None
    assert disk.number("writes") >= DISK_BYTES // PAGE_BYTES / 2
    assert disk.number("errors") == 0
    wrong = [line for line in ran.told.damage if line.word == "disk-wrong"]
    assert wrong
    assert all(line.number("got") == 2**64 - 1 for line in wrong)
    assert all(line.number("block") < DISK_BYTES // PAGE_BYTES for line in wrong)


# --- the stream, without a machine ---------------------------------------------------------------------------------------


def test_stream_is_told_apart_wherever_it_is_cut() -> None:
    stream = b"\x80ready vcp\xc1us=2 pages=5\n\x82touch 64:3\xc3 128:1\ntouch 64:4 128:2\nreport ns=1\xc4"
    for cut in range(len(stream) + 1):
        told = Told()
        told.feed(stream[:cut], 100)
        told.feed(stream[cut:], 200)
        assert [beat.number for beat in told.beats] == [0, 1, 2, 3, 4]
        assert [beat.stepped for beat in told.beats] == [False, True, False, True, True]
        assert [(line.word, line.fields) for line in told.lines] == [("ready", {"vcpus": "2", "pages": "5"})]
        assert told.touches == {64: 4, 128: 2}
        assert told.lost_beats == 0


def test_end_of_a_line_that_was_begun_elsewhere_is_dropped() -> None:
    told = Told(arriving=True)
    told.feed(b"\x85=7 wr", 0)
    told.feed(b"ites=1\x86\nreport ns=3\n", 1)
    assert [(line.word, line.fields) for line in told.lines] == [("report", {"ns": "3"})]
    assert [beat.number for beat in told.beats] == [5, 6]


def test_beats_that_did_not_come_are_counted() -> None:
    told = Told()
    told.feed(b"\xfe\xff\x80\x82\x83\x83", 0)
    assert [beats_between(before, after) for before, after in pairwise(told.beats)] == [0, 0, 1, 0, 63]


def test_gaps_are_those_of_the_beats_that_are_asked_for() -> None:
    told = Told()
    for at_ms, byte in enumerate(b"\xc0\x81\x82\xc3\xc4"):
        told.feed(bytes([byte]), at_ms * 1_000_000)
    assert list(told.gaps_seconds()) == pytest.approx([0.001] * 4)
    assert list(told.gaps_seconds(stepped=True)) == pytest.approx([0.003, 0.001])


def test_a_line_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(PostcopyError, match="got gibberish"):
        Told().feed(b"gibberish x=1\n", 0)


def test_a_guest_that_ends_is_said(tmp_path: Path) -> None:
    with Debugcon(tmp_path / "debugcon") as debugcon:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as machine:
            machine.connect(str(tmp_path / "debugcon"))
            machine.send(b"\x80")
        with pytest.raises(PostcopyError, match="expected ready, got its end: 1 heartbeats"):
            debugcon.wait_line("ready", DEADLINE_SECONDS)


def test_lines_and_parameters_are_those_of_the_c_side(repository: Path) -> None:
    """debugcon.h documents each line, init.c says no other; each parameter of init.c can be given, and no other."""
    folder = repository / "migrate/guests/linux"
    documented = re.findall(r"^ \*     ([a-z-]+)(?: [a-zA-Z_:]+=?)*", (folder / "debugcon.h").read_text(), re.MULTILINE)
    assert documented == list(WORDS)
    said = {word for path in folder.glob("*.c") for word in re.findall(r'debugcon_line\("([a-z-]+)', path.read_text())}
    assert said == set(WORDS)
    taken = set(re.findall(r'parameter(?:_text)?\(line, "(\w+)"', (folder / "init.c").read_text()))
    given = set(re.findall(r"postcopy\.(\w+)=", LinuxGuest().kernel_command_line(disk=True)))
    assert given == taken
    assert given - {"disk"} == {field.name for field in fields(LinuxGuest)} - {"machine_mib", "vcpus"}
