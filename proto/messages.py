"""Every message of the control connection and of the guest socket: typed, bounded, strictly validated.

On the wire a message is a u32 little-endian length and a msgpack map with a ``type``; PROTOCOL.md gives the order.
Unknown fields, missing fields, other types and anything beyond its bound raise ProtocolError ``message-invalid``.
"""

import struct
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from proto.errors import ProtocolError

MESSAGE_BYTES_MAX = 1 << 20
STATE_BYTES_MAX = 768 << 10
REGIONS_MAX = 64
PAGE_BYTES = (4096, 2 << 20, 1 << 30)
STREAMS_MAX = 8
DISCARD_RANGES_MAX = 256
DISCARD_PAGES_MAX = 4096
FORESEEN_PAGES_MAX = 64
WAKE_MS_MAX = 1000

MonotonicNs = Annotated[int, Field(ge=0, lt=1 << 63)]
SizeBytes = Annotated[int, Field(gt=0, le=1 << 50)]
OffsetBytes = Annotated[int, Field(ge=0, le=1 << 50)]
PageBytes = Literal[4096, 2097152, 1073741824]
NAME_CHARACTERS_MAX, NAME_PATTERN = 64, r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=NAME_PATTERN)]
Text = Annotated[str, Field(max_length=2000)]
Version = Annotated[int, Field(ge=0, lt=1 << 16)]
Epoch = Annotated[int, Field(ge=0, lt=1 << 32)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
State = Annotated[bytes, Field(max_length=STATE_BYTES_MAX)]
Streams = Annotated[int, Field(ge=1, le=STREAMS_MAX)]
Foreseen = Annotated[list[Count], Field(max_length=FORESEEN_PAGES_MAX)]
"""Pages that the paused guest will touch first, by their numbers through all regions in order: plain ints, as they are read and
written within the downtime. They are asked for before the guest faults on them; wrong ones cost their transfer."""
Populated = Annotated[list[Count], Field(max_length=REGIONS_MAX)] | None
"""Bytes of each region, in order, that hold anything at the source; None: it does not say."""


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# --- control connection: source <-> destination -------------------------------------------------------------------


class OfferedRegion(Message):
    """One contiguous range of guest memory with one page size; its index in the list is its number on the wire."""

    size_bytes: SizeBytes
    page_bytes: PageBytes
    populated_bytes: Count | None = None

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        if self.size_bytes % self.page_bytes:
            raise ValueError(f"size_bytes a multiple of {self.page_bytes}, not {self.size_bytes}")
        if self.populated_bytes is not None and self.populated_bytes > self.size_bytes:
            raise ValueError(f"populated_bytes <= {self.size_bytes}, not {self.populated_bytes}")
        return self


class Offer(Message):
    """source -> destination, first: take this guest. ``streams``: bulk connections, at most."""

    type: Literal["offer"] = "offer"
    guest_id: Name
    regions: Annotated[list[OfferedRegion], Field(min_length=1, max_length=REGIONS_MAX)]
    clock_id: Text
    software: Text
    precopy: bool = False
    streams: Streams = 1
    machine: Text | None = None


class Accept(Message):
    """destination -> source: a waiting guest fits; data connections prove themselves by the token, ``streams`` of them bulk."""

    type: Literal["accept"] = "accept"
    token: Annotated[bytes, Field(min_length=16, max_length=16)]
    waiting_guest_id: Name
    clock_id: Text
    software: Text
    precopy: bool = False
    streams: Streams = 1


class Refused(Message):
    """Either way: no, and why. The connection ends after it; the source's guest runs on."""

    type: Literal["refused"] = "refused"
    code: Name
    what: Text
    expected: Text
    got: Text


class ClockPing(Message):
    type: Literal["clock_ping"] = "clock_ping"
    sent_ns: MonotonicNs


class ClockPong(Message):
    type: Literal["clock_pong"] = "clock_pong"
    sent_ns: MonotonicNs
    peer_ns: MonotonicNs


class Ready(Message):
    """destination -> source: urgent and bulk connections are attached."""

    type: Literal["ready"] = "ready"


class Round(Message):
    """source -> destination, in precopy: a round begins; so many pages are to be sent."""

    type: Literal["round"] = "round"
    number: Count
    pages: Count
    populated_bytes: Populated = None


class Quiesced(Message):
    """destination -> source: the mark has come on every bulk connection; no precopied page is in flight."""

    type: Literal["quiesced"] = "quiesced"


class Prepare(Message):
    """source -> destination: the switchover is next; hold everything else back."""

    type: Literal["prepare"] = "prepare"
    clock_offset_ns: Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)]
    clock_uncertainty_ns: MonotonicNs
    populated_bytes: Populated = None


