"""A device state on its way: as it is where it fits, deflated where it does not, and nothing else is loaded."""

import os
import zlib

import pytest

from migrate.errors import PauseFailedError, PostcopyError
from migrate.guests.qemu.machine import STREAM_BYTES_MAX, packed, unpacked
from proto.messages import STATE_BYTES_MAX


@pytest.mark.parametrize("stream", [b"", b"QEVM" + bytes(400_000), os.urandom(STATE_BYTES_MAX - 1)])
def test_as_it_is(stream: bytes) -> None:
    assert packed(stream) == b"\0" + stream
    assert unpacked(packed(stream)) == stream


@pytest.mark.parametrize("size_bytes", [STATE_BYTES_MAX, 16 << 20, STREAM_BYTES_MAX])
def test_deflated(size_bytes: int) -> None:
    stream = os.urandom(1000) + bytes(size_bytes - 1000)
    state = packed(stream)
    assert state[:1] == b"\1"
    assert len(state) < STATE_BYTES_MAX
    assert unpacked(state) == stream


def test_too_much() -> None:
    with pytest.raises(PauseFailedError, match=r"786432 bytes at most, got .*choose less video memory"):
        packed(os.urandom(STATE_BYTES_MAX))


@pytest.mark.parametrize(
    "state",
    [b"", b"\2QEVM", b"\1", b"\1QEVM", packed(bytes(1 << 20))[:-1], b"\1" + zlib.compress(bytes(STREAM_BYTES_MAX + 1))],
)
def test_what_is_none_is_refused(state: bytes) -> None:
    with pytest.raises(PostcopyError) as refusal:
        unpacked(state)
    assert refusal.value.code == "state-refused"
