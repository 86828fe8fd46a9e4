"""QEMU's own postcopy, as its users set it up, and without a limit that would slow it.

Memory is what QEMU takes by itself, anonymous: UFFDIO_COPY into it is cheaper than into shared memory, which our own way needs.
max-bandwidth is so high that it limits nothing (its limiter delays the answers to faults too), max-postcopy-bandwidth is
unlimited. postcopy-blocktime stays off: it adds work to each fault. x-ignore-shared stays off: all memory crosses.

Precopy is one round, and postcopy is asked for as it ends. QEMU 7.2 under TCG forgets writes: when it takes over what has been
written, pages that a virtual CPU's TLB has as written stay so there, and further writes to them go unnoticed (the guest's
kernel crashes after one move in two). So the machine is stopped while the first bitmap is taken: turning the log on has
emptied the TLBs then; and a downtime-limit of 0 has no other taken before the machine is stopped for the switchover. All
this is before what is measured as downtime.
"""

import socket
import subprocess
import time
from pathlib import Path

from migrate.bench.qemu.mover import MOVE_SECONDS, Moved, Mover
from migrate.children import group_that_goes_with_us
from migrate.errors import DeadlineError, PostcopyError
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.guests.qemu.qmp import Event, Monitor

CONNECT_SECONDS = 20.0
ROUND_LEFT_SECONDS = 0.1
"""So little of the round is left when postcopy is asked for: QEMU looks every 50 ms, and after the round it is too late."""
ROUND_LOOK_SECONDS = 0.005
UNLIMITED_BYTES_A_SECOND = 1 << 40


class OwnProcess:
    """One QEMU with its monitor."""

    def __init__(self, command: list[str], log_path: Path, *, arriving: bool) -> None:
        ours, theirs = socket.socketpair()
        words = [*command, "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        words += ["-incoming", "defer"] * arriving
        self.monitor = Monitor(ours)
        try:
            with theirs, log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    process_group=group_that_goes_with_us(),
                )
        except OSError as error:
            self.monitor.close()
            raise PostcopyError(words[0], expected="a QEMU that can be started", got=error) from error
        try:
            self.monitor.connect(CONNECT_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.monitor.close()


class OwnMover(Mover):
    name = "qemu"

    def __init__(self, guest: LinuxGuest, image: GuestImage, directory: Path) -> None:
        super().__init__(guest, image, directory)
        self._running: list[OwnProcess] = []

    def _launch(self, command: list[str], number: int, *, arriving: bool) -> None:
        self._running.append(OwnProcess(command, self._directory / f"{self.name}-{number}.log", arriving=arriving))

    def _migrate(self, *, precopy: bool, preempt: bool) -> Moved:
        source, destination = self._running
        for end in (source, destination):
            wanted = {"postcopy-ram": True, "postcopy-preempt": preempt, "events": True}
            states = [{"capability": name, "state": state} for name, state in wanted.items()]
            end.monitor.execute("migrate-set-capabilities", capabilities=states)
        limits = {"max_bandwidth": UNLIMITED_BYTES_A_SECOND, "max_postcopy_bandwidth": 0, "downtime_limit": 0}
        source.monitor.execute("migrate-set-parameters", **limits)
        destination.monitor.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        [address] = destination.monitor.execute("query-migrate")["socket-address"]
        source.monitor.events()  # of the migration that brought it here

        begun_ns = time.monotonic_ns()
        uri = f"tcp:127.0.0.1:{address['port']}"
        if precopy:
            _one_round(source.monitor, uri)
        else:
            source.monitor.execute("migrate", uri=uri)
        source.monitor.execute("migrate-start-postcopy")
        source.monitor.wait("postcopy", _postcopied, MOVE_SECONDS)
        arrived = destination.monitor.wait("end of the migration", _ended, MOVE_SECONDS)
        ended_ns = time.monotonic_ns()
        left = source.monitor.wait("end of the migration", _ended, MOVE_SECONDS)
        told = source.monitor.execute("query-migrate")
        if (left, arrived) != ("completed", "completed"):
            raise PostcopyError("QEMU's migration", expected="completed", got=f"{left}, {arrived}: {told.get('error-desc', '')}")
        self._running.remove(source)
        source.close()
        return Moved(begun_ns, ended_ns, told["ram"]["transferred"])

    def _pids(self) -> list[int]:
        return [process.pid for process in self._running]

    def _end(self) -> None:
        for process in self._running:
            process.close()
        self._running.clear()


def _one_round(monitor: Monitor, uri: str) -> None:
    """Begin, and return when next to nothing of the first round of precopy is left. Raises PostcopyError."""
    monitor.execute("stop")
    monitor.execute("migrate", uri=uri)
    monitor.wait("first round of precopy", _round_begun, MOVE_SECONDS)
    monitor.execute("cont")
    at_begin: tuple[float, int] | None = None
    deadline = time.monotonic() + MOVE_SECONDS
    while (now := time.monotonic()) < deadline:
        told = monitor.execute("query-migrate")
        if told["status"] not in ("setup", "active"):
            raise PostcopyError("QEMU's precopy", expected="to go on", got=told["status"])
        if "ram" in told:
            left_bytes = told["ram"]["remaining"]
            begun, all_bytes = at_begin = at_begin or (now, left_bytes)
            if left_bytes * (now - begun) < (all_bytes - left_bytes) * ROUND_LEFT_SECONDS:
                return
        time.sleep(ROUND_LOOK_SECONDS)  # asking more often would hold up what is measured
    raise DeadlineError("QEMU's precopy", expected=f"a round within {MOVE_SECONDS:g} s", got="no end")


def _round_begun(event: Event) -> bool | None:
    return True if event["event"] == "MIGRATION_PASS" else None


def _postcopied(event: Event) -> bool | None:
    """Raises PostcopyError where the round was over before postcopy was asked for: the move ends with the machine stopped."""
    status = event["data"]["status"] if event["event"] == "MIGRATION" else None
    if status in ("completed", "failed", "cancelled"):
        raise PostcopyError("QEMU's migration", expected="postcopy", got=f"{status} without it")
    return True if status == "postcopy-active" else None


def _ended(event: Event) -> str | None:
    status = event["data"]["status"] if event["event"] == "MIGRATION" else None
    return str(status) if status in ("completed", "failed", "cancelled") else None
