"""The KVM guest's state: what it was saved from and its memory run on in another machine; what is not its state is refused."""

import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from migrate.errors import PostcopyError
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.guests.kvm.native import FailureKind, KvmConfig, KvmGuestFailedError, KvmMachine, Phase, Report
from migrate.guests.workload.native import StateRefusedError

pytestmark = pytest.mark.requires("kvm")
MIB = 1 << 20
DEADLINE_SECONDS = 30.0
VERSION_OFFSET = 16
CHECKSUM_OFFSET = 8
HEADER_BYTES = 40


class Host:
    """A machine and its memory, as its memory file."""

    def __init__(self, size_bytes: int = 4 * MIB, vcpus: int = 2) -> None:
        self.size_bytes = size_bytes
        self.memory = GuestMemory([MemorySpec(size_bytes, "memfd")])
        self.machine = KvmMachine(self.memory.regions, vcpus)

    def close(self) -> None:
        self.machine.close()
        self.memory.close()

    def start(self) -> None:
        self.machine.start(KvmConfig(write_per_mille=300, zero_per_mille=100))

    def until(self, reached: Callable[[Report], bool]) -> Report:
        while not reached(report := self.machine.report()):
            assert select.select([self.machine.event_fd], [], [], DEADLINE_SECONDS)[0], report
            os.read(self.machine.event_fd, 8)
        return report

    def verify(self) -> Report:
        before = self.machine.report().verifications
        self.machine.verify()
        report = self.until(lambda now: now.verifications > before or now.phase is Phase.FAILED)
        assert report.failure is None, report.failure
        return report

    def paused_state(self) -> bytes:
        self.machine.pause(DEADLINE_SECONDS)
        return self.machine.save()

    def copy_memory(self, source: "Host") -> None:
        os.pwrite(self.memory.files[0], os.pread(source.memory.files[0], self.size_bytes, 0), 0)


@pytest.fixture
def host() -> Iterator[Callable[..., Host]]:
    with ExitStack() as stack:

        def make(*arguments: int) -> Host:
            made = Host(*arguments)
            stack.callback(made.close)
            return made

        yield make


def test_state_and_memory_run_on_elsewhere(host: Callable[..., Host]) -> None:
    here, there = host(), host()
    here.start()
    here.verify()
    state = here.paused_state()
    before = here.machine.report()
    there.copy_memory(here)
    there.machine.load(state)
    loaded = there.machine.report()
    assert (loaded.phase, loaded.steps, loaded.writes) == (Phase.PAUSED, before.steps, before.writes)
    there.machine.resume()
    after = there.verify()
    assert after.steps > before.steps
    assert after.first_touch.count > 0
    here.machine.resume()  # and what was only read runs on too
    here.verify()


def test_state_without_its_memory_is_found(host: Callable[..., Host]) -> None:
    """The root travels in a register: memory as it was a while ago agrees with itself, and not with the state."""
    here, there = host(), host()
    here.start()
    here.verify()
    here.machine.pause(DEADLINE_SECONDS)
    there.copy_memory(here)
    here.machine.resume()
    here.verify()
    there.machine.load(here.paused_state())
    there.machine.resume()
    there.machine.verify()
    report = there.until(lambda now: now.phase is Phase.FAILED)
    assert report.failure is not None
    with pytest.raises(KvmGuestFailedError):
        there.machine.pause(DEADLINE_SECONDS)


def test_wrong_word_is_named(host: Callable[..., Host]) -> None:
    one = host()
    one.start()
    one.verify()
    one.machine.pause(DEADLINE_SECONDS)
    page = one.size_bytes // 4096 - 5
    os.pwrite(one.memory.files[0], b"damaged!", page * 4096 + 8 * 100)
    one.machine.resume()
    failure = one.until(lambda now: now.phase is Phase.FAILED).failure
    assert failure is not None
    assert (failure.kind, failure.vcpu, failure.block_index, failure.word_index) == (FailureKind.WRONG_WORD, 1, page, 100)
    assert failure.got == int.from_bytes(b"damaged!", "little")
    assert f"page {page} of 4 KiB" in str(failure)


