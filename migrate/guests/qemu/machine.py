"""What the agent drives: pause is a migration of QEMU's into a file, resume one out of a socket.

With x-ignore-shared QEMU's stream holds the devices and the ROMs, a few hundred KB; guest memory stays where it is. QEMU
stops the VM itself when all but the devices is written, and closes its images for writing before it says `completed`.
Nothing is irrevocable until the destination's `cont`: the stream is loaded with the VM stopped, and images are taken over by
`cont` alone (late-block-activate). Loading touches guest memory (some pages of firmware) on QEMU's main thread: faults must be
resolved meanwhile, and they are, from before `resume`.
"""

import contextlib
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Sequence

import structlog

from migrate.errors import DeadlineError, PauseFailedError, PostcopyError
from migrate.guests.qemu.process import Qemu, monotonic_ns_of
from migrate.guests.qemu.qmp import Event, QemuEndedError
from proto.messages import STATE_BYTES_MAX, Discard, Message, Stepped

LOAD_SECONDS, CONTINUE_SECONDS = 3.5, 1.0
"""Together below the five seconds that the daemon waits for `running`."""
WAKE_MS = 30
"""So long a resumed VM is left alone with its demand faults. Measured on two busy CPUs, 10 moves each: from its last heartbeat to
its next 41 ms without precopy (87 ms where bulk begins at once) and 37 ms with it (59 ms)."""
UNDO_SECONDS = 5.0
PREPARE_SECONDS, FLUSH_SECONDS = 2.0, 5.0
"""Of the ten that a daemon waits for `prepared`; what is not written back by then is QEMU's to flush."""
PLAIN, DEFLATED = b"\0", b"\1"
STREAM_BYTES_MAX = 64 << 20
"""What a state may inflate to: the largest video memory, and some."""

log = structlog.get_logger("postcopy.qemu")


class VmEndedError(PostcopyError):
    """QEMU has ended, and with it the guest. ``status``: its exit status, negative for a signal."""

    code = "guest-failed"

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(
            "QEMU", expected="to run", got=f"exit status {status}" if status >= 0 else f"its end by signal {-status}"
        )


class VmUndecidedError(Exception):
    """Whether the VM has run here cannot be known: neither `running` nor `resume_failed` may be said.

    No PostcopyError: one that resume() raises means that it has not."""


