"""Refusals that cannot be brought about here without another kernel, a security module or a container: their sentences alone."""

import dataclasses
import errno
from pathlib import Path
from typing import NamedTuple

import pytest

from migrate.host import sentences
from migrate.host.hugepages import Pool
from migrate.host.rights import CAP_SYS_PTRACE, Capabilities, Node, Rights
from migrate.host.sentences import NEWER_KERNEL, kvm_refused, userfaultfd_refused

USER = Rights(
    uid=1000,
    user="vmm",
    group="vmms",
    groups=frozenset({1000}),
    capabilities=Capabilities(effective=0, permitted=0, bounding=0),
    no_new_privs=False,
    seccomp_mode=0,
    initial_user_namespace=True,
    security_module="",
    unprivileged_userfaultfd=0,
)
PTRACE = dataclasses.replace(USER, capabilities=Capabilities(1 << CAP_SYS_PTRACE, 1 << CAP_SYS_PTRACE, 1 << CAP_SYS_PTRACE))
PERMITTED = dataclasses.replace(USER, capabilities=Capabilities(0, 1 << CAP_SYS_PTRACE, 1 << CAP_SYS_PTRACE))
CONTAINER_ROOT = dataclasses.replace(PTRACE, initial_user_namespace=False)
SELINUX = "SELinux enforcing, domain system_u:system_r:container_t:s0"
CONFINED = dataclasses.replace(USER, security_module=SELINUX)
FILTERED = dataclasses.replace(USER, unprivileged_userfaultfd=1, seccomp_mode=2)
NODE = Node("/dev/userfaultfd", 126, exists=True, owner="root", group="root", mode=0o600)
OPEN_NODE = dataclasses.replace(NODE, mode=0o666, permitted=True)
NO_NODE = Node("/dev/userfaultfd", 126)
NO_DEVICE = Node("/dev/userfaultfd", -1)
ADMIT = "chgrp vmms /dev/userfaultfd && chmod 0660 /dev/userfaultfd"
POLICY = (
    "look up the denial (SELinux: ausearch -m avc -ts recent; AppArmor: journalctl -k --grep DENIED) "
    f"and allow it in the policy of {SELINUX}"
)


class Asked(NamedTuple):
    """Arguments of userfaultfd_refused."""

    device_error_number: int
    syscall_error_number: int
    user_mode_only: bool
    rights: Rights
    node: Node


