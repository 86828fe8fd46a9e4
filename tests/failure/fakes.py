"""Peers that say exactly what a test tells them to: a source daemon, a destination daemon, a guest.

Plain blocking sockets with a deadline on every call, no threads: the test is the peer's whole mind. A fake guest's memory
is registered and never touched, so nothing here can hang in a page fault.
"""

import contextlib
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from migrate.client import DaemonClient
from migrate.clock import clock_id, monotonic_ns
from migrate.guest.memory import GuestMemory, MemorySpec
from migrate.session import MigrationStatus
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR
from proto.messages import (
    Accept,
    Decoder,
    GuestPrepare,
    GuestPrepared,
    GuestRegion,
    Heartbeat,
    Hello,
    Keep,
    Message,
    Offer,
    OfferedRegion,
    Pause,
    Paused,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Resume,
    Running,
    Switchover,
    Welcome,
    control_decoder,
    encode,
    guest_decoder,
)
from proto.preamble import ANSWER_BYTES, NO_TOKEN, PREAMBLE_BYTES, Answer, AnswerCode, ConnectionKind, Preamble

from ..path.commuter import until

DEADLINE_SECONDS = 10.0
TOKEN = b"sixteen bytes..."
_M = TypeVar("_M", bound=Message)


class PeerEndedError(Exception):
    """The daemon closed the connection while more was awaited."""


class Connection:
    """Messages over one socket."""

    def __init__(self, sock: socket.socket, decoder: Decoder[Message]) -> None:
        sock.settimeout(DEADLINE_SECONDS)
        self.socket = sock
        self.beside: FakeGuest | None = None
        """A fake guest that answers ``prepare`` while this connection is waited for: daemons ask whenever they like."""
        self.descriptors: list[int] = []
        """What came with messages of a guest socket, for who takes them."""
        self._decoder = decoder
        self._messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.socket.sendall(encode(message))

    def receive(self, *kinds: type[_M]) -> _M:
        """The next message, which must be of one of these kinds. Raises PeerEndedError, AssertionError, TimeoutError."""
        names = " or ".join(kind.__name__ for kind in kinds)
        while not self._messages:
            if self.beside is not None:
                self._serve_beside(self.beside)
            self._read(names)
        message = self._messages.pop(0)
        assert isinstance(message, kinds), f"{message!r} instead of {names}"
        return message

    def _read(self, names: str) -> None:
        try:
            data = self._receive_some()
        except ConnectionError as error:
            raise PeerEndedError(f"instead of {names}") from error
        if not data:
            raise PeerEndedError(f"instead of {names}")
        self._take(data)

    def _receive_some(self) -> bytes:
        if self.socket.family != socket.AF_UNIX:
            return self.socket.recv(1 << 16)
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        self.descriptors += descriptors
        return data

    def _take(self, data: bytes) -> None:
        """Heartbeats come at any time and say nothing; a peer that never says one is not expected to."""
        self._messages += [message for message in self._decoder.feed(data) if not isinstance(message, Heartbeat)]

    def _serve_beside(self, guest: "FakeGuest") -> None:
        """Until there is something to read here."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self.socket, guest.connection.socket], [], [], left)
            if self.socket in ready or not guest.answer_prepare():
                return

    @property
    def unread_messages(self) -> int:
        return len(self._messages)

    def unread(self, message: Message) -> None:
        self._messages.insert(0, message)

    def receive_end(self) -> None:
        """Nothing but the end of the connection comes."""
        with contextlib.suppress(ConnectionError):
            while data := self.socket.recv(1 << 16):
                self._take(data)
                assert not self._messages, self._messages
        assert not self._messages, self._messages

    def refused(self) -> Refused:
        """The daemon's refusal, and then the end: what every kind of bad input must lead to."""
        message = self.receive(Refused)
        self.receive_end()
        return message

    def close(self) -> None:
        self.socket.close()