class Prepared(Message):
    type: Literal["prepared"] = "prepared"


class Switchover(Message):
    """source -> destination: the guest is paused, this is its state; resume it. Sent at most once an epoch."""

    type: Literal["switchover"] = "switchover"
    epoch: Epoch
    state: State
    last_step_ns: MonotonicNs
    foreseen: Foreseen = []


class Running(Message):
    """destination -> source, guest -> destination daemon: the guest runs."""

    type: Literal["running"] = "running"
    epoch: Epoch


class Aborted(Message):
    """destination -> source: recorded that this epoch's guest will never be resumed here; the source may resume it."""

    type: Literal["aborted"] = "aborted"
    epoch: Epoch
    reason: Text


FaultKind = Literal["remote", "local", "zero"]


class LatencySummary(Message):
    """Of one kind of fault; nanoseconds, handler's view (event read to page resolved)."""

    count: Count
    p50_ns: Count
    p99_ns: Count
    max_ns: Count


class Progress(Message):
    """destination -> source, a few times a second in postcopy; ``downtime_ns`` from when the guest's first step is known."""

    type: Literal["progress"] = "progress"
    pages_present: Count
    faults: Count
    downtime_ns: Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | None
    downtime_uncertainty_ns: MonotonicNs


class Complete(Message):
    """destination -> source: every page is here and the memory is unregistered; the source's copy is not needed."""

    type: Literal["complete"] = "complete"
    downtime_ns: Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | None
    downtime_uncertainty_ns: MonotonicNs
    faults: Annotated[dict[FaultKind, LatencySummary], Field(max_length=3)]
    pages: Annotated[dict[Name, Count], Field(max_length=32)]
    stale_window_ns: Count | None = None


class Recover(Message):
    """source -> destination, first on a control connection of a later epoch: go on with this migration."""

    type: Literal["recover"] = "recover"
    epoch: Epoch


class Recovered(Message):
    """destination -> source: the guest runs here and waits for pages; data connections of this epoch are expected.
    ``settled``: no page is held any more, the stale set need not be told again."""

    type: Literal["recovered"] = "recovered"
    epoch: Epoch
    settled: bool


class Heartbeat(Message):
    """Either way: still here. Whoever has said it once is expected to go on."""

    type: Literal["heartbeat"] = "heartbeat"


class Released(Message):
    """source -> destination: understood; both close."""

    type: Literal["released"] = "released"


class Cancel(Message):
    """source -> destination, before the switchover only."""

    type: Literal["cancel"] = "cancel"
    reason: Text


ControlMessage = Annotated[
    Offer | Accept | Refused | ClockPing | ClockPong | Ready | Round | Quiesced | Prepare | Prepared | Switchover | Running
    | Aborted | Progress | Complete | Released | Cancel | Recover | Recovered | Heartbeat,
    Field(discriminator="type"),
]  # fmt: skip

# --- guest socket: agent <-> its daemon ---------------------------------------------------------------------------


class GuestRegion(Message):
    """``guest_address``: where the guest maps it. ``memory_file``: which of the memory descriptors backs it."""

    guest_address: Annotated[int, Field(ge=0, lt=1 << 64)]
    size_bytes: SizeBytes
    offset_bytes: OffsetBytes
    page_bytes: PageBytes
    memory_file: Annotated[int, Field(ge=0, lt=REGIONS_MAX)]

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        for field in ("guest_address", "size_bytes", "offset_bytes"):
            if getattr(self, field) % self.page_bytes:
                raise ValueError(f"{field} a multiple of {self.page_bytes}, not {getattr(self, field)}")
        if self.guest_address + self.size_bytes > 1 << 64:
            raise ValueError(f"guest_address + size_bytes <= 2^64, not {self.guest_address + self.size_bytes}")
        return self


