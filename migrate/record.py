"""What a daemon must still know of a migration when it has been killed: one small file each, in its runtime directory, or in
``STATE_DIRECTORY`` where a service manager gives it one, since that may take the runtime directory away between two lives.

Written before the act that it describes, so that after any death the file says at least as much as has happened (P4, P6):

- at the source ``may_run_there`` is recorded before ``switchover`` is sent, at the destination before ``resume``. Where it is
  not recorded the act has not happened: the source resumes its guest, the destination never will.
- ``ran_there``, at the source, once the destination has said so: then no person may decide otherwise.
- ``verdict`` is recorded before it is said: ``aborted``, this guest is never resumed there in that epoch; ``complete``, it is
  whole there; ``abandoned``, it runs there without what had not come: recorded before the first page is lost, since a daemon that
  knew nothing of that would take what it finds lost for lacking, and ask for it; ``gone``, its process there has ended.

The two writes that fall into a downtime are prepared before it (``stage``): one byte is left, which says that the staged record
holds (``commit``). It is written in place: a rename(2) there costs 100 to 150 us on ext4, this 2 us. Which of two holds says
``revision``. Nothing is synced: what survives a power cut is no guest either, and a record of another boot is dropped. The files
are 0600, for they hold the migration's token.
"""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proto.messages import STREAMS_MAX, GuestRegion
from proto.states import Role

log = structlog.get_logger("postcopy.record")
FOLDER = "migrations"
STAGED, HOLDS = b"-", b"+"
UNREADABLE_HINT = "its guest waits: put the file back as it was and restart, or `postcopy resolve` the guest; then remove it"
VERDICTS_KEPT = 64
"""Of earlier lives, for a peer that never asked. On one that was abandoned a guest may depend: it goes with the boot."""


def boot_id() -> str:
    """An inode number means nothing after a reboot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def folder_of(runtime_dir: Path) -> Path:
    state_directories = os.environ.get("STATE_DIRECTORY", "")
    return (Path(state_directories.split(":")[0]) if state_directories else runtime_dir) / FOLDER


class Record(BaseModel):
    """``files``: (device, inode) of the guest's memory files, by which it is known when it attaches again. ``regions``: what of
    them is the guest's memory, ``memory_file`` an index into ``files``; by these a source that has the files goes on without it.

    ``version`` 1 had no regions, and is read. A daemon of that version leaves a record of this one as it is, and decides nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1, 2] = 2
    revision: int = Field(default=0, ge=0)
    boot_id: str = Field(default_factory=boot_id)
    role: Role
    migration_id: str = Field(pattern="^[0-9a-f]{32}$")
    guest_id: str
    files: list[tuple[int, int]]
    regions: list[GuestRegion] = []
    peer: str
    token: str = Field(pattern="^[0-9a-f]{32}$", repr=False)
    epoch: int = Field(ge=0, lt=1 << 32)
    streams: int = Field(ge=1, le=STREAMS_MAX)
    bulk: bool = True
    precopy: bool = False
    may_run_there: bool = False
    ran_there: bool = False
    verdict: Literal["", "aborted", "complete", "abandoned", "gone"] = ""

    def changed(self, **changes: object) -> Self:
        return self.model_copy(update={**changes, "revision": self.revision + 1})


