"""The first bytes of every TCP connection, and their answer: fixed, so that any two versions can refuse each other.

preamble, 64 bytes, little-endian: magic "POSTCOPY" · u16 major · u16 minor · u8 kind · 3 zero · 16 migration id ·
u32 epoch · u32 stream index · 16 token · 8 zero.    answer, 16 bytes: magic · u16 major · u16 minor · u16 code · 2 zero.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR
from proto.errors import ProtocolError

MAGIC = b"POSTCOPY"
_PREAMBLE = struct.Struct("<8sHHB3x16sII16s8x")
_ANSWER = struct.Struct("<8sHHH2x")
PREAMBLE_BYTES = _PREAMBLE.size
ANSWER_BYTES = _ANSWER.size
NO_TOKEN = bytes(16)
TLS_CONTROL, TLS_DATA = b"C", b"D"
"""Said in the clear before a TLS handshake: which kind of connection the preamble, inside, will name."""


class ConnectionKind(IntEnum):
    CONTROL = 1
    URGENT = 2
    BULK = 3


class AnswerCode(IntEnum):
    """How an acceptor answers a preamble; anything but WELCOME is followed by the end of the connection."""

    WELCOME = 0
    VERSION_UNSUPPORTED = 1
    MIGRATION_UNKNOWN = 2
    EPOCH_STALE = 3
    TOKEN_WRONG = 4
    KIND_UNEXPECTED = 5
    PREAMBLE_INVALID = 6
    BUSY = 7
    TLS_REQUIRED = 8
    NAME_NOT_ALLOWED = 9


_REMEDIES = {
    AnswerCode.MIGRATION_UNKNOWN: "; it has no such migration, or that has ended: its log tells, or this is another daemon",
    AnswerCode.EPOCH_STALE: "; it has seen this epoch or a later one: first of all, is it the daemon that the guest leaves?",
    AnswerCode.TLS_REQUIRED: "; it speaks TLS only: start this daemon with --tls-dir too",
    AnswerCode.NAME_NOT_ALLOWED: "; it lets other names in: add --tls-allow with a DNS name of our certificate there",
}


@dataclass(frozen=True, slots=True)
class Preamble:
    kind: ConnectionKind
    migration_id: bytes
    epoch: int
    stream_index: int = 0
    token: bytes = NO_TOKEN
    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR

    def encode(self) -> bytes:
        return _PREAMBLE.pack(
            MAGIC, self.major, self.minor, self.kind, self.migration_id, self.epoch, self.stream_index, self.token
        )

    @classmethod
    def decode(cls, data: bytes) -> "Preamble":
        """Raises ProtocolError: ``magic-wrong``, ``version-unsupported`` (another major), ``preamble-invalid``."""
        if data[:8] != MAGIC[: len(data[:8])] or len(data) < 8:
            raise ProtocolError("magic-wrong", "preamble magic", expected=MAGIC, got=data[:8])
        if len(data) != PREAMBLE_BYTES:
            raise ProtocolError("preamble-invalid", "preamble size in bytes", expected=PREAMBLE_BYTES, got=len(data))
        _, major, minor, kind, migration_id, epoch, stream_index, token = _PREAMBLE.unpack(data)
        if major != PROTOCOL_MAJOR:
            raise ProtocolError(
                "version-unsupported",
                "protocol version",
                expected=f"{PROTOCOL_MAJOR}.x",
                got=f"{major}.{minor}; install the same major version of postcopy on both sides",
            )
        if kind not in ConnectionKind._value2member_map_:
            raise ProtocolError("preamble-invalid", "connection kind", expected="1, 2 or 3", got=kind)
        if data[13:16] != bytes(3) or data[56:64] != bytes(8):
            raise ProtocolError("preamble-invalid", "reserved bytes", expected="zero", got=(data[13:16] + data[56:64]).hex())
        return cls(ConnectionKind(kind), migration_id, epoch, stream_index, token, major, minor)


@dataclass(frozen=True, slots=True)
class Answer:
    code: AnswerCode
    major: int = PROTOCOL_MAJOR
    minor: int = PROTOCOL_MINOR

    def encode(self) -> bytes:
        return _ANSWER.pack(MAGIC, self.major, self.minor, self.code)

    @classmethod
    def decode(cls, data: bytes) -> "Answer":
        """Raises ProtocolError: ``magic-wrong``, ``preamble-invalid`` (size or code)."""
        if data[:8] != MAGIC:
            raise ProtocolError("magic-wrong", "preamble answer", expected=MAGIC, got=data[:8])
        if len(data) != ANSWER_BYTES:
            raise ProtocolError("preamble-invalid", "answer size in bytes", expected=ANSWER_BYTES, got=len(data))
        _, major, minor, code = _ANSWER.unpack(data)
        if code not in AnswerCode._value2member_map_:
            raise ProtocolError("preamble-invalid", "answer code", expected="0..9", got=code)
        return cls(AnswerCode(code), major, minor)

    def check(self) -> None:
        """Raises ProtocolError with the answer's name as its code unless the peer said WELCOME."""
        if self.code is not AnswerCode.WELCOME:
            name = self.code.name.lower().replace("_", "-")
            got = f"{name}: peer speaks {self.major}.{self.minor}, this side {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}"
            got += _REMEDIES.get(self.code, "")
            raise ProtocolError(name, "peer's answer to the preamble", expected="welcome", got=got)
