"""What waits unread on a control connection is bounded, and rounds of a precopy are not what bounds it."""

import asyncio

import pytest

from migrate.control import MESSAGES_WAITING_MAX, PINGS_MAX, ControlConnection
from migrate.errors import PostcopyError
from proto.errors import ProtocolError
from proto.messages import Cancel, ClockPing, Message, Progress, Round, encode


def received(*sent: Message) -> list[Message]:
    """All in one read, and then read one by one. Raises what the connection says instead."""

    async def read() -> list[Message]:
        control = ControlConnection()
        control.data_received(b"".join(map(encode, sent)))
        messages: list[Message] = []
        while control._messages:
            messages.append(await control.receive(Round, Cancel, Progress))
        control.check()
        return messages

    return asyncio.run(read())


def test_daemon_that_was_busy_hears_of_the_last_round() -> None:
    """A guest that writes nothing makes a round in a millisecond: each is announced, and none waits for an answer."""
    rounds = [Round(number=number, pages=0) for number in range(1, 10 * MESSAGES_WAITING_MAX)]
    cancel = Cancel(reason="enough")
    assert received(*rounds, cancel, rounds[0]) == [rounds[-1], cancel, rounds[0]]


def test_any_other_flood_is_refused() -> None:
    flood = [Round(number=1, pages=0), Cancel(reason="x")] * MESSAGES_WAITING_MAX
    with pytest.raises((ProtocolError, PostcopyError), match="unread messages"):
        received(*flood)


def test_flood_of_pings_is_refused() -> None:
    """Each costs an answer; a clock that is measured again and again has other messages between."""
    pings = [ClockPing(sent_ns=1)] * PINGS_MAX
    cancel = Cancel(reason="enough")
    assert received(*pings, cancel, *pings, cancel) == [cancel, cancel]
    with pytest.raises(ProtocolError, match="clock pings"):
        received(*pings, *pings)
