"""What the binding itself decides: outcomes, ownership of descriptors, errors with what they expect. Little memory, no faults."""

import errno
import itertools
import os
import re
from pathlib import Path

import pytest

from migrate import uffd
from migrate.uffd import (
    Feature,
    FeaturesMissingError,
    Filled,
    Ioctl,
    Mode,
    Operation,
    Outcome,
    PageFaultFlag,
    Userfaultfd,
    UserfaultfdError,
    UserfaultfdUnavailableError,
    features_of,
    outcome_of,
)
from migrate.uffd._uffd import ffi, lib
from migrate.uffd.constants import RELEASES
from migrate.uffd.events import Fork, PageFault, Remap, Remove, UnknownEvent, Unmap, event_of
from migrate.uffd.outcomes import EXPECTED
from migrate.uffd.pagemap import Category

NO_FEATURES = Feature(0)

OUTCOMES = {
    errno.EEXIST: Outcome.ALREADY_MAPPED,
    errno.EAGAIN: Outcome.AGAIN,
    errno.ENOENT: Outcome.RANGE_GONE,
    errno.ESRCH: Outcome.PROCESS_GONE,
    errno.ENOMEM: Outcome.NO_MEMORY,
    errno.ENOSPC: Outcome.NO_MEMORY,
}
OF_ONE = {(Operation.CONTINUE, errno.EFAULT): Outcome.NO_PAGE, (Operation.MOVE, errno.EBUSY): Outcome.BUSY}


@pytest.mark.parametrize("operation", Operation)
def test_every_errno_is_an_outcome_or_an_error(operation: Operation) -> None:
    """All 133 of them; progress makes an outcome of EAGAIN alone."""
    assert outcome_of(operation, 0) is Outcome.DONE
    for error_number in errno.errorcode:
        expected = OUTCOMES.get(error_number) or OF_ONE.get((operation, error_number))
        for progress_bytes in (-error_number, 0):
            assert outcome_of(operation, error_number, progress_bytes) is expected
        with_progress = Outcome.PARTIAL if error_number == errno.EAGAIN else expected
        assert outcome_of(operation, error_number, 4096) is with_progress


def test_every_operation_says_what_it_expects() -> None:
    assert EXPECTED.keys() == set(Operation)


def test_filled_is_true_when_all_is_done() -> None:
    assert Filled(4096, Outcome.DONE)
    for outcome in set(Outcome) - {Outcome.DONE}:
        assert not Filled(4096, outcome, errno.EAGAIN)
    assert str(Filled(4096, Outcome.NO_PAGE, errno.EFAULT)) == "no-page after 4096 bytes by EFAULT (Bad address)"


