"""QMP, from blocking code: ``qemu.qmp`` on an event loop that runs only inside the calls.

The agent is one thread that answers its daemon within a downtime; a second one for the event loop would cost two wake-ups a
command. Commands and waits have deadlines, and end at once when QEMU does.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate

from migrate.errors import DeadlineError, PostcopyError

COMMAND_SECONDS = 5.0
_T = TypeVar("_T")
Event = dict[str, Any]


class QemuEndedError(PostcopyError):
    """Its process, or its monitor."""

    code = "guest-failed"


class CommandRefusedError(PostcopyError):
    """QEMU's own words are in ``got``."""

    code = "failed"


class Monitor:
    """One QEMU's. Not to be used by two threads, nor inside an event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._own = sock.dup()  # descriptors go by it: asyncio's transports pass none
        self._socket = sock
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("qemu")
        self._events: deque[Event] = deque()

    def fileno(self) -> int:
        """Readable when ``events`` may have something to say."""
        return self._own.fileno()

    def connect(self, deadline_seconds: float) -> None:
        """Raises PostcopyError."""
        self._run("a greeting", self._client.connect(self._socket), deadline_seconds)

    def execute(self, command: str, *, deadline_seconds: float = COMMAND_SECONDS, **arguments: object) -> Any:
        """What QEMU returns. An underscore in an argument's name is a hyphen. Raises PostcopyError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._run(command, self._client.execute(command, named or None), deadline_seconds)

    def pass_descriptor(self, name: str, descriptor: int) -> None:
        """QEMU knows it as ``fd:NAME``; the caller keeps and closes its own. Raises PostcopyError."""
        socket.send_fds(self._own, [b" "], [descriptor])
        self.execute("getfd", fdname=name)

    def events(self) -> list[Event]:
        """Those that have come and nobody has waited for."""
        self._loop.run_until_complete(asyncio.sleep(0))
        self._events.extend(dict(event) for event in self._client.events.clear())
        events = list(self._events)
        self._events.clear()
        return events

    def wait(self, what: str, condition: Callable[[Event], _T | None], deadline_seconds: float) -> _T:
        """Until the condition makes something of an event; what else comes is kept for ``events``. Raises PostcopyError."""
        return self._run(what, self._wait(condition), deadline_seconds)

    async def _wait(self, condition: Callable[[Event], _T | None]) -> _T:
        ended = asyncio.ensure_future(self._ended())  # waiting for an event does not end with the connection by itself
        try:
            while True:
                event = asyncio.ensure_future(self._next())
                await asyncio.wait({event, ended}, return_when="FIRST_COMPLETED")
                if not event.done():
                    event.cancel()
                    raise EOFError
                found = condition(event.result())
                if found is not None:
                    return found
                self._events.append(event.result())
        finally:
            ended.cancel()

    async def _next(self) -> Event:
        return dict(await self._client.events.get())

    async def _ended(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
            self._loop.run_until_complete(_within(self._client.disconnect(), COMMAND_SECONDS))
        self._loop.close()
        self._own.close()
        self._socket.close()

    def _run(self, what: str, call: Coroutine[Any, Any, _T], deadline_seconds: float) -> _T:
        began = time.monotonic()
        try:
            return self._loop.run_until_complete(_within(call, deadline_seconds))
        except TimeoutError:
            raise DeadlineError(f"QEMU: {what}", expected=f"within {deadline_seconds:g} s", got="nothing") from None
        except ExecuteError as error:
            raise CommandRefusedError(f"QEMU: {what}", expected="to be done", got=str(error)) from error
        except (ExecInterruptedError, QMPError, EOFError, OSError) as error:
            waited = time.monotonic() - began
            raise QemuEndedError(
                f"QEMU: {what}", expected="an answer", got=f"the end of its monitor after {waited:.1f} s"
            ) from error


async def _within(call: Coroutine[Any, Any, _T], deadline_seconds: float) -> _T:
    async with asyncio.timeout(deadline_seconds):
        return await call
