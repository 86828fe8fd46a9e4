"""The data frame header in Python: a mirror of frame.h for tests, fakes and tools. Pages themselves never come here."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from proto.errors import ProtocolError

_FRAME = struct.Struct("<HBBIQII")
FRAME_HEADER_BYTES = _FRAME.size
FRAME_MAGIC = 0x4350
FRAME_LENGTH_BYTES_MAX = 1 << 30


class FrameKind(IntEnum):
    REQUEST = 1
    PAGES = 2
    ZERO = 3
    STALE = 4
    MARK = 5
    LACKS = 6
    AHEAD = 7
    AHEAD_ZERO = 8


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
        _require(flags == 0, "flags", 0, flags)
        _require(region < len(regions), "region", f"< {len(regions)}", region)
        _require(offset_bytes == 0, "offset_bytes", 0, offset_bytes)
        page_count, page_bytes = regions[region]
        _require(page_index < page_count, "page_index", f"< {page_count}", page_index)
        whole = 0 < length_bytes <= FRAME_LENGTH_BYTES_MAX and length_bytes % page_bytes == 0
        _require(whole, "length_bytes", f"whole pages of {page_bytes}", length_bytes)
        room_bytes = (page_count - page_index) * page_bytes
        _require(length_bytes <= room_bytes, "length_bytes", f"<= {room_bytes}", length_bytes)
        return cls(FrameKind(kind), region, page_index, length_bytes, offset_bytes, flags)


def _require(good: bool, field: str, expected: object, got: object) -> None:
    if not good:
        raise ProtocolError("frame-invalid", f"frame {field}", expected=expected, got=got)
