"""The rounds of precopy as the source drives them, while the guest runs on: dataplane/precopy.c does the work of each."""

import asyncio
import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from migrate.connections import DataConnections
from migrate.control import ControlConnection
from migrate.dataplane import LoopResult, SourcePlane
from migrate.errors import ConnectionLostError
from migrate.greeting import DataSocket
from migrate.guest_link import GuestLink
from migrate.precopy import PrecopyPolicy, RoundFigures, reason_to_switch
from migrate.region import populated_bytes
from migrate.session import Migration
from proto.messages import Message, Quiesced, Round

TRACK_DEADLINE_SECONDS = 10.0
PEER_REASON_SECONDS = 1.0
"""How long the word on the control connection may come after the end of a data connection."""


class Rounds:
    """Of one migration: ``track``, and if the guest is ``tracked``, ``run``. ``done`` are those that have ended."""

    def __init__(self, migration: Migration, guest: GuestLink, policy: PrecopyPolicy) -> None:
        self.tracked = False
        self.done: list[RoundFigures] = []
        self._migration: Migration = weakref.proxy(migration)  # which has this: what has ended must not wait for the collector
        self._guest, self._policy = guest, policy

    async def track(self, plane: SourcePlane) -> None:
        """Whether there is precopy, and if it was wanted and cannot be, why; said once."""
        guest = self._guest
        why = guest.untrackable or await guest.track(TRACK_DEADLINE_SECONDS) or await self._untracked(plane)
        if why is not None:
            self.give_up(why)
        else:
            self.tracked = True

    async def _untracked(self, plane: SourcePlane) -> str | None:
        result = await self._migration.on_own_thread("precopy", lambda: plane.precopy_check(self._guest.pagemap_fd))
        return None if result.reason == "finished" else str(result.error())

    def give_up(self, why: str) -> None:
        self.tracked = False
        self._guest.untrack()
        self._migration.switched_because = f"no precopy: {why}"
        self._migration.log.warning("no precopy: every page is fetched or streamed after the switchover", reason=why)

    async def run(self, plane: SourcePlane, control: ControlConnection, connections: DataConnections) -> None:
        """Until another one is not worth it; then no precopied page is in flight any more."""
        with self._watched(control, connections):
            await self._rounds(plane, control, connections)
            await control.receive(Quiesced)  # behind megabytes on a slow link: no deadline

    async def _rounds(self, plane: SourcePlane, control: ControlConnection, connections: DataConnections) -> None:
        bulk = [sock.fileno() for sock in connections.bulk]
        sends = [partial(plane.precopy_send, sock, stream) for stream, sock in enumerate(bulk)]
        plane.track(self._guest.pagemap_fd)
        begun = time.monotonic()
        await self._call(control, plane.precopy_arm)
        while True:
            pages = plane.figures()["pages_pending"]
            populated = populated_bytes(self._guest.regions)
            control.send(Round(number=len(self.done) + 1, pages=pages, populated_bytes=populated))
            await self._call(control, *sends)
            await self._call(control, plane.precopy_count)
            figures = plane.figures()
            written = figures["pages_written"], figures["bytes_written"]
            self.done.append(RoundFigures(len(self.done) + 1, pages, *written, time.monotonic() - begun))
            why = reason_to_switch(self._policy, self.done[-1])
            if why is not None:
                break
            await self._call(control, plane.precopy_collect)
        self._migration.switched_because = why
        await self._call(control, *(partial(plane.precopy_end, sock) for sock in bulk), awaited=Quiesced)

    @contextlib.contextmanager
    def _watched(self, control: ControlConnection, connections: DataConnections) -> Iterator[None]:
        """Nothing comes by bulk now but its end, which nobody else would see on a connection that has nothing to send."""
        loop = asyncio.get_running_loop()

        def ended(sock: DataSocket) -> None:
            loop.remove_reader(sock)
            lost = ConnectionLostError("bulk connection", expected="to stay", got="its end before quiesced")
            loop.call_later(PEER_REASON_SECONDS, control.fail, lost)

        for sock in connections.bulk:
            loop.add_reader(sock, ended, sock)
        try:
            yield
        finally:
            for sock in connections.bulk:
                loop.remove_reader(sock)

    async def _call(
        self, control: ControlConnection, *calls: Callable[[], LoopResult], awaited: type[Message] | None = None
    ) -> None:
        """One step of a round, each call on a thread of its own. Given up as soon as one of them, the peer or the guest ends the
        migration, or the peer says anything but what is ``awaited``: quiesced too early would leave precopied pages in flight."""
        result = await control.beside(self._together(calls), awaited)
        if result.reason == "finished":
            return
        if result.reason == "peer-closed":
            with contextlib.suppress(Exception):  # said by `check`, or nothing
                async with asyncio.timeout(PEER_REASON_SECONDS):
                    await control.watch(awaited)
        control.check()
        raise lost("bulk", result) if result.reason == "peer-closed" else result.error()

    async def _together(self, calls: Sequence[Callable[[], LoopResult]]) -> LoopResult:
        """The first result that is not `finished`, else the last. What a failure leaves unfinished ends with the plane's stop."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._migration.on_own_thread("precopy", call)) for call in calls]
        try:
            for task in asyncio.as_completed(tasks):
                result = await task
                if result.reason != "finished":
                    break
            return result
        finally:
            for one in tasks:
                one.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def lost(connection: str, result: LoopResult) -> ConnectionLostError:
    return ConnectionLostError(f"{connection} connection", expected="to stay", got=str(result.error()))
