"""What to say when something is refused: why, in the machine's own words, and the one thing to change.

Every function returns (why, remedy). The errors of the product, ``postcopy doctor`` and the tests' requirements all take
their sentences from here. Nothing is tried here, the caller has; what is read is what the words need. Of the package only
``migrate.errors`` is imported, so that whoever raises may import this.

Who may have a userfaultfd: fs/userfaultfd.c of Linux 6.18. The device asks for nothing but the right to open it; the
system call lets everyone have user-mode faults, and kernel-mode ones with CAP_SYS_PTRACE or vm.unprivileged_userfaultfd.
"""

import errno
import shlex
from pathlib import Path

from migrate.errors import errno_text
from migrate.host.hugepages import HUGEPAGE_BYTES, Pool, size_text
from migrate.host.rights import CAP_SYS_PTRACE, Node, Rights, kernel_option

USERFAULTFD_DEVICE = "/dev/userfaultfd"
KVM_DEVICE = "/dev/kvm"
NEWER_KERNEL = "run Linux 5.14 or later, built with CONFIG_USERFAULTFD, on x86-64 or arm64"
_SANDBOX_ERRORS = (errno.EPERM, errno.ENOSYS)
_SECCOMP_REMEDY = (
    "allow the system call userfaultfd in the seccomp profile (systemd: SystemCallFilter=userfaultfd; "
    "docker: --security-opt seccomp=PROFILE; Kubernetes: securityContext.seccompProfile)"
)
_SANDBOX_REMEDY = "find what filters system calls here (gVisor, a BPF security module) and allow userfaultfd in it"
_MODULE_REMEDY = (
    "look up the denial (SELinux: ausearch -m avc -ts recent; AppArmor: journalctl -k --grep DENIED) "
    "and allow it in the policy of {module}"
)


# ---- userfaultfd ----


def userfaultfd_refused(
    device_error_number: int,
    syscall_error_number: int,
    *,
    user_mode_only: bool,
    rights: Rights | None = None,
    node: Node | None = None,
) -> tuple[str, str]:
    """Neither /dev/userfaultfd nor userfaultfd(2) gave one; errno of each, 0: not tried. None: this process's, this machine's."""
    rights = rights or Rights.here()
    node = node or rights.node(USERFAULTFD_DEVICE)
    parts = []
    if device_error_number:
        parts.append(f"{USERFAULTFD_DEVICE}: {node_refused(device_error_number, node, rights)[0]}")
    if syscall_error_number:
        parts.append(f"userfaultfd(2): {_syscall_why(syscall_error_number, user_mode_only, node, rights)}")
    parts.append(f"this process has {rights.seccomp} and {rights.security_module or 'no security module around it'}")
    return "; ".join(parts), _userfaultfd_remedy(device_error_number, syscall_error_number, user_mode_only, node, rights)


def userfaultfd_kills() -> tuple[str, str]:
    """Asking for one is the end of the process."""
    return "userfaultfd(2): killed by SIGSYS, a seccomp filter kills processes that ask for one", _SECCOMP_REMEDY


def _kernel_has_userfaultfd(node: Node, rights: Rights) -> bool:
    return node.minor >= 0 or rights.unprivileged_userfaultfd is not None or kernel_option("CONFIG_USERFAULTFD") == "y"


def _entitled(user_mode_only: bool, rights: Rights) -> bool:
    """Whether the kernel's own check lets this process have one by the system call."""
    return user_mode_only or rights.may_ptrace or rights.unprivileged_userfaultfd == 1


