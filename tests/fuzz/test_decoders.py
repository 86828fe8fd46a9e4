"""The message decoders and the preamble on bytes made of good ones: messages, or a ProtocolError of bounded words."""

import random
import struct
from collections import Counter
from collections.abc import Callable

import msgpack  # type: ignore[import-untyped]
import pytest

from proto.errors import ProtocolError
from proto.messages import Decoder, Message, control_decoder, guest_decoder
from proto.preamble import NO_TOKEN, Answer, AnswerCode, ConnectionKind, Preamble

from ..proto.test_messages import CONTROL, GUEST

VALUES = (
    0,
    -1,
    1 << 63,
    (1 << 64) - 1,
    1.5,
    float("nan"),
    True,
    None,
    "",
    "x" * 3000,
    "\ud800".encode("utf-8", "replace"),
    [],
    {},
    [[]],
)
PREAMBLES = (
    Preamble(ConnectionKind.CONTROL, bytes(16), 0, 0, NO_TOKEN).encode(),
    Preamble(ConnectionKind.BULK, bytes(range(16)), 3, 7, bytes(range(16))).encode(),
    Answer(AnswerCode.WELCOME).encode(),
)


def changed_bytes(dice: random.Random, data: bytes) -> bytes:
    """A few bytes of it, its end, or a stretch twice."""
    made = bytearray(data)
    for _ in range(dice.randint(0, 4)):
        at = dice.randrange(len(made) + 1)
        kind = dice.random()
        if kind < 0.6 and at < len(made):
            made[at] = dice.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDF, 0xFF, dice.randrange(256)))
        elif kind < 0.75:
            del made[at:]
        elif kind < 0.9:
            made[at:at] = made[at : at + dice.randint(1, 16)]
        else:
            made[at:at] = dice.randbytes(dice.randint(1, 8))
    return bytes(made)


def changed_message(dice: random.Random, name: str, good: dict[str, object]) -> bytes:
    """Fields that are missing, too many, or of another kind; then perhaps its bytes too."""
    body: dict[object, object] = {"type": name, **good}
    for _ in range(dice.choice((0, 0, 1, 2))):
        field = dice.choice([*body, "else", 7])
        if dice.random() < 0.3:
            body.pop(field, None)
        else:
            body[field] = dice.choice(VALUES)
    packed = msgpack.packb(body)
    if dice.random() < 0.5:
        packed = changed_bytes(dice, packed)
    length = len(packed) if dice.random() < 0.9 else dice.choice((0, 1, 1 << 20, (1 << 20) + 1, (1 << 32) - 1))
    return struct.pack("<I", length) + packed


def outcome(decoder: Decoder[Message], data: bytes, dice: random.Random) -> str:
    """In two parts, wherever they begin."""
    middle = dice.randrange(len(data) + 1)
    try:
        messages = decoder.feed(data[:middle]) + decoder.feed(data[middle:])
    except ProtocolError as error:
        bounded = all(len(text) <= 2000 for text in (error.what, error.expected, error.got))
        return error.code if bounded else f"{error.code} in {len(str(error))} characters"
    return "messages" if messages else "more"


@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize(("make", "good"), [(control_decoder, CONTROL), (guest_decoder, GUEST)], ids=["control", "guest"])
def test_messages(
    make: Callable[[], Decoder[Message]], good: dict[str, dict[str, object]], fuzz_runs: int, fuzz_seed: int
) -> None:
    dice = random.Random(fuzz_seed)
    names = sorted(good)
    met: Counter[str] = Counter()
    for _ in range(fuzz_runs):
        name = dice.choice(names)
        data = changed_message(dice, name, good[name])
        try:
            met[outcome(make(), data, dice)] += 1
        except BaseException as error:
            error.add_note(f"input {data!r}")
            raise
    assert met.keys() == {"messages", "more", "message-invalid", "message-too-large"}


@pytest.mark.timeout(24 * 3600)
def test_preambles(fuzz_runs: int, fuzz_seed: int) -> None:
    dice = random.Random(fuzz_seed)
    met: Counter[str] = Counter()
    for _ in range(fuzz_runs):
        data = changed_bytes(dice, dice.choice(PREAMBLES))
        for decode in (Preamble.decode, Answer.decode):
            try:
                decode(data)
                met["good"] += 1
            except ProtocolError as error:
                met[error.code] += 1
    assert met.keys() >= {"good", "magic-wrong", "version-unsupported", "preamble-invalid"}
