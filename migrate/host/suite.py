"""What the tests and their tools need beyond the product: namespaces, root, sanitizers, enough huge pages."""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from migrate.errors import HostLacksError
from migrate.guests.linux.machine import GuestImage
from migrate.host import cgroup, sentences
from migrate.host.feature import Feature
from migrate.host.guests import GIGANTIC_PAGE_BYTES, huge_pages, qemu
from migrate.host.hugepages import GIGANTIC_PAGES_WANTED, HUGEPAGE_BYTES, HUGEPAGES_WANTED, pool
from migrate.host.rights import unprivileged_userfaultfd

PROBE_DEADLINE_SECONDS = 20.0
ADMINISTRATOR_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
CGROUP_LIMITS = {
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "cpu": ("cpu.max", "cpu.cfs_quota_us"),
    "pids": ("pids.max",),
}
"""Controller to its file of versions 2 and 1."""
_GIGANTIC_SCRIPT = """
exec 9<"$1/nr_hugepages"
flock 9
before=$(cat "$1/nr_hugepages")
trap 'echo "$before" >"$1/nr_hugepages"' EXIT
echo $((before + $2)) >"$1/nr_hugepages"
test "$(cat "$1/nr_hugepages")" -eq $((before + $2))
"""
_NETNS_SCRIPT = """
mount -t tmpfs none /run
ip netns add probe
ip -n probe link add name left type veth peer name right
"""
ZRAM_CONTROL = Path("/sys/class/zram-control")
ZRAM_SCRIPT = f"""
number=$(cat {ZRAM_CONTROL}/hot_add)
device=/dev/zram$number
give_back() {{
    swapoff "$device" || :
    for attempt in 1 2 3 4 5 6 7 8 9 10; do # udev may be looking at it
        echo "$number" >{ZRAM_CONTROL}/hot_remove && break || sleep 0.1
    done
}}
trap give_back EXIT
echo "$1" >"/sys/block/zram$number/disksize"
mkswap "$device" >&2
swapon "$device"
echo "$device"
read -r _ || :
"""
"""With a size in bytes: swap on a zram device of its own, whose name it says, until its standard input ends."""
# Threads, because ThreadSanitizer's own thread is what some address space layouts do not let start.
_SANITIZED_PROGRAM = """
#include <pthread.h>
static void *run(void *argument) { return argument; }
int main(void) { pthread_t thread; return pthread_create(&thread, 0, run, 0) || pthread_join(thread, 0); }
"""


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


def hugetlb() -> Feature:
    """HUGEPAGES_WANTED pages are free or may be reserved, and 2 MiB pages work."""
    there = huge_pages()
    pages = pool(HUGEPAGE_BYTES)
    if not there.available or pages is None:
        return Feature("hugetlb", False, there.reason, there.remedy)
    if pages.may_grow:
        return Feature("hugetlb", True, f"{pages.unreserved} free pages of 2 MiB, and this user may reserve more")
    if pages.unreserved < HUGEPAGES_WANTED:
        return Feature("hugetlb", False, *sentences.hugepages_missing(HUGEPAGES_WANTED, pages))
    return Feature("hugetlb", True, f"{pages.unreserved} free pages of 2 MiB")


def gigantic() -> Feature:
    """Two pages of 1 GiB are free, or can be had: each in one piece, so it is tried, and they are given back at once."""
    pages = pool(GIGANTIC_PAGE_BYTES)
    if pages is None:
        return Feature("gigantic", False, "this kernel has no pages of 1 GiB", "use a processor with pdpe1gb")
    if pages.unreserved < GIGANTIC_PAGES_WANTED:
        why = _try("sh", "-euc", _GIGANTIC_SCRIPT, "sh", str(pages.directory), str(GIGANTIC_PAGES_WANTED))
        if why:
            return Feature("gigantic", False, *sentences.hugepages_missing(GIGANTIC_PAGES_WANTED, pages))
    return Feature("gigantic", True, f"{GIGANTIC_PAGES_WANTED} pages of 1 GiB can be had")