def test_guest_that_cannot_run_on_says_where(host: Callable[..., Host]) -> None:
    """Its page tables are gone."""
    here, there = host(), host()
    here.start()
    here.until(lambda now: now.first_step_ns > 0)
    there.machine.load(here.paused_state())
    there.machine.resume()
    failure = there.until(lambda now: now.phase is Phase.FAILED).failure
    assert failure is not None
    assert failure.kind is FailureKind.STOPPED
    assert "a triple fault" in str(failure)


def with_version(state: bytes, version: int) -> bytes:
    return state[:VERSION_OFFSET] + struct.pack("<I", version) + state[VERSION_OFFSET + 4 :]


REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "no state of a KVM guest"),
    "garbage": (lambda state: bytes(reversed(state)), "no state of a KVM guest"),
    "the workload's": (lambda _: b"WrsktatS" * 20, "no state of a KVM guest"),
    "another version": (lambda state: with_version(state, 2), "another version"),
    "truncated": (lambda state: state[:-8], "not all there"),
    "truncated amid a word": (lambda state: state[:-3], "not all there"),
    "header alone": (lambda state: state[:HEADER_BYTES], "not all there"),
    "lengthened": (lambda state: state + bytes(8), "not all there"),
    "a bit flipped": (lambda state: state[:-9] + bytes([state[-9] ^ 1]) + state[-8:], "checksum"),
}


@pytest.mark.parametrize(("spoil", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_state_is_refused_and_the_right_one_taken(host: Callable[..., Host], spoil: Callable[[bytes], bytes], why: str) -> None:
    here, there = host(), host()
    here.start()
    here.until(lambda now: now.first_step_ns > 0)
    state = here.paused_state()
    there.copy_memory(here)
    with pytest.raises(StateRefusedError, match=why):
        there.machine.load(spoil(state))
    assert there.machine.report().phase is Phase.IDLE
    there.machine.load(state)
    there.machine.resume()
    there.verify()


@pytest.mark.parametrize(("size_bytes", "vcpus", "why"), [(4 * MIB, 1, "vCPUs"), (8 * MIB, 2, "memory size")])
def test_state_of_another_machine_is_refused(host: Callable[..., Host], size_bytes: int, vcpus: int, why: str) -> None:
    here, there = host(), host(size_bytes, vcpus)
    here.start()
    here.until(lambda now: now.first_step_ns > 0)
    with pytest.raises(StateRefusedError, match=why):
        there.machine.load(here.paused_state())


def test_calls_out_of_turn(host: Callable[..., Host]) -> None:
    one = host()
    for call in (one.machine.save, one.machine.resume, lambda: one.machine.pause(1.0)):
        with pytest.raises(PostcopyError, match="phase idle"):
            call()
    one.start()
    with pytest.raises(PostcopyError, match="phase running: expected 0, got EBUSY"):
        one.start()
    state = one.paused_state()
    with pytest.raises(PostcopyError, match="phase paused: expected 0, got EBUSY"):
        one.machine.load(state)


def test_memory_that_is_too_small(host: Callable[..., Host]) -> None:
    with pytest.raises(PostcopyError, match="a slice of the memory for each vCPU"):
        host(16384, 4)


def test_where_it_stands_is_foreseen(host: Callable[..., Host]) -> None:
    """Program, task state segment and the page tables of level 4 and 3 lie in page 0, those of level 2 in page 1; and each vCPU
    is at work somewhere in its slice."""
    one = host()
    one.start()
    assert one.machine.foreseen() == []
    one.until(lambda now: now.first_step_ns > 0)
    one.machine.pause(DEADLINE_SECONDS)
    pages, total = one.machine.foreseen(), one.size_bytes // 4096
    assert pages[:2] == [0, 1]
    assert len(pages) == len(set(pages))
    assert all(0 <= page < total for page in pages)
    assert any(1 < page < total // 2 for page in pages)
    assert any(total // 2 < page for page in pages)


def test_registers_that_point_nowhere_foresee_nothing(host: Callable[..., Host]) -> None:
    """Page tables without an entry: the walk ends in them."""
    one = host()
    one.start()
    one.until(lambda now: now.first_step_ns > 0)
    one.machine.pause(DEADLINE_SECONDS)
    os.pwrite(one.memory.files[0], bytes(2 * 4096), 0)
    assert one.machine.foreseen() == [0]
    os.pwrite(one.memory.files[0], struct.pack("<512Q", *[(1 << 40) | 0xE7] * 512), 0)  # beyond the memory
    assert one.machine.foreseen() == [0]
