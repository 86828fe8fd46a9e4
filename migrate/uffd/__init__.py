"""userfaultfd as a guest uses it: open, ask for minor faults, register. Typed, with errors that say what to change.

Sources: Documentation/admin-guide/mm/userfaultfd.rst and fs/userfaultfd.c of Linux 6.18. Always MISSING|MINOR: with
MINOR alone a touch of a hole reads zeroes without any event (tests/kernel/test_registering.py).
"""

import errno
import os
from pathlib import Path

from migrate.errors import HostLacksError, PostcopyError, errno_text
from migrate.uffd._uffd import ffi, lib

MODES_POSTCOPY: int = lib.UFFDIO_REGISTER_MODE_MISSING | lib.UFFDIO_REGISTER_MODE_MINOR
FEATURES_SHMEM: int = lib.UFFD_FEATURE_MISSING_SHMEM | lib.UFFD_FEATURE_MINOR_SHMEM
FEATURES_HUGETLBFS: int = lib.UFFD_FEATURE_MISSING_HUGETLBFS | lib.UFFD_FEATURE_MINOR_HUGETLBFS
FEATURES_ALLOWED: int = FEATURES_SHMEM | FEATURES_HUGETLBFS | 1 << 31  # the kernel's own mark of UFFDIO_API
"""Events would have to be read for the guest's own calls to return, and EVENT_FORK hands descriptors to who reads them."""
_IOCTL_CONTINUE = 1 << lib._UFFDIO_CONTINUE


class UserfaultfdError(PostcopyError):
    """An ioctl on a userfaultfd failed; ``error_number`` is its errno."""

    code = "userfaultfd-failed"

    def __init__(self, what: str, error_number: int, *, expected: str) -> None:
        self.error_number = error_number
        super().__init__(what, expected=expected, got=errno_text(error_number))


def open_userfaultfd(*, hugetlb: bool = False, user_mode_only: bool | None = None) -> int:
    """A non-blocking userfaultfd with minor faults. ``user_mode_only`` None: full where permitted, else user mode.

    Raises HostLacksError naming both ways tried and the one thing to change.
    """
    opened = ffi.new("struct uffd_opened *")
    for only in (False, True) if user_mode_only is None else (user_mode_only,):
        lib.uffd_open(int(only), opened)
        if opened.fd >= 0:
            break
    else:
        raise HostLacksError(
            "userfaultfd",
            f"/dev/userfaultfd: {errno_text(opened.device_errno)}; userfaultfd(2): {errno_text(opened.syscall_errno)}",
            _remedy(opened.syscall_errno),
        )
    wanted = FEATURES_SHMEM | (FEATURES_HUGETLBFS if hugetlb else 0)
    features = ffi.new("uint64_t *", wanted)
    error_number = lib.uffd_api(opened.fd, features)
    if error_number:
        os.close(opened.fd)
        raise HostLacksError(
            "userfaultfd minor faults",
            f"UFFDIO_API: {errno_text(error_number)}",
            "run Linux 5.14 or later (5.13 for hugetlbfs alone)",
        )
    return int(opened.fd)


def _remedy(syscall_errno: int) -> str:
    if syscall_errno == errno.ENOSYS:
        return "use a kernel with CONFIG_USERFAULTFD, or allow the userfaultfd system call in the seccomp profile"
    return (
        "give this user access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1, or grant CAP_SYS_PTRACE; "
        "if one of them is in place, look for a seccomp or SELinux denial"
    )


def register(userfaultfd: int, address: int, size_bytes: int, modes: int = MODES_POSTCOPY) -> None:
    """Register a range. Raises UserfaultfdError: EINVAL (not shmem or hugetlbfs, or no UFFDIO_API), EBUSY, EPERM, ENOTTY."""
    ioctls = ffi.new("uint64_t *")
    error_number = lib.uffd_register(userfaultfd, address, size_bytes, modes, ioctls)
    if error_number:
        expected = "a userfaultfd with minor faults over a shared, writable shmem or hugetlbfs mapping, not registered elsewhere"
        raise UserfaultfdError(
            f"UFFDIO_REGISTER MISSING|MINOR of {size_bytes} bytes at {address:#x}", error_number, expected=expected
        )
    if not ioctls[0] & _IOCTL_CONTINUE:
        raise UserfaultfdError("UFFDIO_REGISTER", errno.EOPNOTSUPP, expected="a range that allows UFFDIO_CONTINUE")


def features_of(userfaultfd: int) -> int:
    """The features that UFFDIO_API enabled on a descriptor; 0 for none yet, or for what is not a userfaultfd.

    Source: userfaultfd_show_fdinfo in fs/userfaultfd.c, ``API: api:features:all features`` in hexadecimal.
    """
    for line in Path(f"/proc/self/fdinfo/{userfaultfd}").read_text().splitlines():
        if line.startswith("API:"):
            return int(line.split(":")[2], 16)
    return 0
