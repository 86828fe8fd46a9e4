"""A userfaultfd: opened, adopted or borrowed; its ioctls as methods.

Recoverable ends of a fill are outcomes (outcomes.py), the rest raises UserfaultfdError with the errno and what was expected.
Nothing is closed behind the owner's back, by no destructor either: closing the last descriptor wakes every waiting thread,
and absent pages then read as zeroes (tests/kernel/test_letting_go.py).
Sources: Documentation/admin-guide/mm/userfaultfd.rst, fs/userfaultfd.c (the function is named where it matters).
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrate.uffd._uffd import ffi, lib
from migrate.uffd.constants import Feature, Ioctl, Mode
from migrate.uffd.errors import FeaturesMissingError, UserfaultfdError, UserfaultfdUnavailableError
from migrate.uffd.events import Event, event_of
from migrate.uffd.outcomes import EXPECTED, Filled, Operation, Outcome, outcome_of

NO_FEATURES = Feature(0)
READ_MAX: int = lib.UFFD_READ_MAX
"""Events that one read_events gives at most."""
_INITIALIZED = 1 << 31  # the kernel's own mark that UFFDIO_API is done (UFFD_FEATURE_INITIALIZED in fs/userfaultfd.c)
_EXPECTED_RANGE = "page-aligned address and size_bytes > 0 within the process that opened the userfaultfd"


@dataclass(frozen=True, slots=True)
class Supported:
    """What this kernel offers to this user. ``user_mode_only``: no faults taken inside the kernel (read(2), KVM)."""

    features: Feature
    ioctls: Ioctl
    user_mode_only: bool


class Userfaultfd:
    """One descriptor. Its methods may be called from any thread, and from any process that holds a duplicate: they act on the
    memory of the process that opened it."""

    def __init__(self, descriptor: int, features: Feature, *, owned: bool) -> None:
        """For ``open``, ``adopt`` and ``borrow``, which say who closes it."""
        self._descriptor, self._owned = descriptor, owned
        self.features = features
        self._undelivered: list[tuple[Any, int]] = []

    @classmethod
    def open(cls, features: Feature = NO_FEATURES, *, user_mode_only: bool | None = None, blocking: bool = False) -> Self:
        """A new one, close-on-exec, with UFFDIO_API done.

        ``user_mode_only`` None: with faults taken inside the kernel where that is permitted, else without. ``blocking``: reads
        wait; poll(2) then says POLLERR (userfaultfd_poll). Raises UserfaultfdUnavailableError, FeaturesMissingError.
        """
        descriptor, _ = _open_raw(user_mode_only)
        try:
            _api(descriptor, features)
            os.set_blocking(descriptor, blocking)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, features, owned=True)

    @classmethod
    def adopt(cls, descriptor: int) -> Self:
        """Take over a descriptor from elsewhere (a fork event, SCM_RIGHTS): close() closes it.

        Any descriptor is taken; where it is not a userfaultfd its ioctls say ENOTTY."""
        return cls(descriptor, features_of(descriptor), owned=True)

    @classmethod
    def borrow(cls, descriptor: int) -> Self:
        """Use a descriptor that belongs to someone else: close() leaves it open."""
        return cls(descriptor, features_of(descriptor), owned=False)

    def fileno(self) -> int:
        """-1 after close(): every ioctl then says EBADF."""
        return self._descriptor

    def duplicate(self) -> "Userfaultfd":
        """The same userfaultfd by a descriptor of its own, close-on-exec. O_NONBLOCK is shared by all. Raises OSError: EMFILE."""
        return Userfaultfd(os.dup(self._descriptor), self.features, owned=True)

    def detach(self) -> int:
        """The descriptor, which the caller closes."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close it if it is owned. With its last descriptor the registrations end, as after ``unregister``."""
        descriptor = self.detach()
        if self._owned and descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Userfaultfd {self._descriptor} {self.features!r}{'' if self._owned else ' borrowed'}>"

    # --- ranges -----------------------------------------------------------------------------------------------------

    def register(self, address: int, size_bytes: int, modes: Mode) -> Ioctl:
        """Have faults of a range told; the ioctls that the range allows.

        Registering again *replaces* the modes, unless the new ones are contained in the old (userfaultfd_register): pass the
        union. Raises UserfaultfdError: EINVAL (address, size or modes; MINOR of anonymous memory), EBUSY (another userfaultfd
        is there), EPERM (shared and not writable), ENOMEM (nothing mapped there, or the process is gone).
        """
        ioctls = ffi.new("uint64_t *")
        error_number = lib.uffd_register(self._descriptor, address, size_bytes, modes, ioctls)
        if error_number:
            what = f"UFFDIO_REGISTER {'|'.join(str(one.name) for one in modes) or modes} of {size_bytes} bytes at {address:#x}"
            raise UserfaultfdError(what, error_number, expected=_expected_of_register(modes))
        return Ioctl(ioctls[0])

    def unregister(self, address: int, size_bytes: int) -> None:
        """End the registration: absent pages read as *zeroes* from here on.

        Who waits is woken only where MISSING was registered (userfaultfd_unregister), and a fault that is just entering can miss
        that (6.4 and later take the lock of its VMA alone): wake() the range afterwards.
        Raises UserfaultfdError: EINVAL (address, size, or nothing there to register), ENOMEM (nothing mapped, process gone)."""
        self._check("UFFDIO_UNREGISTER", lib.uffd_unregister(self._descriptor, address, size_bytes), address, size_bytes)

    def wake(self, address: int, size_bytes: int) -> None:
        """Let the threads that wait in the range try again; who still finds no page faults anew. Raises UserfaultfdError."""
        self._check("UFFDIO_WAKE", lib.uffd_wake(self._descriptor, address, size_bytes), address, size_bytes)

    def _check(self, what: str, error_number: int, address: int, size_bytes: int) -> None:
        if error_number:
            raise UserfaultfdError(f"{what} of {size_bytes} bytes at {address:#x}", error_number, expected=_EXPECTED_RANGE)

    # --- filling ----------------------------------------------------------------------------------------------------
    # Each goes on after EAGAIN with progress until the range is done or the real errno is known; one_call=True makes one
    # ioctl and tells PARTIAL. dontwake=True leaves waiting threads asleep until wake().

    def copy(
        self,
        to_address: int,
        from_address: int,
        size_bytes: int,
        *,
        wp: bool = False,
        dontwake: bool = False,
        one_call: bool = False,
    ) -> Filled:
        """UFFDIO_COPY: new pages with the content at ``from_address`` of the process that opened the userfaultfd.

        ``wp``: mapped write-protected. Raises UserfaultfdError: EFAULT (the source cannot be read), EINVAL."""
        mode = (lib.UFFDIO_COPY_MODE_WP if wp else 0) | (lib.UFFDIO_COPY_MODE_DONTWAKE if dontwake else 0)
        return self._fill(
            Operation.COPY,
            to_address,
            size_bytes,
            lambda done, field: lib.uffd_copy(
                self._descriptor, to_address + done, from_address + done, size_bytes - done, mode, field
            ),
            one_call,
        )

    def zeropage(self, address: int, size_bytes: int, *, dontwake: bool = False, one_call: bool = False) -> Filled:
        """UFFDIO_ZEROPAGE: cleared pages. Raises UserfaultfdError: EINVAL (hugetlbfs has none)."""
        mode = lib.UFFDIO_ZEROPAGE_MODE_DONTWAKE if dontwake else 0
        return self._fill_range(Operation.ZEROPAGE, lib.uffd_zeropage, address, size_bytes, mode, one_call)

    def continue_(
        self, address: int, size_bytes: int, *, wp: bool = False, dontwake: bool = False, one_call: bool = False
    ) -> Filled:
        """UFFDIO_CONTINUE: map the pages that the file has. NO_PAGE: it has a hole there.

        ``wp``: mapped write-protected (6.4). Raises UserfaultfdError: EINVAL (anonymous memory)."""
        mode = (lib.UFFDIO_CONTINUE_MODE_WP if wp else 0) | (lib.UFFDIO_CONTINUE_MODE_DONTWAKE if dontwake else 0)
        return self._fill_range(Operation.CONTINUE, lib.uffd_continue, address, size_bytes, mode, one_call)

    def poison(self, address: int, size_bytes: int, *, dontwake: bool = False, one_call: bool = False) -> Filled:
        """UFFDIO_POISON (6.6): a touch of this mapping is SIGBUS. Raises UserfaultfdError: EINVAL."""
        mode = lib.UFFDIO_POISON_MODE_DONTWAKE if dontwake else 0
        return self._fill_range(Operation.POISON, lib.uffd_poison, address, size_bytes, mode, one_call)

    def move(
        self,
        to_address: int,
        from_address: int,
        size_bytes: int,
        *,
        allow_src_holes: bool = False,
        dontwake: bool = False,
        one_call: bool = False,
    ) -> Filled:
        """UFFDIO_MOVE (6.8): take the pages of the source away and map them; private anonymous memory both.

        Holes of the source are RANGE_GONE, unless ``allow_src_holes``. Raises UserfaultfdError: EINVAL (other memory)."""
        mode = (lib.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES if allow_src_holes else 0) | (
            lib.UFFDIO_MOVE_MODE_DONTWAKE if dontwake else 0
        )
        return self._fill(
            Operation.MOVE,
            to_address,
            size_bytes,
            lambda done, field: lib.uffd_move(
                self._descriptor, to_address + done, from_address + done, size_bytes - done, mode, field
            ),
            one_call,
        )

    def writeprotect(self, address: int, size_bytes: int, *, protect: bool, dontwake: bool = False) -> Filled:
        """UFFDIO_WRITEPROTECT: protect a range, or lift that and wake who waits for it. It is done whole or not at all.

        RANGE_GONE: not registered with WP. Raises UserfaultfdError: EINVAL (dontwake with protect)."""
        mode = (lib.UFFDIO_WRITEPROTECT_MODE_WP if protect else 0) | (lib.UFFDIO_WRITEPROTECT_MODE_DONTWAKE if dontwake else 0)
        return self._fill(
            Operation.WRITEPROTECT,
            address,
            size_bytes,
            lambda _, __: lib.uffd_writeprotect(self._descriptor, address, size_bytes, mode),
            one_call=True,
        )

    def _fill_range(
        self, operation: Operation, call: Callable[..., int], address: int, size_bytes: int, mode: int, one_call: bool
    ) -> Filled:
        return self._fill(
            operation,
            address,
            size_bytes,
            lambda done, field: call(self._descriptor, address + done, size_bytes - done, mode, field),
            one_call,
        )

    def _fill(
        self, operation: Operation, address: int, size_bytes: int, call: Callable[[int, Any], int], one_call: bool
    ) -> Filled:
        """``call(bytes_done, field)`` is one ioctl on the rest of the range."""
        field = ffi.new("int64_t *")
        bytes_done = 0
        while True:
            error_number = call(bytes_done, field)
            outcome = outcome_of(operation, error_number, field[0])
            if outcome is Outcome.DONE:
                return Filled(size_bytes, outcome, 0, field[0])
            if outcome is Outcome.PARTIAL:
                bytes_done += field[0]
            if outcome is None:
                what = f"{operation} of {size_bytes} bytes at {address:#x}"
                raise UserfaultfdError(what, error_number, expected=EXPECTED[operation], bytes_done=bytes_done)
            if outcome is not Outcome.PARTIAL or one_call:
                return Filled(bytes_done, outcome, error_number, field[0])

    # --- events -----------------------------------------------------------------------------------------------------

    def read_events(self, maximum: int = READ_MAX) -> list[Event]:
        """At most ``maximum`` (READ_MAX of them in one call) events that are there now; empty when there are none.

        A blocking descriptor waits for the first one. Who gets a Fork owns its descriptor. What was read and could not be
        handed out, because something raised, comes first the next time: no descriptor and no fault is lost. Raises
        UserfaultfdError: EINVAL (no UFFDIO_API yet, or ``maximum`` below 1), EMFILE (no descriptor left for a fork's)."""
        if not self._undelivered:
            messages, count = ffi.new("struct uffd_event[]", READ_MAX), ffi.new("uint64_t *")
            while (error_number := lib.uffd_read(self._descriptor, messages, max(maximum, 0), count)) == errno.EINTR:
                pass
            if error_number == errno.EAGAIN:
                return []
            if error_number:
                raise UserfaultfdError("read of events", error_number, expected="a userfaultfd with UFFDIO_API done, and room")
            self._undelivered.append((messages, int(count[0])))
        messages, held = self._undelivered[0]
        events = [event_of(messages[index], self.features) for index in range(held)]
        self._undelivered.clear()
        return events


