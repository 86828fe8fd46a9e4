"""The KVM guest between two real daemons: what is counted and timed, and what is refused.

To and fro it goes in tests/torture/test_kvm.py."""

import subprocess
from collections.abc import Iterator

import pytest

from migrate.host.sentences import KVM_DEVICE
from migrate.pair import COMMAND, Pair
from proto.messages import FORESEEN_PAGES_MAX

from ..control.obstacles import OWN_DEV, in_namespace
from ..path.commuter import Commuter

pytestmark = pytest.mark.requires("uffd", "uffd-kernel", "kvm")
VCPUS = ("--vcpus", "2", "--write-ratio", "0.3", "--zero-ratio", "0.1")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def test_pages_are_asked_for_once_and_faults_are_timed(pair: Pair) -> None:
    """Without bulk: one remote fault a page, but for those that were foreseen; the guest's own clock has timed every stall."""
    commuter = Commuter(pair, "kvm-asks", "4M", options=("--vcpus", "1"), kind="kvm")
    status = commuter.move(bulk=False, precopy="off")
    with commuter.is_at.client() as client:
        there = client.status(status.id)
    assert there.pages["urgent"] == status.pages_total == 1024
    assert 1024 - FORESEEN_PAGES_MAX <= there.faults["remote"].count <= 1024
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
