"""What is mounted where, for this process. Source: proc_pid_mountinfo(5)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """``root``: the part of the file system that is seen; ``options``: of the file system, not of this mount."""

    place: Path
    root: str
    kind: str
    options: tuple[str, ...]


def mounts() -> Iterator[Mount]:
    """In the order of mounting: a later one at the same place covers an earlier one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, place = (_ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) for field in left.split()[3:5])
        kind, _, options = right.split(" ", 2)
        yield Mount(Path(place), root, kind, tuple(options.split(",")))


def mount_of(path: str | Path) -> Mount:
    """The mount that an existing file is on."""
    real = Path(path).resolve()
    found = None
    for mount in mounts():
        covers = real.is_relative_to(mount.place)
        if covers and (found is None or len(mount.place.parts) >= len(found.place.parts)):
            found = mount
    assert found is not None, f"nothing is mounted above {real}"
    return found