def probe(*, user_mode_only: bool | None = None) -> Supported:
    """What this kernel has, asked on a descriptor that is thrown away: UFFDIO_API succeeds once for each.

    Raises UserfaultfdUnavailableError."""
    descriptor, only = _open_raw(user_mode_only)
    try:
        features, ioctls = _ask_all(descriptor)
    finally:
        os.close(descriptor)
    return Supported(features, ioctls, only)


def features_of(descriptor: int) -> Feature:
    """The features that UFFDIO_API enabled on a descriptor; none for none yet, or for what is not a userfaultfd.

    Source: userfaultfd_show_fdinfo in fs/userfaultfd.c, ``API: api:features:all features`` in hexadecimal.
    Raises OSError where nothing is open.
    """
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        if line.startswith("API:"):
            return Feature(int(line.split(":")[2], 16) & ~_INITIALIZED)
    return Feature(0)


def _open_raw(user_mode_only: bool | None) -> tuple[int, bool]:
    """A descriptor without UFFDIO_API, and whether it is for user-mode faults only."""
    opened = ffi.new("struct uffd_opened *")
    for only in (False, True) if user_mode_only is None else (user_mode_only,):
        lib.uffd_open(int(only), opened)
        if opened.fd >= 0:
            return int(opened.fd), only
    raise UserfaultfdUnavailableError(opened.device_errno, opened.syscall_errno, user_mode_only=only)


def _ask_all(descriptor: int) -> tuple[Feature, Ioctl]:
    features, ioctls = ffi.new("uint64_t *", 0), ffi.new("uint64_t *")
    error_number = lib.uffd_api_and_ioctls(descriptor, features, ioctls)
    if error_number:
        raise UserfaultfdError("UFFDIO_API", error_number, expected="a new userfaultfd")
    return Feature(features[0]), Ioctl(ioctls[0])


def _api(descriptor: int, wanted: Feature) -> None:
    """After a refusal the struct may be zeroed, but the descriptor is as it was: what is missing is asked on it."""
    error_number = lib.uffd_api(descriptor, ffi.new("uint64_t *", wanted))
    if error_number == errno.EPERM:
        raise FeaturesMissingError(wanted & Feature.EVENT_FORK, error_number)
    if error_number:
        available, _ = _ask_all(descriptor)
        raise FeaturesMissingError(wanted.without(available), error_number)


def _expected_of_register(modes: Mode) -> str:
    if Mode.MINOR in modes:
        return "a userfaultfd with minor faults over a shared, writable shmem or hugetlbfs mapping, not registered elsewhere"
    return "page-aligned address and size_bytes > 0, a mode, and writable memory there that is not registered elsewhere"
