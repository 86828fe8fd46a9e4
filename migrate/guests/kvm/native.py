"""The one door between Python and the KVM monitor; machine.h documents what lies behind it. Calls release the GIL."""

import errno
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from migrate.errors import HostLacksError, PauseFailedError, PostcopyError, errno_text
from migrate.guests.workload.native import StateRefusedError, Touches, touches
from migrate.host import sentences
from proto.messages import FORESEEN_PAGES_MAX, GuestRegion

try:
    from migrate.guests.kvm._kvm import ffi, lib
except ModuleNotFoundError as error:  # built for another processor
    why = "the KVM guest's program is written for x86-64"
    raise HostLacksError("kvm", why, "run it on an x86-64 machine") from error

VCPUS_MAX: int = lib.MACHINE_VCPUS_MAX
STEPS_A_BEAT = 32
_EXIT_REASONS = {8: "a triple fault (KVM_EXIT_SHUTDOWN)", 9: "KVM_EXIT_FAIL_ENTRY", 17: "KVM_EXIT_INTERNAL_ERROR"}
_TRIED_BY_DOCTOR = ("/dev/kvm", "KVM_GET_API_VERSION", "KVM_CREATE_VM")


class Phase(IntEnum):
    IDLE = lib.MACHINE_IDLE
    RUNNING = lib.MACHINE_RUNNING
    PAUSED = lib.MACHINE_PAUSED
    FAILED = lib.MACHINE_FAILED


class FailureKind(IntEnum):
    WRONG_WORD = lib.MACHINE_WRONG_WORD
    ROLLED_BACK = lib.MACHINE_ROLLED_BACK
    STOPPED = lib.MACHINE_STOPPED


class KvmGuestFailedError(PostcopyError):
    """The guest found its own memory damaged, or could not run on; ``KvmMachine.report().failure`` says where."""

    code = "guest-failed"


@dataclass(frozen=True, slots=True)
class KvmConfig:
    """What the guest does; ``rate_per_second`` counts the steps of all vCPUs together, 0 is flat out."""

    write_per_mille: int = 0
    zero_per_mille: int = 0
    rate_per_second: int = 0
    beat_steps: int = STEPS_A_BEAT
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """What the guest reported through its port, or why KVM could not run on."""

    kind: FailureKind
    vcpu: int
    block_index: int
    word_index: int
    expected: int
    got: int

    def __str__(self) -> str:
        if self.kind is FailureKind.STOPPED:
            why = errno_text(self.got - 1000) if self.got > 1000 else _EXIT_REASONS.get(self.got, f"exit reason {self.got}")
            return f"vCPU {self.vcpu} stopped at {self.block_index:#x}: {why}"
        where = f"page {self.block_index} of 4 KiB (offset {self.block_index * 4096:#x}, vCPU {self.vcpu})"
        if self.kind is FailureKind.ROLLED_BACK:
            return f"the slice from {where} is rolled back: it sums up to {self.got:#x}, not to the root {self.expected:#x}"
        return f"{where} is wrong in word {self.word_index}: expected {self.expected:#x}, got {self.got:#x}"


