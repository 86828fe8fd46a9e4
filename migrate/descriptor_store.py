"""Descriptors of guests that depend on this daemon, kept by the service manager beyond the daemon's own life.

From the switchover on a guest in postcopy needs what its daemons hold. At the source that is its memory: the guest's own
process may end, and then nobody else has the pages that are still to be sent. At the destination it is the memory and the
userfaultfd, with which another process can take over as long as the guest lives. A daemon that is killed loses all of it,
unless the manager has duplicates (FDSTORE of sd_notify(3), FileDescriptorStoreMax= in the unit).

They are stored before the guest is paused and removed when nothing hangs on them any more. What comes back after a restart is
checked and held. A source takes its migration up again from that, where its record says that the guest may run elsewhere
(returning.py): whether the guest's own process comes back or not, the pages are there. A destination lets go of what is left of a
guest whose process has ended; its userfaultfd says so. What no record tells of is held until its guest attaches.
"""

import asyncio
import mmap
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from migrate import uffd
from migrate.errors import PostcopyError
from migrate.guest_link import GuestLink
from migrate.notify import Told, is_managed, store, take_descriptors, unstore
from migrate.region import is_memory_file
from proto.states import Role

log = structlog.get_logger("postcopy.store")
USERFAULTFD = "userfaultfd"
NOBODYS_ADDRESS = 1 << 20  # above vm.mmap_min_addr, below which every range is invalid
RETRY_SECONDS = 0.02
STORE_SECONDS_MAX = 0.5  # the guest runs on meanwhile
_NAME = re.compile(r"(source|destination)\.([0-9a-f]{32})\.(memory-[0-9]{1,2}|userfaultfd)\.([A-Za-z0-9][A-Za-z0-9._-]{0,63})")


@dataclass(frozen=True, slots=True)
class StoredName:
    """FDNAME of one descriptor: ``source.MIGRATION.memory-0.GUEST``. Printable ASCII without a colon, 121 bytes at most.

    ``part``: ``memory-N``, the Nth memory file in the order of the guest's regions, or ``userfaultfd``.
    """

    role: Role
    migration_id: str
    part: str
    guest_id: str

    def __str__(self) -> str:
        return f"{self.role}.{self.migration_id}.{self.part}.{self.guest_id}"

    @classmethod
    def parse(cls, text: str) -> "StoredName | None":
        match = _NAME.fullmatch(text)
        return cls(Role(match[1]), match[2], match[3], match[4]) if match else None

    def fits(self, descriptor: int) -> bool:
        """Whether the descriptor is of the kind that the name says."""
        try:
            return uffd.features_of(descriptor) != 0 if self.part == USERFAULTFD else is_memory_file(descriptor)
        except OSError:
            return False


