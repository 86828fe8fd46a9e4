"""How a fill ioctl ended, by name. The one place where an errno becomes an outcome, or does not.

All five (COPY, ZEROPAGE, CONTINUE, POISON, MOVE) and WRITEPROTECT answer alike. A range that ends early is EAGAIN with the
bytes done in the result field; the errno of what stopped it comes with the next call, which begins there. The result field is
signed: bytes, or a negative errno. Sources: userfaultfd_copy and its siblings in fs/userfaultfd.c, mfill_atomic and move_pages
in mm/userfaultfd.c. Shown in tests/kernel/test_resolving.py.
"""

import errno
from dataclasses import dataclass
from enum import StrEnum

from migrate.errors import errno_text


class Operation(StrEnum):
    COPY = "UFFDIO_COPY"
    ZEROPAGE = "UFFDIO_ZEROPAGE"
    CONTINUE = "UFFDIO_CONTINUE"
    POISON = "UFFDIO_POISON"
    MOVE = "UFFDIO_MOVE"
    WRITEPROTECT = "UFFDIO_WRITEPROTECT"


class Outcome(StrEnum):
    DONE = "done"  # the whole range
    PARTIAL = "partial"  # one_call only: the beginning of the range; why not all of it, the next call says
    ALREADY_MAPPED = "already-mapped"  # EEXIST: a page is there. It wakes nobody: wake() by hand
    NO_PAGE = "no-page"  # EFAULT of CONTINUE: the file has a hole there
    BUSY = "busy"  # EBUSY of MOVE: the source page is shared with another process, or pinned
    AGAIN = "again"  # EAGAIN: an event is unread or the address space is changing: read events, then retry
    RANGE_GONE = "range-gone"  # ENOENT: not one registered mapping (any more); of MOVE also: the source has a hole
    PROCESS_GONE = "process-gone"  # ESRCH: the process that opened the userfaultfd has no memory any more
    NO_MEMORY = "no-memory"  # ENOMEM, ENOSPC. Not of a used-up hugetlbfs pool: there COPY says EEXIST (test_memory_files.py)


_OF_ALL = {
    errno.EEXIST: Outcome.ALREADY_MAPPED,
    errno.EAGAIN: Outcome.AGAIN,
    errno.ENOENT: Outcome.RANGE_GONE,
    errno.ESRCH: Outcome.PROCESS_GONE,
    errno.ENOMEM: Outcome.NO_MEMORY,
    errno.ENOSPC: Outcome.NO_MEMORY,
}
_OF_ONE = {
    (Operation.CONTINUE, errno.EFAULT): Outcome.NO_PAGE,  # of COPY, EFAULT is a source that cannot be read: an error
    (Operation.MOVE, errno.EBUSY): Outcome.BUSY,
}
EXPECTED: dict[str, str] = {
    Operation.COPY: "page-aligned to_address and size_bytes > 0 within one registered range, a source that can be read, "
    "wp=True only where WP is registered",
    Operation.ZEROPAGE: "page-aligned address and size_bytes > 0 within one registered range that is not hugetlbfs",
    Operation.CONTINUE: "page-aligned address and size_bytes > 0 within one range of shmem or hugetlbfs that allows CONTINUE, "
    "wp=True only where WP is registered",
    Operation.POISON: "page-aligned address and size_bytes > 0 within one registered range, Linux 6.6 or later",
    Operation.MOVE: "page-aligned addresses and size_bytes > 0, both ranges private anonymous memory, Linux 6.8 or later",
    Operation.WRITEPROTECT: "page-aligned address and size_bytes > 0 within ranges registered with WP",
}
"""What each needs; for the messages of errors."""


@dataclass(frozen=True, slots=True)
class Filled:
    """``bytes_done`` from the beginning of the range; ``error_number`` is the errno behind the outcome, 0 for DONE.

    ``field`` is the result field as the kernel left it after the last call: bytes, or a negative errno.
    """

    bytes_done: int
    outcome: Outcome
    error_number: int = 0
    field: int = 0

    def __bool__(self) -> bool:
        return self.outcome is Outcome.DONE

    def __str__(self) -> str:
        why = f" by {errno_text(self.error_number)}" if self.error_number else ""
        return f"{self.outcome} after {self.bytes_done} bytes{why}"


def outcome_of(operation: Operation, error_number: int, progress_bytes: int = 0) -> Outcome | None:
    """None: an error that no caller can go on from. ``progress_bytes``: the result field, where it is positive."""
    if error_number == 0:
        return Outcome.DONE
    if error_number == errno.EAGAIN and progress_bytes > 0:
        return Outcome.PARTIAL
    return _OF_ALL.get(error_number) or _OF_ONE.get((operation, error_number))