class QemuMachine:
    """One QEMU, running or waiting for a guest."""

    def __init__(self, qemu: Qemu, *, waiting: bool) -> None:
        self._qemu, self._monitor = qemu, qemu.monitor
        self._stepped_ns = 0
        self._told_fd = os.eventfd(0)
        self._events = select.epoll()
        for descriptor in (self._told_fd, qemu.ended_fd, self._monitor.fileno()):
            self._events.register(descriptor, select.EPOLLIN)
        self._stream: socket.socket | None = None
        if waiting:
            self._stream, theirs = socket.socketpair()
            with theirs:
                self._monitor.pass_descriptor("postcopy-in", theirs.fileno())
            self._monitor.execute("migrate-incoming", uri="fd:postcopy-in")

    def start(self) -> None:
        """The VM runs from here on. Raises PostcopyError."""
        self._monitor.execute("cont")

    def prepare(self) -> None:
        """QEMU flushes its disks when it stops the VM, within the downtime: what is written back before need not be then."""
        try:
            self._monitor.execute("query-status", deadline_seconds=PREPARE_SECONDS)
            nodes = self._monitor.execute("query-named-block-nodes", flat=True, deadline_seconds=PREPARE_SECONDS)
        except PostcopyError as error:  # the pause will tell: nothing has been touched yet, and the VM is not to end of it
            log.warning("QEMU could not be prepared", pid=self.pid, reason=str(error))
            return
        paths = {node["file"] for node in nodes if node["drv"] in ("file", "host_device") and not node["ro"]}
        flushing = threading.Thread(target=_write_back, args=(sorted(paths),), name="flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def pause(self, deadline_seconds: float) -> tuple[bytes, int]:
        deadline = time.monotonic() + deadline_seconds
        try:
            status = self._monitor.execute("query-status")["status"]
            if status != "running":
                raise PauseFailedError("the VM", expected="running", got=f"{status}: somebody else has stopped it")
            stream, stopped_ns = self._save(deadline)
            return packed(stream), stopped_ns
        except PostcopyError as error:
            self._run_on()
            if isinstance(error, PauseFailedError | QemuEndedError):
                raise
            raise PauseFailedError("the VM", expected=f"to be saved within {deadline_seconds:g} s", got=error) from error

    def _save(self, deadline: float) -> tuple[bytes, int]:
        """The stream, and when the VM was stopped."""
        stopped_ns = 0

        def ended(event: Event) -> str | None:
            nonlocal stopped_ns
            if event["event"] == "STOP":
                stopped_ns = monotonic_ns_of(event)
            return _migration_ended(event)

        self._tell_events()
        file = os.memfd_create("postcopy-device-state", os.MFD_CLOEXEC)
        try:
            self._monitor.pass_descriptor("postcopy-out", file)
            self._monitor.execute("migrate", uri="fd:postcopy-out", deadline_seconds=max(0.0, deadline - time.monotonic()))
            outcome = self._monitor.wait("device state", ended, max(0.0, deadline - time.monotonic()))
            if outcome != "completed":
                info = self._monitor.execute("query-migrate")
                raise PostcopyError(
                    "QEMU's migration", expected="completed", got=f"{outcome}: {info.get('error-desc', 'no reason')}"
                )
            return os.pread(file, os.fstat(file).st_size, 0), stopped_ns
        finally:
            os.close(file)

    def _run_on(self) -> None:
        """Whatever became of the migration: the VM runs here. Raises QemuEndedError."""
        try:
            if self._monitor.execute("query-migrate").get("status") in ("setup", "active", "pre-switchover", "device"):
                self._monitor.execute("migrate_cancel")
                self._monitor.wait("end of the migration", _migration_ended, UNDO_SECONDS)
            if self._monitor.execute("query-status")["status"] != "running":
                self._monitor.execute("cont")
        except QemuEndedError:
            raise
        except PostcopyError as error:  # nobody else has the guest: let it be seen
            log.error("the VM could not be resumed", pid=self._qemu.pid, reason=str(error))

    # --- arriving ---------------------------------------------------------------------------------------------------

    def resume(self, state: bytes | None) -> None:
        if state is None:
            self._run_on()
            return
        try:
            self._load(unpacked(state))
            self._stepped_ns = self._continue()
        except PostcopyError:
            self._qemu.kill()  # it has not run, and never will: only that makes `resume_failed` true
            raise
        os.eventfd_write(self._told_fd, 1)

    def _load(self, stream: bytes) -> None:
        """Raises PostcopyError: with another machine QEMU says why on standard error, and ends."""
        assert self._stream is not None
        deadline = time.monotonic() + LOAD_SECONDS
        self._stream.settimeout(LOAD_SECONDS)
        with contextlib.suppress(OSError):  # it has seen enough, and says so below
            self._stream.sendall(stream)
        self._stream.close()
        try:
            remaining_seconds = max(0.0, deadline - time.monotonic())
            outcome = self._monitor.wait("loading the device state", _migration_ended, remaining_seconds)
        except QemuEndedError:
            outcome = "QEMU's end"
        if outcome != "completed":
            got = f"{outcome}: QEMU has said why on its standard error"
            raise PostcopyError("device state", expected="one of the same machine", got=got, code="state-refused")

    def _continue(self) -> int:
        """When it ran. From here on the VM may have run, unless QEMU says that it has not."""
        try:
            self._monitor.execute("cont", deadline_seconds=CONTINUE_SECONDS)
            return self._monitor.wait("RESUME", _resumed_ns, CONTINUE_SECONDS)
        except (DeadlineError, QemuEndedError) as error:
            raise VmUndecidedError(str(error)) from error

    def complete(self) -> None:
        self._qemu.all_memory_is_here()

    # --- events -----------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._qemu.pid

    @property
    def ended_fd(self) -> int:
        """Readable when QEMU has ended."""
        return self._qemu.ended_fd

    @property
    def status(self) -> int:
        """Of a QEMU that has ended."""
        status = self._qemu.returncode
        return 0 if status is None else status

    def event_fd(self) -> int:
        return self._events.fileno()

    def event(self) -> Message | None:
        ready = {descriptor for descriptor, _ in self._events.poll(0)}
        if self._told_fd in ready:
            os.eventfd_read(self._told_fd)
            return Stepped(first_step_ns=self._stepped_ns)
        if self._monitor.fileno() in ready and self._qemu.ended_fd not in ready:
            self._tell_events()
        if self._qemu.ended_fd in ready:
            raise VmEndedError(self.status)
        return None

    def _tell_events(self) -> None:
        for event in self._monitor.events():
            grave = event["event"] in ("BLOCK_IO_ERROR", "GUEST_PANICKED", "MEMORY_FAILURE")
            (log.error if grave else log.debug)("QEMU tells", told=event["event"], facts=event.get("data", {}))

    def foreseen(self) -> list[int]:
        return []  # its processors' registers are its own

    def discards(self) -> Discard | None:
        return None

    def discarded(self) -> None:
        """It tells none."""

    def close(self) -> None:
        self._events.close()
        os.close(self._told_fd)
        if self._stream is not None:
            self._stream.close()


def _migration_ended(event: Event) -> str | None:
    status = event["data"]["status"] if event["event"] == "MIGRATION" else None
    return str(status) if status in ("completed", "failed", "cancelled") else None


def _resumed_ns(event: Event) -> int | None:
    return monotonic_ns_of(event) if event["event"] == "RESUME" else None


def _write_back(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # not a file of this process: QEMU has it open
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)


def packed(stream: bytes) -> bytes:
    """As it is, unless it is too long for a state: video memory. Deflating costs some 10 ns a byte, within the downtime."""
    packed = PLAIN + stream
    if len(packed) > STATE_BYTES_MAX:
        packed = DEFLATED + zlib.compress(stream, 1)
    if len(packed) > STATE_BYTES_MAX:
        raise PauseFailedError(
            "device state",
            expected=f"{STATE_BYTES_MAX} bytes at most",
            got=f"{len(packed)}: choose less video memory, or -vga none",
        )
    return packed


def unpacked(state: bytes) -> bytes:
    """Raises PostcopyError."""
    if state[:1] == PLAIN:
        return state[1:]
    if state[:1] == DEFLATED:
        inflater = zlib.decompressobj()
        try:
            stream = inflater.decompress(state[1:], STREAM_BYTES_MAX)
        except zlib.error as error:
            raise PostcopyError("device state", expected="what was deflated", got=error, code="state-refused") from error
        if inflater.eof:
            return stream
    raise PostcopyError("device state", expected="a QEMU's", got=f"{len(state)} bytes of something else", code="state-refused")
