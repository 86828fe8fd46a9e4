"""Connections that have not said who they are: bounded, and the oldest gives way to the newest.

Refusing the newest would let whoever holds that many open, silent, keep everybody else out; who means well says who he is
within a round trip, before that many others have come. A connection leaves with its preamble; from then on it is its migration's.
"""

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable

from proto.preamble import Answer, AnswerCode


class HalfOpen:
    """``limit`` tasks, each with the socket that it greets and who is there."""

    def __init__(self, limit: int, on_gave_way: Callable[[str], None]) -> None:
        self._limit = limit
        self._on_gave_way = on_gave_way
        self._waiting: OrderedDict[asyncio.Task[None], tuple[socket.socket, str]] = OrderedDict()

    def admit(self, task: asyncio.Task[None], sock: socket.socket, peer: str, *, answers: bool = True) -> None:
        """``answers``: the one that gives way is told ``busy``. Its task is cancelled, and closes its socket."""
        while len(self._waiting) >= self._limit:
            oldest, (theirs, whose) = self._waiting.popitem(last=False)
            if answers:
                with contextlib.suppress(OSError):
                    theirs.send(Answer(AnswerCode.BUSY).encode())
            oldest.cancel()
            self._on_gave_way(whose)
        self._waiting[task] = sock, peer
        task.add_done_callback(self._leave)

    def known(self) -> None:
        """The current task's connection has said who it is."""
        task = asyncio.current_task()
        if task is not None:
            self._leave(task)

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._waiting.pop(task, None)
