"""Control and guest-socket messages: round trips, bounds, strictness, split feeding, any bytes at all."""

import struct
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proto import messages as m
from proto.errors import ProtocolError

REGION = {"size_bytes": 8192, "page_bytes": 4096, "populated_bytes": 4096}
GUEST_REGION = {"guest_address": 1 << 40, "size_bytes": 8192, "offset_bytes": 0, "page_bytes": 4096, "memory_file": 0}
LATENCY = {"count": 3, "p50_ns": 1, "p99_ns": 2, "max_ns": 3}
TOKEN, STATE = b"0123456789abcdef", b"registers"
# One good instance of every message, as it is on the wire.
CONTROL: dict[str, dict[str, Any]] = {
    "offer": {
        "guest_id": "db-1",
        "regions": [REGION],
        "clock_id": "here",
        "software": "postcopy 0.1",
        "precopy": True,
        "streams": 8,
        "machine": "M 1",
    },
    "accept": {
        "token": TOKEN,
        "waiting_guest_id": "w",
        "clock_id": "there",
        "software": "postcopy 0.1",
        "precopy": True,
        "streams": 1,
    },
    "refused": {"code": "busy", "what": "guest", "expected": "idle", "got": "migrating"},
    "clock_ping": {"sent_ns": 0},
    "clock_pong": {"sent_ns": 0, "peer_ns": (1 << 63) - 1},
    "ready": {},
    "round": {"number": 1, "pages": 262144, "populated_bytes": [4096]},
    "quiesced": {},
    "prepare": {"clock_offset_ns": -5, "clock_uncertainty_ns": 7, "populated_bytes": None},
    "prepared": {},
    "switchover": {"epoch": 0, "state": STATE, "last_step_ns": 9, "foreseen": [7]},
    "running": {"epoch": 0},
    "aborted": {"epoch": 0, "reason": "resume refused"},
    "progress": {"pages_present": 1, "faults": 2, "downtime_ns": None, "downtime_uncertainty_ns": 0},
    "recover": {"epoch": 3},
    "recovered": {"epoch": 3, "settled": True},
    "heartbeat": {},
    "complete": {
        "downtime_ns": -1,
        "downtime_uncertainty_ns": 4,
        "faults": {"remote": LATENCY},
        "pages": {"urgent": 4},
        "stale_window_ns": 5,
    },
    "released": {},
    "cancel": {"reason": "asked to"},
}


def pages(page_count: int) -> dict[str, int]:
    return {"region": 0, "page_index": 7, "page_count": page_count}


PAGE_RANGE = pages(2)
GUEST: dict[str, dict[str, Any]] = {
    "hello": {
        "major": 1, "minor": 0, "guest_id": "g", "role": "waiting", "regions": [GUEST_REGION], "memory_files": 1,
        "offers": [], "declares": [], "remove_means": "zero", "machine": "M 1", "wake_ms": 30,
        "page_states": True, "epoch": 3,
    },
    "welcome": {"major": 1, "minor": 0, "software": "postcopy 0.1"},
    "refused": CONTROL["refused"],
    "prepare": {},
    "prepared": {},
    "track": {},
    "tracking": {},
    "track_failed": {"reason": "ENOSYS"},
    "untrack": {},
    "keep": {},
    "pause": {"deadline_ms": 100},
    "paused": {"state": STATE, "last_step_ns": 9, "foreseen": [7]},
    "pause_failed": {"reason": "busy"},
    "resume": {"epoch": 0, "state": None},
    "resume_failed": {"epoch": 0, "reason": "not my state"},
    "running": {"epoch": 0},
    "stepped": {"first_step_ns": 10},
    "discard": {"ranges": [PAGE_RANGE]},
    "discarded": {},
    "complete": {},
    "released": {},
    "failed": {"reason": "page 7 is stale"},
}  # fmt: skip
EVERY = [pytest.param("control", name, id=f"control-{name}") for name in CONTROL]
EVERY += [pytest.param("guest", name, id=f"guest-{name}") for name in GUEST]
NAME_MAX = "a" * 64

