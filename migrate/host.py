"""What this machine can do, in sentences: each feature with why it is or is not there, and the one thing to change.

``python -m migrate.host`` prints all of them; ``--available`` the names of those present, joined by commas.
Probes use what they probe (no version is believed), change nothing that outlives them, and take well under a second.
"""

import ctypes
import functools
import operator
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import HostLacksError, errno_text

PROBE_DEADLINE_SECONDS = 20.0
HUGEPAGE_BYTES = 2 << 20
HUGEPAGES_WANTED = 160  # a guest of 128 MiB at both ends of a move, and some to spare
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
POOL_2M = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
ADMINISTRATOR_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_NETNS_SCRIPT = """
mount -t tmpfs none /run
ip netns add probe
ip -n probe link add name left type veth peer name right
"""
# Threads, because ThreadSanitizer's own thread is what some address space layouts do not let start.
_SANITIZED_PROGRAM = """
#include <pthread.h>
static void *run(void *argument) { return argument; }
int main(void) { pthread_t thread; return pthread_create(&thread, 0, run, 0) || pthread_join(thread, 0); }
"""


@dataclass(frozen=True, slots=True)
class Feature:
    """``reason``: how it is there, or why not; ``remedy``: the one thing to change, empty where nothing has to be."""

    name: str
    available: bool
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.name}: yes, {self.reason}" if self.available else f"{self.name}: no, {self.reason}; {self.remedy}"


