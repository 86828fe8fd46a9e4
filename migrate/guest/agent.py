"""The agent: attaches a guest to its daemon, passes descriptors, answers pause and resume, keeps the userfaultfd.

One thread, plain blocking sockets, never touches guest memory (but ``foreseen`` may read page tables). It serves one daemon
connection at a time. The duplicate of the userfaultfd stays open here until the daemon says ``complete``: with the last
descriptor gone, absent pages would read as zeroes (P3). After ``released`` the guest may offer itself again with new
descriptors, as a waiting guest.

A daemon that is lost amid a migration can come back (P6): the guest attaches again and says where it stands, paused or resumed
here, with all descriptors, the page states among them. All that the old connection brought has been read by then.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

import structlog

from migrate.errors import PauseFailedError, PeerRefusedError, PostcopyError
from migrate.guest.schedule import prefer_latency
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR
from proto.errors import ProtocolError
from proto.messages import (
    Discard,
    Discarded,
    GuestComplete,
    GuestFailed,
    GuestPrepare,
    GuestPrepared,
    GuestRegion,
    GuestReleased,
    Hello,
    Keep,
    Message,
    Pause,
    Paused,
    PauseFailed,
    Refused,
    Resume,
    ResumeFailed,
    Running,
    Track,
    TrackFailed,
    Tracking,
    Untrack,
    Welcome,
    encode,
    guest_decoder,
)

YIELDING_NS = 400_000
FIRST_STEP_MS = 2
"""How long `running` waits for the guest's first step; it is told then in any case."""

log = structlog.get_logger("postcopy.agent")


class GuestRole(StrEnum):
    RUNNING = "running"  # whole, here; may be moved away
    WAITING = "waiting"  # takes a guest
    ARRIVING = "arriving"  # runs here, its memory is still coming: refuses to be a source
    DEPARTED = "departed"  # released: whole somewhere else


class Tracked(Protocol):
    """Memory whose writes are seen, until it is closed."""

    pagemap_fd: int

    def close(self) -> None: ...


class Memory(Protocol):
    """What an agent hands to its daemon: GuestMemory, or that of another process."""

    files: list[int]
    regions: list[GuestRegion]

    def register(self, *, remove_events: bool = False) -> int:
        """A userfaultfd over all of it, MISSING|MINOR; the caller closes it."""

    def track(self) -> Tracked:
        """Raises PostcopyError, OSError: then there is no precopy."""


class Machine(Protocol):
    """What an agent drives: the workload, a KVM machine, a QEMU."""

    def prepare(self) -> None:
        """A pause or a resume is next."""

    def pause(self, deadline_seconds: float) -> tuple[bytes, int]:
        """State, and CLOCK_MONOTONIC of the last completed step in ns. Raises PauseFailedError and runs on."""

    def foreseen(self) -> list[int]:
        """Paused: pages that it will touch first, as far as it knows, by their numbers through all regions; 64 at most."""

    def resume(self, state: bytes | None) -> None:
        """With state: load it and run. Without: run on. Raises PostcopyError for a state that is not this machine's."""

    def event_fd(self) -> int:
        """Readable when ``event`` has something to say; -1 for none."""

    def event(self) -> Message | None:
        """Stepped or GuestFailed, or None."""

    def complete(self) -> None:
        """All memory is here."""

    def discards(self) -> Discard | None:
        """What the guest has discarded and nobody has been told, if there is any; it leaves these pages alone."""

    def discarded(self) -> None:
        """All that ``discards`` has told of holds: the pages are the guest's again."""