def _syscall_why(error_number: int, user_mode_only: bool, node: Node, rights: Rights) -> str:
    text = errno_text(error_number)
    if error_number == errno.ENOSYS:
        if _kernel_has_userfaultfd(node, rights):
            return f"{text}, though this kernel has the call: {_sandbox(rights)} answers so"
        return f"{text}, this kernel is built without CONFIG_USERFAULTFD"
    if error_number == errno.EPERM and _entitled(user_mode_only, rights):
        return f"{text}, though {_entitlement(user_mode_only, rights)}: {_sandbox(rights)} refuses it"
    if error_number == errno.EPERM:
        also = "; the seccomp filter may refuse it besides" if rights.seccomp_mode else ""
        return f"{text}, {_missing_rights(rights)}{also}"
    if error_number == errno.EACCES:
        return f"{text}, {rights.security_module or 'a security module'} refuses it"
    if error_number == errno.EINVAL and user_mode_only:
        return f"{text}, this kernel is older than 5.11"
    return text


def _sandbox(rights: Rights) -> str:
    return "the seccomp filter" if rights.seccomp_mode else "something other than seccomp (a BPF security module, a sandbox)"


def _entitlement(user_mode_only: bool, rights: Rights) -> str:
    if user_mode_only:
        return "everyone may have user-mode faults"
    return "CAP_SYS_PTRACE is effective" if rights.may_ptrace else "vm.unprivileged_userfaultfd is 1"


def _missing_rights(rights: Rights) -> str:
    sysctl = rights.unprivileged_userfaultfd
    parts = [f"vm.unprivileged_userfaultfd is {sysctl if sysctl is not None else 'not there'}"]
    if rights.capabilities.has(CAP_SYS_PTRACE):
        parts.append("CAP_SYS_PTRACE is effective in a user namespace only, which does not count")
    else:
        parts.append(rights.capabilities.lack(CAP_SYS_PTRACE))
    if rights.no_new_privs:
        parts.append("no_new_privs keeps it from being gained")
    return " and ".join(parts)


def _userfaultfd_remedy(device_error: int, syscall_error: int, user_mode_only: bool, node: Node, rights: Rights) -> str:
    if syscall_error in (errno.EMFILE, errno.ENFILE):
        return open_files_remedy()
    if not _kernel_has_userfaultfd(node, rights) or (syscall_error == errno.EINVAL and user_mode_only):
        return NEWER_KERNEL
    if syscall_error in _SANDBOX_ERRORS and _entitled(user_mode_only, rights):
        return _SECCOMP_REMEDY if rights.seccomp_mode else _SANDBOX_REMEDY
    if syscall_error == errno.EACCES:
        return _MODULE_REMEDY.format(module=rights.security_module or "the module")
    if node.minor < 0:  # before 6.1: there is no device to give
        return "sysctl vm.unprivileged_userfaultfd=1"
    return node_refused(device_error or errno.EACCES, node, rights)[1]


# ---- device nodes ----


def node_refused(error_number: int, node: Node, rights: Rights) -> tuple[str, str]:
    """Opening a device node failed."""
    text = errno_text(error_number)
    if error_number == errno.ENOENT and node.minor >= 0:
        return f"{text}, though this kernel has the device ({node.minor} in /proc/misc)", _bring_in(node, rights)
    if error_number == errno.ENOENT:
        return f"{text}, and this kernel has no such device", f"use a kernel that has {node.path}"
    if error_number == errno.EPERM:
        remedy = f"allow the device (systemd: DeviceAllow={node.path} rw; container: --device {node.path})"
        return f"{text}, the device rules of this process's cgroup refuse it", remedy
    if error_number == errno.EACCES and not node.permitted:
        identity = f"{rights.user}:{rights.group} without CAP_DAC_OVERRIDE"
        return f"{text}, the node is {node.holders} and this is {identity}", _admit(node, rights)
    if error_number == errno.EACCES and node.nodev_mount:
        return f"{text}, {node.nodev_mount} is mounted nodev", f"mount -o remount,bind,dev {shlex.quote(node.nodev_mount)}"
    if error_number == errno.EACCES:
        module = rights.security_module or "a security module"
        return f"{text}, though the node's mode allows it: {module} refuses", _MODULE_REMEDY.format(module=module)
    if error_number in (errno.ENXIO, errno.ENODEV, errno.ENOTTY):
        return f"{text}, the node is not this kernel's device of that name", f"rm {node.path}; {_bring_in(node, rights)}"
    return text, f"find out what answers {text} when {node.path} is opened"