class Kernel:
    """In place of one fill ioctl: what it answers, call by call; the calls it was given."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers, self.calls = list(answers), []

    def __call__(self, descriptor: int, address: int, size_bytes: int, mode: int, field) -> int:
        self.calls.append((address, size_bytes, mode))
        error_number, field[0] = self.answers.pop(0)
        return error_number


class Library:
    """The extension with one of its functions replaced."""

    def __init__(self, **replaced: Kernel) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> object:
        return self._replaced.get(name) or getattr(lib, name)


@pytest.mark.parametrize(
    ("answers", "expected", "calls"),
    [
        ([(errno.EAGAIN, 4096), (errno.EAGAIN, 8192), (0, 4096)], Filled(16384, Outcome.DONE, 0, 4096), [0, 4096, 12288]),
        (
            [(errno.EAGAIN, 4096), (errno.EEXIST, -errno.EEXIST)],
            Filled(4096, Outcome.ALREADY_MAPPED, errno.EEXIST, -errno.EEXIST),
            [0, 4096],
        ),
        ([(errno.EAGAIN, -errno.EAGAIN)], Filled(0, Outcome.AGAIN, errno.EAGAIN, -errno.EAGAIN), [0]),
        ([(errno.EAGAIN, 0)], Filled(0, Outcome.AGAIN, errno.EAGAIN, 0), [0]),  # a kernel that left the field alone
        ([(errno.EAGAIN, 4096), (errno.EAGAIN, 0)], Filled(4096, Outcome.AGAIN, errno.EAGAIN, 0), [0, 4096]),
    ],
)
def test_fill_steps_on(
    monkeypatch: pytest.MonkeyPatch, answers: list[tuple[int, int]], expected: Filled, calls: list[int]
) -> None:
    """After EAGAIN with progress, from where it came to, to the same end; never after EAGAIN without."""
    kernel = Kernel(*answers)
    monkeypatch.setattr(uffd.descriptor, "lib", Library(uffd_continue=kernel))
    userfaultfd = Userfaultfd(-1, NO_FEATURES, owned=False)
    assert userfaultfd.continue_(1 << 20, 16384, wp=True, dontwake=True) == expected
    mode = lib.UFFDIO_CONTINUE_MODE_WP | lib.UFFDIO_CONTINUE_MODE_DONTWAKE
    assert kernel.calls == [((1 << 20) + done, 16384 - done, mode) for done in calls]


def test_error_after_progress_says_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel((errno.EAGAIN, 4096), (errno.EIO, -errno.EIO))
    monkeypatch.setattr(uffd.descriptor, "lib", Library(uffd_continue=kernel))
    with pytest.raises(UserfaultfdError, match="UFFDIO_CONTINUE of 16384 bytes at 0x100000: expected page-aligned") as raised:
        Userfaultfd(-1, NO_FEATURES, owned=False).continue_(1 << 20, 16384)
    assert (raised.value.error_number, raised.value.bytes_done) == (errno.EIO, 4096)


# --- bits -----------------------------------------------------------------------------------------------------------


def test_every_feature_has_a_release() -> None:
    assert RELEASES.keys() == set(Feature)
    assert Feature(sum(Feature)) == Feature((1 << len(Feature)) - 1)


def test_bits_without_a_name_are_kept() -> None:
    """Of a kernel to come: a daemon must see that a guest has asked for something that nobody here knows."""
    unknown = Feature(1 << 40)
    assert (unknown | Feature.SIGBUS).without(Feature.SIGBUS | Feature.POISON) == unknown


def test_numbers_are_the_kernels() -> None:
    """Those that are part of its binary interface for ever, against values from its documentation and not from its headers."""
    assert [int(mode) for mode in Mode] == [1, 2, 4]
    assert [int(flag) for flag in PageFaultFlag] == [1, 2, 4]
    assert Ioctl.CONTINUE == 1 << 7
    assert Ioctl.API == 1 << 63
    assert Category.WRITTEN == 2


def test_no_number_is_typed_in_python(repository: Path) -> None:
    """Constants come from the compiler: a hand-typed ioctl fails in silence."""
    for path in (repository / "migrate/uffd").glob("*.py"):
        assert not re.findall(r"0x[Aa][Aa]\b|\b_IO[WR]*\(|ioctl\(", path.read_text()), path
    for line in (repository / "migrate/uffd/cdef.txt").read_text().splitlines():
        assert not line.startswith("#define") or line.endswith("..."), line


# --- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "features", "expected"),
    [
        ({"event": lib.UFFD_EVENT_PAGEFAULT, "address": 4096, "flags": 5}, NO_FEATURES, PageFault(4096, PageFaultFlag(5), None)),
        (
            {"event": lib.UFFD_EVENT_PAGEFAULT, "address": 1, "thread_id": 9},
            Feature.THREAD_ID,
            PageFault(1, PageFaultFlag(0), 9),
        ),
        ({"event": lib.UFFD_EVENT_FORK, "descriptor": 7}, NO_FEATURES, Fork(7)),
        ({"event": lib.UFFD_EVENT_REMAP, "address": 1, "to": 2, "size_bytes": 3}, NO_FEATURES, Remap(1, 2, 3)),
        ({"event": lib.UFFD_EVENT_REMOVE, "address": 1, "end": 2}, NO_FEATURES, Remove(1, 2)),
        ({"event": lib.UFFD_EVENT_UNMAP, "address": 1, "end": 2}, NO_FEATURES, Unmap(1, 2)),
        ({"event": 99}, NO_FEATURES, UnknownEvent(99)),
    ],
)
def test_message_becomes_an_event(message: dict[str, int], features: Feature, expected: uffd.Event) -> None:
    assert event_of(ffi.new("struct uffd_event *", message), features) == expected


# --- descriptors ----------------------------------------------------------------------------------------------------


def is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").exists()


@pytest.mark.requires("uffd")
def test_who_owns_a_descriptor() -> None:
    opened = Userfaultfd.open(Feature.THREAD_ID)
    descriptor = opened.fileno()
    with Userfaultfd.borrow(descriptor) as borrowed:
        assert borrowed.features == Feature.THREAD_ID
    assert is_open(descriptor)
    with opened.duplicate() as duplicate:
        second = duplicate.fileno()
        assert duplicate.features == Feature.THREAD_ID
        assert not os.get_inheritable(second)
    assert not is_open(second)
    assert opened.detach() == descriptor
    opened.close()
    assert is_open(descriptor)
    with Userfaultfd.adopt(descriptor) as adopted:
        assert adopted.features == Feature.THREAD_ID
    assert not is_open(descriptor)
    adopted.close()  # once more does nothing


@pytest.mark.requires("uffd")
def test_nothing_is_closed_by_being_forgotten() -> None:
    """With the last descriptor absent pages read as zeroes: only close() does that."""
    descriptor = Userfaultfd.open().fileno()
    assert is_open(descriptor)
    os.close(descriptor)


def test_closed_one_is_ebadf() -> None:
    closed = Userfaultfd(-1, NO_FEATURES, owned=True)
    calls = [
        lambda: closed.register(4096, 4096, Mode.MISSING),
        lambda: closed.unregister(4096, 4096),
        lambda: closed.wake(4096, 4096),
        lambda: closed.copy(4096, 4096, 4096),
        lambda: closed.zeropage(4096, 4096),
        lambda: closed.continue_(4096, 4096),
        lambda: closed.poison(4096, 4096),
        lambda: closed.move(4096, 8192, 4096),
        lambda: closed.writeprotect(4096, 4096, protect=True),
        closed.read_events,
    ]
    for call in calls:
        with pytest.raises(UserfaultfdError) as raised:
            call()
        assert raised.value.error_number == errno.EBADF


def test_what_is_not_a_userfaultfd() -> None:
    """Adopted without a word, it has no features and its ioctls say ENOTTY."""
    with Userfaultfd.adopt(os.memfd_create("no userfaultfd")) as other:
        assert other.features == NO_FEATURES
        with pytest.raises(UserfaultfdError, match="ENOTTY"):
            other.register(4096, 4096, Mode.MISSING | Mode.MINOR)
        with pytest.raises(UserfaultfdError, match="ENOTTY"):
            other.wake(4096, 4096)


def test_features_of_nothing() -> None:
    with pytest.raises(FileNotFoundError):
        features_of(1 << 20)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "syscall"), list(itertools.product((errno.ENOENT, errno.EACCES), (errno.EPERM, errno.ENOSYS)))
)
@pytest.mark.parametrize("user_mode_only", [False, True])
def test_refusal_names_both_ways_and_a_remedy(device: int, syscall: int, user_mode_only: bool) -> None:
    error = UserfaultfdUnavailableError(device, syscall, user_mode_only=user_mode_only)
    assert (error.device_error_number, error.syscall_error_number) == (device, syscall)
    assert f"/dev/userfaultfd: {errno.errorcode[device]}" in str(error)
    assert f"userfaultfd(2): {errno.errorcode[syscall]}" in str(error)
    assert error.remedy
    assert error.code == "host-lacks"


def test_missing_features_name_the_release() -> None:
    error = FeaturesMissingError(Feature.MINOR_SHMEM | Feature.WP_ASYNC, errno.EINVAL)
    assert error.remedy.startswith("run Linux 6.7 or later")
    assert error.feature == "userfaultfd with MINOR_SHMEM, WP_ASYNC"
