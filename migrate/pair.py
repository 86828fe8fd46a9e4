"""Two daemons on this host and guests beside them, as processes: what demo, bench and the tests stand on.

Everything lives in one temporary directory and is ended by its own process id, also after a failure; and with this process,
however that ends (children.py).
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrate.children import group_that_goes_with_us
from migrate.client import DaemonClient
from migrate.errors import DeadlineError, PostcopyError
from migrate.session import MigrationStatus

# -P: this interpreter's installed package, whatever the current directory holds.
COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "migrate")
START_DEADLINE_SECONDS = 20.0
END_DEADLINE_SECONDS = 10.0
SIGTERM_AGAIN_SECONDS = 0.5


class Process:
    """A child that is always reaped. Its standard output is read as JSON lines; its log goes to a file. No ``command``: ours."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_path: Path,
        environment: dict[str, str] | None = None,
        *,
        command: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        with log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                [*(COMMAND if command is None else command), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env={**os.environ, **(environment or {})},
                cwd=log_path.parent,
                process_group=group_that_goes_with_us(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def event(self, *names: str, deadline_seconds: float = START_DEADLINE_SECONDS) -> dict[str, Any]:
        """The next event of one of these names; earlier ones are consumed. Raises DeadlineError, PostcopyError (ended)."""
        deadline = time.monotonic() + deadline_seconds
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                while self.events:
                    event = self.events.pop(0)
                    if event["event"] in names:
                        return event
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise DeadlineError(
                        f"process {self.name}", expected=f"{names} within {deadline_seconds} s", got=self.log()[-2000:]
                    )
                data = os.read(stdout.fileno(), 1 << 20)
                if not data:
                    raise PostcopyError(f"process {self.name}", expected=f"{names}", got=f"its end: {self.log()[-2000:]}")
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                self.events += [json.loads(line) for line in lines]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, deadline_seconds: float = END_DEADLINE_SECONDS) -> int:
        try:
            return self._process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineError(
                f"process {self.name}", expected=f"its end within {deadline_seconds} s", got="still running"
            ) from None

    def end(self, deadline_seconds: float = END_DEADLINE_SECONDS) -> None:
        """SIGTERM until it ends, then SIGKILL; reaped when this returns.

        Again and again: a daemon with a stalled migration waits for a second one, and two at once may arrive as one.
        """
        deadline = time.monotonic() + deadline_seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SIGTERM_AGAIN_SECONDS)
        self.kill()

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class DaemonProcess(Process):
    """One daemon; ready when the constructor returns (it says so by sd_notify)."""

    def __init__(
        self,
        directory: Path,
        role: str,
        arguments: Sequence[str] = (),
        *,
        listens: bool = True,
        listen_at: str = "127.0.0.1:0",
        command: Sequence[str] | None = None,
    ) -> None:
        self.runtime_dir = directory / role
        notify_path = directory / f"{role}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
            notify_socket.bind(str(notify_path))
            notify_socket.settimeout(0.2)
            kind = "destination" if listens else "source"
            listen = ["--listen", listen_at] if listens else []
            options = ["--runtime-dir", str(self.runtime_dir), "--metrics", "127.0.0.1:0", *listen, *arguments]
            environment = {"NOTIFY_SOCKET": str(notify_path)}
            super().__init__(role, [kind, *options], directory / f"{role}.log", environment, command=command)
            try:
                self._wait_ready(notify_socket)
            except BaseException:
                self.kill()
                raise
            finally:
                notify_path.unlink(missing_ok=True)
        self.info: dict[str, Any] = json.loads((self.runtime_dir / "daemon.json").read_text())

    def _wait_ready(self, notify_socket: socket.socket) -> None:
        deadline = time.monotonic() + START_DEADLINE_SECONDS
        while self.returncode is None and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notify_socket.recv(4096):
                    return
        got = "nothing" if self.returncode is None else f"exit status {self.returncode}"
        raise DeadlineError(f"daemon {self.name}", expected="ready", got=f"{got}: {self.log()[-2000:]}")

    @property
    def address(self) -> str:
        return str(self.info["migration_address"])

    @property
    def metrics_address(self) -> str:
        return str(self.info["metrics_address"])

    def client(self) -> DaemonClient:
        return DaemonClient(self.runtime_dir)


class Pair:
    """``with Pair() as pair``: ``pair.source`` and ``pair.destination``, both able to take guests; ``pair.guest(…)``."""

    def __init__(self, *, arguments: Sequence[str] = ()) -> None:
        self._arguments = arguments
        self._children: list[Process] = []

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="postcopy-"))
        try:
            self.source = self.daemon("source")
            self.destination = self.daemon("destination")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        guests = [child for child in self._children if not isinstance(child, DaemonProcess)]
        for child in guests:
            child.kill()
        for child in self._children:
            if child.returncode is None:
                child.signal(signal.SIGTERM)
        for child in self._children:
            child.end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def daemon(self, role: str) -> DaemonProcess:
        child = DaemonProcess(self.directory, role, self._arguments)
        self._children.append(child)
        return child

    def again(self, daemon: DaemonProcess) -> DaemonProcess:
        """A daemon that has ended, or was killed, started anew: same runtime directory, same address."""
        daemon.wait()
        child = DaemonProcess(self.directory, daemon.name, self._arguments, listen_at=daemon.address)
        self._children.append(child)
        if daemon is self.source:
            self.source = child
        elif daemon is self.destination:
            self.destination = child
        return child

    def guest(
        self, daemon: DaemonProcess, guest_id: str, memory: str, *options: str, waiting: bool = False, kind: str = "workload"
    ) -> Process:
        """A guest of a kind that `postcopy guest` has, attached when this returns."""
        arguments = ["guest", kind, "--id", guest_id, "--daemon", str(daemon.runtime_dir), "--memory", memory, *options]
        child = self.child(guest_id, [*arguments, *(["--waiting"] if waiting else [])])
        child.event("waiting" if waiting else "started")
        return child

    def child(self, name: str, arguments: Sequence[str], *, command: Sequence[str] | None = None) -> Process:
        """Any other command, ended with the rest. No ``command``: ours."""
        child = Process(name, arguments, self.directory / f"{name}.log", command=command)
        self._children.append(child)
        return child

    def move(
        self,
        guest_id: str,
        leaves: DaemonProcess,
        reaches: DaemonProcess,
        *,
        bulk: bool = True,
        settled_within_seconds: float = 60,
        **precopy: str | float,
    ) -> MigrationStatus:
        """Migrate and wait until it has settled; away from one daemon, to the other. ``precopy``: as DaemonClient.migrate."""
        with leaves.client() as client:
            status = client.migrate(guest_id, reaches.address, bulk=bulk, **precopy)
            return wait_settled(client, status.id, settled_within_seconds)


def wait_settled(client: DaemonClient, migration_id: str, deadline_seconds: float = 60) -> MigrationStatus:
    """Until the migration has ended or stalled. Raises DeadlineError."""
    status = client.status(migration_id, settled_within_seconds=deadline_seconds)
    if not status.settled:
        raise DeadlineError(f"migration {migration_id}", expected=f"an end within {deadline_seconds} s", got=status.state)
    return status