def _try(*command: str, text: str = "") -> str:
    """Empty when the command succeeded, else the last line of what it said."""
    environment = {**os.environ, "PATH": ADMINISTRATOR_PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=PROBE_DEADLINE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "" if done.returncode == 0 else (said[-1] if said else f"{command[0]} ended with status {done.returncode}")


def _userfaultfd() -> Feature:
    from migrate.uffd import open_for_postcopy

    try:
        open_for_postcopy().close()
    except HostLacksError as error:
        return Feature("uffd", False, error.why, error.remedy)
    return Feature("uffd", True, "a userfaultfd with minor faults can be opened")


def _full_userfaultfd() -> Feature:
    from migrate.uffd import Userfaultfd

    try:
        Userfaultfd.open(user_mode_only=False).close()
    except HostLacksError as error:
        return Feature("uffd-full", False, error.why, error.remedy)
    return Feature("uffd-full", True, "a userfaultfd may take faults inside the kernel too")


def _userfaultfd_with(name: str, *wanted: str) -> Feature:
    from migrate import uffd

    try:
        uffd.Userfaultfd.open(functools.reduce(operator.or_, (uffd.Feature[one] for one in wanted))).close()
    except HostLacksError as error:
        return Feature(name, False, error.why, error.remedy)
    return Feature(name, True, f"a userfaultfd has {', '.join(wanted)}")


def _pagemap_scan() -> Feature:
    from migrate.uffd import PagemapScanError, pagemap

    with open("/proc/self/pagemap", "rb") as file:
        try:
            pagemap.scan(file.fileno(), 0, HUGEPAGE_BYTES, return_mask=pagemap.Category.PRESENT)
        except PagemapScanError as error:
            return Feature("pagemap-scan", False, f"PAGEMAP_SCAN: {error.got}", "run Linux 6.7 or later")
    return Feature("pagemap-scan", True, "/proc/PID/pagemap has PAGEMAP_SCAN")


def _transparent_huge_pages() -> Feature:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        return Feature("thp", False, "madvise(MADV_HUGEPAGE) has no effect", f"write madvise to {mode}")
    return Feature("thp", True, "anonymous memory can have 2 MiB pages")


def _io_uring() -> Feature:
    # by its number, which is alike on all architectures: the C library has no name for it
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(425, 1, ctypes.create_string_buffer(120))
    if ring < 0:
        why = f"io_uring_setup: {errno_text(ctypes.get_errno())}"
        return Feature("io-uring", False, why, "set kernel.io_uring_disabled to 0, or allow it in the seccomp profile")
    os.close(ring)
    return Feature("io-uring", True, "pages can be pinned as I/O buffers")


def _hugetlb() -> Feature:
    name, remedy = "hugetlb", f"set vm.nr_hugepages to {HUGEPAGES_WANTED}"
    try:
        free = int((POOL_2M / "free_hugepages").read_text())
        pool = (POOL_2M / "nr_hugepages").read_text()
    except OSError as error:
        return Feature(name, False, str(error), "use a kernel with CONFIG_HUGETLBFS and 2 MiB pages")
    try:
        (POOL_2M / "nr_hugepages").write_text(pool)  # what it is already: shows whether this user may raise it
    except OSError as error:
        if free < HUGEPAGES_WANTED:
            why = f"{free} pages of 2 MiB are free, and this user may not reserve more ({error.strerror})"
            return Feature(name, False, why, remedy)
        return Feature(name, True, f"{free} free pages of 2 MiB")
    return Feature(name, True, f"{free} free pages of 2 MiB, and this user may reserve more")


def _netns() -> Feature:
    # A mount namespace of its own: /run/netns/probe and the namespace end with it.
    why = _try("unshare", "--mount", "--propagation", "private", "sh", "-euc", _NETNS_SCRIPT)
    if why:
        remedy = "be root with CAP_SYS_ADMIN and CAP_NET_ADMIN, on a kernel with veth, and install iproute2"
        return Feature("netns", False, why, remedy)
    return Feature("netns", True, "network namespaces with veth pairs can be made")


def _timens() -> Feature:
    why = _try("unshare", "--time", "--fork", "--monotonic", "60", "true")
    if why:
        return Feature("timens", False, why, "be root with CAP_SYS_ADMIN, on a kernel with CONFIG_TIME_NS")
    return Feature("timens", True, "a process can have a monotonic clock with an offset")


def _root() -> Feature:
    remedy = "run as root, in a container with CAP_SYS_ADMIN"
    if os.geteuid() != 0:
        return Feature("root", False, f"this is uid {os.geteuid()}", remedy)
    why = _try("unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt")
    if why:
        return Feature("root", False, why, remedy)
    return Feature("root", True, "uid 0, and it may mount in a namespace of its own")


def sanitizer_prefix(executable: str | os.PathLike[str]) -> tuple[list[str], str]:
    """How to start a sanitized program: as it is, else without address randomization, which TSan of gcc 13 and older needs
    where vm.mmap_rnd_bits is above 28. Returns the prefix, and why it works neither way (empty: it works)."""
    why = _try(os.fspath(executable))
    if not why:
        return [], ""
    prefix = ["setarch", "--addr-no-randomize"]
    return prefix, _try(*prefix, os.fspath(executable)) and why


def _sanitizer(name: str, option: str, package: str) -> Feature:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    remedy = f"install gcc or clang with its sanitizers ({package})"
    with tempfile.TemporaryDirectory(prefix="postcopy-probe-") as directory:
        program = f"{directory}/probe"
        why = _try(*compiler, f"-fsanitize={option}", "-pthread", "-x", "c", "-", "-o", program, text=_SANITIZED_PROGRAM)
        why = why or sanitizer_prefix(program)[1]
    if why:
        return Feature(name, False, why, remedy)
    return Feature(name, True, f"{compiler[0]} builds programs with it, and they run")


PROBES: dict[str, Callable[[], Feature]] = {
    "uffd": _userfaultfd,
    "hugetlb": _hugetlb,
    "netns": _netns,
    "timens": _timens,
    "root": _root,
    "asan": lambda: _sanitizer("asan", "address,undefined", "libasan, libubsan"),
    "tsan": lambda: _sanitizer("tsan", "thread", "libtsan"),
    "uffd-full": _full_userfaultfd,
    "uffd-wp": lambda: _userfaultfd_with("uffd-wp", "PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED"),
    "uffd-poison": lambda: _userfaultfd_with("uffd-poison", "POISON"),
    "uffd-move": lambda: _userfaultfd_with("uffd-move", "MOVE"),
    "wp-async": lambda: _userfaultfd_with("wp-async", "WP_ASYNC", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED"),
    "pagemap-scan": _pagemap_scan,
    "thp": _transparent_huge_pages,
    "io-uring": _io_uring,
}


@functools.cache
def feature(name: str) -> Feature:
    """Probe one feature, once a process. Raises KeyError for a name that is not in PROBES."""
    return PROBES[name]()


def main(arguments: list[str]) -> None:
    found = [feature(name) for name in PROBES]
    if arguments == ["--available"]:
        print(",".join(one.name for one in found if one.available))
    else:
        print(*found, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
