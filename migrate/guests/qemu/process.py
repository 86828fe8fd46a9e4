"""One QEMU process: started with what it needs from us, checked, and ended with us."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import Counter

from migrate import uffd
from migrate.errors import GuestRefusedError, PostcopyError
from migrate.guest.memory import MemorySpec
from migrate.guests.qemu.command_line import CommandLine
from migrate.guests.qemu.memory import QemuMemory
from migrate.guests.qemu.preload import Preload
from migrate.guests.qemu.qmp import Monitor
from migrate.uffd.postcopy import FEATURES_SHMEM

START_SECONDS = 20.0
END_SECONDS = 3.0
CAPABILITIES = ("x-ignore-shared", "events", "late-block-activate")
"""Guest memory is ours to move · how the migration goes is told · images are the destination's only from its `cont` on."""
UNLIMITED_BYTES_A_SECOND = 1 << 40


class Qemu:
    """Raises PostcopyError when QEMU cannot be started, or says itself that it cannot be moved; the VM has not run then."""

    def __init__(self, command_line: CommandLine, memory_kind: str, *, waiting: bool) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.ended_fd = -1
        if waiting:  # QEMU's system calls read disks into pages that are not here yet: faults of user mode alone will not do
            uffd.Userfaultfd.open(FEATURES_SHMEM, user_mode_only=False).close()
        self.memory = QemuMemory(MemorySpec.parse(f"{command_line.memory_bytes}:{memory_kind}"))
        self._preload = Preload(self.memory.files[0], "waiting" if waiting else "running")
        ours, theirs = socket.socketpair()
        self.monitor = Monitor(ours)
        try:
            with theirs:
                self._start(command_line, theirs.fileno(), waiting=waiting)
            self.memory.attach(self._preload, self._preload.mapping(self.ended_fd, START_SECONDS))
            self.monitor.connect(START_SECONDS)
            self._check()
            self._preload.check()  # QEMU has answered: it has mapped all that it will
            self.kind = self._kind()
        except BaseException:
            self.close()
            raise

    def _start(self, command_line: CommandLine, monitor_fd: int, *, waiting: bool) -> None:
        memory_fd = self.memory.files[0]
        words = command_line.completed(memory_fd, monitor_fd, waiting=waiting)
        inherited = (memory_fd, monitor_fd, self._preload.inherited_fd)
        try:
            self._process = subprocess.Popen(words, env={**os.environ, **self._preload.environment}, pass_fds=inherited)
        except OSError as error:
            raise PostcopyError(words[0], expected="a QEMU that can be started", got=error, code="usage") from error
        self.ended_fd = os.pidfd_open(self._process.pid)
        self._preload.started()

    def _check(self) -> None:
        """What QEMU itself knows to stand in the way. Raises GuestRefusedError."""
        known = {one["capability"] for one in self.monitor.execute("query-migrate-capabilities")}
        if missing := [name for name in CAPABILITIES if name not in known]:
            raise GuestRefusedError(
                "QEMU", expected=f"migration capability {', '.join(missing)} (QEMU 4.2 to 7.2 and later)", got="none"
            )
        wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
        self.monitor.execute("migrate-set-capabilities", capabilities=wanted)
        self.monitor.execute("migrate-set-parameters", max_bandwidth=UNLIMITED_BYTES_A_SECOND)
        if blocked := self.monitor.execute("query-migrate").get("blocked-reasons"):
            raise GuestRefusedError("QEMU", expected="a machine that can be migrated", got="; ".join(blocked))

    def _kind(self) -> str:
        """What both sides must have alike, as far as it can be asked before a state is loaded: that says the rest."""
        machine = self._type_of("/machine").removesuffix("-machine")
        cpus = Counter(self._type_of(cpu["qom-path"]) for cpu in self.monitor.execute("query-cpus-fast"))
        return f"QEMU {machine} with " + ", ".join(f"{count} {name}" for name, count in sorted(cpus.items()))

    def _type_of(self, path: str) -> str:
        return str(self.monitor.execute("qom-get", path=path, property="type"))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        assert self._process is not None
        return self._process.poll()

    def all_memory_is_here(self) -> None:
        self._preload.whole()

    def kill(self) -> None:
        """It runs no more when this returns, whatever it was waiting for."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, by its own leave if it gives it soon; everything of it is released."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        self.kill()
        self.monitor.close()
        self._preload.close()
        if self.ended_fd >= 0:
            os.close(self.ended_fd)
            self.ended_fd = -1
        self.memory.close()


def monotonic_ns_of(event: dict[str, object]) -> int:
    """When QEMU says that it happened: its wall clock to a microsecond, as CLOCK_MONOTONIC."""
    stamp = event["timestamp"]
    assert isinstance(stamp, dict)
    happened_ns = (stamp["seconds"] * 1_000_000 + stamp["microseconds"]) * 1000
    return int(happened_ns + time.monotonic_ns() - time.time_ns())