class Hello(Message):
    """agent -> daemon, first, with descriptors attached: the memory files, then (waiting guests) the userfaultfd.

    role ``running``: may be migrated away; ``waiting``: takes a guest whose regions equal its own. Of one whose daemon was lost
    amid a migration: ``paused`` at the source; ``arriving`` at the destination, resumed in ``epoch``, page states attached last.
    """

    type: Literal["hello"] = "hello"
    major: Version
    minor: Version
    guest_id: Name
    role: Literal["running", "waiting", "paused", "arriving"]
    regions: Annotated[list[GuestRegion], Field(min_length=1, max_length=REGIONS_MAX)]
    memory_files: Annotated[int, Field(ge=1, le=REGIONS_MAX)]
    offers: Annotated[list[Name], Field(max_length=32)] = []
    declares: Annotated[list[Name], Field(max_length=32)] = []
    remove_means: Literal["zero", "keep"] | None = None
    machine: Text | None = None
    wake_ms: Annotated[int, Field(ge=0, le=WAKE_MS_MAX)] = 0
    page_states: bool = False
    epoch: Epoch | None = None

    @model_validator(mode="after")
    def _brought_back(self) -> Self:
        if self.role == "arriving" and not (self.page_states and self.epoch is not None):
            raise ValueError("page_states and epoch of a guest that is arriving")
        return self

    @model_validator(mode="after")
    def _files_named(self) -> Self:
        for region in self.regions:
            if region.memory_file >= self.memory_files:
                raise ValueError(f"memory_file < memory_files ({self.memory_files}), not {region.memory_file}")
        return self


class Welcome(Message):
    type: Literal["welcome"] = "welcome"
    major: Version
    minor: Version
    software: Text


class GuestPrepare(Message):
    """daemon -> agent: a switchover is next. Answer ``prepared`` at once; what can be made ready for it, make ready."""

    type: Literal["prepare"] = "prepare"


class GuestPrepared(Message):
    type: Literal["prepared"] = "prepared"


class Track(Message):
    """daemon -> agent, to a running guest that offers ``tracking``: from now on its writes are to be seen."""

    type: Literal["track"] = "track"


class Tracking(Message):
    """agent -> daemon, the guest's pagemap attached: its memory is registered for asynchronous write protection."""

    type: Literal["tracking"] = "tracking"


class TrackFailed(Message):
    """agent -> daemon: it cannot be, and why; the guest is moved without precopy."""

    type: Literal["track_failed"] = "track_failed"
    reason: Text


class Untrack(Message):
    """daemon -> agent: the migration came to nothing; writes need not be seen any more."""

    type: Literal["untrack"] = "untrack"


class Keep(Message):
    """daemon -> agent, a descriptor attached: the page states, to be brought along when this daemon is lost."""

    type: Literal["keep"] = "keep"


class Pause(Message):
    """daemon -> agent: stop between two steps; answer ``paused`` or ``pause_failed`` before the deadline."""

    type: Literal["pause"] = "pause"
    deadline_ms: Annotated[int, Field(gt=0, le=600_000)]


class Paused(Message):
    type: Literal["paused"] = "paused"
    state: State
    last_step_ns: MonotonicNs
    foreseen: Foreseen = []


class PauseFailed(Message):
    """The guest could not be stopped in time and runs on."""

    type: Literal["pause_failed"] = "pause_failed"
    reason: Text


class Resume(Message):
    """daemon -> agent. With state: load it and run (a waiting guest). Without: run on as if never paused."""

    type: Literal["resume"] = "resume"
    epoch: Epoch
    state: State | None


class ResumeFailed(Message):
    """The agent refused the state and never ran: the guest can still be resumed at the source."""

    type: Literal["resume_failed"] = "resume_failed"
    epoch: Epoch
    reason: Text


class Stepped(Message):
    """agent -> daemon: when the guest completed its first step since resume, on the guest's CLOCK_MONOTONIC."""

    type: Literal["stepped"] = "stepped"
    first_step_ns: MonotonicNs


class PageRange(Message):
    """Pages of one region of the guest."""

    region: Annotated[int, Field(ge=0, lt=REGIONS_MAX)]
    page_index: Count
    page_count: Annotated[int, Field(ge=1, le=DISCARD_PAGES_MAX)]


