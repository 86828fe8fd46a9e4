"""Peers and guests that take part in precopy and say exactly what a test tells them to: what fakes.py has, and the rounds."""

import select
import socket
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType

from migrate.client import DaemonClient
from migrate.pair import wait_settled
from migrate.session import ErrorFacts
from proto.frame import FRAME_HEADER_BYTES, Frame, FrameKind
from proto.messages import (
    GuestPrepare,
    GuestPrepared,
    Hello,
    Offer,
    Prepare,
    Quiesced,
    Ready,
    Round,
    Track,
    Tracking,
    Untrack,
    control_decoder,
    encode,
)
from proto.preamble import ConnectionKind

from .fakes import DEADLINE_SECONDS, Connection, FakeDestination, FakeGuest, FakeSource, interrupted, receive_exactly
from .memory_child import PAGE_BYTES, AwaitedMemory, MemoryChild, TrackedMemory

LARGE = "8M"
"""More than sockets buffer: its rounds wait for who reads them."""


def mark(**changed: int) -> bytes:
    return Frame(**{"kind": FrameKind.MARK, "region": 0, "page_index": 0, "length_bytes": 0, **changed}).encode()  # type: ignore[arg-type]


def pages(first: int, content: bytes, page_bytes: int = PAGE_BYTES) -> bytes:
    """A frame of pages with that content, a whole number of pages."""
    assert len(content) % page_bytes == 0
    return Frame(FrameKind.PAGES, 0, first, len(content)).encode() + content


def zeroes(first: int, count: int) -> bytes:
    return Frame(FrameKind.ZERO, 0, first, count * PAGE_BYTES).encode()