@dataclass(frozen=True, slots=True)
class Report:
    """One reading, field by field as in machine.h; told as the workload's is."""

    phase: Phase
    verifications: int
    steps: int
    writes: int
    last_step_ns: int
    first_step_ns: int
    failure: Failure | None
    touch: Touches
    first_touch: Touches

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the failure in words, or None."""
        failure = None if self.failure is None else str(self.failure)
        return {**asdict(self), "discards": 0, "phase": self.phase.name.lower(), "failure": failure}


class KvmMachine:
    """vCPUs over mapped memory, which stays the caller's and must outlive this object. One thread at a time may control it;
    ``report`` and ``verify`` may be called by any."""

    def __init__(self, regions: Sequence[GuestRegion], vcpus: int) -> None:
        """Raises HostLacksError with the doctor's sentence, PostcopyError."""
        raw = ffi.new("struct machine_region[]", [(region.guest_address, region.size_bytes) for region in regions])
        made, step = ffi.new("struct machine **"), ffi.new("const char **")
        result = lib.machine_create(made, raw, len(regions), vcpus, step)
        if result != 0:
            raise _not_made(ffi.string(step[0]).decode(), -result)
        self._owned: Any = ffi.gc(made[0], lib.machine_destroy)
        self._state = ffi.new("uint8_t[]", lib.MACHINE_STATE_BYTES_MAX)  # made here: save lies in the downtime
        self._why = ffi.new("const char **")
        self._blocks = ffi.new("uint64_t[]", FORESEEN_PAGES_MAX)
        self._large = any(region.page_bytes != 4096 for region in regions)

    def close(self) -> None:
        """Stop and join the vCPUs' threads; waits for one that is in a fault which nothing interrupts."""
        owned, self._owned = self._owned, None
        if owned is not None:
            ffi.release(owned)

    @property
    def _pointer(self) -> Any:
        if self._owned is None:
            raise ValueError("the machine is closed")
        return self._owned

    @property
    def event_fd(self) -> int:
        """Readable after a first step since resume, a verification, a failure. Borrowed: not to be closed."""
        return int(lib.machine_event_fd(self._pointer))

    def start(self, config: KvmConfig) -> None:
        """Write the program into the memory, which must read zero, and run it."""
        self._check("start", lib.machine_start(self._pointer, ffi.new("struct machine_config *", asdict(config))))

    def pause(self, deadline_seconds: float) -> None:
        """Every vCPU out of KVM. Raises PauseFailedError after ``deadline_seconds`` from now (they run on)."""
        self._check("pause", lib.machine_pause(self._pointer, time.monotonic_ns() + int(deadline_seconds * 1e9)))

    def save(self) -> bytes:
        """What the guest needs, besides its memory, to run on elsewhere. Paused only."""
        size_bytes = self._check("save", lib.machine_save(self._pointer, self._state, lib.MACHINE_STATE_BYTES_MAX))
        return bytes(ffi.buffer(self._state, size_bytes))

    def foreseen(self) -> list[int]:
        """Pages on which its vCPUs stand (foreseen.c), by their numbers through all regions. Paused only; none otherwise."""
        if self._large:  # each would keep a fault on another waiting
            return []
        count = lib.machine_foreseen(self._pointer, self._blocks, len(self._blocks))
        blocks: list[int] = ffi.unpack(self._blocks, count)
        return blocks

    def load(self, state: bytes) -> None:
        """Take over what ``save`` gave; paused then. Raises StateRefusedError."""
        result = lib.machine_load(self._pointer, state, len(state), self._why)
        if result == -errno.EINVAL:
            why = ffi.string(self._why[0]).decode()
            raise StateRefusedError("KVM state", expected="one that this machine can load", got=f"{len(state)} bytes: {why}")
        self._check("load", result)

    def resume(self) -> None:
        self._check("resume", lib.machine_resume(self._pointer))

    def verify(self) -> None:
        """Ask for one pass over all memory; ``event_fd``, then ``Report.verifications`` tell the end."""
        lib.machine_verify(self._pointer)

    def last_step_ns(self) -> int:
        return int(lib.machine_last_step_ns(self._pointer))

    def first_step_ns(self) -> int:
        return int(lib.machine_first_step_ns(self._pointer))

    def report(self) -> Report:
        raw = ffi.new("struct machine_report *")
        lib.machine_read(self._pointer, raw)
        failed = raw.failure
        fields = (failed.vcpu, failed.block_index, failed.word_index, failed.expected, failed.got)
        return Report(
            phase=Phase(raw.phase),
            verifications=raw.verifications,
            steps=raw.steps,
            writes=raw.writes,
            last_step_ns=raw.last_step_ns,
            first_step_ns=raw.first_step_ns,
            failure=None if failed.kind == lib.MACHINE_INTACT else Failure(FailureKind(failed.kind), *fields),
            touch=touches(ffi, lib, raw.touch),
            first_touch=touches(ffi, lib, raw.first_touch),
        )

    def _check(self, call: str, result: int) -> int:
        """The one place where an errno becomes an exception."""
        if result >= 0:
            return result
        if result == -errno.ETIMEDOUT:
            raise PauseFailedError("pause", expected="every vCPU out of KVM", got="a vCPU that stays in a page fault")
        if result == -errno.EBADMSG:
            raise KvmGuestFailedError(f"{call}: the guest has failed: {self.report().failure}")
        raise PostcopyError(
            f"KVM guest {call} in phase {self.report().phase.name.lower()}", expected="0", got=errno_text(-result)
        )


def _not_made(step: str, error_number: int) -> PostcopyError:
    if step in _TRIED_BY_DOCTOR:
        tried = 0 if error_number == errno.EOPNOTSUPP else error_number
        return HostLacksError("kvm", *sentences.kvm_refused(step, tried))
    if error_number == errno.EOPNOTSUPP:
        return HostLacksError("kvm", f"this kernel's KVM lacks {step}", "run Linux 4.17 or later")
    return PostcopyError(
        "KVM guest", expected=step, got=errno_text(error_number), code="usage" if error_number == errno.EINVAL else None
    )