def receive_exactly(sock: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        part = sock.recv(size_bytes - len(data))
        if not part:
            raise PeerEndedError(f"after {len(data)} of {size_bytes} bytes")
        data += part
    return data


def closed_by_peer(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def place_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


_hosts = itertools.count(2)


def host_of_its_own() -> str:
    """A loopback address that nobody has dialled from yet: what a daemon holds back of others' refusals is not about it."""
    number = next(_hosts)
    return f"127.1.{number >> 8}.{number & 255}"


class FakeSource:
    """Dials a destination daemon. Each step is a method; ``until_running`` goes through them all."""

    def __init__(self, address: str, regions: Sequence[tuple[int, int]] = ((1 << 20, 4096),), guest_id: str = "fake") -> None:
        self.address, self._host = place_of(address), host_of_its_own()
        self.regions = [OfferedRegion(size_bytes=size_bytes, page_bytes=page_bytes) for size_bytes, page_bytes in regions]
        self.guest_id = guest_id
        self.precopy = False
        self.streams = 1
        self.migration_id = os.urandom(16)
        self.token = NO_TOKEN
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sock in self._sockets:
            sock.close()

    def open(self, first_bytes: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.address, DEADLINE_SECONDS, (self._host, 0))
        self._sockets.append(sock)
        sock.sendall(first_bytes)
        return sock

    def dial(
        self, kind: ConnectionKind, *, token: bytes = NO_TOKEN, epoch: int = 0, stream_index: int = 0
    ) -> tuple[socket.socket, Answer]:
        sock = self.open(Preamble(kind, self.migration_id, epoch, stream_index, token).encode())
        return sock, Answer.decode(receive_exactly(sock, ANSWER_BYTES))

    def begin(self) -> Connection:
        """The control connection, welcomed."""
        sock, answer = self.dial(ConnectionKind.CONTROL)
        assert answer.code is AnswerCode.WELCOME
        self.control = Connection(sock, control_decoder())
        return self.control

    def offer(self) -> Accept:
        self.begin().send(self.offered())
        accept = self.control.receive(Accept)
        self.token = accept.token
        return accept

    def offered(self) -> Offer:
        return Offer(
            guest_id=self.guest_id,
            regions=self.regions,
            clock_id=clock_id(),
            software="a fake source",
            precopy=self.precopy,
            streams=self.streams,
        )

    def attach(self) -> None:
        """Offered, accepted, urgent and as many of bulk as were accepted connected, ready."""
        self.attach_accepted(self.offer().streams)

    def attach_accepted(self, streams: int) -> None:
        """The rest of it, once it has been accepted."""
        self.urgent, answer = self.dial(ConnectionKind.URGENT, token=self.token)
        assert answer.code is AnswerCode.WELCOME
        self.bulks = []
        for stream in range(streams):
            sock, answer = self.dial(ConnectionKind.BULK, token=self.token, stream_index=stream)
            assert answer.code is AnswerCode.WELCOME
            self.bulks.append(sock)
        self.bulk = self.bulks[0]
        self.control.receive(Ready)

    def prepare(self, guest: "FakeGuest | None" = None) -> None:
        """``guest``: the one that waits, when it is a fake too and has to answer."""
        self.attach()
        self.prepare_attached(guest)

    def prepare_attached(self, guest: "FakeGuest | None") -> None:
        self.control.beside = guest
        self.control.send(Prepare(clock_offset_ns=0, clock_uncertainty_ns=0))
        self.control.receive(Prepared)

    def switch_over(self, guest: "FakeGuest | None" = None, state: bytes = b"a state", epoch: int = 0) -> None:
        self.prepare(guest)
        self.say_switchover(state, epoch)

    def say_switchover(self, state: bytes = b"a state", epoch: int = 0, foreseen: Sequence[int] = ()) -> None:
        self.control.send(Switchover(epoch=epoch, state=state, last_step_ns=monotonic_ns(), foreseen=list(foreseen)))

    def until_running(self, guest: "FakeGuest", state: bytes = b"a state") -> None:
        self.switch_over(guest, state)
        assert guest.resumed() == state
        self.control.receive(Running)


class FakeDestination:
    """Listens for a source daemon. ``accept_control`` first; ``until("prepared")`` goes through the steps up to that one."""

    STEPS = (
        "connected",
        "preamble",
        "answered",
        "offered",
        "accepted",
        "urgent",
        "bulk",
        "ready",
        "prepare",
        "prepared",
        "switchover",
    )

    def __init__(self, clock: str | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_SECONDS)
        self._clock = clock or clock_id()
        self.streams = 1
        self._sockets: list[socket.socket] = [self._listener]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sock in self._sockets:
            sock.close()

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_SECONDS)
        self._sockets.append(sock)
        return sock

    def greet(self, kind: ConnectionKind, stream: int = 0) -> socket.socket:
        sock = self.accept()
        preamble = Preamble.decode(receive_exactly(sock, PREAMBLE_BYTES))
        assert (preamble.kind, preamble.stream_index) == (kind, stream)
        assert preamble.token == (NO_TOKEN if kind is ConnectionKind.CONTROL else TOKEN)
        sock.sendall(Answer(AnswerCode.WELCOME).encode())
        return sock

    def accept_offer(self) -> Offer:
        """Welcomed, offered; not yet accepted."""
        self.control = Connection(self.greet(ConnectionKind.CONTROL), control_decoder())
        return self.control.receive(Offer)

    def send_accept(self) -> None:
        self.control.send(self.accepted())

    def accepted(self) -> Accept:
        return Accept(
            token=TOKEN, waiting_guest_id="fake", clock_id=self._clock, software="a fake destination", streams=self.streams
        )

    def attach(self) -> None:
        """Data connections are here; not yet said to be ready."""
        self.accept_offer()
        self.send_accept()
        self.greet_data()

    def greet_data(self) -> None:
        self.urgent = self.greet(ConnectionKind.URGENT)
        self.bulks = [self.greet(ConnectionKind.BULK, stream) for stream in range(self.streams)]
        self.bulk = self.bulks[0]

    def prepare(self, guest: "FakeGuest | None" = None) -> Prepare:
        """``guest``: the one that leaves, when it is a fake too and has to answer."""
        self.attach()
        self.control.beside = guest
        self.control.send(Ready())
        return self.control.receive(Prepare)

    def until_switchover(self) -> Switchover:
        """The source has paused its guest for good."""
        self.prepare()
        self.control.send(Prepared())
        return self.control.receive(Switchover)

    def until_switchover_of(self, guest: "FakeGuest") -> Switchover:
        """Prepared; the guest is paused there; its state is here."""
        self.control.send(Prepared())
        guest.pauses()
        return self.control.receive(Switchover)

    def switch_over(self, guest: "FakeGuest") -> None:
        """The guest is paused there and said to run here."""
        self.prepare(guest)
        switchover = self.until_switchover_of(guest)
        self.control.send(Running(epoch=switchover.epoch))

    def until_gone(self) -> None:
        """The source has given its guest away; and that is the last that is heard of this side."""
        self.control.receive(Switchover)
        self.control.close()

    def refusal_after_switchover(self) -> Refused:
        self.control.receive(Switchover)
        return self.control.refused()

    def until(self, step: str) -> None:
        """Everything up to and with this step of STEPS, then nothing more."""
        wanted = self.STEPS.index(step)
        if wanted <= 1:
            sock = self.accept()
            if step == "preamble":
                receive_exactly(sock, PREAMBLE_BYTES)
            return
        if wanted == 2:
            self.greet(ConnectionKind.CONTROL)
            return
        self.accept_offer()
        actions = (
            self.send_accept,
            lambda: setattr(self, "urgent", self.greet(ConnectionKind.URGENT)),
            lambda: setattr(self, "bulk", self.greet(ConnectionKind.BULK)),
            lambda: self.control.send(Ready()),
            lambda: self.control.receive(Prepare),
            lambda: self.control.send(Prepared()),
            lambda: self.control.receive(Switchover),
        )
        for action in actions[: wanted - 3]:
            action()


class FakeGuest:
    """A guest's agent, in this process. Its memory is a memfd that nobody touches; ``attach`` may lie about all of it."""

    def __init__(self, guest_id: str, role: Literal["running", "waiting"], *memory: str | GuestMemory) -> None:
        made = memory[0] if memory and isinstance(memory[0], GuestMemory) else None
        self.memory = made or GuestMemory([MemorySpec.parse(str(spec)) for spec in memory or ("1M",)])
        self.guest_id, self.role = guest_id, role
        self.userfaultfd = self.memory.register() if role == "waiting" else -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._older: list[socket.socket] = []
        self.foreseen: list[int] = []
        self.connection = Connection(self._socket, guest_decoder())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sock in (self._socket, *self._older):
            sock.close()
        for descriptor in self.connection.descriptors:
            os.close(descriptor)
        if self.userfaultfd >= 0:
            os.close(self.userfaultfd)
        self.memory.close()

    def hello(self, **changed: object) -> Hello:
        facts: dict[str, object] = {
            "major": PROTOCOL_MAJOR,
            "minor": PROTOCOL_MINOR,
            "guest_id": self.guest_id,
            "role": self.role,
            "regions": self.memory.regions,
            "memory_files": len(self.memory.files),
        }
        return Hello.model_validate({**facts, **changed})

    def region(self, **changed: object) -> GuestRegion:
        return GuestRegion.model_validate({**self.memory.regions[0].model_dump(), **changed})

    def descriptors(self) -> list[int]:
        return self.memory.files + ([self.userfaultfd] if self.role == "waiting" else [])

    def connect(self, socket_path: Path) -> None:
        self._socket.connect(str(socket_path))

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        if descriptors:
            sent_bytes = socket.send_fds(self._socket, [data], list(descriptors))
            data = data[sent_bytes:]
        if data:
            self._socket.sendall(data)

    def attach(self, socket_path: Path) -> Self:
        self.connect(socket_path)
        self.send(encode(self.hello()), self.descriptors())
        self.connection.receive(Welcome)
        return self

    def receive_kept(self) -> int:
        """``keep``, and what came with it: the caller closes it."""
        self.connection.receive(Keep)
        return self.connection.descriptors.pop(0)

    def connect_again(self, socket_path: Path, descriptors: Sequence[int] = (), **hello: object) -> Message:
        """To another daemon, or one started anew, while the old connection stands: its answer."""
        self._older.append(self._socket)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.connection = Connection(self._socket, guest_decoder())
        self.connect(socket_path)
        self.send(encode(self.hello(**hello)), [*self.descriptors(), *descriptors])
        return self.connection.receive(Welcome, Refused)

    def answer_prepare(self) -> bool:
        """Take one message: answer it if it is ``prepare``, else keep it for later. False when nothing more is to be expected."""
        try:
            message = self.connection.receive(Message)
        except PeerEndedError:
            return False
        if isinstance(message, GuestPrepare):
            self.connection.send(GuestPrepared())
            return True
        self.connection.unread(message)
        return False

    def told_to_pause(self) -> None:
        while isinstance(self.connection.receive(GuestPrepare, Pause), GuestPrepare):
            self.connection.send(GuestPrepared())

    def pauses(self, state: bytes = b"a state") -> None:
        self.told_to_pause()
        self.connection.send(Paused(state=state, last_step_ns=monotonic_ns(), foreseen=self.foreseen))

    def resumed(self) -> bytes | None:
        """Told to run, with what state; says that it does."""
        resume = self.connection.receive(Resume)
        if resume.state is not None:
            self.connection.send(Running(epoch=resume.epoch))
        return resume.state

    def told_only_the_end(self) -> bool:
        """Whether the connection ended with nothing said before it."""
        self.connection.receive_end()
        return True

    def told_nothing(self) -> bool:
        """Whether the daemon has sent nothing since; what it did before it answered another request is here already."""
        if self.connection.unread_messages:
            return False
        self._socket.setblocking(False)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
            return False
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(DEADLINE_SECONDS)


def oversized() -> bytes:
    """A length prefix beyond the bound, and nothing behind it: it must be refused before anything more is read."""
    return struct.pack("<I", (1 << 20) + 1)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def interrupted(client: DaemonClient, migration_id: str) -> MigrationStatus:
    """Until its path is lost, or worse, behind the switchover."""
    until(lambda: client.status(migration_id).state in ("paused", "stalled"), "paused or stalled")
    return client.status(migration_id)
