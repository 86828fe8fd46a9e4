"""What read(2) on a userfaultfd tells, as typed values.

Sources: struct uffd_msg in include/uapi/linux/userfaultfd.h; "Non-cooperative userfaultfd" in
Documentation/admin-guide/mm/userfaultfd.rst. Shown in tests/kernel/test_events.py.
"""

from dataclasses import dataclass
from typing import Any

from migrate.uffd._uffd import lib
from migrate.uffd.constants import Feature, PageFaultFlag


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at ``address``: the byte that it touched with Feature.EXACT_ADDRESS, else the beginning of its page.

    ``thread_id`` in the reader's pid namespace with Feature.THREAD_ID, else None. A message once read is not sent again.
    """

    address: int
    flags: PageFaultFlag
    thread_id: int | None


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked. ``descriptor`` is the child's userfaultfd, open in this process and owned by who gets this event:
    ``Userfaultfd.adopt`` it and close it. Closing it makes absent pages of the child read as zeroes, so nothing here does."""

    descriptor: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) moved a registered range; the new place is registered."""

    from_address: int
    to_address: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Remove:
    """MADV_DONTNEED, MADV_FREE or MADV_REMOVE of [start, end): the same event for content that stays in the file and content
    that is gone; the next fault there tells."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """[start, end) is not there any more."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """Of a kernel that knows more events than this binding."""

    number: int


Event = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent


def event_of(message: Any, features: Feature) -> Event:
    """``message``: one struct uffd_event (uffd.h)."""
    match message.event:
        case lib.UFFD_EVENT_PAGEFAULT:
            thread_id = int(message.thread_id) if Feature.THREAD_ID in features else None
            return PageFault(int(message.address), PageFaultFlag(message.flags), thread_id)
        case lib.UFFD_EVENT_FORK:
            return Fork(int(message.descriptor))
        case lib.UFFD_EVENT_REMAP:
            return Remap(int(message.address), int(message.to), int(message.size_bytes))
        case lib.UFFD_EVENT_REMOVE:
            return Remove(int(message.address), int(message.end))
        case lib.UFFD_EVENT_UNMAP:
            return Unmap(int(message.address), int(message.end))
        case number:
            return UnknownEvent(int(number))
