"""The built-in guest's check of itself: it passes an intact memory, and each kind of damage ends it by that name.

Damage is done from here, between pause and resume, as a broken migration would do it. The memory is ordinary shared memory.
"""

import ctypes
import itertools
import mmap
import random
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from migrate.errors import PauseFailedError, PostcopyError
from migrate.guests.workload.native import (
    BLOCK_BYTES,
    Failure,
    FailureKind,
    Pattern,
    Phase,
    Report,
    StateRefusedError,
    Workload,
    WorkloadConfig,
    WorkloadFailedError,
)

DEADLINE_SECONDS = 30.0
ENTRIES_PER_TABLE_BLOCK = BLOCK_BYTES // 8


class Guest:
    """A workload and its memory, block by block; what the slices look like is told in verify.h."""

    def __init__(self, blocks: int, threads: int = 1) -> None:
        self.blocks, self.threads = blocks, threads
        self.memory = mmap.mmap(-1, blocks * BLOCK_BYTES)
        self._export = ctypes.c_char.from_buffer(self.memory)
        self.workload = Workload(ctypes.addressof(self._export), len(self.memory))

    def close(self) -> None:
        self.workload.close()
        del self._export
        self.memory.close()

    def __getitem__(self, block: int) -> bytes:
        return self.memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]

    def __setitem__(self, block: int, content: bytes) -> None:
        self.memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = content

    def slices(self) -> list[tuple[range, range]]:
        """For each thread its table blocks and its data blocks."""
        edges = [self.blocks * thread // self.threads for thread in range(self.threads + 1)]
        result = []
        for first, end in itertools.pairwise(edges):
            tables = -(-(end - first) // (ENTRIES_PER_TABLE_BLOCK + 1))
            result.append((range(first, first + tables), range(first + tables, end)))
        return result

    def data_blocks(self) -> list[int]:
        return [block for _, data in self.slices() for block in data]

    def start(self, pattern: Pattern = Pattern.RANDOM, write_per_mille: int = 500, **more: int) -> None:
        self.workload.start(WorkloadConfig(threads=self.threads, pattern=pattern, write_per_mille=write_per_mille, **more))

    def pause(self) -> None:
        self.workload.pause(DEADLINE_SECONDS)

    def wait(self, reached: Callable[[Report], bool]) -> Report:
        """Until an event's report says so."""
        poll = select.poll()
        poll.register(self.workload.event_fd, select.POLLIN)
        while not reached(report := self.workload.report()):
            assert poll.poll(DEADLINE_SECONDS * 1000), f"no event: {report}"
            with open(self.workload.event_fd, "rb", buffering=0, closefd=False) as event:
                event.read(8)
        return report

    def verify(self) -> Report:
        before = self.workload.report().verifications
        self.workload.verify()
        return self.wait(lambda report: report.verifications > before or report.phase == Phase.FAILED)

    def run_steps(self, steps: int) -> Report:
        target, deadline = self.workload.report().steps + steps, time.monotonic() + DEADLINE_SECONDS
        while (report := self.workload.report()).steps < target:
            assert report.phase == Phase.RUNNING, report.failure
            assert time.monotonic() < deadline, report
        return report


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    with ExitStack() as guests:

        def make(blocks: int, threads: int = 1) -> Guest:
            guest = Guest(blocks, threads)
            guests.callback(guest.close)
            return guest

        yield make


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pattern", Pattern)
def test_intact_guest_verifies(make_guest: Callable[..., Guest], pattern: Pattern, threads: int) -> None:
    guest = make_guest(2000, threads)
    guest.start(pattern, zero_per_mille=200)
    guest.run_steps(5000)
    report = guest.verify()
    assert (report.phase, report.failure, report.verifications) == (Phase.RUNNING, None, 1)
    assert 0.4 < report.writes / report.steps < 0.6


def test_unwritten_blocks_stay_zero(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(2000)
    guest.start(write_per_mille=0, zero_per_mille=300)
    guest.verify()
    guest.pause()
    zero = sum(guest[block] == bytes(BLOCK_BYTES) for block in guest.data_blocks())
    assert 500 < zero < 700


def test_pause_stops_every_step(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(2000, 3)
    guest.start()
    guest.run_steps(1000)
    guest.pause()
    before, memory = guest.workload.report(), bytes(guest.memory)
    assert before.phase == Phase.PAUSED
    assert 0 < before.first_step_ns < before.last_step_ns <= time.monotonic_ns()
    assert bytes(guest.memory) == memory
    assert guest.workload.report().steps == before.steps
    guest.workload.resume()
    after = guest.wait(lambda report: report.first_step_ns != 0)
    assert after.first_step_ns > before.last_step_ns


def test_pause_that_misses_its_deadline_lets_all_run_on(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(2000, 3)
    guest.start()

    def pause_at_once_until_refused() -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:  # three threads: sooner or later one of them is in a step
            guest.workload.pause(0)
            guest.workload.resume()

    with pytest.raises(PauseFailedError):
        pause_at_once_until_refused()
    guest.run_steps(1000)
    guest.pause()
    guest.workload.resume()
    assert guest.verify().failure is None


def test_state_and_copied_memory_run_on_elsewhere(make_guest: Callable[..., Guest]) -> None:
    source, destination = make_guest(2000, 3), make_guest(2000, 3)
    source.start(zero_per_mille=100)
    source.run_steps(5000)
    source.pause()
    state, left = source.workload.save(), source.workload.report()
    destination.workload.prepare(3)
    destination.workload.load(state)
    arrived = destination.workload.report()
    assert (arrived.phase, arrived.steps, arrived.writes) == (Phase.PAUSED, left.steps, left.writes)
    assert (arrived.touch.count, arrived.last_step_ns, arrived.first_step_ns) == (0, 0, 0)
    assert bytes(destination.memory) == bytes(len(destination.memory))
    destination.memory[:] = source.memory[:]
    destination.workload.resume()
    report = destination.verify()
    assert (report.phase, report.failure) == (Phase.RUNNING, None)
    assert report.first_step_ns > left.last_step_ns
    assert report.first_touch.count == 2000, "each block has one first touch"
    assert report.touch.count > 2000
    assert 0 < report.first_touch.p50_seconds <= report.first_touch.p99_seconds <= report.first_touch.max_seconds
    assert report.to_dict()["first_touch"]["count"] == 2000


def test_pause_amid_the_first_stamping_is_carried_over(make_guest: Callable[..., Guest]) -> None:
    def paused_early() -> Guest:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            guest = make_guest(20_000)
            guest.start()
            guest.pause()
            if guest[19_999] == bytes(BLOCK_BYTES):  # stamped last
                return guest
        raise AssertionError("the stamping was always faster")

    source, destination = paused_early(), make_guest(20_000)
    destination.workload.load(source.workload.save())
    destination.memory[:] = source.memory[:]
    destination.workload.resume()
    assert destination.verify().failure is None


def test_a_workload_loads_again_and_counts_first_touches_anew(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(500)
    guest.start()
    for _ in range(3):
        guest.verify()
        guest.pause()
        guest.workload.load(guest.workload.save())
        assert guest.workload.report().first_touch.count == 0
        guest.workload.resume()
        assert guest.verify().first_touch.count == 500


@pytest.mark.parametrize("pattern", [Pattern.PERMUTE, Pattern.SEQUENTIAL])
def test_two_passes_reach_every_block(make_guest: Callable[..., Guest], pattern: Pattern) -> None:
    guest = make_guest(1500)
    guest.start(pattern, write_per_mille=0)
    guest.pause()
    guest.workload.load(guest.workload.save())
    guest.workload.resume()
    assert guest.run_steps(2 * 1500).first_touch.count == 1500


def test_zipf_has_a_favourite(make_guest: Callable[..., Guest]) -> None:
    shares = {}
    for pattern in (Pattern.ZIPF, Pattern.RANDOM):
        guest = make_guest(2000)
        guest.start(pattern, write_per_mille=1000)
        guest.run_steps(20_000)
        guest.pause()
        versions = [struct.unpack_from("<Q", guest[block], 8)[0] for block in guest.data_blocks()]
        shares[pattern] = (max(versions) - 1) / guest.workload.report().writes
    assert 0.05 < shares[Pattern.ZIPF] < 0.2
    assert shares[Pattern.RANDOM] < 0.005


def test_rate_is_not_exceeded_and_waits_end_at_a_pause(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(100, 3)
    guest.start(rate_per_second=1000)
    guest.run_steps(10)
    began = time.monotonic()
    guest.run_steps(200)
    assert time.monotonic() - began > 0.1
    guest.pause()
    guest.workload.resume()
    assert guest.verify().failure is None


def test_states_that_are_none_are_refused(make_guest: Callable[..., Guest]) -> None:
    source, other_size, destination = make_guest(100, 3), make_guest(101), make_guest(100)
    source.start()
    source.pause()
    state = source.workload.save()
    flipped = [state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :] for at in range(len(state))]
    noise = random.Random(1).randbytes(len(state))
    for refused in [b"", b"x", state[:-1], state + b"\0", state[:64], noise, *flipped]:
        with pytest.raises(StateRefusedError):
            destination.workload.load(refused)
    with pytest.raises(StateRefusedError):
        other_size.workload.load(state)
    assert destination.workload.report().phase == Phase.IDLE
    destination.workload.load(state)
    assert destination.workload.report().phase == Phase.PAUSED


def test_calls_out_of_turn_and_bad_configurations_are_refused(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(3)
    for call in (guest.workload.resume, guest.workload.save, guest.pause):
        with pytest.raises(PostcopyError):
            call()
    for config in (
        WorkloadConfig(threads=0),
        WorkloadConfig(threads=65),
        WorkloadConfig(threads=2),  # three blocks hold a table and a data block for one thread only
        WorkloadConfig(write_per_mille=1001),
        WorkloadConfig(zero_per_mille=1001),
    ):
        with pytest.raises(PostcopyError):
            guest.workload.start(config)
    guest.start()
    with pytest.raises(PostcopyError):
        guest.start()
    guest.workload.close()
    with pytest.raises(ValueError, match="closed"):
        guest.workload.report()


Injection = Callable[[Guest, bytes, list[int]], set[int]]
"""Damages a paused guest, given its memory of some time ago and the data blocks written since; returns the blocks at fault."""


def old_block(memory: bytes, block: int) -> bytes:
    return memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


def lost(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[written[0]] = random.Random(2).randbytes(BLOCK_BYTES)
    return {written[0]}


def stale(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[written[0]] = old_block(old, written[0])
    return {written[0]}


def torn(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[written[0]] = guest[written[0]][:2048] + old_block(old, written[0])[2048:]
    return {written[0]}


def half_arrived(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[written[0]] = guest[written[0]][:2048] + bytes(2048)
    return {written[0]}


def swapped(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    one, other = written[0], written[-1]
    guest[one], guest[other] = guest[other], guest[one]
    return {one, other}


def zeroed(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[written[0]] = bytes(BLOCK_BYTES)
    return {written[0]}


def count_writes(guest: Guest, block: int, change: int) -> set[int]:
    (count,) = struct.unpack_from("<Q", guest[block], 16)
    struct.pack_into("<Q", guest.memory, block * BLOCK_BYTES + 16, count + change)
    return {block}


def write_lost(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    return count_writes(guest, written[0], -1)


def write_repeated(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    return count_writes(guest, written[0], +1)


def rolled_back(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest.memory[:] = old
    return {tables.start for tables, _ in guest.slices()}


def one_page_and_its_entry_rolled_back(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    tables, data = next((tables, data) for tables, data in guest.slices() if written[0] in data)
    entry = tables.start * BLOCK_BYTES + (written[0] - data.start) * 8
    guest[written[0]] = old_block(old, written[0])
    guest.memory[entry : entry + 8] = old[entry : entry + 8]
    return {tables.start}


def table_stale(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[0] = old_block(old, 0)
    return {0}


def table_zeroed(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[0] = bytes(BLOCK_BYTES)
    return {0}


def table_lost(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[0] = random.Random(3).randbytes(BLOCK_BYTES)
    return {0}


def tables_swapped(guest: Guest, old: bytes, written: list[int]) -> set[int]:
    guest[0], guest[1] = guest[1], guest[0]
    return {0, 1}


def damage(guest: Guest, inject: Injection | None, verify: bool = True) -> tuple[Failure | None, set[int]]:
    """Run, remember, run, pause, inject, resume, and say what the guest found, and the blocks it may name."""
    guest.start(Pattern.RANDOM if verify else Pattern.SEQUENTIAL)
    guest.run_steps(2 * guest.blocks)
    guest.pause()
    old = bytes(guest.memory)
    while bytes(guest[0]) == old_block(old, 0):  # until the first thread, too, has written: others may have had the CPUs
        guest.workload.resume()
        guest.run_steps(2 * guest.blocks)
        guest.pause()
    written = [block for block in guest.data_blocks() if guest[block] != old_block(old, block)]
    assert len(written) > 1
    at_fault = inject(guest, old, written) if inject else set()
    guest.workload.resume()
    if verify:
        return guest.verify().failure, at_fault
    return guest.wait(lambda report: report.phase == Phase.FAILED).failure, at_fault


INJECTIONS: list[tuple[Injection, FailureKind]] = [
    (lost, FailureKind.LOST),
    (stale, FailureKind.STALE),
    (torn, FailureKind.TORN),
    (half_arrived, FailureKind.TORN),
    (swapped, FailureKind.SWAPPED),
    (zeroed, FailureKind.ZEROED),
    (write_lost, FailureKind.WRITE_LOST),
    (write_repeated, FailureKind.WRITE_REPEATED),
    (rolled_back, FailureKind.ROLLED_BACK),
    (one_page_and_its_entry_rolled_back, FailureKind.ROLLED_BACK),
    (table_stale, FailureKind.STALE),
    (table_zeroed, FailureKind.ZEROED),
    (table_lost, FailureKind.LOST),
    (tables_swapped, FailureKind.SWAPPED),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inject", "kind"), INJECTIONS, ids=[inject.__name__ for inject, _ in INJECTIONS])
def test_damage_is_named(make_guest: Callable[..., Guest], inject: Injection, kind: FailureKind, threads: int) -> None:
    guest = make_guest(2000 * threads, threads)
    failure, at_fault = damage(guest, inject)
    assert failure is not None
    assert failure.kind == kind
    assert failure.block_index in at_fault, f"{failure}, injected in {at_fault}"
    assert f"{'pages' if kind == FailureKind.ROLLED_BACK else 'page'} {failure.block_index} " in str(failure)
    tables, data = guest.slices()[failure.thread]
    assert failure.block_count == (len(tables) + len(data) if kind == FailureKind.ROLLED_BACK else 1)
    assert guest.workload.report().to_dict()["failure"] == str(failure)
    for call in (guest.pause, guest.workload.save, guest.workload.resume):
        with pytest.raises(WorkloadFailedError, match=str(failure.block_index)):
            call()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_run_without_damage_is_intact(make_guest: Callable[..., Guest], threads: int) -> None:
    assert damage(make_guest(2000 * threads, threads), None) == (None, set())


@pytest.mark.parametrize("inject", [lost, stale, torn, swapped, zeroed, write_lost, write_repeated])
def test_steps_alone_find_a_damaged_page(make_guest: Callable[..., Guest], inject: Injection) -> None:
    failure, at_fault = damage(make_guest(200), inject, verify=False)
    assert failure is not None
    assert failure.block_index in at_fault


def test_damage_on_the_way_to_another_host_is_named(make_guest: Callable[..., Guest]) -> None:
    source, destination = make_guest(500), make_guest(500)
    source.start()
    source.run_steps(2000)
    source.pause()
    destination.workload.load(source.workload.save())
    destination.memory[:] = source.memory[:]
    destination[77] = bytes(BLOCK_BYTES)
    destination.workload.resume()
    failure = destination.verify().failure
    assert failure is not None
    assert (failure.kind, failure.block_index, failure.got) == (FailureKind.ZEROED, 77, 0)
    assert str(failure).startswith("page 77 of 4 KiB (offset 0x4d000, thread 0) zeroed: version ")
