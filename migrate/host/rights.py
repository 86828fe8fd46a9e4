"""Who this process is and what it may: user, capabilities, seccomp, security modules, device nodes. Read, never guessed.

Sources: capabilities(7), proc_pid_status(5), user_namespaces(7). Nothing of the rest of the package is imported here.
"""

import functools
import grp
import gzip
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from migrate.host.mounts import mount_of

CAP_DAC_OVERRIDE = 1
CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
CAPABILITY_NAMES = {CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE", CAP_IPC_LOCK: "CAP_IPC_LOCK", CAP_SYS_PTRACE: "CAP_SYS_PTRACE"}
_WHOLE_ID_RANGE = 4294967295


def read_text(path: str | os.PathLike[str]) -> str:
    """Stripped; empty when it is not there or not for this user."""
    try:
        with open(path) as file:  # no Path of what may be one: each parses and interns its parts anew, a thousand a migration
            return file.read().strip("\0\n ")
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The sets as bit masks."""

    effective: int
    permitted: int
    bounding: int

    def has(self, capability: int) -> bool:
        return bool(self.effective >> capability & 1)

    def lack(self, capability: int) -> str:
        """How it is missing: what an operator would have to change differs."""
        name = CAPABILITY_NAMES[capability]
        if self.permitted >> capability & 1:
            return f"{name} is permitted but not effective"
        if self.bounding >> capability & 1:
            return f"{name} is missing"
        return f"{name} is missing, in the bounding set too"


@dataclass(frozen=True, slots=True)
class Node:
    """A device node as this user meets it. ``minor``: of the kernel's misc device of that name; -1: this kernel has none.

    ``permitted``: by owner, group, mode and capability. ``nodev_mount``: where the file system that it lies on is mounted,
    when that is mounted nodev.
    """

    path: str
    minor: int
    exists: bool = False
    owner: str = ""
    group: str = ""
    mode: int = 0
    permitted: bool = False
    nodev_mount: str = ""

    @property
    def holders(self) -> str:
        return f"{self.owner}:{self.group} {self.mode:04o}"


@dataclass(frozen=True, slots=True)
class Rights:
    """``seccomp_mode``: 0 none, 1 strict, 2 a filter. ``security_module``: the one that confines, empty for none."""

    uid: int
    user: str
    group: str
    groups: frozenset[int]
    capabilities: Capabilities
    no_new_privs: bool
    seccomp_mode: int
    initial_user_namespace: bool
    security_module: str
    unprivileged_userfaultfd: int | None

    @classmethod
    def here(cls) -> "Rights":
        """Of this process."""
        fields = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        status = {name: value.strip() for name, _, value in fields}
        return cls(
            uid=os.geteuid(),
            user=user_name(os.geteuid()),
            group=group_name(os.getegid()),
            groups=frozenset({os.getegid(), *os.getgroups()}),
            capabilities=Capabilities(*(int(status.get(name, "0"), 16) for name in ("CapEff", "CapPrm", "CapBnd"))),
            no_new_privs=status.get("NoNewPrivs") == "1",
            seccomp_mode=int(status.get("Seccomp", "0")),
            initial_user_namespace=_is_whole(read_text("/proc/self/uid_map")),
            security_module=_security_module(),
            unprivileged_userfaultfd=unprivileged_userfaultfd(),
        )

    @property
    def seccomp(self) -> str:
        return ("no seccomp filter", "seccomp in strict mode", "a seccomp filter")[min(self.seccomp_mode, 2)]

    @property
    def may_ptrace(self) -> bool:
        """As the kernel asks for it here: capable(), so a capability within a user namespace does not count."""
        return self.initial_user_namespace and self.capabilities.has(CAP_SYS_PTRACE)

    def node(self, path: str) -> Node:
        """Raises nothing: what cannot be seen is not there."""
        minor = misc_minor(os.path.basename(path))
        try:
            status = os.stat(path)
            nodev = os.statvfs(path).f_flag & os.ST_NODEV
        except OSError:
            return Node(path, minor)
        mode = stat.S_IMODE(status.st_mode)
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in self.groups else 0
        return Node(
            path=path,
            minor=minor,
            exists=True,
            owner=user_name(status.st_uid),
            group=group_name(status.st_gid),
            mode=mode,
            permitted=mode >> shift & 6 == 6 or self.capabilities.has(CAP_DAC_OVERRIDE),
            nodev_mount=str(mount_of(path).place) if nodev else "",
        )


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def misc_minor(name: str) -> int:
    """The minor number that this kernel gave its misc device, node or not; -1: it has no such device."""
    for line in read_text("/proc/misc").splitlines():
        number, _, device = line.strip().partition(" ")
        if device == name:
            return int(number)
    return -1


def unprivileged_userfaultfd() -> int | None:
    """None: this kernel has no userfaultfd, or is older than 5.2."""
    text = read_text("/proc/sys/vm/unprivileged_userfaultfd")
    return int(text) if text.isdigit() else None


@functools.cache
def kernel_option(name: str) -> str:
    """``y``, ``m``, ``n``; empty where the configuration is not to be had. Only ever to explain: what works is tried."""
    for line in _kernel_config():
        if line.startswith(f"{name}="):
            return line.partition("=")[2]
    return "n" if _kernel_config() else ""


@functools.cache
def _kernel_config() -> tuple[str, ...]:
    try:
        return tuple(gzip.decompress(Path("/proc/config.gz").read_bytes()).decode().splitlines())
    except OSError:
        return tuple(read_text(f"/boot/config-{os.uname().release}").splitlines())


def _is_whole(uid_map: str) -> bool:
    return uid_map.split() == ["0", "0", str(_WHOLE_ID_RANGE)]


def _security_module() -> str:
    enforce = read_text("/sys/fs/selinux/enforce")
    context = read_text("/proc/self/attr/current")
    if enforce:
        return f"SELinux {'enforcing' if enforce == '1' else 'permissive'}, domain {context or 'unknown'}"
    profile = read_text("/proc/self/attr/apparmor/current")
    if profile and profile != "unconfined":
        return f"AppArmor profile {profile}"
    return f"security context {context}" if context and context != "unconfined" and not profile else ""