def userfaultfd_restricted() -> Feature:
    """A userfaultfd for kernel-mode faults is a matter of rights here, which can be taken away and given."""
    name, value = "uffd-restricted", unprivileged_userfaultfd()
    if value != 0:
        return Feature(name, False, f"vm.unprivileged_userfaultfd is {value}", "sysctl vm.unprivileged_userfaultfd=0")
    return Feature(name, True, "vm.unprivileged_userfaultfd is 0")


def limiting_cgroups() -> Feature:
    """One child in each hierarchy that has memory, cpu or pids (one in all: version 2), made and taken away."""
    name = "cgroup"
    for controller, files in CGROUP_LIMITS.items():
        place = cgroup.top(controller)
        if place is None:
            return Feature(name, False, f"no {controller} controller is mounted", "mount -t cgroup2 none /sys/fs/cgroup")
        try:
            made = Path(tempfile.mkdtemp(prefix="postcopy-probe-", dir=place))
            limits = [file for file in files if (made / file).exists()]
            made.rmdir()  # the files in it are the kernel's and go with it
        except OSError as error:
            return Feature(name, False, str(error), "be root, with cgroups mounted for writing")
        if not limits:
            return Feature(name, False, f"{place} limits no {controller}", f"echo +{controller} > {place}/cgroup.subtree_control")
    return Feature(name, True, f"cgroups with limits of {', '.join(CGROUP_LIMITS)} can be made")


def netns() -> Feature:
    # A mount namespace of its own: /run/netns/probe and the namespace end with it.
    why = _try("unshare", "--mount", "--propagation", "private", "sh", "-euc", _NETNS_SCRIPT)
    if why:
        remedy = "be root with CAP_SYS_ADMIN and CAP_NET_ADMIN, on a kernel with veth, and install iproute2"
        return Feature("netns", False, why, remedy)
    return Feature("netns", True, "network namespaces with veth pairs can be made")


def timens() -> Feature:
    why = _try("unshare", "--time", "--fork", "--monotonic", "60", "true")
    if why:
        return Feature("timens", False, why, "be root with CAP_SYS_ADMIN, on a kernel with CONFIG_TIME_NS")
    return Feature("timens", True, "a process can have a monotonic clock with an offset")


def zram() -> Feature:
    """Swap in compressed memory: on, off, and the device given back."""
    if not ZRAM_CONTROL.is_dir():
        return Feature("zram", False, f"no {ZRAM_CONTROL}", "modprobe zram, as root")
    why = _try("sh", "-euc", ZRAM_SCRIPT, "sh", str(16 << 20))
    if why:
        return Feature("zram", False, why, "be root with CAP_SYS_ADMIN, with devtmpfs at /dev, and install util-linux")
    return Feature("zram", True, "a zram device can be made and used as swap")


def linux_guest() -> Feature:
    """QEMU, and the image that it boots."""
    machine = qemu()
    if not machine.available:
        return Feature("linux-guest", False, machine.reason, machine.remedy)
    try:
        image = GuestImage.find()
    except HostLacksError as error:
        return Feature("linux-guest", False, error.why, error.remedy)
    return Feature("linux-guest", True, f"{image.kernel.parent} and {machine.reason}")


def root() -> Feature:
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


def sanitizer(name: str, option: str, package: str) -> Feature:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    remedy = f"install gcc or clang with its sanitizers ({package})"
    with tempfile.TemporaryDirectory(prefix="postcopy-probe-") as directory:
        program = f"{directory}/probe"
        why = _try(*compiler, f"-fsanitize={option}", "-pthread", "-x", "c", "-", "-o", program, text=_SANITIZED_PROGRAM)
        why = why or sanitizer_prefix(program)[1]
    if why:
        return Feature(name, False, why, remedy)
    return Feature(name, True, f"{compiler[0]} builds programs with it, and they run")
