"""What would bound guests and daemons here: memory, descriptors, threads, CPUs, clocks."""

import errno
import os
import resource
from pathlib import Path

from migrate.host import cgroup, sentences
from migrate.host.feature import Feature
from migrate.host.hugepages import size_text
from migrate.host.mounts import mount_of
from migrate.host.rights import CAP_IPC_LOCK, Rights, read_text

SHARED_MEMORY = Path("/dev/shm")
DAEMON_DESCRIPTORS = 32
MIGRATION_DESCRIPTORS = 15
"""Open files of a daemon at rest, and what a guest with its migration adds (tests/control/test_doctor.py counts them)."""
FILES_WANTED = DAEMON_DESCRIPTORS + 32 * MIGRATION_DESCRIPTORS
THREADS_WANTED = 64
CPUS_WANTED = 2
SLOW_CLOCKS = ("acpi_pm", "hpet", "jiffies", "pit", "refined-jiffies")
CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


def meminfo(name: str) -> int:
    """A row of /proc/meminfo, in bytes."""
    for line in read_text("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    return 0


def memory() -> Feature:
    """How much guest memory still fits: it is charged to the cgroup of whoever writes it first, the destination daemon."""
    available_bytes = meminfo("MemAvailable")
    for limit in cgroup.memory()[:1]:
        if limit.left < available_bytes:
            why = f"{limit.path} leaves {size_text(int(limit.left))} of the {size_text(available_bytes)} that are available"
            return Feature("memory", True, why, limit.remedy)
    return Feature("memory", True, f"{size_text(available_bytes)} are available, and no cgroup limit is below that")


def shared_memory() -> Feature:
    """tmpfs guests. Half of the machine's memory is what the kernel gives a tmpfs that nobody has limited."""
    name = "shared-memory"
    kind = mount_of(SHARED_MEMORY).kind if SHARED_MEMORY.is_dir() else "not there"
    if kind != "tmpfs":
        why = f"{SHARED_MEMORY} is {kind}, and tmpfs is needed"
        return Feature(name, False, why, f"mkdir -p {SHARED_MEMORY} && mount -t tmpfs -o mode=1777 tmpfs {SHARED_MEMORY}")
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK, effective_ids=True):
        return Feature(name, False, f"this user may not write to {SHARED_MEMORY}", f"chmod 1777 {SHARED_MEMORY}")
    status = os.statvfs(SHARED_MEMORY)
    size_bytes, free_bytes = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    total_bytes = meminfo("MemTotal")
    text = f"{size_text(free_bytes)} of {size_text(size_bytes)} are free in {SHARED_MEMORY}"
    if 0 < size_bytes < total_bytes // 2 - (total_bytes >> 4):
        remedy = f"mount -o remount,size=50% {SHARED_MEMORY} (docker: --shm-size)"
        return Feature(name, True, f"{text}, of {size_text(total_bytes)} of memory", remedy)
    return Feature(name, True, text)


def memory_locking() -> Feature:
    """mlock in a guest. A guest that takes one in must not lock: locking fills pages that have not arrived."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Feature("memory-locking", True, "any amount")
    if Rights.here().capabilities.has(CAP_IPC_LOCK):
        return Feature("memory-locking", True, f"any amount (CAP_IPC_LOCK; the limit of {size_text(soft)} does not hold)")
    why = f"a guest may lock {size_text(soft)}; moving one needs none"
    return Feature("memory-locking", True, why, "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)" if soft == 0 else "")


def open_files() -> Feature:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Feature("open-files", True, "any number")
    guests = max(soft - DAEMON_DESCRIPTORS, 0) // MIGRATION_DESCRIPTORS
    ceiling = "no hard limit" if hard == resource.RLIM_INFINITY else f"hard limit {hard}"
    why = f"{soft} open files ({ceiling}): a daemon moves {guests} guests at once"
    if soft >= FILES_WANTED:
        return Feature("open-files", True, why)
    return Feature("open-files", guests > 0, why, sentences.open_files_remedy())


def threads() -> Feature:
    """A migration is a handful of threads in each daemon; processes and threads count alike."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    for limit in cgroup.processes()[:1]:
        if limit.left < THREADS_WANTED:
            why = f"{limit.path} leaves {int(limit.left)} processes and threads"
            return Feature("threads", limit.left > 0, why, limit.remedy)
    if soft != resource.RLIM_INFINITY and soft < THREADS_WANTED:
        remedy = f"ulimit -u {16 * THREADS_WANTED} (systemd: LimitNPROC={16 * THREADS_WANTED})"
        return Feature("threads", True, f"this user may have {soft} processes and threads", remedy)
    return Feature("threads", True, "no limit on processes and threads is near")


def processors() -> Feature:
    """A quota stops daemon and guest for the rest of each period (100 ms): faults wait that long."""
    usable = len(os.sched_getaffinity(0))
    for limit in cgroup.cpus()[:1]:
        if limit.value < min(CPUS_WANTED, usable):
            why = f"{limit.path} allows {limit.value:.4g} CPUs: when it is used up, faults wait for the next period"
            return Feature("processors", True, why, limit.remedy)
    return Feature("processors", True, f"{usable} CPUs are usable")


def clock() -> Feature:
    """Downtime is a difference of two processes' CLOCK_MONOTONIC: guest and daemon must have the same one."""
    source = read_text(CLOCK_SOURCE) or "unknown"
    offsets = [line.split() for line in read_text("/proc/self/timens_offsets").splitlines()]
    shifted = [f"{name} by {seconds} s" for name, seconds, nanoseconds in offsets if (seconds, nanoseconds) != ("0", "0")]
    if shifted:
        why = f"this time namespace shifts {' and '.join(shifted)}: a guest and its daemon must share it"
        return Feature("clock", True, why, "start guests and daemons in the same time namespace, best the initial one")
    if source in SLOW_CLOCKS:
        why = f"clock source {source}: every reading of the time costs a microsecond or more"
        return Feature("clock", True, why, f"echo tsc > {CLOCK_SOURCE}")
    return Feature("clock", True, f"clock source {source}, no time namespace in between")


def runtime_directory() -> Feature:
    """Where daemons put their sockets: made 0700 by the first, so it is enough that it can be made. Nothing is made here."""
    from migrate.config import runtime_base

    base = runtime_base()
    name = "runtime-directory"
    try:
        status = base.lstat()
    except FileNotFoundError:
        above = next(parent for parent in base.parents if parent.exists())
        if os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            return Feature(name, True, f"{base} can be made")
        return Feature(name, False, *sentences.runtime_directory_refused(base, error_number=errno.EACCES))
    except OSError as error:
        return Feature(name, False, *sentences.runtime_directory_refused(base, error_number=error.errno or 0))
    if not base.is_dir() or base.is_symlink() or status.st_uid != os.geteuid():
        return Feature(name, False, *sentences.runtime_directory_refused(base, uid=status.st_uid))
    return Feature(name, True, f"{base} is ours")
