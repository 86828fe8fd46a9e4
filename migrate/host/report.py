"""The doctor's report: verdicts and the facts behind them. ``postcopy doctor --json`` is this model, as it stands here.

``schema_version`` rises when a field goes or changes its meaning; new fields may come without.
"""

import os
import resource
from typing import Literal

from pydantic import BaseModel, ConfigDict

from migrate import __version__
from migrate.host import cgroup, feature, hugepages, limits, sentences, transport
from migrate.host.feature import Verdict
from migrate.host.guests import SHMEM_ENABLED
from migrate.host.product import ROWS, Group, Need
from migrate.host.rights import Rights, kernel_option, read_text
from migrate.host.trial import attempt

SCHEMA_VERSION: Literal[1] = 1
CONFIG_OPTIONS = (
    "CONFIG_USERFAULTFD",
    "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
    "CONFIG_PTE_MARKER_UFFD_WP",
    "CONFIG_HUGETLBFS",
    "CONFIG_MEM_SOFT_DIRTY",
    "CONFIG_KVM",
)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Finding(_Model):
    """One feature. ``remedy``: the one thing to change, empty where nothing has to be; limited has one too."""

    id: str
    title: str
    group: Group
    need: Need
    verdict: Verdict
    reason: str
    remedy: str


class Kernel(_Model):
    """``config``: y, m or n; empty where the configuration is not to be had. ``soft_dirty``: tried, whatever that says."""

    release: str
    machine: str
    config: dict[str, str]
    soft_dirty: bool


class User(_Model):
    """Capability sets in hexadecimal, as in /proc/PID/status. ``seccomp``: 0 none, 1 strict, 2 filter."""

    uid: int
    name: str
    group: str
    capabilities_effective: str
    capabilities_permitted: str
    capabilities_bounding: str
    no_new_privs: bool
    seccomp: int
    security_module: str
    initial_user_namespace: bool


class Device(_Model):
    """``misc_minor`` -1: this kernel has no such device. ``mode`` octal. ``permitted``: by owner, group, mode and capability."""

    path: str
    exists: bool
    owner: str
    group: str
    mode: str
    permitted: bool
    misc_minor: int


class NodePages(_Model):
    node: int
    total: int
    free: int
    surplus: int


class Pages(_Model):
    """A pool of huge pages, in pages."""

    page_bytes: int
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int
    nodes: list[NodePages]


class CgroupLimit(_Model):
    """The tightest of its kind. ``value`` and ``used`` in bytes, processes or CPUs."""

    kind: Literal["memory", "processes", "cpus"]
    path: str
    value: float
    used: float


class Limits(_Model):
    """None: no limit."""

    open_files_soft: int | None
    open_files_hard: int | None
    locked_bytes: int | None
    cgroup: list[CgroupLimit]


class Memory(_Model):
    total_bytes: int
    available_bytes: int
    shared_memory_bytes: int
    shared_memory_free_bytes: int
    shmem_huge_pages: str
    huge_pages: list[Pages]


class Network(_Model):
    congestion_control_default: str
    congestion_control_available: list[str]
    congestion_control_allowed: list[str]
    queueing_discipline_default: str


class Facts(_Model):
    kernel: Kernel
    user: User
    unprivileged_userfaultfd: int | None
    devices: list[Device]
    memory: Memory
    limits: Limits
    network: Network
    clock_source: str


class Report(_Model):
    """``works``: the core of the product does, process guests can be moved; the exit status says the same."""

    schema_version: Literal[1]
    postcopy: str
    works: bool
    features: list[Finding]
    facts: Facts


def report() -> Report:
    """Probe everything."""
    findings = []
    for row in ROWS:
        found = feature(row.name)
        findings.append(
            Finding(
                id=row.name,
                title=row.title,
                group=row.group,
                need=row.need,
                verdict=found.verdict,
                reason=found.reason,
                remedy=found.remedy,
            )
        )
    return Report(
        schema_version=SCHEMA_VERSION,
        postcopy=__version__,
        works=all(one.verdict != "no" for one in findings if one.need == "core"),
        features=findings,
        facts=facts(),
    )


def facts() -> Facts:
    rights = Rights.here()
    system = os.uname()
    return Facts(
        kernel=Kernel(
            release=system.release,
            machine=system.machine,
            config={name: kernel_option(name) for name in CONFIG_OPTIONS},
            soft_dirty=attempt("soft-dirty").works,
        ),
        user=_user(rights),
        unprivileged_userfaultfd=rights.unprivileged_userfaultfd,
        devices=[_device(rights, path) for path in (sentences.USERFAULTFD_DEVICE, sentences.KVM_DEVICE)],
        memory=_memory(),
        limits=_limits(),
        network=Network(
            congestion_control_default=transport.default(),
            congestion_control_available=transport.available(),
            congestion_control_allowed=transport.allowed(),
            queueing_discipline_default=transport.queueing_discipline(),
        ),
        clock_source=read_text(limits.CLOCK_SOURCE),
    )


def _user(rights: Rights) -> User:
    held = rights.capabilities
    return User(
        uid=rights.uid,
        name=rights.user,
        group=rights.group,
        capabilities_effective=f"{held.effective:016x}",
        capabilities_permitted=f"{held.permitted:016x}",
        capabilities_bounding=f"{held.bounding:016x}",
        no_new_privs=rights.no_new_privs,
        seccomp=rights.seccomp_mode,
        security_module=rights.security_module,
        initial_user_namespace=rights.initial_user_namespace,
    )


def _device(rights: Rights, path: str) -> Device:
    node = rights.node(path)
    return Device(
        path=path,
        exists=node.exists,
        owner=node.owner,
        group=node.group,
        mode=f"{node.mode:04o}",
        permitted=node.permitted,
        misc_minor=node.minor,
    )


def _memory() -> Memory:
    shared = os.statvfs(limits.SHARED_MEMORY) if limits.SHARED_MEMORY.is_dir() else None
    return Memory(
        total_bytes=limits.meminfo("MemTotal"),
        available_bytes=limits.meminfo("MemAvailable"),
        shared_memory_bytes=shared.f_blocks * shared.f_frsize if shared else 0,
        shared_memory_free_bytes=shared.f_bavail * shared.f_frsize if shared else 0,
        shmem_huge_pages=read_text(SHMEM_ENABLED).partition("[")[2].partition("]")[0],
        huge_pages=[
            Pages(
                page_bytes=pool.page_bytes,
                total=pool.total,
                free=pool.free,
                reserved=pool.reserved,
                surplus=pool.surplus,
                overcommit=pool.overcommit,
                nodes=[NodePages(node=node, total=n.total, free=n.free, surplus=n.surplus) for node, n in pool.nodes.items()],
            )
            for pool in hugepages.pools().values()
        ],
    )


def _limits() -> Limits:
    soft, hard = (_finite(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    found: list[CgroupLimit] = []
    kinds: tuple[tuple[Literal["memory", "processes", "cpus"], list[cgroup.Limit]], ...] = (
        ("memory", cgroup.memory()),
        ("processes", cgroup.processes()),
        ("cpus", cgroup.cpus()),
    )
    for kind, tightest in kinds:
        found += [CgroupLimit(kind=kind, path=str(one.path), value=one.value, used=one.used) for one in tightest[:1]]
    return Limits(
        open_files_soft=soft,
        open_files_hard=hard,
        locked_bytes=_finite(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        cgroup=found,
    )


def _finite(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value
