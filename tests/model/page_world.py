"""What the page model is made of: pages, guest threads, threads of the daemon, connections; and the kernel's four answers.

The kernel's part is what the kernel tests show of the real one: CONTINUE of a hole is EFAULT, of a mapped page EEXIST
*without* a wake; UNREGISTER wakes everybody; a wake takes an unread event of its sleeper with it.
"""

from typing import NamedTuple

TORN = -1
ABSENT, REQUESTED, RECEIVING, PRESENT, MAPPED, ZERO = "ABSENT", "REQUESTED", "RECEIVING", "PRESENT", "MAPPED", "ZERO"
HELD, HELD_ZERO, REMOVED = "HELD", "HELD_ZERO", "REMOVED"
FINAL = (PRESENT, MAPPED, ZERO, REMOVED)


class Page(NamedTuple):
    state: str
    wanted: bool
    cache: int | None  # the page cache; None: a hole
    mapped: bool  # a page-table entry in the guest mapping
    source: int
    truth: int
    streamed: bool  # sent by the bulk stream in this epoch
    written: bool = True  # at the source, since the page was armed (uffd-wp); as it is before the first time
    pending: bool = True  # to be sent in this round of precopy; after the pause: stale
    discarded: bool = False  # while it was being received
    in_file: bool = False  # the daemon remembers that it put something into the file (COPY_IN_FILE)


class Job(NamedTuple):
    """What a thread of the destination is in the middle of; ``step`` is what it does next."""

    step: str
    page: int
    value: int
    wake: bool


class Precopy(NamedTuple):
    """An attempt that began with precopy, until it is completed or has come to nothing."""

    rounds: int  # to begin after this one
    writes: int  # that the guest may do at the source still
    source: str = "arm"  # what the source's precopy thread, then its stream thread does next
    at: int = 0  # the page at which it does it
    inbox: str = "precopy"  # the destination's bulk connection: precopy, marked, ahead, final
    judged: int = 0  # pages that the stale set, then mapping ahead has come to
    verdict: tuple[bool, ...] | None = None  # on its way: the stale set to the destination, LACKS back
    running: bool = False  # the guest has been resumed at the destination
    ended: bool = False  # the attempt has failed: the loops are being stopped


class World(NamedTuple):
    pages: tuple[Page, ...]
    threads: tuple[tuple[int, bool] | None, ...]  # asleep on (page, event not read yet), or running
    accesses: int
    paused: bool  # the source's guest is paused, the destination's runs
    requests: tuple[int, ...]
    urgent: tuple[tuple[int, int], ...]
    bulk: tuple[tuple[int, int], ...]
    fault_thread: Job | None
    bulk_thread: Job | None
    registered: bool
    restarts: int
    broken: str | None
    precopy: Precopy | None = None
    discards: int = 0  # that the guest may still do at the destination
    removing: tuple[int, bool] | None = None  # the page of a discard under way, and whether its event has been read


def with_page(world: World, p: int, page: Page) -> World:
    return world._replace(pages=(*world.pages[:p], page, *world.pages[p + 1 :]))


def with_thread(world: World, t: int, asleep: tuple[int, bool] | None) -> World:
    threads = [*world.threads[:t], asleep, *world.threads[t + 1 :]]
    return world._replace(threads=tuple(sorted(threads, key=lambda one: one or (-1, False))))


def with_job(world: World, name: str, job: Job | None) -> World:
    return world._replace(fault_thread=job) if name == "fault_thread" else world._replace(bulk_thread=job)


def wake(world: World, p: int) -> World:
    """All sleepers of a page, as the kernel does; an event of theirs that was not read is gone with them."""
    threads = [None if asleep is not None and asleep[0] == p else asleep for asleep in world.threads]
    return world._replace(threads=tuple(sorted(threads, key=lambda one: one or (-1, False))))


def unregister(world: World) -> World:
    return world._replace(registered=False, threads=(None,) * len(world.threads))


# --- the kernel ---


def uffdio_continue(world: World, p: int, dont_wake: bool) -> tuple[World, bool]:
    """UFFDIO_CONTINUE of one page; True: EEXIST, which has woken nobody."""
    page = world.pages[p]
    if not world.registered:
        return world, False  # ENOENT: everything is final, the kernel maps by itself
    if page.mapped:
        return world, True
    if page.cache is None:
        return world._replace(broken=f"CONTINUE of page {p}, a hole: EFAULT"), False
    world = with_page(world, p, page._replace(mapped=True))
    return (world if dont_wake else wake(world, p)), False


def uffdio_zeropage(world: World, p: int) -> tuple[World, bool]:
    page = world.pages[p]
    if not world.registered:
        return world, False
    if page.cache is not None:
        return world, True
    return wake(with_page(world, p, page._replace(cache=0, mapped=True)), p), False
