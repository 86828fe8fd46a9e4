"""The KVM guest between two real daemons: to and fro, on pages of 4 KiB and of 2 MiB, precopied or not, and intact each time."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from migrate.host.sentences import KVM_DEVICE
from migrate.pair import COMMAND, Pair

from ..control.obstacles import OWN_DEV, in_namespace
from ..path.commuter import Commuter

pytestmark = pytest.mark.requires("uffd", "uffd-kernel", "kvm")
MOVES = int(os.environ.get("POSTCOPY_KVM_MOVES", "5"))
"""50 and more are for an hour in which the machine has nothing else to do."""
SECONDS_A_MOVE = 15
PRECOPY: tuple[str | int, ...] = ("auto", "off", 2)
VCPUS = ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.timeout(30 + MOVES * SECONDS_A_MOVE)
@pytest.mark.requires("hugetlb", "dirty-tracking")
def test_two_vcpus_move_to_and_fro(pair: Pair) -> None:
    """Two regions, so that it works on both sizes of pages at once; steps and writes go on where they were."""
    commuter = Commuter(pair, "kvm", "16M:hugetlb", "16M", options=VCPUS, kind="kvm")
    steps = 0
    for number in range(MOVES):
        status = commuter.move(precopy=PRECOPY[number % len(PRECOPY)])
        assert status.pages_total == 8 + 4096
        assert sum(status.pages.values()) >= status.pages_total
        assert status.faults_count > 0
        assert (status.pages["precopy"] > 0) == (PRECOPY[number % len(PRECOPY)] != "off")
        assert commuter.verified["steps"] > steps + 4096  # a whole pass besides what it had done before
        steps = commuter.verified["steps"]
    commuter.end()


def test_pages_are_asked_for_once_and_faults_are_timed(pair: Pair) -> None:
    """Without bulk: one remote fault a page, and the guest's own clock has timed every stall."""
    commuter = Commuter(pair, "kvm-asks", "4M", options=("--vcpus", "1"), kind="kvm")
    status = commuter.move(bulk=False, precopy="off")
    with commuter.is_at.client() as client:
        there = client.status(status.id)
    assert there.faults["remote"].count == there.pages["urgent"] == status.pages_total == 1024
    assert there.downtime_seconds is not None
    first_touch = commuter.verified["first_touch"]
    assert 1000 <= first_touch["count"] <= 1024
    assert first_touch["p50_seconds"] > there.faults["remote"].p50_seconds / 2
    commuter.end()


def test_destination_of_another_make_refuses_and_the_source_runs_on(pair: Pair) -> None:
    """As many bytes, one vCPU instead of two: `resume_failed`, and then nothing has happened to the guest."""
    other = pair.guest(pair.destination, "one-vcpu", "4M", "--vcpus", "1", waiting=True, kind="kvm")
    guest = pair.guest(pair.source, "picky", "4M", "--stay", *VCPUS, kind="kvm")
    guest.event("stepped")
    status = pair.move("picky", pair.source, pair.destination)
    assert status.state == "failed"
    assert status.error is not None
    assert "another number of vCPUs" in str(status.error)
    other.kill()
    right = pair.guest(pair.destination, "two-vcpus", "4M", *VCPUS, waiting=True, kind="kvm")
    assert pair.move("picky", pair.source, pair.destination).state == "complete"
    assert right.event("verified", "failed")["event"] == "verified"
    guest.kill()
    right.kill()


def test_demo() -> None:
    command = [*COMMAND, "demo", "--guest", "kvm", "--memory", "16M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "guest verified: all memory checked against its root" in done.stdout


@pytest.mark.requires("root")
def test_without_the_device_it_says_what_the_doctor_says() -> None:
    guest = " ".join([*COMMAND, "guest", "kvm", "--memory", "4M"])
    said = in_namespace(
        f"{OWN_DEV}rm {KVM_DEVICE}\nstatus=0; {guest} 2>&1 || status=$?; echo $status\n{' '.join(COMMAND)} doctor"
    )
    told, _, doctor = said.partition("\n5\n")
    why = "/dev/kvm: ENOENT (No such file or directory), though this kernel has the device"
    assert told.startswith(f"postcopy: kvm is not available here: {why}")
    assert "; mknod -m 0600 /dev/kvm c 10 " in told
    assert why in " ".join(doctor.split())
