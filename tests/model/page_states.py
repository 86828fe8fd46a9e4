"""Model of the page states at the destination: promises P1 (one owner), P2 (final content only), P3 (no accidental zero).

What stands for what:
  guest threads        the moved guest; the kernel's part (fault, sleep, zero-fill) as measured by the kernel tests
  fault thread         migrate/dataplane/fault.c (events, requests) and, on the same thread, the urgent connection:
                       inbox.c (header, claim), place.c (bytes into the page cache), resolve.c (CONTINUE, ZEROPAGE, WAKE)
  bulk thread          migrate/dataplane/receive.c, with the same inbox.c, place.c, resolve.c
  serve, stream        migrate/dataplane/serve.c, stream.c: one page read and sent in a step (the guest is paused, so it is whole)
  complete             migrate/dataplane/destination.c: count full -> map what is PRESENT -> unregister -> `complete`
  pause                the switchover as migrate/source.py does it; its own promises are in switchover.py
  restart              death of the destination daemon at any point and its return: connections, threads and events read are
                       gone; page states, page cache, userfaultfd stay. (Not built yet; the order of stores is there for it.)

A page's content is a number: 0 zeroes, TORN half written, others versions. ``truth`` is what the guest must read.
Every access reads and checks, every second kind also writes a new version. The only thing checked at an access is what
the guest itself can see. Each field of Guards is one rule of the algorithm; False removes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .page_world import (
    ABSENT,
    FINAL,
    MAPPED,
    PRESENT,
    RECEIVING,
    REQUESTED,
    TORN,
    ZERO,
    Job,
    Page,
    World,
    uffdio_continue,
    uffdio_zeropage,
    unregister,
    wake,
    with_job,
    with_page,
    with_thread,
)

Step = tuple[str, World]


@dataclass(frozen=True)
class Guards:
    claim: bool = True  # bytes are written only after ABSENT|REQUESTED -> RECEIVING by compare-and-swap; else dropped
    present_after_bytes: bool = True  # PRESENT is stored when the last byte is in the page cache
    present_before_continue: bool = True  # ... and before CONTINUE, so that a restart never takes a mapped page for absent
    wanted: bool = True  # a fault that finds RECEIVING or sends the request sets WANTED; whoever ends RECEIVING looks
    wake_on_eexist: bool = True  # a fill that finds the page mapped has woken nobody: wake
    gate: bool = True  # the source streams nothing before its guest is paused
    missing_registered: bool = True  # MISSING together with MINOR: a hole raises an event, no zeroes
    count_before_unregister: bool = True  # unregister only when every page is final
    guest_keeps_duplicate: bool = True  # the guest's own descriptor keeps the userfaultfd alive when the daemon dies
    receiving_restarts_absent: bool = True  # after a restart RECEIVING is ABSENT: nobody knows how much was written
    wake_all_on_restart: bool = True  # events that were read and lost: their threads are woken and fault again


@dataclass(frozen=True)
class Size:
    pages: int
    guest_threads: int
    accesses: int
    restarts: int
    endless: bool = False
    """The rest of the memory is never whole: no `complete` comes to the rescue of a thread that nobody wakes."""
    bulk: bool = True
    """False: nothing is streamed, every page must come by its fault."""


def initial(size: Size) -> list[World]:
    """With one page: a page of zeroes or not. With two: one of each."""

    def world(contents: tuple[int, ...]) -> World:
        pages = tuple(Page(ABSENT, False, None, False, value, value, False) for value in contents)
        threads = (None,) * size.guest_threads
        return World(pages, threads, size.accesses, False, (), (), (), None, None, True, size.restarts, None)

    return [world((0,)), world((1,))] if size.pages == 1 else [world((0, 1))]


def invariant(world: World) -> str | None:
    return world.broken


class Model:
    def __init__(self, size: Size, guards: Guards) -> None:
        self.size, self.guards = size, guards
        order = ["half", "whole", "store", "continue", "mark"]
        if not guards.present_after_bytes:
            order = ["half", "store", "whole", "continue", "mark"]
        if not guards.present_before_continue:
            order = ["half", "whole", "continue", "store", "mark"]
        self._next: dict[str, str | None] = dict(zip(order, [*order[1:], None], strict=True))
        self._first = order[0]

    def done(self, world: World) -> bool:
        """The guest has done all that it wanted to and, unless there is no end, the memory is its own again."""
        return world.accesses == 0 and not any(world.threads) and world.registered == self.size.endless

    def end(self, world: World) -> str | None:
        return None if self.done(world) else "deadlock"

    def successors(self, world: World) -> Iterator[Step]:
        if not world.paused:
            yield from self._source_guest(world)
        if world.paused or not self.guards.gate:
            yield from self._stream(world)
        if world.paused:
            yield from self._serve(world)
            yield from self._guest(world)
        yield from self._destination_thread(world, "fault_thread")
        yield from self._destination_thread(world, "bulk_thread")
        yield from self._complete(world)
        if world.restarts and world.paused and world.registered:
            yield "restart of the destination daemon", self._restart(world)

    # --- source ---

    def _source_guest(self, world: World) -> Iterator[Step]:
        for p, page in enumerate(world.pages):
            if page.source != 2:
                yield f"guest writes page {p} at the source", with_page(world, p, page._replace(source=2, truth=2))
        yield "pause at the source, resume at the destination", world._replace(paused=True)

    def _stream(self, world: World) -> Iterator[Step]:
        for p, page in enumerate(world.pages):
            if self.size.bulk and not page.streamed:
                sent = world._replace(bulk=(*world.bulk, (p, page.source)))
                yield f"stream sends page {p} = {page.source}", with_page(sent, p, page._replace(streamed=True))
                return

    def _serve(self, world: World) -> Iterator[Step]:
        if world.requests:
            p, value = world.requests[0], world.pages[world.requests[0]].source
            answered = world._replace(requests=world.requests[1:], urgent=(*world.urgent, (p, value)))
            yield f"serve sends page {p} = {value}", answered

    # --- guest and kernel at the destination ---

    def _guest(self, world: World) -> Iterator[Step]:
        if not world.accesses:
            return
        for t, asleep in enumerate(world.threads):
            if asleep is not None or asleep in world.threads[:t]:  # guest threads are alike: let one running one go
                continue
            for p, page in enumerate(world.pages):
                if not page.mapped and world.registered and (page.cache is not None or self.guards.missing_registered):
                    yield f"guest faults on page {p}", with_thread(world, t, (p, True))
                    continue
                filled = page._replace(mapped=True, cache=0 if page.cache is None else page.cache)
                yield from self._access(world, p, filled)

    def _access(self, world: World, p: int, page: Page) -> Iterator[Step]:
        world = world._replace(accesses=world.accesses - 1)
        if page.cache != page.truth:
            yield f"guest reads page {p}", world._replace(broken=f"page {p} reads {page.cache}, the truth is {page.truth}")
            return
        yield f"guest reads page {p} = {page.cache}", with_page(world, p, page)
        version = max(page.truth, 2) + 1
        yield f"guest writes page {p} = {version}", with_page(world, p, page._replace(cache=version, truth=version))

    # --- the two threads of the destination daemon ---

    def _destination_thread(self, world: World, name: str) -> Iterator[Step]:
        job: Job | None = getattr(world, name)
        if job is not None:
            yield from self._job(world, name, job)
            return
        urgent = name == "fault_thread"
        inbox = world.urgent if urgent else world.bulk
        if inbox:
            (p, value), rest = inbox[0], inbox[1:]
            taken = world._replace(urgent=rest) if urgent else world._replace(bulk=rest)
            yield from self._claim(taken, name, p, value)
        if urgent and world.registered:
            for t, asleep in enumerate(world.threads):
                if asleep is not None and asleep[1]:
                    read = with_thread(world, t, (asleep[0], False))
                    yield f"{name} reads the event of page {asleep[0]}", with_job(read, name, Job("event", asleep[0], 0, True))

    def _claim(self, world: World, name: str, p: int, value: int) -> Iterator[Step]:
        page = world.pages[p]
        if self.guards.claim and page.state not in (ABSENT, REQUESTED):
            yield f"{name} drops page {p} = {value}: {page.state}", world
            return
        if name == "fault_thread" and self._unasked(page):
            yield f"{name} receives page {p}", world._replace(broken=f"page-unasked: page {p} is {page.state}")
            return
        claimed = with_page(world, p, page._replace(state=RECEIVING))
        yield f"{name} claims page {p} = {value}", with_job(claimed, name, Job(self._first_step(value), p, value, False))

    def _unasked(self, page: Page) -> bool:
        """The rule by which a liar is told (COPY_ASKED in destination.c): none is honest here."""
        return page.state == ABSENT

    def _first_step(self, value: int) -> str:
        return self._first if value else "zero"

    def _job(self, world: World, name: str, job: Job) -> Iterator[Step]:
        p, page, step = job.page, world.pages[job.page], job.step
        label = f"{name} {step} page {p}"
        idle = with_job(world, name, None)
        if step == "event":
            yield from self._event(world, name, p)
        elif step == "send":
            yield label, idle._replace(requests=(*world.requests, p))
        elif step in ("half", "whole"):
            written = with_page(world, p, page._replace(cache=TORN if step == "half" else job.value))
            yield label, with_job(written, name, job._replace(step=str(self._next[step])))
        elif step == "store":
            stored = with_page(world, p, page._replace(state=PRESENT, wanted=False))
            yield label, with_job(stored, name, job._replace(step=str(self._next[step]), wake=job.wake or page.wanted))
        elif step == "continue":
            # Where nobody is known to wait the implementation may spare itself the wake: the model lets it do either.
            for dont_wake in (False,) if job.wake else (False, True):
                continued, exists = uffdio_continue(world, p, dont_wake)
                following = "wake" if exists and self.guards.wake_on_eexist else self._next.get(step)
                yield f"{label}{' DONTWAKE' if dont_wake else ''}", with_job(continued, name, job._replace(step=str(following)))
        elif step == "wake":
            following = "mark" if page.state == ZERO else self._next["continue"]
            yield label, with_job(wake(world, p), name, job._replace(step=str(following)))
        elif step == "mark":
            marked = page._replace(state=MAPPED) if page.state in (PRESENT, ZERO) else page
            yield label, with_page(idle, p, marked)
        elif step == "zero":
            zero = with_page(world, p, page._replace(state=ZERO, wanted=False))
            yield label, with_job(zero, name, Job("zeropage", p, 0, True) if page.wanted else None)
        elif step == "zeropage":
            filled, exists = uffdio_zeropage(world, p)
            yield label, with_job(filled, name, job._replace(step="wake" if exists and self.guards.wake_on_eexist else "mark"))

    def _event(self, world: World, name: str, p: int) -> Iterator[Step]:
        page, label = world.pages[p], f"{name} finds page {p} {world.pages[p].state}"
        wanted = page._replace(wanted=self.guards.wanted)
        idle = with_job(world, name, None)
        if page.state == ABSENT:
            yield label, with_job(with_page(world, p, wanted._replace(state=REQUESTED)), name, Job("send", p, 0, False))
        elif page.state in (REQUESTED, RECEIVING):
            yield label, with_page(idle, p, wanted)
        else:
            yield label, with_job(world, name, Job("zeropage" if page.state == ZERO else "continue", p, 0, True))

    def _complete(self, world: World) -> Iterator[Step]:
        counted = all(page.state in FINAL and not page.wanted for page in world.pages)
        if self.size.endless:
            return
        if world.paused and world.registered and (counted or not self.guards.count_before_unregister):
            for p, page in enumerate(world.pages):
                if page.state == PRESENT:
                    world, _ = uffdio_continue(world, p, False)
            yield "complete: map, unregister", unregister(world)

    def _restart(self, world: World) -> World:
        pages = list(world.pages)
        for p, page in enumerate(pages):
            state = page.state
            if state == RECEIVING and not self.guards.receiving_restarts_absent:
                state = PRESENT
            elif state in (REQUESTED, RECEIVING):
                state = ABSENT
            pages[p] = page._replace(state=state, wanted=False, streamed=state in FINAL)
        world = world._replace(pages=tuple(pages), requests=(), urgent=(), bulk=(), fault_thread=None, bulk_thread=None)
        world = world._replace(restarts=world.restarts - 1)
        if not self.guards.guest_keeps_duplicate:
            return unregister(world)
        for p, page in enumerate(world.pages):
            if page.state == PRESENT:
                world, _ = uffdio_continue(world, p, False)
                world = with_page(world, p, world.pages[p]._replace(state=MAPPED))
        return world._replace(threads=(None,) * len(world.threads)) if self.guards.wake_all_on_restart else world
