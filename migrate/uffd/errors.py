"""What raises: the ends that no caller can go on from. What it can go on from is an Outcome (outcomes.py)."""

import errno

from migrate.errors import HostLacksError, PostcopyError, errno_text
from migrate.host.sentences import userfaultfd_refused
from migrate.uffd.constants import RELEASES, Feature


class UserfaultfdError(PostcopyError):
    """A call on a userfaultfd failed. ``bytes_done``: what a fill ioctl had done of its range before."""

    code = "userfaultfd-failed"

    def __init__(self, what: str, error_number: int, *, expected: str, bytes_done: int = 0) -> None:
        self.error_number, self.bytes_done = error_number, bytes_done
        super().__init__(what, expected=expected, got=errno_text(error_number))


class PagemapScanError(PostcopyError):
    """PAGEMAP_SCAN failed."""

    code = "pagemap-scan-failed"

    def __init__(self, what: str, error_number: int, *, expected: str) -> None:
        self.error_number = error_number
        super().__init__(what, expected=expected, got=errno_text(error_number))


class UserfaultfdUnavailableError(HostLacksError):
    """No userfaultfd for this process. Both ways were tried; each has its errno (0: that way was not the one that failed)."""

    def __init__(self, device_error_number: int, syscall_error_number: int, *, user_mode_only: bool) -> None:
        self.device_error_number, self.syscall_error_number = device_error_number, syscall_error_number
        self.user_mode_only = user_mode_only
        refused = userfaultfd_refused(device_error_number, syscall_error_number, user_mode_only=user_mode_only)
        super().__init__("userfaultfd", *refused)


class FeaturesMissingError(HostLacksError):
    """A userfaultfd can be had, ``missing`` of what was asked for cannot."""

    def __init__(self, missing: Feature, error_number: int) -> None:
        self.missing, self.error_number = missing, error_number
        names = ", ".join(str(one.name) for one in missing) or f"feature bits {missing:#x}"
        releases = [RELEASES[one] for one in missing]
        if error_number == errno.EPERM:
            remedy = "grant CAP_SYS_PTRACE: whoever reads fork events gets descriptors of other processes' memory"
        elif releases:
            remedy = "run Linux {}.{} or later, built with it for this architecture".format(*max(releases))
        else:
            remedy = "ask for features that have a name in migrate.uffd.Feature"
        super().__init__(f"userfaultfd with {names}", f"UFFDIO_API: {errno_text(error_number)}", remedy)
