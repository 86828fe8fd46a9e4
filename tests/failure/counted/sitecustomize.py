"""Put before everything else by test_constant_switchover.py: counts what a process does between pause and running.

Not time: bytecodes run, minor page faults taken and message bytes encoded by the thread that switches over. One JSON line each.
In a daemon that is a switchover's quiet block; in a guest, the agent's answers to pause and to resume.
"""

import functools
import json
import os
import resource
import sys
from types import FrameType
from typing import Any


class Counter:
    def __init__(self) -> None:
        self.bytecodes = self.message_bytes = self.faults = 0

    def start(self) -> None:
        self.bytecodes = self.message_bytes = 0
        self.faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frame.f_trace = self._trace(frame, "call", None)
            frame = frame.f_back
        sys.settrace(self._trace)

    def stop(self, what: str) -> None:
        sys.settrace(None)
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - self.faults
        counts = {"what": what, "bytecodes": self.bytecodes, "faults": faults, "message_bytes": self.message_bytes}
        with open(os.environ["POSTCOPY_COUNTS"], "a") as file:
            file.write(json.dumps(counts) + "\n")

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.bytecodes += event == "opcode"
        return self._trace


COUNTER = Counter()


def count_daemon() -> None:
    from migrate.switchover import Quiet

    enter, leave = Quiet.__aenter__, Quiet.__aexit__

    async def counted_enter(self: Any) -> None:
        await enter(self)
        COUNTER.start()

    async def counted_leave(self: Any, *error: Any) -> None:
        COUNTER.stop(str(sys._getframe(1).f_locals["self"].role))  # the migration's whose block this is
        await leave(self, *error)

    Quiet.__aenter__, Quiet.__aexit__ = counted_enter, counted_leave  # type: ignore[method-assign]


def count_guest() -> None:
    from migrate.guest.agent import Agent

    for name in ("_pause", "_resume"):
        answer = getattr(Agent, name)

        @functools.wraps(answer)
        def counted(self: Any, message: Any, answer: Any = answer, name: str = name) -> None:
            COUNTER.start()
            answer(self, message)
            COUNTER.stop(f"guest{name}")

        setattr(Agent, name, counted)


def count_messages() -> None:
    import proto.messages

    encode = proto.messages.encode

    def counted(message: Any) -> bytes:
        data = encode(message)
        COUNTER.message_bytes += len(data)
        return data

    proto.messages.encode = counted


if "POSTCOPY_COUNTS" in os.environ and sys.orig_argv[3:4] == ["migrate"]:
    count_messages()
    if sys.orig_argv[4] == "guest":
        count_guest()
    else:
        count_daemon()