def _bring_in(node: Node, rights: Rights) -> str:
    mode, owner = ("0600", "") if rights.uid == 0 else ("0660", f" && chgrp {rights.group} {node.path}")
    return f"mknod -m {mode} {node.path} c 10 {node.minor}{owner} (container: --device {node.path})"


def _admit(node: Node, rights: Rights) -> str:
    """By the node's group where it has one of its own, as /dev/kvm does; else by this user's."""
    if node.group != "root" and node.mode & 0o060 == 0o060:
        return f"usermod -aG {node.group} {rights.user}, and log in again"
    if node.owner == rights.user:
        return f"chmod 0600 {node.path}"
    return f"chgrp {rights.group} {node.path} && chmod 0660 {node.path}"


def kvm_refused(step: str, error_number: int, rights: Rights | None = None) -> tuple[str, str]:
    """``step``: /dev/kvm (opening it), KVM_GET_API_VERSION (another version with errno 0), KVM_CREATE_VM."""
    rights = rights or Rights.here()
    node = rights.node(KVM_DEVICE)
    if step == KVM_DEVICE and error_number == errno.ENOENT and node.minor < 0:
        return _no_kvm(error_number)
    if step == KVM_DEVICE or error_number == errno.ENOTTY:
        why, remedy = node_refused(error_number, node, rights)
        return f"{KVM_DEVICE}: {why}", remedy
    if error_number == 0:
        return f"{step}: not version 12", "use a kernel with the KVM interface of Linux 2.6.22 or later"
    return f"{step}: {errno_text(error_number)}", "end the other hypervisor that holds the processor's virtualization"


def _no_kvm(error_number: int) -> tuple[str, str]:
    flags = Path("/proc/cpuinfo").read_text().split()
    why = f"{KVM_DEVICE}: {errno_text(error_number)}, this kernel has not loaded KVM"
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in flags:
            return why, f"modprobe {module}"
    return f"{why}, and the processor shows no virtualization", "switch it on in the firmware, or allow nested virtualization"


# ---- memory and limits ----


def hugepages_missing(pages_wanted: int, pool: Pool) -> tuple[str, str]:
    """Fewer than ``pages_wanted`` pages of the pool's size are free and unreserved."""
    held = f"{pool.total} in the pool, {pool.reserved} reserved"
    why = f"pages of {size_text(pool.page_bytes)}: {pages_wanted} needed, {pool.unreserved} free ({held})"
    return why, reserve_hugepages(pages_wanted, pool)


def reserve_hugepages(pages_wanted: int, pool: Pool) -> str:
    """The command, as root, after which ``pages_wanted`` are free."""
    total = pool.total + max(pages_wanted - pool.unreserved, 0)
    if pool.page_bytes == HUGEPAGE_BYTES:
        return f"sysctl vm.nr_hugepages={total}"
    return f"echo {total} > {pool.directory}/nr_hugepages (or at boot: hugepagesz={pool.page_bytes >> 30}G hugepages={total})"


def address_space_refused(size_bytes: int, error_number: int) -> tuple[str, str]:
    """mmap of guest memory failed for a reason other than missing huge pages."""
    why = f"mapping {size_text(size_bytes)}: {errno_text(error_number)}"
    return why, "ask for less memory, or raise the limit of address space (ulimit -v unlimited) or vm.max_map_count"


def open_files_remedy(wanted: int = 4096) -> str:
    return f"ulimit -n {wanted} (systemd: LimitNOFILE={wanted})"


def runtime_directory_refused(directory: Path, *, uid: int | None = None, error_number: int = 0) -> tuple[str, str]:
    """``uid``: whose it is, where it is not ours. ``error_number``: of making it."""
    remedy = "choose another with --runtime-dir"
    if error_number:
        return f"{directory}: {errno_text(error_number)}", remedy
    return f"{directory} is a link or belongs to uid {uid}", remedy
