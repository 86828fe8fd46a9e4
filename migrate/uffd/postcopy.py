"""What postcopy asks of a userfaultfd, in one place for guests and daemons.

Always MISSING|MINOR: with MINOR alone a touch of a hole reads zeroes without any event (tests/kernel/test_registering.py).
"""

import errno

from migrate.uffd.constants import Feature, Ioctl, Mode
from migrate.uffd.descriptor import Userfaultfd
from migrate.uffd.errors import UserfaultfdError

MODES_POSTCOPY = Mode.MISSING | Mode.MINOR
FEATURES_SHMEM = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM
FEATURES_HUGETLBFS = Feature.MISSING_HUGETLBFS | Feature.MINOR_HUGETLBFS
FEATURES_ALLOWED = FEATURES_SHMEM | FEATURES_HUGETLBFS
"""Events would have to be read for the guest's own calls to return, and EVENT_FORK hands descriptors to who reads them.
EVENT_REMOVE is for those guests that say what it means."""


def open_for_postcopy(*, hugetlb: bool = False, remove_events: bool = False) -> Userfaultfd:
    """With minor faults; taken inside the kernel too where that is permitted. Raises HostLacksError."""
    events = Feature.EVENT_REMOVE if remove_events else Feature(0)
    return Userfaultfd.open(FEATURES_SHMEM | (FEATURES_HUGETLBFS if hugetlb else Feature(0)) | events)


def register_for_postcopy(userfaultfd: Userfaultfd, address: int, size_bytes: int) -> None:
    """Raises UserfaultfdError: EINVAL (not shmem or hugetlbfs, or no UFFDIO_API), EBUSY, EPERM, ENOTTY."""
    ioctls = userfaultfd.register(address, size_bytes, MODES_POSTCOPY)
    if Ioctl.CONTINUE not in ioctls:
        raise UserfaultfdError("UFFDIO_REGISTER", errno.EOPNOTSUPP, expected="a range that allows UFFDIO_CONTINUE")
