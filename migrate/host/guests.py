"""Which guests can be moved here: userfaultfd, huge pages, KVM. Each is tried, in this process's own rights."""

import errno
import os
import shutil
from pathlib import Path

from migrate.errors import HostLacksError
from migrate.host import cgroup, hugepages, sentences
from migrate.host.feature import Feature
from migrate.host.hugepages import HUGEPAGE_BYTES, size_text
from migrate.host.rights import kernel_option, read_text
from migrate.host.trial import Outcome, attempt

GIGANTIC_PAGE_BYTES = 1 << 30
EXAMPLE_GUEST_BYTES = 1 << 30
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_SHMEM_ENABLED_MEANS = {
    "never": "memfd pages are 4 KiB",
    "advise": "memfd pages are 4 KiB unless madvise asks for more",
    "within_size": "the kernel may make 2 MiB at a time present where one page of a memfd arrives",
    "always": "the kernel may make 2 MiB at a time present where one page of a memfd arrives",
    "deny": "memfd pages are 4 KiB",
    "force": "the kernel makes 2 MiB at a time present where one page of a memfd arrives",
}


def _opens(name: str, *, user_mode_only: bool) -> Feature | None:
    """None: a userfaultfd can be opened; else the product's own error as a feature that is not there."""
    from migrate.uffd import Userfaultfd
    from migrate.uffd.postcopy import FEATURES_SHMEM

    if attempt("minor-user" if user_mode_only else "minor-kernel").forbidden:
        return Feature(name, False, *sentences.userfaultfd_kills())
    try:
        Userfaultfd.open(FEATURES_SHMEM, user_mode_only=user_mode_only).close()
    except HostLacksError as error:
        return Feature(name, False, error.why, error.remedy)
    return None


def _tried(name: str, outcome: Outcome, works: str, remedy: str, option: str = "") -> Feature:
    if outcome.works:
        return Feature(name, True, works)
    config = kernel_option(option) if option else ""
    return Feature(name, False, f"{outcome}" + (f" ({option} is {config})" if config else ""), remedy)


def userfaultfd() -> Feature:
    """The core of the product: without it nothing moves."""
    lacking = _opens("uffd", user_mode_only=True)
    works = "a fault on shared memory was resolved by UFFDIO_CONTINUE"
    return lacking or _tried("uffd", attempt("minor-user"), works, sentences.NEWER_KERNEL, "CONFIG_HAVE_ARCH_USERFAULTFD_MINOR")


def kernel_mode_faults() -> Feature:
    lacking = _opens("uffd-kernel", user_mode_only=False)
    works = "a fault inside write(2) was resolved: KVM, vhost and system calls may touch pages that have not arrived"
    return lacking or _tried("uffd-kernel", attempt("minor-kernel"), works, sentences.NEWER_KERNEL)


def huge_pages() -> Feature:
    """2 MiB. Tried where a page is free."""
    feature = _pool_feature("hugetlb-2m", HUGEPAGE_BYTES)
    pool = hugepages.pool(HUGEPAGE_BYTES)
    if pool is None or pool.unreserved == 0:
        return feature
    lacking = _opens(feature.name, user_mode_only=True)
    if lacking is not None:
        return lacking
    outcome = attempt("minor-hugetlb")
    if outcome.works or outcome == Outcome("mmap", errno.ENOMEM):  # another took the last free page meanwhile
        return feature
    return Feature(feature.name, False, str(outcome), sentences.NEWER_KERNEL)


def gigantic_pages() -> Feature:
    """1 GiB. Not tried: the kernel takes a good part of a second to clear one."""
    return _pool_feature("hugetlb-1g", GIGANTIC_PAGE_BYTES)


def _pool_feature(name: str, page_bytes: int) -> Feature:
    pool = hugepages.pool(page_bytes)
    size = size_text(page_bytes)
    if pool is None:
        return Feature(name, False, f"this kernel has no pages of {size}", f"use a kernel and processor with pages of {size}")
    if pool.unreserved == 0:
        why, remedy = sentences.hugepages_missing(max(EXAMPLE_GUEST_BYTES // page_bytes, 1), pool)
        grows = "; this user may add them" if pool.may_grow else ""
        return Feature(name, pool.may_grow, f"{why}, as for a guest of {size_text(EXAMPLE_GUEST_BYTES)}{grows}", remedy)
    for limit in cgroup.hugepages(page_bytes)[:1]:
        if limit.left < pool.unreserved * page_bytes:
            why = f"{pool.unreserved} pages of {size} are free, but {limit.path} leaves {size_text(int(limit.left))}"
            return Feature(name, limit.left >= page_bytes, why, limit.remedy)
    return Feature(name, True, f"{pool.unreserved} pages of {size} are free: {size_text(pool.unreserved * page_bytes)}")


def page_granularity() -> Feature:
    """Whether shmem comes in 4 KiB: what arrives is counted by the product itself, so this costs memory, not content."""
    text = read_text(SHMEM_ENABLED)
    chosen = text.partition("[")[2].partition("]")[0]
    if not chosen:
        return Feature("page-granularity", True, "this kernel has no transparent huge pages: memfd pages are 4 KiB")
    reason = f"shmem_enabled is {chosen}: {_SHMEM_ENABLED_MEANS.get(chosen, 'unknown to this program')}"
    coarse = chosen in ("within_size", "always", "force")
    return Feature("page-granularity", True, reason, f"echo advise > {SHMEM_ENABLED}" if coarse else "")


def kvm() -> Feature:
    outcome = attempt("kvm")
    if outcome.works:
        return Feature("kvm", True, "/dev/kvm makes virtual machines")
    return Feature("kvm", False, *sentences.kvm_refused(outcome.step, outcome.error_number))


def qemu() -> Feature:
    machine = os.uname().machine
    name = f"qemu-system-{machine}"
    path = shutil.which(name)
    if path is None:
        return Feature("qemu", False, f"no {name} in PATH", "install QEMU (Debian: qemu-system-x86, qemu-system-arm)")
    return Feature("qemu", True, path)


def dirty_tracking() -> Feature:
    works = "WP_ASYNC and PAGEMAP_SCAN named the one page that was written"
    lacking = _opens("dirty-tracking", user_mode_only=True)
    return lacking or _tried("dirty-tracking", attempt("dirty"), works, "run Linux 6.7 or later", "CONFIG_PTE_MARKER_UFFD_WP")


def poison() -> Feature:
    lacking = _opens("poison", user_mode_only=True)
    return lacking or _tried("poison", attempt("poison"), "a poisoned page gave SIGBUS", "run Linux 6.6 or later")


def move() -> Feature:
    lacking = _opens("move", user_mode_only=True)
    works = "UFFDIO_MOVE moved a private anonymous page"
    return lacking or _tried("move", attempt("move"), works, "run Linux 6.8 or later")
