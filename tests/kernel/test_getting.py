"""Getting a userfaultfd, and what its descriptor is: opened, refused, duplicated, read."""

import errno
import os
import select
import struct
from pathlib import Path

import pytest

from migrate.uffd import (
    Feature,
    FeaturesMissingError,
    Ioctl,
    Mode,
    PageFault,
    PageFaultFlag,
    Userfaultfd,
    UserfaultfdError,
    UserfaultfdUnavailableError,
    features_of,
    probe,
)
from migrate.uffd._uffd import ffi, lib

from .cases import case
from .memory import ALL, ANON, SHMEM, Calling, Kind, Memory, kernel_reads

NOBODY = 65534
MESSAGE_BYTES = 32


def raw_descriptor() -> int:
    """Without UFFDIO_API."""
    opened = ffi.new("struct uffd_opened *")
    lib.uffd_open(1, opened)
    assert opened.fd >= 0
    return int(opened.fd)


def become_nobody() -> None:
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@case()
def test_probe_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    supported = probe()
    assert Feature.MINOR_SHMEM in supported.features
    assert supported.ioctls == Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
    assert os.listdir("/proc/self/fd") == before


@case()
def test_api_succeeds_once() -> None:
    with Userfaultfd.open() as userfaultfd:
        assert lib.uffd_api(userfaultfd.fileno(), ffi.new("uint64_t *", Feature.EVENT_REMOVE)) == errno.EINVAL
        assert features_of(userfaultfd.fileno()) == Feature(0)


@case()
def test_unknown_feature_is_named() -> None:
    """UFFDIO_API refuses all for one bit that it does not know; the descriptor is as it was and tells which."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FeaturesMissingError) as raised:
        Userfaultfd.open(Feature(1 << 63 | Feature.MINOR_SHMEM))
    assert (raised.value.missing, raised.value.error_number) == (Feature(1 << 63), errno.EINVAL)
    assert "0x8000000000000000" in raised.value.feature
    assert os.listdir("/proc/self/fd") == before


@case(requires=["root"])
def test_fork_events_need_a_capability() -> None:
    become_nobody()
    with pytest.raises(FeaturesMissingError) as raised:
        Userfaultfd.open(Feature.EVENT_FORK, user_mode_only=True)
    assert (raised.value.missing, raised.value.error_number) == (Feature.EVENT_FORK, errno.EPERM)
    assert "CAP_SYS_PTRACE" in raised.value.remedy


@case(requires=["root"])
def test_refusal_tells_both_ways() -> None:
    become_nobody()
    if int(Path("/proc/sys/vm/unprivileged_userfaultfd").read_text()) or os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        Userfaultfd.open(user_mode_only=False).close()  # this machine lets everyone
        return
    with pytest.raises(UserfaultfdUnavailableError) as raised:
        Userfaultfd.open(user_mode_only=False)
    assert raised.value.device_error_number in (errno.EACCES, errno.ENOENT)
    assert raised.value.syscall_error_number == errno.EPERM
    assert "/dev/userfaultfd" in raised.value.why
    assert "vm.unprivileged_userfaultfd is 0" in raised.value.why
    assert "/dev/userfaultfd" in raised.value.remedy


@case(ALL, requires=["root"])
def test_user_mode_only_needs_no_privilege(kind: Kind) -> None:
    """It is what is left without one. The kernel's own touch of an absent page then fails instead of faulting."""
    become_nobody()
    memory = Memory(kind)
    memory.open(user_mode_only=None)
    memory.register(Mode.MISSING)
    assert kernel_reads(memory.at(0)) == (errno.EFAULT, -1)
    assert memory.events() == []
    touch, flags = memory.fault(0)
    assert flags == 0
    assert memory.copy(0, 7)
    assert touch.ends() == 7
    assert kernel_reads(memory.at(0)) == (0, 7)


@case(ALL, requires=["uffd-full"])
def test_full_one_takes_the_kernels_faults(kind: Kind) -> None:
    memory = Memory(kind)
    memory.open(user_mode_only=False)
    memory.register(Mode.MISSING)
    reading = Calling(kernel_reads, memory.at(0))
    assert memory.next_event() == PageFault(memory.at(0), PageFaultFlag(0), None)
    assert memory.copy(0, 7)
    assert reading.ends() == (0, 7)


@case()
def test_without_api_nothing_works() -> None:
    memory = Memory(SHMEM)
    memory.userfaultfd = Userfaultfd.adopt(raw_descriptor())
    for call in (memory.events, memory.unregister, lambda: memory.register(Mode.MISSING), lambda: memory.continue_(0)):
        with pytest.raises(UserfaultfdError) as raised:
            call()
        assert raised.value.error_number == errno.EINVAL


@case()
def test_blocking_one_polls_as_error() -> None:
    for blocking, revents in ((False, []), (True, [select.POLLERR])):
        with Userfaultfd.open(blocking=blocking) as userfaultfd:
            poll = select.poll()
            poll.register(userfaultfd.fileno(), select.POLLIN)
            assert [got for _, got in poll.poll(0)] == revents


@case()
def test_anyone_with_a_duplicate_can_make_it_blocking() -> None:
    """O_NONBLOCK belongs to the open file. What still does not hang is preadv2(RWF_NOWAIT)."""
    memory = Memory(ANON)
    memory.open()
    memory.register(Mode.MISSING)
    with memory.userfaultfd.duplicate() as theirs:
        os.set_blocking(theirs.fileno(), True)
        assert os.get_blocking(memory.userfaultfd.fileno())
        with pytest.raises(BlockingIOError):
            os.preadv(memory.userfaultfd.fileno(), [bytearray(MESSAGE_BYTES)], -1, os.RWF_NOWAIT)
        touch = memory.touch(1)
        [event] = memory.events()  # waits for it
        assert isinstance(event, PageFault)
        assert memory.copy(1, 7)
        assert touch.ends() == 7


@case()
def test_read_takes_whole_messages() -> None:
    memory = Memory(ANON)
    memory.open()
    memory.register(Mode.MISSING)
    touch = memory.touch(1)
    memory.wait_for_events()
    for size_bytes in (0, MESSAGE_BYTES - 1):
        with pytest.raises(OSError, match="Invalid argument"):
            os.read(memory.userfaultfd.fileno(), size_bytes)
    data = os.read(memory.userfaultfd.fileno(), 2 * MESSAGE_BYTES - 1)
    assert len(data) == MESSAGE_BYTES
    assert struct.unpack_from("=B7xQQ", data) == (lib.UFFD_EVENT_PAGEFAULT, 0, memory.at(1))
    assert memory.copy(1, 7)
    assert touch.ends() == 7


@case()
def test_read_events_below_one_is_einval() -> None:
    with Userfaultfd.open() as userfaultfd:
        with pytest.raises(UserfaultfdError) as raised:
            userfaultfd.read_events(0)
        assert raised.value.error_number == errno.EINVAL
