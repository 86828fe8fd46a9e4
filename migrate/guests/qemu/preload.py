"""The agent's end of the object that is preloaded into QEMU: preload.h, message for message."""

import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Literal

from migrate.errors import DeadlineError, PostcopyError, errno_text

OBJECT = Path(__file__).with_name("libpostcopy-preload.so")
ENVIRONMENT = "POSTCOPY_QEMU_MEMORY"
REPORT = struct.Struct("=IiQQQ40s")
MAPPED, TRACKING = 1, 2
TRACK, UNTRACK, WHOLE = 1, 2, 3
ANSWER_SECONDS = 5.0
"""To register: a walk over the mappings of QEMU, whatever its guest does."""


class Mapping:
    """Where QEMU has the guest's memory; ``userfaultfd`` -1 where the guest runs."""

    def __init__(self, address: int, size_bytes: int, offset_bytes: int, userfaultfd: int) -> None:
        self.address, self.size_bytes, self.offset_bytes, self.userfaultfd = address, size_bytes, offset_bytes, userfaultfd


class Preload:
    """One QEMU's. ``environment`` and ``inherited_fd`` are for the child; then ``started``."""

    def __init__(self, memory_fd: int, role: Literal["running", "waiting"]) -> None:
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.fstat(memory_fd)
        before = os.environ.get("LD_PRELOAD")
        self.inherited_fd = self._theirs.fileno()
        self.environment = {
            "LD_PRELOAD": f"{OBJECT} {before}" if before else str(OBJECT),
            ENVIRONMENT: f"{self.inherited_fd}:{memory.st_dev}:{memory.st_ino}:{role[0]}",
        }

    def started(self) -> None:
        """QEMU has its end: from now on the end of QEMU is the end of the connection."""
        self._theirs.close()

    def mapping(self, ended_fd: int, deadline_seconds: float) -> Mapping:
        """What QEMU has mapped, registered already where the guest waits. Raises PostcopyError."""
        values, descriptors = self._receive(MAPPED, ended_fd, deadline_seconds)
        address, size_bytes, offset_bytes = values
        return Mapping(address, size_bytes, offset_bytes, descriptors[0] if descriptors else -1)

    def check(self) -> None:
        """Nothing more has come that QEMU could not have. Raises PostcopyError."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while poll.poll(0):
            self._receive(MAPPED, -1, ANSWER_SECONDS)

    def track(self) -> int:
        """The pagemap of QEMU, whose memory is write-protected asynchronously from now on. Raises PostcopyError."""
        self._send(TRACK)
        _, descriptors = self._receive(TRACKING, -1, ANSWER_SECONDS)
        return descriptors[0]

    def untrack(self) -> None:
        self._send(UNTRACK)

    def whole(self) -> None:
        """All memory is here: QEMU's own descriptor of the userfaultfd is the last."""
        self._send(WHOLE)

    def close(self) -> None:
        """QEMU ends with it, if it has not yet."""
        self._theirs.close()
        self._socket.close()

    def _send(self, command: int) -> None:
        try:
            self._socket.send(struct.pack("=I", command), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PostcopyError("QEMU", expected="to run", got=f"its end ({error})", code="guest-failed") from error

    def _receive(self, wanted: int, ended_fd: int, deadline_seconds: float) -> tuple[tuple[int, int, int], list[int]]:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if ended_fd >= 0:
            poll.register(ended_fd, select.POLLIN)
        end = time.monotonic() + deadline_seconds
        while ready := poll.poll(max(0.0, end - time.monotonic()) * 1000):
            if self._socket.fileno() not in [fd for fd, _ in ready]:
                break
            data, descriptors, _, _ = socket.recv_fds(self._socket, REPORT.size, 4, socket.MSG_CMSG_CLOEXEC)
            if len(data) != REPORT.size:
                break
            kind, error_number, address, size_bytes, offset_bytes, step = REPORT.unpack(data)
            if error_number:
                what = step.rstrip(b"\0").decode()
                raise PostcopyError(f"{what} inside QEMU", expected="success", got=errno_text(error_number))
            if kind == wanted:
                return (address, size_bytes, offset_bytes), descriptors
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            got = "none: a QEMU linked statically, or set-user-ID?"
            raise DeadlineError("object preloaded into QEMU", expected=f"its word within {deadline_seconds:.0f} s", got=got)
        raise PostcopyError("QEMU", expected="to run", got="its end: it has said why", code="guest-failed")
