"""The same machine as a guest of two daemons, moved by ``postcopy migrate``; its memory is a memfd."""

import time
from pathlib import Path

from migrate.bench.qemu.mover import BOOT_SECONDS, MOVE_SECONDS, Moved, Mover
from migrate.errors import PostcopyError
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.pair import Pair, Process

ROUNDS = 1
"""Of precopy, where it is wanted."""


class PostcopyMover(Mover):
    name = "postcopy"

    def __init__(self, guest: LinuxGuest, image: GuestImage, directory: Path) -> None:
        super().__init__(guest, image, directory)
        self._pair = Pair()
        self._pair.__enter__()
        self._ends = [self._pair.source, self._pair.destination]
        self._running: list[tuple[Process, int]] = []
        """With the process id of its QEMU."""

    def _launch(self, command: list[str], number: int, *, arriving: bool) -> None:
        daemon = self._ends[-1] if arriving else self._ends[0]
        guest_id = f"{self.name}-{number}"
        options = ["--id", guest_id, "--daemon", str(daemon.runtime_dir), *["--waiting"] * arriving]
        guest = self._pair.child(guest_id, ["guest", "qemu", *options, "--", *command])
        told = guest.event("waiting" if arriving else "started", deadline_seconds=BOOT_SECONDS)
        self._running.append((guest, told["pid"]))

    def _migrate(self, *, precopy: bool, preempt: bool) -> Moved:
        """``preempt`` is QEMU's word: pages that a fault waits for always have a connection of their own here."""
        (leaving, _), (reaching, _) = self._running
        leaves, reaches = self._ends
        with leaves.client() as client:
            begun_ns = time.monotonic_ns()
            begun = client.migrate(leaving.name, reaches.address, precopy=ROUNDS if precopy else "off")
            status = client.status(begun.id, settled_within_seconds=MOVE_SECONDS)
            ended_ns = time.monotonic_ns()
        if status.state != "complete":
            raise PostcopyError("migration", expected="complete", got=f"{status.state}: {status.error}", code="migration-failed")
        reaching.event("complete")
        leaving.wait()
        del self._running[0]
        self._ends.reverse()
        return Moved(begun_ns, ended_ns, status.bytes_moved)

    def _pids(self) -> list[int]:
        return [pid for guest, qemu in self._running for pid in (guest.pid, qemu)]

    def _end(self) -> None:
        self._pair.__exit__(None, None, None)
