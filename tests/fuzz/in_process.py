"""What both state machines run on in this process: a control connection without a network, and a log that stays short."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from migrate.control import ControlConnection
from proto.messages import Message, control_decoder


class Transport(asyncio.Transport):
    """What the daemon says ends up in a list."""

    def __init__(self, control: ControlConnection) -> None:
        super().__init__()
        self.said: list[Message] = []
        self._control, self._decoder, self._closing = control, control_decoder(), False
        control.connection_made(self)

    def write(self, data: Any) -> None:
        self.said += self._decoder.feed(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._control.connection_lost, None)

    abort = close


@pytest.fixture
def quiet_log() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()