class RecordBook:
    """The records of one daemon. Without a directory it keeps none. Raises OSError for what cannot be written: no act follows."""

    def __init__(self, runtime_dir: Path | None = None) -> None:
        self._folder = None if runtime_dir is None else folder_of(runtime_dir)
        self._staged: dict[str, int] = {}
        self.earlier: dict[str, Record] = {}
        """Of lives before this one, by migration, until somebody goes on with them."""
        self.unreadable: list[Path] = []
        """Damaged ones, of which guests is not known: left as they are."""

    def open(self) -> None:
        """At the start: read what earlier lives have left; what they had only staged has not happened."""
        if self._folder is None:
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for path in self._folder.glob("*.staged"):  # out of the reach of a daemon that lives on, stopped perhaps: see commit
            path.rename(path.with_suffix(".taken"))
        for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            try:
                record = _read(path)
            except (IsADirectoryError, PermissionError, ValueError) as error:
                self.unreadable.append(path)
                log.error("record that cannot be read: left as it is", path=str(path), reason=_why(error), hint=UNREADABLE_HINT)
                continue
            if record is None or record.boot_id != boot_id():  # what was only being written, or staged, has not happened
                path.unlink()
                continue
            known = self.earlier.get(record.migration_id)
            if known is None or known.revision < record.revision:
                self.earlier[record.migration_id] = record
        for path in self.unreadable:  # what else there is of it may say too little: nobody decides by that
            self.earlier.pop(path.stem, None)
        for path in self._folder.glob("*.taken"):
            if path.stem in self.earlier:
                self.write(self.earlier[path.stem])
                path.unlink()
        decided = [record.migration_id for record in self.earlier.values() if record.verdict not in ("", "abandoned")]
        for migration_id in decided[: max(0, len(decided) - VERDICTS_KEPT)]:
            self.remove(migration_id)

    def close(self) -> None:
        """At the end: nothing is left behind of a daemon that has nothing to go on with."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # records, or another's doing
                self._folder.rmdir()

    def write(self, record: Record) -> None:
        """From here on it holds, and nothing that was staged."""
        if self._folder is None:
            return
        path = self._folder / f"{record.migration_id}.next"
        os.close(_write(path, b"", record))
        os.rename(path, path.with_suffix(".json"))
        self._unstage(record.migration_id)

    def stage(self, record: Record) -> None:
        """All but the byte that makes it hold. What holds now has been written."""
        if self._folder is not None:
            self._unstage(record.migration_id)
            path = self._folder / f"{record.migration_id}.staged"
            self._staged[record.migration_id] = _write(path, STAGED, record)

    def commit(self, migration_id: str) -> None:
        """What is staged holds from here on. Raises OSError where another daemon has taken it: it may have read it before."""
        if self._folder is None:
            return
        descriptor, path = self._staged.pop(migration_id), self._folder / f"{migration_id}.staged"
        try:
            os.pwrite(descriptor, HOLDS, 0)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError(errno.ENOENT, "another daemon goes on with this record", str(path))
        finally:
            os.close(descriptor)

    def _unstage(self, migration_id: str) -> None:
        descriptor = self._staged.pop(migration_id, None)
        if descriptor is not None:
            os.close(descriptor)
        if self._folder is not None:
            (self._folder / f"{migration_id}.staged").unlink(missing_ok=True)

    def remove(self, migration_id: str) -> None:
        """Nothing hangs on it any more. Safe for a migration of which there is none."""
        self.earlier.pop(migration_id, None)
        if self._folder is not None:
            for suffix in ("next", "json"):
                (self._folder / f"{migration_id}.{suffix}").unlink(missing_ok=True)
        self._unstage(migration_id)

    def of_guest(self, role: Role, guest_id: str, files: Iterable[tuple[int, int]]) -> Record | None:
        """Of an earlier life, the newest; by the guest's memory files: a name alone says nothing."""
        wanted = list(files)
        newest_first = reversed(self.earlier.values())
        return next((one for one in newest_first if (one.role, one.guest_id, one.files) == (role, guest_id, wanted)), None)


def _write(path: Path, prefix: bytes, record: Record) -> int:
    """The file's descriptor, still open. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        data = prefix + record.model_dump_json().encode()
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read(path: Path) -> Record | None:
    """The record in this file, if it holds. Raises OSError, ValueError for one that is damaged."""
    data = path.read_bytes()
    if path.suffix == ".taken" and data.startswith(HOLDS):
        return Record.model_validate_json(data[len(HOLDS) :])
    return Record.model_validate_json(data) if path.suffix == ".json" else None


def _why(error: OSError | ValueError) -> str:
    """Without what is in the file, which has a token in it."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False)[0]
        return ": ".join([*map(str, first["loc"][:1]), first["msg"]])
    return str(error.strerror if isinstance(error, OSError) else error)
