"""The first bytes of a connection and their answer: golden vectors, round trips, any bytes at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proto import PROTOCOL_MAJOR
from proto.errors import ProtocolError
from proto.preamble import ANSWER_BYTES, PREAMBLE_BYTES, Answer, AnswerCode, ConnectionKind, Preamble

GOLDEN = json.loads((Path(__file__).parents[2] / "proto/golden/preambles.json").read_text())
U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
SIXTEEN = st.binary(min_size=16, max_size=16)


def named(vectors: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(one, id=one["name"]) for one in vectors]


def plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def test_sizes() -> None:
    assert (PREAMBLE_BYTES, ANSWER_BYTES) == (64, 16)


@pytest.mark.parametrize("vector", named(GOLDEN["valid"]))
def test_valid(vector: dict[str, Any]) -> None:
    preamble = Preamble.decode(bytes.fromhex(vector["hex"]))
    assert {name: plain(getattr(preamble, name)) for name in vector["fields"]} == vector["fields"]
    assert preamble.encode().hex() == vector["hex"]


@pytest.mark.parametrize("vector", named(GOLDEN["answers_valid"]))
def test_answer_valid(vector: dict[str, Any]) -> None:
    answer = Answer.decode(bytes.fromhex(vector["hex"]))
    assert {name: getattr(answer, name) for name in vector["fields"]} == vector["fields"]
    assert answer.encode().hex() == vector["hex"]
    if vector["name"] == "welcome":
        answer.check()
    else:
        with pytest.raises(ProtocolError) as caught:
            answer.check()
        assert caught.value.code == vector["name"]
        assert f"{answer.major}.{answer.minor}" in caught.value.got


def test_every_answer_code_has_a_vector() -> None:
    assert {vector["fields"]["code"] for vector in GOLDEN["answers_valid"]} == set(AnswerCode)


@pytest.mark.parametrize("vector", named(GOLDEN["invalid"]))
def test_invalid(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        Preamble.decode(bytes.fromhex(vector["hex"]))
    faults = {name: getattr(caught.value, name) for name in ("code", "what", "expected", "got")}
    assert faults == {name: vector[name] for name in faults}


@pytest.mark.parametrize("vector", named(GOLDEN["answers_invalid"]))
def test_answer_invalid(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        Answer.decode(bytes.fromhex(vector["hex"]))
    faults = {name: getattr(caught.value, name) for name in ("code", "what", "expected", "got")}
    assert faults == {name: vector[name] for name in faults}


@given(st.sampled_from(ConnectionKind), SIXTEEN, U32, U32, SIXTEEN, U16)
def test_round_trip(kind: ConnectionKind, migration_id: bytes, epoch: int, stream: int, token: bytes, minor: int) -> None:
    preamble = Preamble(kind, migration_id, epoch, stream, token, minor=minor)
    assert len(preamble.encode()) == PREAMBLE_BYTES
    assert Preamble.decode(preamble.encode()) == preamble


@given(st.sampled_from(AnswerCode), U16, U16)
def test_answer_round_trip(code: AnswerCode, major: int, minor: int) -> None:
    """Any two versions can refuse each other: an answer is read whatever version it comes from."""
    answer = Answer(code, major, minor)
    assert len(answer.encode()) == ANSWER_BYTES
    assert Answer.decode(answer.encode()) == answer


@given(U16.filter(lambda major: major != PROTOCOL_MAJOR), st.binary(min_size=54, max_size=54))
def test_another_major_is_named_whatever_follows_it(major: int, rest: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Preamble.decode(b"POSTCOPY" + major.to_bytes(2, "little") + rest)
    assert caught.value.code == "version-unsupported"


NEAR = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=72).map(lambda rest: b"POSTCOPY" + rest),
    st.binary(min_size=54, max_size=54).map(lambda rest: b"POSTCOPY\x01\x00" + rest),
)


@given(NEAR)
@example(b"POSTCOPY\x01\x00\x00\x00\x01" + bytes(51))
def test_any_bytes_are_a_preamble_or_a_protocol_error(data: bytes) -> None:
    try:
        preamble = Preamble.decode(data)
    except ProtocolError as error:
        code = error.code
    else:
        code = "good" if preamble.encode() == data else "decodes to something else"
    assert code in ("good", "magic-wrong", "version-unsupported", "preamble-invalid")


@given(st.one_of(NEAR, st.binary(min_size=8, max_size=8).map(lambda rest: b"POSTCOPY" + rest)))
def test_any_bytes_are_an_answer_or_a_protocol_error(data: bytes) -> None:
    try:
        answer = Answer.decode(data)
    except ProtocolError as error:
        code = error.code
    else:  # the last two bytes are for later versions
        code = "good" if answer.encode()[:14] == data[:14] else "decodes to something else"
    assert code in ("good", "magic-wrong", "preamble-invalid")
