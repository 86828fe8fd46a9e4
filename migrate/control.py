"""The control connection between two daemons: typed messages in order, a clear refusal, clock pings answered at once."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar, cast, overload

from migrate.clock import ClockOffset, estimate, monotonic_ns
from migrate.errors import AbortedError, ConnectionLostError, DeadlineError, PeerRefusedError
from proto.errors import ProtocolError
from proto.messages import Aborted, ClockPing, ClockPong, Heartbeat, Message, Refused, Round, control_decoder, encode

_M = TypeVar("_M", bound=Message)
_N = TypeVar("_N", bound=Message)
_R = TypeVar("_R")
MESSAGES_WAITING_MAX = 64
PINGS_MAX = 64
"""With nothing else between them: each is answered, at the cost of the loop that every guest's switchover needs."""
DECODED_TOGETHER_BYTES = 4096
"""Of what has come in one read, before it is looked at: a flood is seen before all of it has been decoded."""
HEARTBEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0
"""A peer that has said a heartbeat and then nothing for so long hangs, or the path to it does: a slow one goes on saying them."""
UNSENT_BYTES_MAX = 4 << 20


class ControlConnection(asyncio.Protocol):
    """Read it from one task: ``receive`` gives the next message or raises what ended the connection."""

    def __init__(self) -> None:
        self._decoder = control_decoder()
        self._messages: deque[tuple[Message, int]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._beat_due_seconds = 0.0
        self._heard_seconds: float | None = None
        self._pings = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        received_ns = monotonic_ns()
        try:
            for start in range(0, len(data), DECODED_TOGETHER_BYTES):
                for message in self._decoder.feed(data[start : start + DECODED_TOGETHER_BYTES]):
                    self._take(message, received_ns)
                _not_more_than(MESSAGES_WAITING_MAX, "unread messages", len(self._messages))
                _not_more_than(PINGS_MAX, "clock pings", self._pings)
        except ProtocolError as error:
            self.refuse(error)
        self._wake()

    def _take(self, message: Message, received_ns: int) -> None:
        if self._heard_seconds is not None or isinstance(message, Heartbeat):
            self._heard_seconds = asyncio.get_running_loop().time()
        if isinstance(message, Heartbeat):
            return
        if isinstance(message, ClockPing):
            self._pings += 1
            self.send(ClockPong(sent_ns=message.sent_ns, peer_ns=received_ns))
        else:
            self._pings = 0
            self._append(message, received_ns)

    def _append(self, message: Message, received_ns: int) -> None:
        """Of rounds that nobody has read yet the last one says it all: a guest that writes nothing makes a thousand a second."""
        if isinstance(message, Round) and self._messages and isinstance(self._messages[-1][0], Round):
            self._messages.pop()
        self._messages.append((message, received_ns))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None  # with its buffers: this end of it is kept as long as its migration is known
        if self._beat is not None:
            self._beat.cancel()
        if self._error is None:
            self._error = ConnectionLostError("control connection", expected="to stay", got=str(exc or "closed by the peer"))
        if not self.closed.done():
            self.closed.set_result(None)
        self._wake()

    # --- messages ---------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self.fail(ConnectionLostError("control connection", expected="a peer that reads", got="one that only writes"))
            self._transport.abort()
            return
        self._transport.write(encode(message))

    def keep_alive(self) -> None:
        """From now on say heartbeats, and fail when the peer has stopped saying them."""
        loop = asyncio.get_running_loop()
        late_seconds = loop.time() - self._beat_due_seconds if self._beat is not None else 0.0
        self._pings = 0  # by our own clock: no word of the peer's lifts the bound
        if self._transport is None or self._transport.is_closing():
            return
        self.send(Heartbeat())
        heard = self._heard_seconds
        # Late ourselves: what has come meanwhile has not been read yet, and says nothing of the peer.
        if heard is not None and late_seconds < HEARTBEAT_SECONDS and loop.time() - heard > SILENT_SECONDS:
            self.fail(ConnectionLostError("control connection", expected=f"a word within {SILENT_SECONDS} s", got="silence"))
            self._transport.abort()
            return
        self._beat_due_seconds = loop.time() + HEARTBEAT_SECONDS
        self._beat = loop.call_later(HEARTBEAT_SECONDS, self.keep_alive)

    def check(self) -> None:
        """Raise what has ended the connection or refused the migration already, although nobody has received it yet."""
        refusal = next((message for message, _ in self._messages if isinstance(message, Refused | Aborted)), None)
        if refusal is not None:
            raise _said_no(refusal)
        if self._error is not None:
            raise self._error

    @overload
    async def receive(self, first: type[_M], /, *, deadline_seconds: float | None = None) -> _M: ...
    @overload
    async def receive(self, first: type[_M], second: type[_N], /, *, deadline_seconds: float | None = None) -> _M | _N: ...
    @overload
    async def receive(
        self, first: type[_M], second: type[_N], third: type[Message], /, *, deadline_seconds: float | None = None
    ) -> Message: ...
    async def receive(self, *kinds: type[Message], deadline_seconds: float | None = None) -> Message:
        """The next message, which must be of one of the kinds.

        Raises PeerRefusedError (the peer's own words; AbortedError when it says ``aborted``), ProtocolError
        ``message-unexpected``, DeadlineError, ConnectionLostError.
        """
        message, _ = await self._next(kinds, deadline_seconds)
        if isinstance(message, Refused | Aborted):
            raise _said_no(message)
        if not isinstance(message, kinds):
            _unexpected(kinds, message)
        return message

    async def watch(self, awaited: type[Message] | None = None) -> NoReturn:
        """While nobody receives: raises as soon as the peer, or anything else, ends the migration, or the peer says anything but
        what is ``awaited``, which waits for who receives it. Raises as ``receive`` does."""
        while True:
            self.check()
            for message, _ in self._messages:
                if awaited is None or not isinstance(message, awaited):
                    _unexpected((awaited,) if awaited else (), message)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def beside(self, step: Coroutine[Any, Any, _R], awaited: type[Message] | None = None) -> _R:
        """What the step comes to; it is given up as soon as ``watch`` raises."""
        loop = asyncio.get_running_loop()
        run, watch = loop.create_task(step), loop.create_task(self.watch(awaited))
        try:
            await asyncio.wait({run, watch}, return_when="FIRST_COMPLETED")
            if not run.done():
                watch.result()
            return run.result()
        finally:
            for task in (run, watch):
                task.cancel()
            await asyncio.gather(run, watch, return_exceptions=True)

    async def measure_clock(self, pings: int, deadline_seconds: float) -> ClockOffset:
        """The peer's clock against ours; reads nothing but pongs meanwhile."""
        trips: list[tuple[int, int, int]] = []
        for _ in range(pings):
            sent_ns = monotonic_ns()
            self.send(ClockPing(sent_ns=sent_ns))
            message, received_ns = await self._next((ClockPong,), deadline_seconds)
            if not isinstance(message, ClockPong):
                raise ProtocolError(
                    "message-unexpected", "control message", expected="clock_pong", got=type(message).__name__.lower()
                )
            if message.sent_ns != sent_ns:
                raise ProtocolError("message-invalid", "clock_pong sent_ns", expected=sent_ns, got=message.sent_ns)
            trips.append((sent_ns, message.peer_ns, received_ns))
        return estimate(trips)

    async def _next(self, kinds: tuple[type[Message], ...], deadline_seconds: float | None) -> tuple[Message, int]:
        try:
            async with asyncio.timeout(deadline_seconds):
                while not self._messages:
                    if self._error is not None:
                        raise self._error
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        except TimeoutError:
            expected = f"{_names(kinds)} within {deadline_seconds} s"
            raise DeadlineError("peer daemon", expected=expected, got="nothing") from None
        return self._messages.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the end ----------------------------------------------------------------------------------------------------

    def refuse(self, error: Exception) -> None:
        """Tell the peer why, then close; ``receive`` raises the same error here."""
        code = getattr(error, "code", "failed")
        what, expected, got = (str(getattr(error, name, ""))[:2000] for name in ("what", "expected", "got"))
        self.send(Refused(code=code, what=what or str(error)[:2000], expected=expected, got=got))
        self._error = self._error or error
        self._messages.clear()  # the reason is this one, not what came before it and was not read
        self.close()

    def fail(self, error: Exception) -> None:
        """Something else that the migration hangs on has ended: whoever waits in ``receive`` gets the error."""
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        if self._transport is not None:
            with contextlib.suppress(RuntimeError):
                self._transport.close()


def _not_more_than(most: int, what: str, count: int) -> None:
    if count > most:
        raise ProtocolError("message-flood", what, expected=f"<= {most}", got=count)


def _said_no(message: Refused | Aborted) -> PeerRefusedError:
    if isinstance(message, Aborted):
        return AbortedError("destination", expected="to resume the guest", got=message.reason)
    return PeerRefusedError(message.what, expected=message.expected, got=message.got, code=message.code)


def _names(kinds: tuple[type[Message], ...]) -> str:
    return " or ".join(kind.__name__.lower() for kind in kinds)


def _unexpected(kinds: tuple[type[Message], ...], message: Message) -> NoReturn:
    expected = _names(kinds) or "nothing now"
    raise ProtocolError("message-unexpected", "control message", expected=expected, got=type(message).__name__.lower())
