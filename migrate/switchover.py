"""The milliseconds of a switchover: no other Python runs in the daemon meanwhile.

Between ``prepare`` and ``running`` scrapes and API calls wait at the gate, and the garbage collector is off. Nothing that
happens inside may grow with guest memory (P7).
"""

import asyncio
import contextlib
import gc
from collections.abc import Callable
from types import TracebackType

from proto.messages import Running, Switchover, control_decoder, encode

WAIT_SECONDS_MAX = 0.1


def rehearse(epoch: int) -> None:
    """Encode and decode what the switchover will: a daemon that has slept since the last one takes four times as long for it
    as one whose caches hold the way. ``GuestLink.prepare`` does the same for the agent and the path to it."""
    control_decoder().feed(encode(Switchover(epoch=epoch, state=bytes(256), last_step_ns=0)) + encode(Running(epoch=epoch)))


class Quiet:
    """``async with quiet`` around a switchover; everything that can wait calls ``await quiet.wait()`` first."""

    def __init__(self) -> None:
        self._holders = 0
        self._free = asyncio.Event()
        self._free.set()
        self.on_free: Callable[[], None] | None = None

    @property
    def held(self) -> bool:
        return self._holders > 0

    async def __aenter__(self) -> None:
        self._holders += 1
        self._free.clear()
        gc.disable()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._holders -= 1
        if self._holders == 0:
            gc.enable()
            self._free.set()
            if self.on_free is not None:
                self.on_free()

    async def wait(self) -> None:
        """At most a moment: a peer that never says ``running`` must not silence the API."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS_MAX):  # wait_for of 3.11 loses a cancellation that comes with the answer
                await self._free.wait()