# side, message, field, good values, values just beyond
BOUNDS: list[tuple[str, str, str, list[Any], list[Any]]] = [
    ("control", "offer", "guest_id", ["a", NAME_MAX, "A.b_c-9"], ["", NAME_MAX + "a", "-a", "a b", "a\n", "ä", 7, b"a"]),
    ("control", "offer", "regions", [[REGION] * 64], [[], [REGION] * 65, REGION, [{**REGION, "x": 1}], [3]]),
    ("control", "offer", "clock_id", ["", "x" * 2000], ["x" * 2001, None]),
    ("control", "accept", "token", [bytes(16)], [bytes(15), bytes(17), "0123456789abcdef"]),
    ("control", "clock_ping", "sent_ns", [0, (1 << 63) - 1], [-1, 1 << 63, 0.0, "0", True, None]),
    ("control", "offer", "precopy", [True, False], [0, 1, "yes", None]),
    ("control", "offer", "streams", [1, 8], [0, 9, -1, True, 1.0, "2", None]),
    ("control", "accept", "streams", [1, 8], [0, 9, True, "2", None]),
    ("control", "round", "pages", [0, (1 << 63) - 1], [-1, 1 << 63]),
    ("control", "round", "populated_bytes", [None, [], [0] * 64, [(1 << 63) - 1]], [[0] * 65, [-1], [True], 4096]),
    ("control", "prepare", "populated_bytes", [None, [0]], [[0] * 65, [1.0]]),
    ("control", "complete", "stale_window_ns", [None, 0, (1 << 63) - 1], [-1, 1 << 63, True]),
    ("control", "prepare", "clock_offset_ns", [1 - (1 << 63), (1 << 63) - 1], [-(1 << 63), 1 << 63]),
    ("control", "prepare", "clock_uncertainty_ns", [0], [-1, 1 << 63]),
    ("control", "switchover", "epoch", [0, (1 << 32) - 1], [-1, 1 << 32, False]),
    ("control", "switchover", "state", [b"", bytes(768 << 10)], [bytes((768 << 10) + 1), "text", None]),
    ("control", "switchover", "foreseen", [[], [(1 << 63) - 1] * 64], [[0] * 65, [-1], [1 << 63], [True], None, 3]),
    ("guest", "paused", "foreseen", [[], [0] * 64], [[0] * 65, ["0"], None]),
    ("control", "progress", "downtime_ns", [None, -1, (1 << 63) - 1], [1 << 63, 1.5]),
    ("control", "progress", "faults", [0, (1 << 63) - 1], [-1, 1 << 63]),
    (
        "control",
        "complete",
        "faults",
        [{}, dict.fromkeys(("remote", "local", "zero"), LATENCY)],
        [{"else": LATENCY}, {"zero": 1}],
    ),
    (
        "control",
        "complete",
        "pages",
        [{}, {f"k{i}": i for i in range(32)}],
        [{f"k{i}": i for i in range(33)}, {"": 1}, {"a": -1}],
    ),
    ("control", "cancel", "reason", ["", "x" * 2000], ["x" * 2001]),
    ("guest", "hello", "major", [0, 65535], [-1, 65536]),
    ("guest", "hello", "role", ["running", "waiting", "paused", "arriving"], ["", "departed", None]),
    ("guest", "hello", "page_states", [True, False], [0, 1, None]),
    ("guest", "hello", "epoch", [None, 0, (1 << 32) - 1], [-1, 1 << 32, True]),
    ("guest", "hello", "regions", [[GUEST_REGION] * 64], [[], [GUEST_REGION] * 65, [{**GUEST_REGION, "memory_file": 1}]]),
    ("guest", "hello", "memory_files", [1, 64], [0, 65]),
    ("guest", "hello", "offers", [[], ["a"] * 32], [["a"] * 33, [""], "a"]),
    ("guest", "hello", "declares", [[], ["a"] * 32], [["a"] * 33]),
    ("guest", "hello", "remove_means", [None, "zero", "keep"], ["", "poison", 0]),
    ("guest", "hello", "wake_ms", [0, 1000], [-1, 1001, None, True]),
    ("guest", "hello", "machine", [None, "", "x" * 2000], ["x" * 2001, 1]),
    ("control", "offer", "machine", [None, "", "x" * 2000], ["x" * 2001, 1]),
    ("guest", "discard", "ranges", [[PAGE_RANGE] * 256], [[], [PAGE_RANGE] * 257, PAGE_RANGE]),
    ("guest", "discard", "ranges", [[pages(4096)], [pages(2048)] * 2], [[pages(0)], [pages(4097)], [pages(2048)] * 3]),
    ("guest", "welcome", "minor", [0, 65535], [-1, 65536]),
    ("guest", "pause", "deadline_ms", [1, 600_000], [0, 600_001]),
    ("guest", "resume", "state", [None, b"", bytes(768 << 10)], [bytes((768 << 10) + 1), ""]),
]
# region class, field, good values, bad ones
REGION_BOUNDS: list[tuple[type[m.Message], dict[str, Any], str, list[int], list[int]]] = [
    (m.OfferedRegion, REGION, "size_bytes", [4096, 1 << 50], [0, -4096, 4097, (1 << 50) + 4096]),
    (m.OfferedRegion, REGION, "populated_bytes", [0, 1, 8192], [-1, 8193]),
    (m.OfferedRegion, REGION, "page_bytes", [4096], [0, 1, 8192, 2 << 20]),  # 8192 bytes are no whole number of 2 MiB
    (m.GuestRegion, GUEST_REGION, "size_bytes", [4096, 1 << 50], [0, 4095, (1 << 50) + 4096]),
    (m.GuestRegion, GUEST_REGION, "guest_address", [0, (1 << 64) - 8192], [-4096, 1, (1 << 64) - 4096, 1 << 64]),
    (m.GuestRegion, GUEST_REGION, "offset_bytes", [0, 1 << 50], [-4096, 4095, (1 << 50) + 4096]),
    (m.GuestRegion, GUEST_REGION, "memory_file", [0, 63], [-1, 64]),
]


