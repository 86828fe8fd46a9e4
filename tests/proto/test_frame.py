"""The frame header: golden vectors read by Python and by C, and both asked about headers that nobody thought of."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import ProtocolError
from proto.frame import (
    ACCEPTED_BY_DESTINATION,
    ACCEPTED_BY_SOURCE,
    FRAME_CHUNK_BYTES,
    FRAME_FLAG_MORE,
    FRAME_HEADER_BYTES,
    FRAME_LENGTH_BYTES_MAX,
    Frame,
    FrameKind,
)

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "proto/golden/frames.json").read_text())
PREAMBLES = json.loads((ROOT / "proto/golden/preambles.json").read_text())
REGIONS = [(one["page_count"], one["page_bytes"]) for one in GOLDEN["regions"]]
ACCEPTS = {"source": ACCEPTED_BY_SOURCE, "destination": ACCEPTED_BY_DESTINATION}
FIELDS = ("none", "magic", "kind", "flags", "region", "page_index", "offset_bytes", "length_bytes")  # enum frame_field
STRICT = ("-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Werror")


def named(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(one, id=one["name"]) for one in vectors]


class FrameInC:
    """frame.h behind a pipe: golden_frames.c, compiled by the system's cc."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "golden_frames"
        source = Path(__file__).with_name("golden_frames.c")
        subprocess.run(["cc", *STRICT, "-O1", f"-I{ROOT / 'proto'}", "-o", self._program, source], check=True, timeout=50)

    def ask(self, lines: Iterable[str]) -> list[list[int]]:
        text = "".join(f"region {count} {size}\n" for count, size in REGIONS) + "".join(f"{line}\n" for line in lines)
        done = subprocess.run([self._program], input=text, capture_output=True, text=True, timeout=20, check=True)
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]

    def judge(self, frames: Iterable[tuple[str, str]]) -> list[list[int]]:
        """(side, hex) of each -> [field, expected, got, magic, kind, flags, region, page_index, offset_bytes, length_bytes]."""
        return self.ask(f"frame {sum(1 << kind for kind in ACCEPTS[side])} {text}" for side, text in frames)


@pytest.fixture(scope="module")
def frame_in_c(tmp_path_factory: pytest.TempPathFactory) -> FrameInC:
    return FrameInC(tmp_path_factory.mktemp("golden"))


def fault_in_python(side: str, data: bytes) -> str:
    """The field that Python finds at fault, or "none"."""
    try:
        Frame.decode(data, ACCEPTS[side], REGIONS)
    except ProtocolError as error:
        return error.what.removeprefix("frame ") if error.code == "frame-invalid" else f"code {error.code}"
    return "none"


# --- golden vectors ---


@pytest.mark.parametrize("vector", named(GOLDEN["valid"]))
def test_valid_in_python(vector: dict[str, Any]) -> None:
    frame = Frame.decode(bytes.fromhex(vector["hex"]), ACCEPTS[vector["accepted_by"]], REGIONS)
    assert {name: getattr(frame, name) for name in vector["fields"]} == vector["fields"]
    assert frame.encode().hex() == vector["hex"]