@dataclass(slots=True)
class HeldSet:
    """What an earlier life of this daemon stored of one guest in one migration; ours to close."""

    role: Role
    migration_id: str
    guest_id: str
    descriptors: dict[StoredName, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(os.fstat(descriptor).st_size for name, descriptor in self.descriptors.items() if name.part != USERFAULTFD)

    @property
    def memory_files(self) -> list[int]:
        """In the order of their numbers."""
        numbered = {
            int(name.part.removeprefix("memory-")): it for name, it in self.descriptors.items() if name.part != USERFAULTFD
        }
        return [numbered[number] for number in sorted(numbered)]

    @property
    def guest_has_ended(self) -> bool:
        """At the destination. CONTINUE finds no page anywhere but in a registered range, which does not begin so low; before it
        looks it says ESRCH where the process that made the userfaultfd has no memory any more."""
        userfaultfd = next((it for name, it in self.descriptors.items() if name.part == USERFAULTFD), -1)
        if userfaultfd < 0:
            return False
        try:
            return (
                uffd.Userfaultfd.borrow(userfaultfd).continue_(NOBODYS_ADDRESS, mmap.PAGESIZE).outcome
                is uffd.Outcome.PROCESS_GONE
            )
        except PostcopyError:  # whatever else is wrong with it, nobody has said that it has ended
            return False

    def concerns(self, link: GuestLink) -> bool:
        """Whether the guest that has attached makes it superfluous: it brought the same memory files, or it is the
        successor of one whose memory had not arrived. At the source an id alone says nothing: another guest of that name does
        not have the pages for which the first one waits elsewhere."""
        theirs = {identity(descriptor) for descriptor in memory_files(link)}
        ours = {identity(descriptor) for descriptor in self.memory_files}
        return bool(theirs & ours) or (self.role is Role.DESTINATION and self.guest_id == link.guest_id)


def memory_files(link: GuestLink) -> list[int]:
    """Each once, in the order of the regions."""
    return list(dict.fromkeys(region.memory_fd for region in link.regions))


def identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


class DescriptorStore:
    """What the manager keeps for this daemon (``save``, ``forget``), and what it has handed back (``take_back``, ``let_go``)."""

    def __init__(self) -> None:
        self.held: list[HeldSet] = []
        self._saved: dict[str, tuple[GuestLink, list[StoredName]]] = {}
        self._unsaid: deque[str] = deque()  # names to be removed that the manager's queue had no room for

    # --- this life --------------------------------------------------------------------------------------------------

    async def save(self, role: Role, migration_id: str, link: GuestLink) -> None:
        """Have the guest's descriptors kept. Takes STORE_SECONDS_MAX at most and never fails: it says what is not kept."""
        if migration_id in self._saved or not is_managed():  # the former: since an earlier life
            return
        for other, (guest, _) in list(self._saved.items()):
            if guest is link:  # the manager ignores a file that it has already, and would forget it with the older name
                self.forget(other)
        parts = {f"memory-{index}": descriptor for index, descriptor in enumerate(memory_files(link))}
        if role is Role.DESTINATION:
            parts[USERFAULTFD] = link.userfaultfd
        deadline = asyncio.get_running_loop().time() + STORE_SECONDS_MAX
        names = [StoredName(role, migration_id, part, link.guest_id) for part in parts]
        self._saved[migration_id] = link, names
        for name in names:
            told = await self._until(deadline, lambda name=name: store(str(name), parts[name.part]))  # type: ignore[misc]
            if told is Told.NOBODY:
                del self._saved[migration_id]
                return
            if told is not Told.YES:
                why = "the service manager does not take its descriptors"
                log.warning("guest would not survive the end of this daemon", guest=link.guest_id, reason=why, name=str(name))
                return

    async def _until(self, deadline: float, say: Callable[[], Told]) -> Told:
        """In order: first all that is to be removed."""
        loop = asyncio.get_running_loop()
        while True:
            told = Told.LATER if self._flush() else say()
            if told is not Told.LATER or loop.time() >= deadline:
                return told
            await asyncio.sleep(RETRY_SECONDS)

    def forget(self, migration_id: str) -> None:
        """Nothing hangs on them any more. Safe for a migration of which nothing is stored."""
        _, names = self._saved.pop(migration_id, (None, []))
        self._remove(names)

    def _remove(self, names: list[StoredName]) -> None:
        waiting = bool(self._unsaid)
        self._unsaid.extend(map(str, names))
        if not waiting:
            self._remove_rest()

    def _remove_rest(self) -> None:
        """A removal must not get lost: the manager would keep the guest's memory for as long as this daemon lives."""
        if self._flush():
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._remove_rest)

    def _flush(self) -> bool:
        """Whether something is left to be said."""
        while self._unsaid and unstore(self._unsaid[0]) is not Told.LATER:
            self._unsaid.popleft()
        return bool(self._unsaid)

    # --- the life before --------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        """At the start. They are held, not closed: the only copy of a guest's pages may be among them."""
        sets: dict[tuple[Role, str], HeldSet] = {}
        for text, descriptor in take_descriptors():
            name = StoredName.parse(text)
            if name is None or not name.fits(descriptor):
                log.warning("descriptor from the service manager closed: none that a daemon stores", name=text)
                os.close(descriptor)
                unstore(text)
                continue
            held = sets.setdefault((name.role, name.migration_id), HeldSet(name.role, name.migration_id, name.guest_id))
            held.descriptors[name] = descriptor
        self.held = list(sets.values())
        for held in self.held:
            log.warning(
                "guest of this daemon's earlier life: its memory is held",
                guest=held.guest_id,
                migration=held.migration_id,
                role=str(held.role),
                descriptors=len(held.descriptors),
                size_bytes=held.size_bytes,
                hint="let go when its migration has ended, when the guest attaches again, or when the service is stopped",
            )

    def let_go(self, link: GuestLink) -> bool:
        """A guest has attached: what was held of it is its own again. Whether anything was."""
        concerned = [held for held in self.held if held.concerns(link)]
        for held in concerned:
            self.drop(held, "its guest is here")
        return bool(concerned)

    def drop(self, held: HeldSet, reason: str) -> None:
        self.held.remove(held)
        for descriptor in held.descriptors.values():
            os.close(descriptor)
        self._remove(list(held.descriptors))
        log.info("held memory let go", reason=reason, guest=held.guest_id, migration=held.migration_id)

    def taken_up(self, held: HeldSet, link: GuestLink) -> None:
        """The descriptors are the link's now; the manager keeps its own until ``forget``."""
        self.held.remove(held)
        self._saved[held.migration_id] = link, list(held.descriptors)