def wire(body: object) -> bytes:
    packed: bytes = body if isinstance(body, bytes) else msgpack.packb(body)
    return struct.pack("<I", len(packed)) + packed


def decoder(side: str) -> m.Decoder[m.Message]:
    return m.control_decoder() if side == "control" else m.guest_decoder()


def on_wire(side: str, name: str, **changed: Any) -> dict[str, Any]:
    return {"type": name, **(CONTROL if side == "control" else GUEST)[name], **changed}


def refusal(side: str, data: bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decoder(side).feed(data)
    return caught.value


def test_errors_print_what_there_is() -> None:
    said = [str(ProtocolError("c", "x", expected=expected, got=got)) for expected, got in ((1, 2), (1, ""), ("", 2), ("", ""))]
    assert said == ["x: expected 1, got 2", "x: expected 1", "x: got 2", "x"]


def test_every_message_has_its_instance() -> None:
    """The tables above are whole: the types that the decoders know are those listed."""
    for side, table in (("control", CONTROL), ("guest", GUEST)):
        known = refusal(side, wire({"type": "nothing"})).expected
        assert {word.strip("'") for word in known.split("tags: ")[1].split(", ")} == set(table)


@pytest.mark.parametrize(("side", "name"), EVERY)
def test_round_trip(side: str, name: str) -> None:
    sent = on_wire(side, name)
    (message,) = decoder(side).feed(wire(sent))
    assert message.model_dump() == sent
    assert decoder(side).feed(m.encode(message)) == [message]


@pytest.mark.parametrize(("side", "name"), EVERY)
def test_unknown_and_missing_fields_are_refused(side: str, name: str) -> None:
    unknown = refusal(side, wire(on_wire(side, name, surprise=1)))
    assert (unknown.code, unknown.what) == ("message-invalid", f"{name}.surprise")
    for field in (CONTROL if side == "control" else GUEST)[name]:
        body = on_wire(side, name)
        del body[field]
        if field in (
            "offers",
            "declares",
            "precopy",
            "foreseen",
            "streams",
            "populated_bytes",
            "stale_window_ns",
            "remove_means",
            "machine",
            "wake_ms",
            "page_states",
        ) or (name, field) == ("hello", "epoch"):  # optional
            decoder(side).feed(wire(body))
            continue
        missing = refusal(side, wire(body))
        assert (missing.code, missing.what, missing.got) == ("message-invalid", f"{name}.{field}", "nothing")


@pytest.mark.parametrize(
    ("side", "name", "field", "good", "bad"), BOUNDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bounds(side: str, name: str, field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        (message,) = decoder(side).feed(wire(on_wire(side, name, **{field: value})))
        assert message.model_dump()[field] == value
    for value in bad:
        error = refusal(side, wire(on_wire(side, name, **{field: value})))
        assert (error.code, error.what.split(".")[0]) == ("message-invalid", name)


@pytest.mark.parametrize(("kind", "base", "field", "good", "bad"), REGION_BOUNDS)
def test_region_bounds(kind: type[m.Message], base: dict[str, Any], field: str, good: list[int], bad: list[int]) -> None:
    for value in good:
        kind.model_validate({**base, field: value})
    for value in bad:
        with pytest.raises(ValidationError):
            kind.model_validate({**base, field: value})


def test_the_largest_messages_fit() -> None:
    """No valid message is refused for its size: the bounds of the fields are within the bound of the message."""
    worst = "\U0001f4be" * 2000
    for message in (
        m.Switchover(
            epoch=(1 << 32) - 1,
            state=bytes(m.STATE_BYTES_MAX),
            last_step_ns=(1 << 63) - 1,
            foreseen=[(1 << 63) - 1] * m.FORESEEN_PAGES_MAX,
        ),
        m.Refused(code=NAME_MAX, what=worst, expected=worst, got=worst),
        m.Offer(
            guest_id=NAME_MAX, regions=[m.OfferedRegion(size_bytes=8192, page_bytes=4096)] * 64, clock_id=worst, software=worst
        ),
    ):
        assert len(m.encode(message)) <= m.MESSAGE_BYTES_MAX + 4


def test_too_large_is_refused_from_its_length_alone() -> None:
    error = refusal("control", struct.pack("<I", m.MESSAGE_BYTES_MAX + 1))
    assert (error.code, error.expected, error.got) == ("message-too-large", "<= 1048576", "1048577")
    assert decoder("control").feed(struct.pack("<I", m.MESSAGE_BYTES_MAX)) == []


def test_a_peers_secrets_are_not_repeated() -> None:
    """What was wrong with a token or a guest's state is said by its size; the error goes to the log and to the peer."""
    for body in (
        on_wire("control", "accept", token=b"secret"),
        on_wire("control", "accept", token=[b"secret"]),
        on_wire("control", "switchover", state=b"secret" * 140_000),
        {"type": "accept", "token": b"secret0123456789"},
        {"token": b"secret0123456789"},
    ):
        error = refusal("control", wire(body))
        assert error.code == "message-invalid"
        assert "secret" not in str(error)


def test_hostile_names_become_a_bounded_refusal() -> None:
    """Whatever a peer puts into a field's name, the answer to it is a valid message on one line."""
    for body in (
        {"type": "ready", "a\nb" * 50_000: 1},
        {"type": "x\n" * 50_000},
        {"type": "offer", "guest_id": "\n" * 50_000, "regions": [], "clock_id": "", "software": ""},
    ):
        error = refusal("control", wire(body))
        assert "\n" not in str(error)
        m.encode(m.Refused(code=error.code, what=error.what, expected=error.expected, got=error.got))


@pytest.mark.parametrize("depth", [10, 500, 1000, 5000])
def test_deep_nesting(depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    for body in (b"\x82\xa4type\xa5ready\xa1x" + nested, b"\x81\xa4type" + nested, nested):
        assert refusal("control", wire(body)).code == "message-invalid"


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\xa1\xff", b"\x81\x03\x04", b"\xc0\xc0", b"\xdf\xff\xff\xff\xff"])
def test_bytes_that_are_no_message(body: bytes) -> None:
    assert refusal("guest", wire(body)).code == "message-invalid"


def test_a_message_of_the_other_side_is_refused() -> None:
    assert refusal("control", wire(on_wire("guest", "pause"))).code == "message-invalid"
    assert refusal("guest", wire(on_wire("control", "switchover"))).code == "message-invalid"


@given(st.lists(st.sampled_from(sorted(CONTROL)), min_size=1, max_size=8), st.data())
def test_split_feeding(names: list[str], data: st.DataObject) -> None:
    """However the stream is cut, the same messages come out, in order and none early."""
    whole = b"".join(wire(on_wire("control", name)) for name in names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    one, got = m.control_decoder(), []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        got += one.feed(whole[start:stop])
        assert one.incomplete == (stop not in boundaries(whole))
    assert [message.model_dump()["type"] for message in got] == names


def boundaries(whole: bytes) -> set[int]:
    ends, at = {0}, 0
    while at < len(whole):
        at += 4 + int(struct.unpack_from("<I", whole, at)[0])
        ends.add(at)
    return ends


SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
FIELDS = st.sampled_from(sorted({field for table in (CONTROL, GUEST) for body in table.values() for field in body}))
BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(msgpack.packb),
    st.builds(
        lambda side_name, changed: msgpack.packb(on_wire(*side_name, **changed)),
        st.sampled_from([("control", name) for name in CONTROL] + [("guest", name) for name in GUEST]),
        st.dictionaries(FIELDS | st.text(), VALUES, max_size=2),
    ),
)


@given(st.sampled_from(["control", "guest"]), st.lists(st.one_of(BODIES.map(wire), st.binary(max_size=80)), max_size=3))
def test_any_bytes_are_messages_or_a_protocol_error(side: str, parts: list[bytes]) -> None:
    try:
        got = decoder(side).feed(b"".join(parts))
    except ProtocolError as error:
        code = error.code
        m.encode(m.Refused(code=error.code, what=error.what, expected=error.expected, got=error.got))
    else:
        code = "good" if all(decoder(side).feed(m.encode(message)) == [message] for message in got) else "changed by a round trip"
    assert code in ("good", "message-invalid", "message-too-large")
