"""The features that ``postcopy doctor`` tells of, in its order, and what each is for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from migrate.host import guests, limits, transport
from migrate.host.feature import Feature

Group = Literal["guests", "transport", "limits", "later"]
Need = Literal["core", "used", "later"]


@dataclass(frozen=True, slots=True)
class Row:
    """``need``: core (nothing moves without it), used (some guests or settings need it), later (nothing uses it yet)."""

    name: str
    title: str
    group: Group
    need: Need
    probe: Callable[[], Feature]


ROWS = (
    Row("uffd", "process guests, 4 KiB pages", "guests", "core", guests.userfaultfd),
    Row("uffd-kernel", "faults in the kernel (KVM, read)", "guests", "used", guests.kernel_mode_faults),
    Row("kvm", "KVM guests", "guests", "used", guests.kvm),
    Row("qemu", "QEMU guests", "guests", "used", guests.qemu),
    Row("hugetlb-2m", "2 MiB pages", "guests", "used", guests.huge_pages),
    Row("hugetlb-1g", "1 GiB pages", "guests", "used", guests.gigantic_pages),
    Row("dirty-tracking", "precopy: written pages told", "guests", "used", guests.dirty_tracking),
    Row("poison", "lost pages as SIGBUS", "guests", "used", guests.poison),
    Row("shared-memory", "tmpfs memory", "guests", "used", limits.shared_memory),
    Row("page-granularity", "memory arrives in 4 KiB", "guests", "used", guests.page_granularity),
    Row("congestion-control", "congestion control", "transport", "used", transport.congestion_control),
    Row("pacing", "bulk paced below a bottleneck", "transport", "used", transport.pacing),
    Row("memory", "memory", "limits", "used", limits.memory),
    Row("open-files", "open files", "limits", "used", limits.open_files),
    Row("threads", "processes and threads", "limits", "used", limits.threads),
    Row("processors", "CPUs", "limits", "used", limits.processors),
    Row("memory-locking", "locked memory", "limits", "used", limits.memory_locking),
    Row("clock", "clock", "limits", "used", limits.clock),
    Row("runtime-directory", "runtime directory", "limits", "used", limits.runtime_directory),
    Row("move", "pages moved, not copied", "later", "later", guests.move),
)
