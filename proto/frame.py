"""The data frame header in Python: a mirror of frame.h for tests, fakes and tools. Pages themselves never come here."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from proto.errors import ProtocolError

_FRAME = struct.Struct("<HBBIQII")
FRAME_HEADER_BYTES = _FRAME.size
FRAME_MAGIC = 0x4350
FRAME_LENGTH_BYTES_MAX = 1 << 30
FRAME_CHUNK_BYTES = 128 << 10
FRAME_FLAG_MORE = 0x01


class FrameKind(IntEnum):
    REQUEST = 1
    PAGES = 2
    ZERO = 3
    STALE = 4
    MARK = 5
    LACKS = 6
    AHEAD = 7
    AHEAD_ZERO = 8


HAVE_PIECES = frozenset({FrameKind.PAGES, FrameKind.ZERO})
ACCEPTED_BY_SOURCE = frozenset({FrameKind.REQUEST})
ACCEPTED_BY_DESTINATION = frozenset({FrameKind.PAGES, FrameKind.ZERO})


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
    region: int
    page_index: int
    length_bytes: int
    offset_bytes: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        return _FRAME.pack(FRAME_MAGIC, self.kind, self.flags, self.region, self.page_index, self.offset_bytes, self.length_bytes)

    @classmethod
    def decode(cls, data: bytes, accepts: frozenset[FrameKind], regions: list[tuple[int, int]]) -> "Frame":
        """``regions``: (page_count, page_bytes) of each. Raises ProtocolError ``frame-invalid`` naming the field."""
        if len(data) != FRAME_HEADER_BYTES:
            raise ProtocolError("frame-invalid", "header size in bytes", expected=FRAME_HEADER_BYTES, got=len(data))
        magic, kind, flags, region, page_index, offset_bytes, length_bytes = _FRAME.unpack(data)
        _require(magic == FRAME_MAGIC, "magic", FRAME_MAGIC, magic)
        _require(kind in accepts, "kind", sorted(int(one) for one in accepts), kind)
        known_flags = FRAME_FLAG_MORE if kind in HAVE_PIECES else 0
        _require(flags & ~known_flags == 0, "flags", known_flags, flags)
        _require(region < len(regions), "region", f"< {len(regions)}", region)
        page_count, page_bytes = regions[region]
        pieces = kind in HAVE_PIECES and page_bytes > FRAME_CHUNK_BYTES
        last_bytes = page_bytes - FRAME_CHUNK_BYTES if pieces else 0
        inside = offset_bytes <= last_bytes and offset_bytes % FRAME_CHUNK_BYTES == 0
        _require(inside, "offset_bytes", f"<= {last_bytes}, in chunks of {FRAME_CHUNK_BYTES}", offset_bytes)
        _require(page_index < page_count, "page_index", f"< {page_count}", page_index)
        frame = cls(FrameKind(kind), region, page_index, length_bytes, offset_bytes, flags)
        if pieces and (offset_bytes or length_bytes < page_bytes):
            frame._check_piece(page_bytes)
            return frame
        whole = 0 < length_bytes <= FRAME_LENGTH_BYTES_MAX and length_bytes % page_bytes == 0
        _require(whole, "length_bytes", f"whole pages of {page_bytes}", length_bytes)
        room_bytes = (page_count - page_index) * page_bytes
        _require(length_bytes <= room_bytes, "length_bytes", f"<= {room_bytes}", length_bytes)
        _require(flags == 0, "flags", 0, flags)
        return frame

    def _check_piece(self, page_bytes: int) -> None:
        room_bytes = page_bytes - self.offset_bytes
        good = 0 < self.length_bytes <= room_bytes and self.length_bytes % FRAME_CHUNK_BYTES == 0
        _require(good, "length_bytes", f"chunks of {FRAME_CHUNK_BYTES}, <= {room_bytes}", self.length_bytes)
        wanted_flags = FRAME_FLAG_MORE if self.length_bytes < room_bytes else 0
        _require(self.flags == wanted_flags, "flags", wanted_flags, self.flags)


def _require(good: bool, field: str, expected: object, got: object) -> None:
    if not good:
        raise ProtocolError("frame-invalid", f"frame {field}", expected=expected, got=got)
