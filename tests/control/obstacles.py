"""A doctor in a place of its own: mount namespace, devices, user, limits. What is in the way there is really in the way.

Nothing of it reaches the machine: /dev is a file system of the namespace's own, with nodes made anew, and files of /proc and /sys
are covered by mounts that end with it.
"""

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.host import cgroup
from migrate.host.report import Finding, Report
from migrate.host.rights import misc_minor
from migrate.pair import COMMAND

from ..guests.test_unprivileged import DROP_ALL, needed_folders, open_the_way

DEADLINE_SECONDS = 30
MARK = "\f"
PRIVATE = ("unshare", "--mount", "--propagation", "private")
OWN_DEV = f"""
mount -t tmpfs -o mode=0755 none /dev
mknod -m 0666 /dev/null c 1 3
mknod -m 0666 /dev/zero c 1 5
mknod -m 0666 /dev/urandom c 1 9
mkdir -m 1777 /dev/shm
mount -t tmpfs -o mode=1777 none /dev/shm
mknod -m 0600 /dev/userfaultfd c 10 {misc_minor("userfaultfd")}
mknod -m 0600 /dev/kvm c 10 {misc_minor("kvm")}
"""
"""As devtmpfs makes it: both for root alone."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a doctor said, and its exit status."""

    status: int
    report: Report

    def __getitem__(self, name: str) -> Finding:
        return next(one for one in self.report.features if one.id == name)


def in_namespace(script: str, *, namespaces: tuple[str, ...] = ()) -> str:
    """Standard output of a shell script, as root in a mount namespace of its own. Fails when the script does."""
    environment = {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    command = [*PRIVATE, *namespaces, "sh", "-euc", script]
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def doctors(*steps: str, wrapped_in: tuple[str, ...] = (), namespaces: tuple[str, ...] = ()) -> list[Told]:
    """One for each step, which are shell scripts run by root before it; later ones see what earlier ones did."""
    ask = f"status=0; {shlex.join([*wrapped_in, *COMMAND, 'doctor', '--json'])} || status=$?; printf '\\f%d\\f' $status"
    said = in_namespace("\n".join(f"{step}\n{ask}" for step in steps), namespaces=namespaces).split(MARK)
    return [Told(int(status), Report.model_validate_json(text)) for text, status in zip(said[::2], said[1::2], strict=False)]


def nobodys_doctors(*steps: str, limits: tuple[str, ...] = ()) -> list[Told]:
    """The same without any privilege: uid nobody, no capability, no_new_privs; in a /dev of its own."""
    way = f'{open_the_way(needed_folders())}\ncd "$scratch"\nexport TMPDIR=$scratch HOME=$scratch\n{OWN_DEV}'
    first, *others = steps
    return doctors(way + first, *others, wrapped_in=(*limits, *DROP_ALL))


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int, *, swap: bool = False) -> Iterator[Path]:
    """A new cgroup that may have so much memory, and swap besides or none. What is put into it must have ended before it goes."""
    top = cgroup.top("memory")
    assert top is not None
    made = Path(tempfile.mkdtemp(prefix="postcopy-test-", dir=top))
    try:
        limits = {"memory.limit_in_bytes": limit_bytes, "memory.max": limit_bytes}
        if not swap:
            limits |= {"memory.memsw.limit_in_bytes": limit_bytes, "memory.swap.max": 0}
        written = [(made / name).write_text(str(value)) for name, value in limits.items() if (made / name).exists()]
        assert written, f"{top} limits no memory"
        yield made
    finally:
        made.rmdir()


def covered(path: str | Path, text: str) -> str:
    """A script after which that file reads so."""
    name = shlex.quote(str(path))
    return f'cover=$(mktemp -p /dev/shm)\necho {shlex.quote(text)} >"$cover"\nchmod 0644 "$cover"\nmount --bind "$cover" {name}\n'
