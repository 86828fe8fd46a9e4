"""Whether a guest can be backed here: asked before it is accepted, so that nothing lacks after the switchover.

Huge pages are allocated before ``accept`` (dataplane/room.c): from then on nobody can take them. All of them, zero ones too.

Pages of 4 KiB are counted. Allocating them ahead would be as safe, and would cost memory for each page that is zero and stays a
hole. The source says how much of each region is populated; that is an upper bound of what will be filled, and a guest is refused
only when it exceeds what might be had at the very most (host/room.py): a guest of 64 GiB with 1 GiB in use fits a machine of 32.
What other guests that arrive here have still to fill is taken off. It is asked again with each round of precopy and right before
the switchover, with what is populated by then: a guest that grows is refused before it has filled this machine.

Not excluded: somebody else takes the room between the last look and the last page. On tmpfs that is ENOSPC: the migration
stalls, its pages are kept at the source. In a cgroup or on the machine it is the kernel's OOM killer: give daemons limits of
their own (two daemons under one limit do not know of each other). A source is believed.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import structlog

from migrate.dataplane import MemoryRegion
from migrate.errors import NoRoomError
from migrate.host import room
from migrate.host.hugepages import size_text
from proto.errors import ProtocolError

log = structlog.get_logger("postcopy.room")
_SMALL_PAGE_BYTES = 4096


@dataclass(slots=True)
class _File:
    """A memory file of 4 KiB pages that a migration fills: how much of it, beside what it held before."""

    descriptor: int
    device: int
    before_bytes: int
    needed_bytes: int = 0

    @property
    def left_bytes(self) -> int:
        """Still to be filled; st_blocks counts swapped pages too."""
        return max(self.needed_bytes - (_held_bytes(self.descriptor) - self.before_bytes), 0)


def _held_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


class _Claim:
    """What one migration needs of each of its files."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        self.regions = len(regions)
        by_inode: dict[tuple[int, int], _File] = {}
        self._parts: list[tuple[int, int, _File]] = []  # number of the region, its size, its file
        for number, region in enumerate(regions):
            if region.page_bytes == _SMALL_PAGE_BYTES:
                status = os.fstat(region.memory_fd)
                file = _File(region.memory_fd, status.st_dev, _held_bytes(region.memory_fd))
                file = by_inode.setdefault((status.st_dev, status.st_ino), file)
                self._parts.append((number, region.size_bytes, file))
        self.files = list(by_inode.values())

    def needs(self, populated: Sequence[int | None]) -> None:
        """``populated``: of each region, None where the source does not say."""
        for file in self.files:
            file.needed_bytes = 0
        for number, size_bytes, file in self._parts:
            said_bytes = populated[number]
            file.needed_bytes += size_bytes if said_bytes is None else min(said_bytes, size_bytes)


class Room:
    """One daemon's: guests that arrive at once do not count the same room. Not for threads."""

    def __init__(self) -> None:
        self._claims: dict[bytes, _Claim] = {}

    def claim(self, migration_id: bytes, regions: Sequence[MemoryRegion], populated: Sequence[int | None]) -> None:
        """Of a guest whose memory is empty. Raises NoRoomError, and nothing is claimed."""
        claim = _Claim(regions)
        claim.needs(populated)
        self._check(claim, self._claims.values())
        self._claims[migration_id] = claim
        needed_bytes = sum(file.needed_bytes for file in claim.files)
        for limit in room.slowed():
            if limit.left < needed_bytes:
                facts = {"needed_bytes": needed_bytes, "left_bytes": int(limit.left), "limit": str(limit.path)}
                log.warning("what arrives is slowed by a limit of memory", **facts)

    def check(self, migration_id: bytes, populated: Sequence[int] | None) -> None:
        """What is not filled yet, again; None: as it was said before. Raises NoRoomError, ProtocolError."""
        claim = self._claims[migration_id]
        if populated is not None:
            if len(populated) != claim.regions:
                raise ProtocolError("message-invalid", "populated_bytes", expected=f"{claim.regions} of them", got=len(populated))
            claim.needs(populated)
        self._check(claim, [other for other in self._claims.values() if other is not claim])

    def forget(self, migration_id: bytes) -> None:
        """It has ended, or its files are about to be closed."""
        self._claims.pop(migration_id, None)

    @staticmethod
    def _check(claim: _Claim, others: Iterable[_Claim]) -> None:
        ours, theirs = claim.files, [file for other in others for file in other.files]
        for device, descriptor in {file.device: file.descriptor for file in ours}.items():
            bound = room.tmpfs(descriptor)
            if bound is not None:
                _compare(bound, *([file for file in files if file.device == device] for files in (ours, theirs)))
        for bound in room.memory():
            _compare(bound, ours, theirs)


def _compare(bound: room.Bound, ours: Iterable[_File], theirs: Iterable[_File]) -> None:
    own_bytes, other_bytes = (sum(file.left_bytes for file in files) for files in (ours, theirs))
    if own_bytes == 0 or own_bytes + other_bytes <= bound.left_bytes:
        return
    beside = f", beside {size_text(other_bytes)} that other arriving guests still fill" if other_bytes else ""
    raise NoRoomError(
        "room at the destination",
        expected=f"{size_text(own_bytes)}{beside}",
        got=f"at most {size_text(bound.left_bytes)} {bound.what}; {bound.remedy(own_bytes + other_bytes)}",
    )


def no_huge_pages(regions: Sequence[MemoryRegion], lacking: int, error_number: int) -> NoRoomError | None:
    """The data plane could not allocate those of the region ``lacking``: how many of that size the guest needs, and of what there
    are not so many. None: that was not the reason."""
    if error_number not in (errno.ENOMEM, errno.ENOSPC):
        return None
    page_bytes = regions[lacking].page_bytes
    pages = sum(region.size_bytes for region in regions if region.page_bytes == page_bytes) // page_bytes
    why, remedy = room.huge_pages(pages, page_bytes)
    return NoRoomError("room at the destination", expected=f"{pages} pages of {size_text(page_bytes)}", got=f"{why}; {remedy}")