def bits(kind: FrameKind, set_pages: Iterable[int], page_count: int, *, first: int = 0, beyond: int = 0) -> bytes:
    """One frame of a stale or lacking set over pages [first, first + page_count); ``beyond``: so many bits more, all set."""
    value = sum(1 << (page - first) for page in set_pages) | ((1 << beyond) - 1) << page_count
    return Frame(kind, 0, first, page_count * PAGE_BYTES).encode() + value.to_bytes((page_count + 7) // 8, "little")


def pages_of(payload: bytes, page_count: int) -> set[int]:
    """Those whose bit is set."""
    value = int.from_bytes(payload, "little")
    return {page for page in range(page_count) if value >> page & 1}


class PrecopySource(FakeSource):
    """``begin_round`` stands in the first round; ``attach``, and what goes through it, does what is left up to `quiesced`."""

    begun = quiesced = False

    def offered(self) -> Offer:
        return super().offered().model_copy(update={"precopy": True})

    def begin_round(self) -> None:
        super().attach()
        self.control.send(Round(number=1, pages=self.page_count))
        self.begun = True

    def attach(self) -> None:
        if not self.begun:
            self.begin_round()
            self.send_all()
        if not self.quiesced:
            self.quiesce()

    @property
    def page_count(self) -> int:
        return sum(region.size_bytes // region.page_bytes for region in self.regions)

    def send_all(self) -> None:
        """Every page of region 0, each of a content of its own that is not zero."""
        region = self.regions[0]
        for page in range(region.size_bytes // region.page_bytes):
            self.bulk.sendall(pages(page, content_of(page, region.page_bytes), region.page_bytes))

    def quiesce(self) -> None:
        for bulk in self.bulks:
            bulk.sendall(mark())
        self.control.receive(Quiesced)
        self.quiesced = True

    def receive_lacks(self, page_count: int) -> set[int]:
        """Of one region of small pages, in one frame."""
        header = receive_exactly(self.bulk, FRAME_HEADER_BYTES)
        frame = Frame.decode(header, frozenset({FrameKind.LACKS}), [(page_count, PAGE_BYTES)])
        assert (frame.page_index, frame.length_bytes) == (0, page_count * PAGE_BYTES)
        return pages_of(receive_exactly(self.bulk, (page_count + 7) // 8), page_count)


def content_of(page: int, page_bytes: int = PAGE_BYTES) -> bytes:
    return struct.pack("<Q", page + 1) * (page_bytes // 8)


class PrecopyDestination(FakeDestination):
    """Takes part in precopy. ``guest``: the one that leaves, when it is a fake too and is told to track."""

    STEPS = ("asked to track", "offered", "accepted", "attached", "in a round", "marked", "guest asked to prepare", "prepared")

    def __init__(self, guest: "TrackedGuest | None" = None, *, receive_buffer_bytes: int = 0) -> None:
        super().__init__()
        self.guest = guest
        self.precopied: dict[int, bytes] = {}
        """The last copy of each page of region 0."""
        if receive_buffer_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)

    def accept_offer(self) -> Offer:
        self.begin()
        if self.guest is not None:
            self.guest.tracks()
        return self.receive_offer()

    def begin(self) -> None:
        """Welcomed; the source asks its guest first."""
        self.control = Connection(self.greet(ConnectionKind.CONTROL), control_decoder())

    def receive_offer(self) -> Offer:
        offer = self.control.receive(Offer)
        self.page_count = sum(region.size_bytes // region.page_bytes for region in offer.regions)
        return offer

    def send_accept(self) -> None:
        self.control.send(self.accepted().model_copy(update={"precopy": True}))

    def begin_round(self) -> Round:
        self.attach()
        self.control.beside = self.guest
        self.control.send(Ready())
        return self.control.receive(Round)

    def receive_frame(self, stream: int = 0) -> tuple[FrameKind, int, bytes]:
        """Kind, first page and payload of the next frame by a bulk connection, of whatever kind."""
        bulk = self.bulks[stream]
        header = receive_exactly(bulk, FRAME_HEADER_BYTES)
        _, kind, _, _, page_index, _, length_bytes = struct.unpack("<HBBIQII", header)
        size_bytes = {FrameKind.PAGES: length_bytes, FrameKind.STALE: (length_bytes // PAGE_BYTES + 7) // 8}.get(kind, 0)
        return FrameKind(kind), page_index, receive_exactly(bulk, size_bytes)

    def receive_rounds(self) -> None:
        """All of them, until the marks of all connections."""
        unmarked = set(range(len(self.bulks)))
        while unmarked:
            readable, _, _ = select.select([self.bulks[stream] for stream in unmarked], [], [], DEADLINE_SECONDS)
            assert readable, f"no mark on {unmarked}"
            for stream in [stream for stream in unmarked if self.bulks[stream] in readable]:
                kind, first, content = self.receive_frame(stream)
                if kind is FrameKind.MARK:
                    unmarked.remove(stream)
                for done in range(0, len(content), PAGE_BYTES):
                    self.precopied[first + done // PAGE_BYTES] = content[done : done + PAGE_BYTES]

    def prepare(self, guest: FakeGuest | None = None) -> Prepare:
        self.begin_round()
        self.receive_rounds()
        self.control.send(Quiesced())
        return self.prepare_asked()

    def prepare_asked(self) -> Prepare:
        """Behind what was said of the rounds."""
        while isinstance(message := self.control.receive(Round, Prepare), Round):
            pass
        return message

    def until(self, step: str) -> None:
        """Everything up to and with this step of STEPS, then nothing more."""
        guest = self.guest
        assert guest is not None
        for name, actions in {
            "asked to track": (self.begin, guest.told_to_track),
            "offered": (guest.says_tracking, self.receive_offer),
            "accepted": (self.send_accept,),
            "attached": (self.greet_data,),
            "in a round": (lambda: self.control.send(Ready()), lambda: self.control.receive(Round)),
            "marked": (self.receive_rounds,),
            "guest asked to prepare": (lambda: self.control.send(Quiesced()), guest.told_to_prepare),
            "prepared": (lambda: guest.connection.send(GuestPrepared()), self.prepare_asked),
        }.items():
            for action in actions:
                action()
            if name == step:
                return
        raise AssertionError(step)

    def receive_stale(self) -> set[int]:
        """In one frame."""
        kind, first, payload = self.receive_frame()
        assert (kind, first) == (FrameKind.STALE, 0)
        return pages_of(payload, self.page_count)


class TrackedGuest(FakeGuest):
    """A running guest that can be tracked. Its memory is mapped by a child process, which ``does`` what it is told to."""

    def __init__(
        self, guest_id: str, memory: str = "1M", *, offers: Sequence[str] = ("tracking",), declares: Sequence[str] = ()
    ) -> None:
        super().__init__(guest_id, "running", memory)
        self._said = {"offers": list(offers), "declares": list(declares)}
        self.child = MemoryChild(self.memory.files[0], self.memory.regions[0], TrackedMemory)
        self.pagemap_fd = self.child.descriptor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.child.kill()
        super().__exit__(kind, error, trace)

    def hello(self, **changed: object) -> Hello:
        region = self.region(guest_address=self.child.address)
        return super().hello(**{**self._said, "regions": [region], **changed})

    def told_to_track(self) -> None:
        self.connection.receive(Track)

    def told_to_prepare(self) -> None:
        self.connection.receive(GuestPrepare)

    def says_tracking(self) -> None:
        self.send(encode(Tracking()), [self.pagemap_fd])

    def tracks(self) -> None:
        self.told_to_track()
        self.says_tracking()

    def untracked(self) -> bool:
        return isinstance(self.connection.receive(Untrack), Untrack)


class TouchedGuest(FakeGuest):
    """A waiting guest whose memory a child process maps and touches."""

    def __init__(self, guest_id: str, memory: str = "1M") -> None:
        super().__init__(guest_id, "waiting", memory)
        self.child = MemoryChild(self.memory.files[0], self.memory.regions[0], AwaitedMemory)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.child.kill()
        super().__exit__(kind, error, trace)

    def hello(self, **changed: object) -> Hello:
        return super().hello(**{"regions": [self.region(guest_address=self.child.address)], **changed})

    def descriptors(self) -> list[int]:
        return [*self.memory.files, self.child.descriptor]


# --- what must have come of it ------------------------------------------------------------------------------------------


def runs_on(client: DaemonClient, migration_id: str, guest: TrackedGuest) -> ErrorFacts:
    """P5: as if nothing had been tried; its writes need not be seen any more."""
    status = wait_settled(client, migration_id)
    assert status.state == "failed"
    assert status.error is not None
    assert "pausing" not in status.timeline_seconds
    assert guest.untracked()
    assert guest.told_nothing()
    assert next(one["state"] for one in client.guests() if one["id"] == guest.guest_id) == "running"
    return status.error


def stays_paused(client: DaemonClient, migration_id: str, guest: TrackedGuest) -> ErrorFacts:
    """P4: after the switchover nobody but its destination may decide."""
    status = interrupted(client, migration_id)
    assert status.error is not None
    assert guest.told_nothing()
    return status.error
