"""``postcopy guest qemu``: a QEMU of the user's own command line, and what its agent tells.

Each event is one JSON line: ``started``, ``waiting``, ``stepped``, ``complete``, ``departed``, ``refused``, ``ended``; on
standard output, or on standard error where the command line gives the former to the VM. With ``stay`` a QEMU that has departed is
started anew, to wait for a guest; one that was sent a state that it does not take always is.
"""

import gc
import json
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import structlog

from migrate.errors import PostcopyError
from migrate.guest.agent import Agent, GuestRole
from migrate.guest.attaching import attach_when_there
from migrate.guests.qemu.command_line import CommandLine
from migrate.guests.qemu.machine import WAKE_MS, QemuMachine, VmEndedError, VmUndecidedError
from migrate.guests.qemu.process import Qemu
from proto.messages import Message, Stepped

log = structlog.get_logger("postcopy.qemu")


@dataclass(frozen=True, slots=True)
class QemuOptions:
    guest_id: str
    socket_path: Path
    words: Sequence[str]
    memory_kind: str = "memfd"
    waiting: bool = False
    stay: bool = False


def run(options: QemuOptions) -> None:
    """Returns when the guest has departed, or QEMU has ended well (its guest powered off). Raises PostcopyError."""
    command_line = CommandLine.parse(options.words)
    out = sys.stderr if command_line.uses_stdio else sys.stdout
    waiting = options.waiting
    gc.collect()
    gc.freeze()
    gc.disable()  # the agent answers within a downtime; it makes no cycles
    while True:
        try:
            end = _live(options, command_line, out, waiting=waiting)
        except VmEndedError as ended:
            say(out, "ended", status=ended.status)
            if ended.status:
                raise
            return
        say(out, end)
        if end == "departed" and not options.stay:
            return
        waiting = True


def _live(options: QemuOptions, command_line: CommandLine, out: TextIO, *, waiting: bool) -> str:
    """One QEMU, from its start, or from waiting, until its guest is elsewhere (``departed``) or it has ended with a state that
    it did not take (``refused``). Raises PostcopyError."""
    qemu = Qemu(command_line, options.memory_kind, waiting=waiting)
    try:
        machine = TellingMachine(qemu, out, waiting=waiting)
        role = GuestRole.WAITING if waiting else GuestRole.RUNNING
        declares = ("direct-io",) if command_line.direct_io else ()
        agent = Agent(
            options.guest_id,
            qemu.memory,
            machine,
            role,
            declares=declares,
            machine_kind=qemu.kind,
            wake_ms=WAKE_MS,
        )
        try:
            return _serve(agent, machine, options.socket_path, out)
        finally:
            agent.close()
            machine.close()
    finally:
        qemu.close()


def _serve(agent: Agent, machine: "TellingMachine", socket_path: Path, out: TextIO) -> str:
    attached = False
    while agent.role is not GuestRole.DEPARTED:
        attach_when_there(agent, socket_path, again=attached)
        if agent.role is GuestRole.RUNNING and not attached:
            machine.start()
        attached = True
        say(out, "waiting" if agent.role is GuestRole.WAITING else "started", pid=machine.pid)
        try:
            agent.run()
        except VmEndedError:
            if machine.state_refused:
                return "refused"
            raise
        except VmUndecidedError as error:
            _stay_as_it_is(machine, str(error))
        if agent.undecided:
            _stay_as_it_is(machine, f"the daemon is gone amid a migration, the guest {agent.role}")
    return "departed"


def _stay_as_it_is(machine: "TellingMachine", why: str) -> None:
    """Nothing can be decided from here: the memory and its userfaultfd are held as long as QEMU lives. Raises VmEndedError."""
    log.error("this guest stays as it is", reason=why, pid=machine.pid)
    poll = select.poll()
    poll.register(machine.ended_fd, select.POLLIN)
    poll.poll()
    raise VmEndedError(machine.status)


class TellingMachine(QemuMachine):
    """Its milestones are told."""

    def __init__(self, qemu: Qemu, out: TextIO, *, waiting: bool) -> None:
        super().__init__(qemu, waiting=waiting)
        self._out = out
        self.state_refused = False

    def resume(self, state: bytes | None) -> None:
        try:
            super().resume(state)
        except PostcopyError:
            self.state_refused = state is not None
            raise

    def event(self) -> Message | None:
        message = super().event()
        if isinstance(message, Stepped):
            say(self._out, "stepped", first_step_ns=message.first_step_ns)
        return message

    def complete(self) -> None:
        super().complete()
        say(self._out, "complete")


def say(out: TextIO, event: str, **facts: Any) -> None:
    out.write(json.dumps({"event": event, **facts}) + "\n")
    out.flush()