@pytest.mark.parametrize("vector", named(GOLDEN["invalid"]))
def test_invalid_in_python(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        Frame.decode(bytes.fromhex(vector["hex"]), ACCEPTS[vector["accepted_by"]], REGIONS)
    assert (caught.value.code, caught.value.what) == ("frame-invalid", f"frame {vector['field']}")
    assert caught.value.got == str(vector["got"])
    if vector["field"] != "kind":  # Python lists the kinds, C has a mask
        assert str(vector["bound"]) in caught.value.expected


def test_valid_in_c(frame_in_c: FrameInC) -> None:
    vectors = GOLDEN["valid"]
    answers = frame_in_c.judge((one["accepted_by"], one["hex"]) for one in vectors)
    assert len(answers) == len(vectors) > 0
    for vector, (field, _, _, magic, *fields) in zip(vectors, answers, strict=True):
        assert (FIELDS[field], magic) == ("none", 0x4350), vector["name"]
        assert fields == list(vector["fields"].values()), vector["name"]


def test_invalid_in_c(frame_in_c: FrameInC) -> None:
    vectors = GOLDEN["invalid"]
    answers = frame_in_c.judge((one["accepted_by"], one["hex"]) for one in vectors)
    assert len(answers) == len(vectors) > 0
    for vector, (field, expected, got, *_) in zip(vectors, answers, strict=True):
        assert (FIELDS[field], expected, got) == (vector["field"], vector["bound"], vector["got"]), vector["name"]


def test_every_field_has_an_invalid_vector() -> None:
    assert {vector["field"] for vector in GOLDEN["invalid"]} == set(FIELDS[1:])


def test_preamble_offsets_in_c(frame_in_c: FrameInC) -> None:
    """A C peer that lays out the preamble as PROTOCOL.md says reads what Python wrote."""
    vectors = PREAMBLES["valid"]
    answers = frame_in_c.ask(f"preamble {one['hex']}" for one in vectors)
    names = ("major", "minor", "kind", "epoch", "stream_index")
    assert answers == [[one["fields"][name] for name in names] for one in vectors]


def test_the_c_side_refuses_what_it_does_not_understand(frame_in_c: FrameInC) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        frame_in_c.ask(["frame 12 50"])


# --- generated headers ---

U64_EDGES = st.one_of(
    st.integers(0, 1100), st.sampled_from([(1 << 38) - 1, 1 << 38, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1)
)
OFFSETS = st.one_of(
    st.sampled_from([0] * 15 + [4096]),
    st.builds(lambda chunks: chunks * FRAME_CHUNK_BYTES, st.integers(0, 17)),
    st.sampled_from([(1 << 30) - FRAME_CHUNK_BYTES, 1 << 30]),
)
LENGTHS = st.one_of(
    st.builds(lambda chunks: chunks * FRAME_CHUNK_BYTES, st.integers(0, 17)),
    st.builds(lambda pages, size: min(pages * size, 0xFFFFFFFF), st.integers(0, 1001), st.sampled_from([4096, 2 << 20, 1 << 30])),
    st.integers(0, 0xFFFFFFFF),
)
NEAR_VALID = st.builds(
    lambda magic, kind, flags, region, page, offset, length: (
        magic.to_bytes(2, "little")
        + bytes([kind, flags])
        + b"".join(value.to_bytes(size, "little") for value, size in ((region, 4), (page, 8), (offset, 4), (length, 4)))
    ),
    st.sampled_from([0x4350] * 15 + [0]),
    st.one_of(st.integers(1, 3), st.integers(0, 255)),
    st.sampled_from([0] * 8 + [1] * 7 + [2]),
    st.one_of(st.integers(0, 3), st.integers(0, 0xFFFFFFFF)),
    U64_EDGES,
    OFFSETS,
    LENGTHS,
)


@given(st.lists(st.tuples(st.sampled_from(["source", "destination"]), NEAR_VALID), min_size=1, max_size=200))
def test_c_and_python_find_the_same_fault(frame_in_c: FrameInC, cases: list[tuple[str, bytes]]) -> None:
    answers = frame_in_c.judge((side, data.hex()) for side, data in cases)
    assert [FIELDS[answer[0]] for answer in answers] == [fault_in_python(side, data) for side, data in cases]


@given(st.sampled_from(["source", "destination"]), st.one_of(st.binary(max_size=64), NEAR_VALID))
def test_any_bytes_are_a_frame_or_a_protocol_error(side: str, data: bytes) -> None:
    if fault_in_python(side, data) == "none":
        assert len(data) == FRAME_HEADER_BYTES
        frame = Frame.decode(data, ACCEPTS[side], REGIONS)
        assert frame.encode() == data
        page_count, page_bytes = REGIONS[frame.region]
        assert 0 < frame.length_bytes <= FRAME_LENGTH_BYTES_MAX
        end_bytes = frame.page_index * page_bytes + frame.offset_bytes + frame.length_bytes
        assert end_bytes <= page_count * page_bytes
        assert (frame.flags == FRAME_FLAG_MORE) == (end_bytes % page_bytes != 0)


@given(st.integers(0, len(REGIONS) - 1), st.data())
def test_round_trip(region: int, data: st.DataObject) -> None:
    page_count, page_bytes = REGIONS[region]
    page_index = data.draw(st.integers(0, page_count - 1))
    run_max = min(page_count - page_index, FRAME_LENGTH_BYTES_MAX // page_bytes)
    length_bytes = data.draw(st.integers(1, run_max)) * page_bytes
    kind = data.draw(st.sampled_from([FrameKind.REQUEST, FrameKind.PAGES, FrameKind.ZERO]))
    frame = Frame(kind, region, page_index, length_bytes)
    side = ACCEPTED_BY_SOURCE if kind is FrameKind.REQUEST else ACCEPTED_BY_DESTINATION
    assert Frame.decode(frame.encode(), side, REGIONS) == frame
