"""Model of discards at the destination, by REMOVE events that mean zero, on top of the page states.

The kernel, as tests/kernel/test_events.py shows it: madvise(2) raises the event and waits until it has been read; then it makes
the hole, whenever it comes to that. While the event is unread every fill is EAGAIN, and it may be until the hole is made. The
rest is migrate/dataplane/discard.c. ``truth`` becomes zero with the hole; what another thread reads meanwhile is its own affair.

What is simpler here: one discard at a time; no restart, which loses what was read and not applied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .page_states import Guards, Model, Size, Step
from .page_world import ABSENT, MAPPED, PRESENT, RECEIVING, REMOVED, REQUESTED, Job, Page, World, wake, with_job, with_page


@dataclass(frozen=True)
class DiscardGuards(Guards):
    removed_refuses: bool = True  # what is discarded before it has come is REMOVED: a late copy is dropped
    discarded_bit: bool = True  # one that is being received then is left as a hole, not published
    events_applied: bool = True  # before it leaves its claim bulk waits for the event that is being read


class DiscardModel(Model):
    def __init__(self, size: Size, guards: DiscardGuards) -> None:
        super().__init__(size, guards)
        self.discard_guards = guards
        self._next |= {"whole": "look", "look": self._next["whole"]}

    def done(self, world: World) -> bool:
        return super().done(world) and world.removing is None

    def successors(self, world: World) -> Iterator[Step]:
        yield from super().successors(world)
        if world.paused:
            yield from self._guest_discards(world)

    # --- guest and kernel ---

    def _guest_discards(self, world: World) -> Iterator[Step]:
        if world.removing is None:
            for p in range(len(world.pages)) if world.discards else ():
                calls = world._replace(discards=world.discards - 1)
                if world.registered:
                    yield f"guest discards page {p}", calls._replace(removing=(p, False))
                else:
                    yield f"guest discards page {p} at once", self._hole(calls, p)
        elif world.removing[1]:
            yield f"hole at page {world.removing[0]}", self._hole(world, world.removing[0])

    def _hole(self, world: World, p: int) -> World:
        return with_page(world, p, world.pages[p]._replace(cache=None, mapped=False, truth=0))._replace(removing=None)

    def _access(self, world: World, p: int, page: Page) -> Iterator[Step]:
        if world.removing is None or world.removing[0] != p:
            yield from super()._access(world, p, page)

    # --- the two threads of the destination daemon ---

    def _destination_thread(self, world: World, name: str) -> Iterator[Step]:
        yield from super()._destination_thread(world, name)
        if name == "fault_thread" and world.fault_thread is None and world.removing is not None and not world.removing[1]:
            p = world.removing[0]
            read = world._replace(removing=(p, True))
            yield f"{name} reads the discard of page {p}", with_job(read, name, Job("remove", p, 0, False))

    def _job(self, world: World, name: str, job: Job) -> Iterator[Step]:
        p, page = job.page, world.pages[job.page]
        label, idle = f"{name} {job.step} page {p}", with_job(world, name, None)
        if job.step == "remove":
            yield f"{label}: {page.state}", self._remove(world, name, p)
        elif job.step == "look":
            reading = name == "bulk_thread" and world.fault_thread is not None and world.fault_thread.step == "remove"
            if not reading or not self.discard_guards.events_applied:
                yield label, with_job(world, name, job._replace(step=str(self._next["look"])))
        elif job.step == "store" and page.discarded and self.discard_guards.discarded_bit:
            yield f"{label}: discarded", self._leave_removed(with_page(world, p, page._replace(cache=None)), name, p)
        elif job.step in ("continue", "zeropage"):
            if world.removing is not None:
                yield f"{label}: EAGAIN", wake(idle, p)
            if world.removing is not None and not world.removing[1]:
                return
            if job.step == "continue" and page.cache is None and not page.mapped and world.registered:
                yield f"{label}: a hole", with_job(world, name, job._replace(step="zeropage"))
            else:
                yield from super()._job(world, name, job)
        elif job.step == "mark" and page.state == REMOVED:
            yield label, with_page(idle, p, page._replace(state=MAPPED))
        else:
            yield from super()._job(world, name, job)

    def _remove(self, world: World, name: str, p: int) -> World:
        page = world.pages[p]
        if page.state == RECEIVING:
            return with_job(with_page(world, p, page._replace(discarded=True)), name, None)
        if page.state in (ABSENT, REQUESTED) and self.discard_guards.removed_refuses:
            return self._leave_removed(world, name, p)
        return with_job(world, name, None)

    def _leave_removed(self, world: World, name: str, p: int) -> World:
        page = world.pages[p]
        removed = with_page(world, p, page._replace(state=REMOVED, wanted=False, discarded=False))
        return with_job(removed, name, Job("zeropage", p, 0, True) if page.wanted else None)

    def _event(self, world: World, name: str, p: int) -> Iterator[Step]:
        if world.pages[p].state == REMOVED:
            yield f"{name} finds page {p} {REMOVED}", with_job(world, name, Job("zeropage", p, 0, True))
        else:
            yield from super()._event(world, name, p)

    def _complete(self, world: World) -> Iterator[Step]:
        """Holes need no mapping, and an event that is unread is read at the end (destination_finish)."""
        holes = tuple(
            page._replace(state=MAPPED) if page.state == PRESENT and page.cache is None else page for page in world.pages
        )
        removing = None if world.removing is None else (world.removing[0], True)
        yield from super()._complete(world._replace(pages=holes, removing=removing))