class Discard(Message):
    """agent -> daemon: these pages are to be zero, and left alone by the guest until ``discarded``."""

    type: Literal["discard"] = "discard"
    ranges: Annotated[list[PageRange], Field(min_length=1, max_length=DISCARD_RANGES_MAX)]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        """What a daemon does at once, between two other messages."""
        if (pages := sum(one.page_count for one in self.ranges)) > DISCARD_PAGES_MAX:
            raise ValueError(f"at most {DISCARD_PAGES_MAX} pages in all, not {pages}")
        return self


class Discarded(Message):
    """daemon -> agent, to each ``discard`` in turn: it holds, whatever becomes of the migration."""

    type: Literal["discarded"] = "discarded"


class GuestComplete(Message):
    """daemon -> agent: all memory is here and unregistered; the userfaultfd may be closed; the guest is `running` now."""

    type: Literal["complete"] = "complete"


class GuestReleased(Message):
    """daemon -> agent: the guest runs elsewhere and is whole there; this memory may be freed."""

    type: Literal["released"] = "released"


class GuestFailed(Message):
    """agent -> daemon: the guest found itself broken."""

    type: Literal["failed"] = "failed"
    reason: Text


GuestMessage = Annotated[
    Hello | Welcome | Refused | GuestPrepare | GuestPrepared | Track | Tracking | TrackFailed | Untrack | Keep | Pause | Paused
    | PauseFailed | Resume | ResumeFailed | Running | Stepped | Discard | Discarded | GuestComplete | GuestReleased | GuestFailed,
    Field(discriminator="type"),
]  # fmt: skip

# --- codec ---------------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("<I")
_M = TypeVar("_M", bound=Message)


def encode(message: Message) -> bytes:
    """Length prefix and msgpack map. Raises ProtocolError ``message-too-large`` for what a peer would refuse."""
    body: bytes = msgpack.packb(message.model_dump(), use_bin_type=True)
    if len(body) > MESSAGE_BYTES_MAX:
        raise ProtocolError("message-too-large", "message size in bytes", expected=f"<= {MESSAGE_BYTES_MAX}", got=len(body))
    return _LENGTH.pack(len(body)) + body


class Decoder(Generic[_M]):
    """Bytes in, messages out. One for each connection; after an error the connection cannot be read on."""

    def __init__(self, adapter: TypeAdapter[_M]) -> None:
        self._adapter = adapter
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[_M]:
        """Raises ProtocolError ``message-too-large`` or ``message-invalid``."""
        self._buffer += data
        messages: list[_M] = []
        while len(self._buffer) >= _LENGTH.size:
            (size_bytes,) = _LENGTH.unpack_from(self._buffer)
            if size_bytes > MESSAGE_BYTES_MAX:
                raise ProtocolError(
                    "message-too-large", "message size in bytes", expected=f"<= {MESSAGE_BYTES_MAX}", got=size_bytes
                )
            end = _LENGTH.size + size_bytes
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            messages.append(self._decode(body))
        return messages

    @property
    def incomplete(self) -> bool:
        """True when the connection would end in the middle of a message."""
        return bool(self._buffer)

    def _decode(self, body: bytes) -> _M:
        try:
            raw: Any = msgpack.unpackb(body, raw=False, strict_map_key=True)
        except Exception as error:  # msgpack raises many kinds for bytes that are not msgpack
            raise ProtocolError(
                "message-invalid", "message", expected="a msgpack map", got=f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
            raise ProtocolError("message-invalid", "message", expected="a map with a text as its type", got=_described(raw))
        try:
            return self._adapter.validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=True)[0]
            where = ".".join(str(part) for part in first["loc"]) or "message"
            got = "nothing" if first["type"] == "missing" else _described(first["input"])
            raise ProtocolError("message-invalid", where, expected=first["msg"], got=got) from error


def _described(value: object) -> str:
    """Sizes instead of bytes, arrays and maps: a token or a guest's state never reaches a log, and deep nesting no repr()."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, (list, tuple, dict)):
        return f"{'a map' if isinstance(value, dict) else 'an array'} of {len(value)}"
    return repr(value)


_CONTROL: TypeAdapter[Message] = TypeAdapter(ControlMessage)
_GUEST: TypeAdapter[Message] = TypeAdapter(GuestMessage)


def control_decoder() -> Decoder[Message]:
    return Decoder(_CONTROL)


def guest_decoder() -> Decoder[Message]:
    return Decoder(_GUEST)
