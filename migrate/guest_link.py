"""The daemon's end of a guest socket: one attached guest, its descriptors, requests to its agent and their answers."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from enum import StrEnum
from typing import Self, TypeVar, cast

import structlog

from migrate import __version__, dataplane, uffd
from migrate.dataplane import MemoryRegion
from migrate.errors import DeadlineError, GuestBusyError, GuestGoneError, GuestRefusedError, PostcopyError
from migrate.refusals import Refusals
from migrate.region import check_regions, is_memory_file, shape_of
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR
from proto.errors import ProtocolError
from proto.messages import (
    REGIONS_MAX,
    Discard,
    Discarded,
    GuestFailed,
    GuestPrepare,
    GuestPrepared,
    GuestRegion,
    Hello,
    Keep,
    Message,
    PageRange,
    Refused,
    Stepped,
    Track,
    TrackFailed,
    Tracking,
    Untrack,
    Welcome,
    encode,
    guest_decoder,
)

log = structlog.get_logger("postcopy.guest")
_M = TypeVar("_M", bound=Message)
_N = TypeVar("_N", bound=Message)
RECEIVE_BYTES = 1 << 16
DESCRIPTORS_MAX = REGIONS_MAX + 2  # the memory files, the userfaultfd, the page states
DISCARDS_HELD_MAX = 64
UNSENT_BYTES_MAX = 1 << 20  # to a guest that does not read; a message with a state is less


class GuestState(StrEnum):
    RUNNING = "running"  # whole, here
    WAITING = "waiting"  # for a guest to take
    LEAVING = "leaving"  # source of a migration
    ARRIVING = "arriving"  # destination of a migration
    LOST = "lost"  # its migration stalled or it broke; kept as it is
    UNDECIDED = "undecided"  # amid a migration that this daemon knows nothing of: it may run elsewhere


STATE_OF_ROLE = {
    "running": GuestState.RUNNING,
    "waiting": GuestState.WAITING,
    "paused": GuestState.UNDECIDED,  # until the daemon has found its record
    "arriving": GuestState.UNDECIDED,
}


class GuestLink:
    """One connection of a guest's agent. Calls back: ``on_hello`` (may raise to refuse; what it returns is called once the guest
    has been welcomed), ``on_gone``."""

    def __init__(
        self,
        sock: socket.socket,
        on_hello: Callable[["GuestLink"], Callable[[], object] | None],
        on_gone: Callable[["GuestLink"], None],
        refusals: Refusals | None = None,
    ) -> None:
        sock.setblocking(False)
        self._refusals = refusals or Refusals()
        self._socket = sock
        self._on_hello, self._on_gone = on_hello, on_gone
        self._loop = asyncio.get_running_loop()
        self._decoder = guest_decoder()
        self._descriptors: list[int] = []
        self._unsent = bytearray()
        self._pending: tuple[tuple[type[Message], ...], asyncio.Future[Message]] | None = None
        self._overdue: set[type[Message]] = set()
        self._may_track = False
        self.hello: Hello | None = None
        self.state = GuestState.WAITING
        self.regions: list[MemoryRegion] = []
        self.userfaultfd = -1
        self.pagemap_fd = -1
        self.states_fd = -1  # page states that an earlier daemon had given it
        self.gone = False
        self.released = False
        self.failure: str | None = None
        self.on_stepped: Callable[[int], None] | None = None
        self.on_failed: Callable[[PostcopyError], None] | None = None
        self.on_discard: Callable[[PageRange], None] | None = None
        self.discards_wait = False
        """It is being taken back: what it discards meanwhile holds, and is answered, once that is over (``take_discards``)."""
        self._held_discards: list[Discard] = []
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, _, _ = struct.unpack("3i", credentials)
        self._loop.add_reader(sock, self._readable)

    @classmethod
    def ended(cls, guest_id: str, regions: list[GuestRegion], memory_files: list[int]) -> Self:
        """Of a guest that is not here, its memory files are: as a link whose process has ended. ``release`` closes them. Raises
        GuestRefusedError, OSError; they are the caller's to close then."""
        ours, theirs = socket.socketpair()
        theirs.close()
        link = cls(ours, lambda _: None, lambda _: None)
        link.close()
        link.pid = 0
        link.hello = Hello(
            major=PROTOCOL_MAJOR,
            minor=PROTOCOL_MINOR,
            guest_id=guest_id,
            role="paused",
            regions=regions,
            memory_files=len(memory_files),
        )
        link.regions = check_regions(regions, memory_files)
        link._descriptors = list(memory_files)
        return link

    @property
    def regions_by_file(self) -> list[GuestRegion]:
        """As ``files`` has them: ``memory_file`` is an index into that."""
        assert self.hello is not None
        order = list(dict.fromkeys(region.memory_file for region in self.hello.regions))
        return [region.model_copy(update={"memory_file": order.index(region.memory_file)}) for region in self.hello.regions]

    @property
    def guest_id(self) -> str:
        return self.hello.guest_id if self.hello else "?"

    @property
    def shape(self) -> list[tuple[int, int]]:
        return shape_of(self.hello.regions) if self.hello else []

    @property
    def machine(self) -> str | None:
        return self.hello.machine if self.hello else None

    @property
    def size_bytes(self) -> int:
        return sum(region.size_bytes for region in self.regions)

    @property
    def files(self) -> list[tuple[int, int]]:
        """(device, inode) of its memory files, each once, in the order of the regions: by these it is known again."""
        statuses = [os.fstat(descriptor) for descriptor in dict.fromkeys(region.memory_fd for region in self.regions)]
        return [(status.st_dev, status.st_ino) for status in statuses]

    # --- messages ---------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue and send at once as far as the socket takes it. A guest that is gone shows through on_gone."""
        if self.gone:
            return
        self._unsent += encode(message)
        self._writable()
        if len(self._unsent) > UNSENT_BYTES_MAX:
            log.warning("guest does not read", guest=self.guest_id, pid=self.pid, unsent_bytes=len(self._unsent))
            self.failure = "it asks and does not read"
            self.close()

    def keep(self, states_fd: int) -> bool:
        """Give it the page states: they are in its hands when this returns, whatever becomes of us. False: it takes none."""
        assert self.hello is not None
        if "keep" not in self.hello.offers or self._unsent or self.gone:
            return False
        data = encode(Keep())
        with contextlib.suppress(OSError):
            sent_bytes = socket.send_fds(self._socket, [data], [states_fd], socket.MSG_NOSIGNAL)
            self._unsent += data[sent_bytes:]
            self._writable()
            return True
        return False

    async def request(self, message: Message, yes: type[_M], no: type[_N], *, deadline_seconds: float) -> _M | _N:
        """Send, and wait for one of the two answers. Raises GuestGoneError, DeadlineError."""
        if self.gone:
            raise GuestGoneError(f"guest {self.guest_id}", expected="an attached guest", got="its socket has ended")
        future: asyncio.Future[Message] = self._loop.create_future()
        if self._pending is not None:
            raise GuestBusyError(f"guest {self.guest_id}", expected="one request at a time", got="a second one")
        answers = (yes, no)
        self._pending = (answers, future)
        self.send(message)
        try:
            async with asyncio.timeout(deadline_seconds):
                return cast(_M | _N, await future)
        except asyncio.CancelledError:  # the migration: the guest answers all the same
            self._overdue.update(answers)
            raise
        except TimeoutError:
            self._overdue.update(answers)
            names = " or ".join(answer.__name__.lower() for answer in answers)
            raise DeadlineError(
                f"guest {self.guest_id}", expected=f"{names} within {deadline_seconds} s", got="nothing"
            ) from None
        finally:
            self._pending = None

    async def prepare(self, deadline_seconds: float) -> None:
        """A switchover is next: the agent and this path to it are awake and warm afterwards."""
        await self.request(GuestPrepare(), GuestPrepared, GuestPrepared, deadline_seconds=deadline_seconds)

    @property
    def untrackable(self) -> str | None:
        """Why precopy is not for this guest; None where it may be."""
        assert self.hello is not None
        if self.hello.declares:
            return f"the guest declares {', '.join(self.hello.declares)}: its writes cannot all be seen"
        return None if "tracking" in self.hello.offers else "the guest does not offer tracking"

    async def track(self, deadline_seconds: float) -> str | None:
        """Have the guest's writes be seen, by ``pagemap_fd``; or why that cannot be. Raises GuestGoneError, DeadlineError."""
        self._may_track = True
        answer = await self.request(Track(), Tracking, TrackFailed, deadline_seconds=deadline_seconds)
        if isinstance(answer, TrackFailed):
            self._may_track = False
            return answer.reason
        if self.pagemap_fd < 0:
            return "the guest passed no pagemap"
        name = os.readlink(f"/proc/self/fd/{self.pagemap_fd}")
        if not (name.startswith("/proc/") and name.endswith("/pagemap")):
            self._close_pagemap()
            return f"the guest passed {name}, not its pagemap"
        return None

    def untrack(self) -> None:
        """After a migration that came to nothing, or goes on without precopy."""
        self._close_pagemap()
        if self._may_track:
            self._may_track = False
            self.send(Untrack())

    def _close_pagemap(self) -> None:
        if self.pagemap_fd >= 0:
            os.close(self.pagemap_fd)
            self.pagemap_fd = -1

    def _readable(self) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors, flags = b"", [], 0
        if self._pending and Tracking in self._pending[0] and len(descriptors) == 1 and self.pagemap_fd < 0:
            self.pagemap_fd = descriptors.pop()
        if self.hello is not None and descriptors:
            for descriptor in descriptors:
                os.close(descriptor)
            log.warning("descriptors after hello, closed", guest=self.guest_id, descriptors=len(descriptors))
            descriptors = []
        self._descriptors += descriptors
        if not data:
            self.close()
            return
        try:
            if flags & socket.MSG_CTRUNC or len(self._descriptors) > DESCRIPTORS_MAX:
                raise GuestRefusedError("descriptors", expected=f"<= {DESCRIPTORS_MAX}", got="more")
            for message in self._decoder.feed(data):
                if self.gone:  # by what the last one led to: its descriptors are closed
                    return
                self._take(message)
        except (PostcopyError, ProtocolError) as error:
            self._tell_refused(error)
            self.send(Refused(code=error.code, what=error.what[:2000], expected=error.expected[:2000], got=error.got[:2000]))
            self.failure = str(error)
            self.close()

    def _tell_refused(self, error: PostcopyError | ProtocolError) -> None:
        self._refusals.count("guests", error.code)
        self._refusals.tell(log.warning, "guest refused", error, str(self.pid), guest=self.guest_id, pid=self.pid)

    def gives_way(self, error: ProtocolError) -> None:
        """It has not said who it is, and too many others come."""
        self._tell_refused(error)
        self.close()

    def _take(self, message: Message) -> None:
        if self.hello is None:
            if not isinstance(message, Hello):
                raise ProtocolError(
                    "message-unexpected", "first message of a guest", expected="hello", got=type(message).__name__
                )
            self._greet(message)
        elif isinstance(message, Stepped):
            if self.on_stepped:
                on_stepped, self.on_stepped = self.on_stepped, None  # told once a resume
                on_stepped(message.first_step_ns)
        elif isinstance(message, Discard):
            self._discard(message)
        elif isinstance(message, GuestFailed):
            self.failure = message.reason
            log.error("guest failed", guest=self.guest_id, reason=message.reason)
            if self.on_failed:
                self.on_failed(PostcopyError(message.reason, code="guest-failed"))
        elif self._pending and isinstance(message, self._pending[0]):
            if not self._pending[1].done():
                self._pending[1].set_result(message)
        elif type(message) in self._overdue:
            log.warning("answer after its deadline", guest=self.guest_id, answer=type(message).__name__)
        else:
            expected = " or ".join(kind.__name__ for kind in self._pending[0]) if self._pending else "nothing now"
            raise ProtocolError("message-unexpected", "message of a guest", expected=expected, got=type(message).__name__)

    def _discard(self, message: Discard) -> None:
        """Answered when it holds. A guest whose migration has stalled gets no answer before that goes on: nobody can say where
        its pages are."""
        for one in message.ranges:
            region = self.regions[one.region] if one.region < len(self.regions) else None
            if region is None or one.page_index + one.page_count > region.size_bytes // region.page_bytes:
                raise ProtocolError("message-invalid", "discard.ranges", expected="pages of its regions", got=one.model_dump())
        if self.discards_wait or self.state in (GuestState.LOST, GuestState.UNDECIDED):
            if len(self._held_discards) < DISCARDS_HELD_MAX:  # who waits for each answer, as it should, has one
                self._held_discards.append(message)
            return
        if self.state is GuestState.WAITING:
            raise ProtocolError("message-unexpected", "discard", expected="none of a guest that waits", got="one")
        for one in message.ranges:
            (self.on_discard or self.punch)(one)
        self.send(Discarded())

    def take_discards(self) -> None:
        """Its migration goes on. Raises what ``on_discard`` raises."""
        self.discards_wait = False
        held, self._held_discards = self._held_discards, []
        for message in held:
            self._discard(message)

    def punch(self, pages: PageRange) -> None:
        """Zero they are then, whoever brought them. Raises DataPlaneError."""
        dataplane.discard(self.regions[pages.region], pages.page_index, pages.page_count)

    def _greet(self, hello: Hello) -> None:
        """Check what came with hello, descriptor by descriptor; only then is the guest known."""
        if hello.major != PROTOCOL_MAJOR:
            raise GuestRefusedError(
                "guest protocol", expected=f"{PROTOCOL_MAJOR}.x", got=f"{hello.major}.{hello.minor}", code="version-unsupported"
            )
        waiting = hello.role in ("waiting", "arriving")
        expected = hello.memory_files + waiting + hello.page_states
        if len(self._descriptors) != expected:
            what = f"{hello.memory_files} memory files" + (" and a userfaultfd" if waiting else "")
            what += ", and page states" if hello.page_states else ""
            raise GuestRefusedError("descriptors passed with hello", expected=f"{expected}: {what}", got=len(self._descriptors))
        try:
            self.regions = check_regions(hello.regions, self._descriptors[: hello.memory_files])
            if hello.page_states:  # first: whoever owns the guest resolves its faults
                self._own(self._descriptors[-1])
            if waiting:
                self.userfaultfd = self._descriptors[hello.memory_files]
                self._check_userfaultfd(hello)
        except OSError as error:
            raise GuestRefusedError("descriptors passed with hello", expected="usable ones", got=error) from error
        self.state = STATE_OF_ROLE[hello.role]
        self.hello = hello
        go_on = self._on_hello(self)
        self.send(Welcome(major=PROTOCOL_MAJOR, minor=PROTOCOL_MINOR, software=f"postcopy {__version__}"))
        if go_on is not None:
            go_on()

    def takes_back(self, states_fd: int) -> None:
        """Ours to close: page states of a migration that has stalled, for the one that goes on. Raises as ``_own`` does."""
        if self.states_fd >= 0:
            self._descriptors.remove(self.states_fd)
            os.close(self.states_fd)
            self.states_fd = -1
        self._descriptors.append(states_fd)
        self._own(states_fd)

    def _own(self, states_fd: int) -> None:
        """No other daemon, hung or stopped, may still write this guest's memory. Raises GuestRefusedError, OSError."""
        if not is_memory_file(states_fd):
            raise GuestRefusedError("page states", expected="the descriptor that came with keep", got="another file")
        if (owner := dataplane.own(states_fd)) is not None:
            raise GuestRefusedError(
                "page states", expected="no other daemon that has the guest", got=f"process {owner} has it", code="guest-owned"
            )
        self.states_fd = states_fd

    def _check_userfaultfd(self, hello: Hello) -> None:
        """Registering again is free where the range is MISSING|MINOR already, and says no where it cannot be (P3)."""
        userfaultfd = uffd.Userfaultfd.borrow(self.userfaultfd)
        events = uffd.Feature.EVENT_REMOVE if hello.remove_means else uffd.Feature(0)
        if unexpected := userfaultfd.features.without(uffd.FEATURES_ALLOWED | events):
            raise GuestRefusedError(
                "userfaultfd features",
                expected=f"missing and minor faults, no events{' but REMOVE' if events else ' where hello has no remove_means'}",
                got=f"{unexpected:#x} besides",
                code="userfaultfd-refused",
            )
        try:
            os.set_blocking(self.userfaultfd, False)
            for region in self.regions:
                uffd.register_for_postcopy(userfaultfd, region.guest_address, region.size_bytes)
        except uffd.UserfaultfdError as error:
            raise GuestRefusedError(error.what, expected=error.expected, got=error.got, code="userfaultfd-refused") from error

    # --- writing and the end ----------------------------------------------------------------------------------------

    def _writable(self) -> None:
        try:
            while self._unsent:
                sent_bytes = self._socket.send(self._unsent, socket.MSG_NOSIGNAL)
                del self._unsent[:sent_bytes]
            self._loop.remove_writer(self._socket)
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._socket, self._writable)
        except OSError:
            self._unsent.clear()
            self._loop.remove_writer(self._socket)

    def became_running(self) -> None:
        """Its memory is whole: the daemon lets its descriptor of the userfaultfd go, and the page states."""
        self.state = GuestState.RUNNING
        for descriptor in (self.userfaultfd, self.states_fd):
            if descriptor >= 0:
                os.close(descriptor)
                self._descriptors.remove(descriptor)
        self.userfaultfd = self.states_fd = -1

    def close(self) -> None:
        """End the connection. Descriptors are closed unless a migration still needs them (``release``)."""
        if self.gone:
            return
        self.gone = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._pending and not self._pending[1].done():
            self._pending[1].set_exception(
                GuestGoneError(f"guest {self.guest_id}", expected="an answer", got=self.failure or "its socket ended")
            )
        self._on_gone(self)

    def release(self) -> None:
        """Close the memory files, the userfaultfd and the pagemap."""
        self.released = True
        self._close_pagemap()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()
        self.userfaultfd = self.states_fd = -1
