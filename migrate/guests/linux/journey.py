"""A Linux machine that travels between two daemons: one command line on both sides, one stream of what it tells."""

import selectors
import socket
import time

from migrate.errors import PostcopyError
from migrate.guests.linux.debugcon import Debugcon
from migrate.guests.linux.machine import GuestImage, LinuxGuest
from migrate.pair import DaemonProcess, Pair, Process
from migrate.session import MigrationStatus

BOOT_SECONDS = 40.0
BEATS_SECONDS = 20.0
DISK_BYTES = 16 << 20
_RECEIVE_BYTES = 1 << 16


class TravellingDebugcon(Debugcon):
    """Every QEMU of the command line connects here; only one of them runs the machine, so what they tell is one stream."""

    def _read(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                try:
                    self._read_all(selector)
                finally:
                    for key in selector.get_map().values():
                        if isinstance(key.fileobj, socket.socket) and key.fileobj is not self._listener:
                            key.fileobj.close()
        except OSError:
            pass  # closed
        except PostcopyError as error:
            self._error = error
        finally:
            with self.changed:
                self._ended = True
                self.changed.notify_all()

    def _read_all(self, selector: selectors.BaseSelector) -> None:
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    selector.register(connection, selectors.EVENT_READ)
                else:
                    self._read_some(key.fileobj, selector)

    def _read_some(self, connection: object, selector: selectors.BaseSelector) -> None:
        assert isinstance(connection, socket.socket)
        try:
            data = connection.recv(_RECEIVE_BYTES)
        except ConnectionError:  # its QEMU was killed
            data = b""
        if not data:
            selector.unregister(connection)
            connection.close()
            return
        at_ns = time.monotonic_ns()
        with self.changed:
            self.told.feed(data, at_ns)
            self.changed.notify_all()


class Journey:
    """Two QEMUs that stay: one runs the machine, the other waits for it, and they change roles with each move."""

    def __init__(
        self, pair: Pair, linux: LinuxGuest, *options: str, name: str = "linux", image: GuestImage | None = None
    ) -> None:
        """``options``: of ``postcopy guest qemu``. The machine has booted and works when this returns. Raises PostcopyError."""
        self.pair, self.name = pair, name
        disk = pair.directory / f"{name}.disk"
        disk.write_bytes(bytes(DISK_BYTES))
        path = pair.directory / f"{name}.debugcon"
        self.debugcon = TravellingDebugcon(path)
        self.words = ["qemu-system-x86_64", *linux.arguments(image or GuestImage.find(), path, disk=disk)]
        self._options = options
        try:
            self.runs = self._start(pair.source, f"{name}-here", "started")
            self.waits = self._start(pair.destination, f"{name}-there", "waiting", "--waiting")
            self.is_at, self.goes_to = pair.source, pair.destination
            self.debugcon.wait_line("ready", BOOT_SECONDS)
            self.beats(200)
        except BaseException:
            self.close()
            raise

    def _start(self, daemon: DaemonProcess, name: str, event: str, *options: str) -> Process:
        arguments = ["guest", "qemu", "--id", name, "--daemon", str(daemon.runtime_dir), "--stay", *self._options, *options]
        guest = self.pair.child(name, [*arguments, "--", *self.words])
        guest.event(event)
        return guest

    def beats(self, count: int) -> None:
        """The machine has told so many more heartbeats."""
        seen = len(self.debugcon.told.beats)
        self.debugcon.wait(lambda told: len(told.beats) >= seen + count, f"{count} more heartbeats", BEATS_SECONDS)

    def move(self, *, precopy: str | int = "auto") -> MigrationStatus:
        """To the other daemon; it works there, and its old QEMU waits, when this returns. Raises PostcopyError."""
        status = self.pair.move(self.runs.name, self.is_at, self.goes_to, precopy=precopy)
        if status.state != "complete":
            raise PostcopyError("migration", expected="complete", got=f"{status.state}: {status.error}", code="migration-failed")
        self.arrived()
        return status

    def arrived(self) -> None:
        """After a migration that is complete: it works at the other daemon, and its old QEMU waits."""
        self.runs.event("waiting")
        self.runs, self.waits = self.waits, self.runs
        self.is_at, self.goes_to = self.goes_to, self.is_at
        self.beats(100)

    def check(self) -> None:
        """No bad page, no heartbeat lost, no error of its disk. Raises PostcopyError."""
        with self.debugcon.changed:
            told = self.debugcon.told
            disk = told.last("disk")
            damage, lost = told.damage, told.lost_beats
        wrong = {name: disk.fields[name] for name in ("errors", "wrong") if disk and disk.number(name)}
        if damage or lost or wrong or disk is None:
            got = f"{damage[:1]}, {lost} heartbeats lost, disk {wrong or ('silent' if disk is None else 'well')}"
            raise PostcopyError("the machine", expected="to be intact", got=got, code="guest-failed")

    def gap_seconds(self) -> float:
        """The longest time without a heartbeat so far."""
        with self.debugcon.changed:
            return max(self.debugcon.told.gaps_seconds())

    def close(self) -> None:
        for name in ("runs", "waits"):
            if (guest := getattr(self, name, None)) is not None:
                guest.end()
        self.debugcon.close()