REFUSALS = {
    "nothing at all": (
        Asked(errno.EACCES, errno.EPERM, False, USER, NODE),
        "root:root 0600 and this is vmm:vmms without CAP_DAC_OVERRIDE; userfaultfd(2): EPERM (Operation not permitted), "
        "vm.unprivileged_userfaultfd is 0 and CAP_SYS_PTRACE is missing, in the bounding set too",
        ADMIT,
    ),
    "capability not raised": (
        Asked(errno.EACCES, errno.EPERM, False, PERMITTED, NODE),
        "CAP_SYS_PTRACE is permitted but not effective",
        ADMIT,
    ),
    "capability in a user namespace": (
        Asked(errno.EACCES, errno.EPERM, False, CONTAINER_ROOT, NODE),
        "CAP_SYS_PTRACE is effective in a user namespace only, which does not count",
        ADMIT,
    ),
    "device rules of a cgroup": (
        Asked(errno.EPERM, errno.EPERM, False, USER, OPEN_NODE),
        "/dev/userfaultfd: EPERM (Operation not permitted), the device rules of this process's cgroup refuse it",
        "allow the device (systemd: DeviceAllow=/dev/userfaultfd rw; container: --device /dev/userfaultfd)",
    ),
    "security module at the device": (
        Asked(errno.EACCES, errno.EPERM, False, CONFINED, OPEN_NODE),
        f"though the node's mode allows it: {SELINUX} refuses",
        POLICY,
    ),
    "security module at the system call": (
        Asked(errno.ENOENT, errno.EACCES, True, CONFINED, NO_NODE),
        f"userfaultfd(2): EACCES (Permission denied), {SELINUX} refuses it",
        POLICY,
    ),
    "sysctl allows it and seccomp does not": (
        Asked(errno.ENOENT, errno.EPERM, False, FILTERED, NO_DEVICE),
        "though vm.unprivileged_userfaultfd is 1: the seccomp filter refuses it",
        "allow the system call userfaultfd in the seccomp profile",
    ),
    "capability allows it and something does not": (
        Asked(errno.ENOENT, errno.EPERM, False, PTRACE, NO_DEVICE),
        "though CAP_SYS_PTRACE is effective: something other than seccomp",
        "find what filters system calls here (gVisor, a BPF security module) and allow userfaultfd in it",
    ),
    "kernel without the device": (
        Asked(errno.ENOENT, errno.EPERM, False, USER, NO_DEVICE),
        "/dev/userfaultfd: ENOENT (No such file or directory), and this kernel has no such device",
        "sysctl vm.unprivileged_userfaultfd=1",
    ),
    "kernel before 5.11": (
        Asked(errno.ENOENT, errno.EINVAL, True, USER, NO_DEVICE),
        "EINVAL (Invalid argument), this kernel is older than 5.11",
        NEWER_KERNEL,
    ),
    "too many open files": (
        Asked(errno.EMFILE, errno.EMFILE, True, USER, OPEN_NODE),
        "EMFILE (Too many open files)",
        "ulimit -n 4096 (systemd: LimitNOFILE=4096)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_userfaultfd(name: str) -> None:
    asked, words, remedy = REFUSALS[name]
    why, change = userfaultfd_refused(**asked._asdict())
    assert words in why
    assert change.startswith(remedy)


def test_kernel_without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "kernel_option", lambda name: "n")
    rights = dataclasses.replace(USER, unprivileged_userfaultfd=None)
    why, remedy = userfaultfd_refused(errno.ENOENT, errno.ENOSYS, user_mode_only=True, rights=rights, node=NO_DEVICE)
    assert "this kernel is built without CONFIG_USERFAULTFD" in why
    assert remedy == NEWER_KERNEL


def test_seccomp_is_named_wherever_there_is_one() -> None:
    confined = dataclasses.replace(USER, seccomp_mode=2, no_new_privs=True)
    why, remedy = userfaultfd_refused(errno.EACCES, errno.EPERM, user_mode_only=False, rights=confined, node=NODE)
    assert "the seccomp filter may refuse it besides" in why
    assert "no_new_privs keeps it from being gained" in why
    assert why.endswith("this process has a seccomp filter and no security module around it")
    assert remedy == ADMIT


@pytest.mark.parametrize(
    ("step", "error_number", "words"),
    [
        ("KVM_GET_API_VERSION", 0, "KVM_GET_API_VERSION: not version 12"),
        ("KVM_CREATE_VM", errno.EBUSY, "KVM_CREATE_VM: EBUSY (Device or resource busy)"),
    ],
)
def test_kvm(step: str, error_number: int, words: str) -> None:
    why, remedy = kvm_refused(step, error_number, USER)
    assert why == words
    assert remedy


def test_huge_pages_count_what_is_promised_and_what_may_be_made() -> None:
    pool = Pool(2 << 20, Path("/nowhere"), total=100, free=60, reserved=20, surplus=2, overcommit=7)
    assert pool.unreserved == 45
    why, remedy = sentences.hugepages_missing(64, pool)
    assert why == "pages of 2 MiB: 64 needed, 45 free (100 in the pool, 20 reserved)"
    assert remedy == "sysctl vm.nr_hugepages=119"
    gigantic = dataclasses.replace(pool, page_bytes=1 << 30)
    assert "hugepagesz=1G hugepages=119" in sentences.hugepages_missing(64, gigantic)[1]