class Agent:
    """One guest's side of the guest socket. ``run`` returns when the guest has departed or the daemon is gone."""

    def __init__(
        self,
        guest_id: str,
        memory: Memory,
        machine: Machine,
        role: GuestRole,
        remove_means: Literal["zero", "keep"] | None = None,
        declares: Sequence[str] = (),
        machine_kind: str | None = None,
        wake_ms: int = 0,
    ) -> None:
        """What ``hello`` says of the guest (PROTOCOL.md). ``remove_means``: what its REMOVE events mean for pages that have not
        come; None: it raises none. ``machine_kind``: what it is, in its own words: it moves only to one that says the same."""
        self.guest_id, self.memory, self.machine, self.role = guest_id, memory, machine, role
        self._remove_means, self._declares = remove_means, list(declares)
        self._machine_kind, self._wake_ms = machine_kind, wake_ms
        self._discards_told = 0  # and not answered
        self.userfaultfd = memory.register(remove_events=remove_means is not None) if role is GuestRole.WAITING else -1
        self._states_fd = -1  # page states: the daemon's, kept for the next one
        self._passed: list[int] = []  # descriptors that came along and nobody has taken
        self._unanswered: list[Discard] = []
        self._epoch: int | None = None
        self._paused = False
        self._machine_events = select.poll()
        if machine.event_fd() >= 0:
            self._machine_events.register(machine.event_fd(), select.POLLIN)
        self._socket: socket.socket | None = None
        self._tracking: Tracked | None = None
        self._decoder = guest_decoder()
        self._unserved: list[Message] = []
        self._handlers: dict[type[Message], Callable[..., None]] = {
            GuestPrepare: self._prepare,
            Track: self._track,
            Untrack: self._untrack,
            Keep: self._keep,
            Pause: self._pause,
            Resume: self._resume,
            Discarded: self._discarded,
            GuestComplete: self._complete,
            GuestReleased: self._released,
        }

    def attach(self, socket_path: Path) -> None:
        """Connect, greet, pass the descriptors. Raises OSError (no daemon there) or PeerRefusedError."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.connect(str(socket_path))
        self._end_tracking()  # of a daemon that is gone
        self._discards_told = 0
        self._decoder = guest_decoder()
        self._close_passed()
        role = self._role_said
        states = [self._states_fd] if self._states_fd >= 0 and role in ("waiting", "arriving") else []
        hello = Hello(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            guest_id=self.guest_id,
            role=role,
            regions=self.memory.regions,
            memory_files=len(self.memory.files),
            remove_means=self._remove_means,
            machine=self._machine_kind,
            wake_ms=self._wake_ms,
            declares=self._declares,
            offers=["tracking", "keep"],  # also of a waiting guest: once it is whole it can be moved on
            page_states=bool(states),
            epoch=self._epoch if role == "arriving" else None,
        )
        descriptors = [*self.memory.files, *([self.userfaultfd] if role in ("waiting", "arriving") else []), *states]
        data = encode(hello)
        sent_bytes = socket.send_fds(self._socket, [data], descriptors)
        if sent_bytes < len(data):  # sending nothing at all is EPIPE when the daemon has refused already: then its answer is lost
            self._socket.sendall(data[sent_bytes:])
        answer, *self._unserved = self._receive_some()
        if isinstance(answer, Refused):
            raise PeerRefusedError(answer.what, expected=answer.expected, got=answer.got, code=answer.code)
        if not isinstance(answer, Welcome):
            raise ProtocolError(
                "message-unexpected", "answer to hello", expected="welcome or refused", got=answer.__class__.__name__
            )
        self._tell_again()

    @property
    def _role_said(self) -> Literal["waiting", "running", "paused", "arriving"]:
        if self.role is GuestRole.RUNNING:
            return "paused" if self._paused else "running"
        return "waiting" if self.role is GuestRole.WAITING else "arriving"

    def _tell_again(self) -> None:
        """A guest that arrives leaves pages alone until somebody has said that they are zero."""
        if self.role is GuestRole.ARRIVING:
            self._discards_told = len(self._unanswered)
            for message in self._unanswered:
                self._send(message)
        elif self._unanswered:  # whole here: it has discarded them itself
            self._unanswered.clear()
            self.machine.discards()
            self.machine.discarded()

    def run(self) -> None:
        """Serve the daemon until the guest departs (role DEPARTED), or the connection ends (role as it is then)."""
        assert self._socket is not None, "attach first"
        poll = select.poll()
        daemon_fd = self._socket.fileno()
        poll.register(daemon_fd, select.POLLIN)
        if self.machine.event_fd() >= 0:
            poll.register(self.machine.event_fd(), select.POLLIN)
        with self._socket, prefer_latency():
            if not self._serve(self._unserved):
                return
            while self.role is not GuestRole.DEPARTED:
                for ready_fd, _ in poll.poll():
                    if ready_fd != daemon_fd:
                        self._serve_machine()
                    elif not self._serve_daemon():
                        return

    @property
    def undecided(self) -> bool:
        """Its memory is still arriving, and its daemon has not given it the page states: no other one can go on."""
        return self.role is GuestRole.ARRIVING and self._states_fd < 0

    def close(self) -> None:
        self._end_tracking()
        self._close_states()
        self._close_passed()
        if self.userfaultfd >= 0:
            os.close(self.userfaultfd)
            self.userfaultfd = -1

    def _end_tracking(self) -> None:
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None

    def _close_states(self) -> None:
        if self._states_fd >= 0:
            os.close(self._states_fd)
            self._states_fd = -1

    def _close_passed(self) -> None:
        for descriptor in self._passed:
            os.close(descriptor)
        self._passed.clear()

    def _receive(self) -> bytes:
        """What the daemon says; what it passes is kept for the message that takes it."""
        assert self._socket is not None
        data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        self._passed += descriptors
        return data

    def _receive_some(self) -> list[Message]:
        """At least one; what came with the answer to hello is served first thing by ``run``."""
        assert self._socket is not None
        while True:
            data = self._receive()
            if not data:
                raise PostcopyError("daemon", expected="an answer to hello", got="end of connection", code="connection-lost")
            if messages := self._decoder.feed(data):
                return messages

    def _serve_daemon(self) -> bool:
        assert self._socket is not None
        try:
            data = self._receive()
        except ConnectionError:
            data = b""
        if not data:
            return False
        try:
            messages = self._decoder.feed(data)
        except ProtocolError as error:
            return self._confused(error)
        return self._serve(messages)

    def _serve(self, messages: list[Message]) -> bool:
        for message in messages:
            handler = self._handlers.get(type(message))
            if handler is None:
                got = type(message).__name__
                return self._confused(ProtocolError("message-unexpected", "message to the agent", expected="a request", got=got))
            handler(message)
        return True

    def _confused(self, error: ProtocolError) -> bool:
        """The guest does not end because its daemon is confused."""
        log.error("connection to the daemon ended", guest=self.guest_id, reason=str(error))
        return False

    def _serve_machine(self) -> None:
        message = self.machine.event()
        if message is not None:
            self._send(message)
        if isinstance(message, GuestFailed):
            raise PostcopyError(message.reason, code="guest-failed")
        if self._discards_told == 0:
            self._tell_discards()

    def _tell_discards(self) -> None:
        if (message := self.machine.discards()) is not None:
            self._discards_told += 1
            self._unanswered.append(message)
            self._send(message)

    def _discarded(self, _: Discarded) -> None:
        self._discards_told -= 1
        del self._unanswered[:1]
        if self._discards_told == 0:
            self.machine.discarded()
            self._tell_discards()

    def _send(self, message: Message) -> None:
        assert self._socket is not None
        with contextlib.suppress(ConnectionError):  # a daemon that is gone shows when we next read
            self._socket.sendall(encode(message))

    def _prepare(self, _: GuestPrepare) -> None:
        """Rehearse: what runs within the downtime is in the caches then (measured: half of it)."""
        guest_decoder().feed(encode(Paused(state=bytes(256), last_step_ns=0)) + encode(Running(epoch=0)))
        guest_decoder().feed(encode(Pause(deadline_ms=1)) + encode(Resume(epoch=0, state=bytes(256))))
        self.machine.prepare()
        self._send(GuestPrepared())

    def _pause(self, message: Pause) -> None:
        if self.role is not GuestRole.RUNNING:
            self._send(PauseFailed(reason=f"the guest is {self.role}, not running here as a whole"))
            return
        try:
            state, last_step_ns = self.machine.pause(message.deadline_ms / 1000)
        except PauseFailedError as error:
            self._send(PauseFailed(reason=str(error)))
            return
        self._paused = True
        self._tell_discards()  # before `paused`: they belong to the memory that is final now
        self._send(Paused(state=state, last_step_ns=last_step_ns, foreseen=self.machine.foreseen()))

    def _track(self, _: Track) -> None:
        """Before precopy: the guest's memory is registered, and the daemon gets the pagemap to scan it by."""
        assert self._socket is not None
        self._end_tracking()
        if self.role is not GuestRole.RUNNING:
            self._send(TrackFailed(reason=f"the guest is {self.role}, not running here as a whole"))
            return
        try:
            self._tracking = self.memory.track()
        except (PostcopyError, OSError) as error:
            self._send(TrackFailed(reason=str(error)))
            return
        with contextlib.suppress(ConnectionError):  # as in _send
            socket.send_fds(self._socket, [encode(Tracking())], [self._tracking.pagemap_fd])

    def _keep(self, _: Keep) -> None:
        """The page states of the migration that is next, or goes on."""
        if self._passed:
            self._close_states()
            self._states_fd = self._passed.pop(0)

    def _untrack(self, _: Untrack) -> None:
        self._end_tracking()

    def _resume(self, message: Resume) -> None:
        """The agent is the authority on who runs (P4): a waiting guest takes one resume, once, of one epoch."""
        if message.state is None:
            if self._paused:
                self._paused = False
                self.machine.resume(None)
            return
        if self.role is GuestRole.ARRIVING and self._epoch == message.epoch:
            self._send(Running(epoch=message.epoch))  # asked again: it runs, and must not be said to be refused
            return
        if self.role is not GuestRole.WAITING or self._epoch is not None:
            self._send(
                ResumeFailed(epoch=message.epoch, reason=f"the guest is {self.role} and was resumed in epoch {self._epoch}")
            )
            return
        try:
            self.machine.resume(message.state)
        except PostcopyError as error:
            self._send(ResumeFailed(epoch=message.epoch, reason=str(error)))
            return
        self._epoch = message.epoch
        self.role = GuestRole.ARRIVING
        self._await_first_step()
        self._send(Running(epoch=message.epoch))

    def _await_first_step(self) -> None:
        """At most FIRST_STEP_MS: telling `running` keeps both daemons busy, just when the guest's first faults want the CPUs.

        Yielding for the first part of it keeps this CPU out of its idle state, from which every wake-up on the way of those
        faults would have to fetch it (measured: a tenth of the downtime).
        """
        end_ns = time.monotonic_ns() + YIELDING_NS
        while time.monotonic_ns() < end_ns:
            if self._machine_events.poll(0):
                return
            os.sched_yield()
        self._machine_events.poll(FIRST_STEP_MS)

    def _complete(self, _: GuestComplete) -> None:
        self.close()
        self.role = GuestRole.RUNNING
        self.machine.complete()

    def _released(self, _: GuestReleased) -> None:
        self.role = GuestRole.DEPARTED
