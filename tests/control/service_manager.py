"""The service manager's half of sd_notify(3) and of the descriptor store, as far as daemons see it."""

import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

DEADLINE_SECONDS = 20.0


class ServiceManager:
    """Listens where NOTIFY_SOCKET points. ``stored`` is what it keeps: name to its own duplicate of the descriptor."""

    def __init__(self, address: Path | str) -> None:
        """``address``: a path, or ``@name`` for an abstract socket."""
        self.address = str(address)
        self.messages: list[dict[str, str]] = []
        self.stored: dict[str, int] = {}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()
        for descriptor in self.stored.values():
            os.close(descriptor)
        if not self.address.startswith("@"):
            Path(self.address).unlink(missing_ok=True)

    def receive(self, deadline_seconds: float = DEADLINE_SECONDS) -> dict[str, str]:
        """The next message, with its effect on the store done. Raises TimeoutError, or BlockingIOError at once for 0."""
        self.socket.settimeout(deadline_seconds)
        data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 8)
        lines = [line.partition("=") for line in data.decode().splitlines()]
        message = {name: value for name, _, value in lines}
        name = message.get("FDNAME", "")
        if "FDSTORE" in message:
            assert len(descriptors) == 1
            assert name not in self.stored
            self.stored[name] = descriptors[0]
        else:
            assert not descriptors
        if "FDSTOREREMOVE" in message:
            os.close(self.stored.pop(name))
        self.messages.append(message)
        return message

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Take messages until it holds. Raises AssertionError."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"{what}: {self.messages}"
            self.receive(left)

    def until_told(self, **wanted: str) -> None:
        self.until(lambda: any(wanted.items() <= message.items() for message in self.messages), str(wanted))

    def take_what_is_there(self) -> None:
        try:
            while True:
                self.receive(0)
        except BlockingIOError:
            return

    def fill_queue(self) -> int:
        """As a manager that has not run for a while; how many messages lie there."""
        count = 0
        while (sent := self._send_until_refused()) > 0:  # a sender's own buffer may be full first: the next one has another
            count += sent
        return count

    def _send_until_refused(self) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
            for count in itertools.count():
                try:
                    sock.send(b"STATUS=not read yet")
                except BlockingIOError:
                    return count
        raise AssertionError


def same_file(one: int, other: int | str) -> bool:
    """``other``: a descriptor of ours, or a path such as /proc/PID/fd/N."""
    return os.path.samestat(os.fstat(one), os.stat(other))
