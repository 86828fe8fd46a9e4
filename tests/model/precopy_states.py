"""Model of the page states with precopy before the switchover, and of what an attempt that fails leaves behind: P1, P2, P3.

What stands for what, beside what page_states.py names, on which this builds (its steps go on once the guest is resumed):
  source's guest     writes until it is paused: a new version, or zeroes over what was there
  precopy thread     migrate/dataplane/precopy.c, driven by migrate/rounds.py: arm, then rounds of send and collect, then the mark
  stream thread      settle.c, stream.c: after the pause the final scan, the stale set, LACKS taken, then what is lacking
  bulk thread        receive.c with inbox.c's phases; precopied.c: hold, judge, LACKS, map ahead
  fault thread       fault.c: it runs before the guest does, as a waiting guest's threads may touch its memory (a machine that
                     loads its state): such a touch sleeps until the content is final
  attempt fails      any failure or cancel before the pause, or a refused resume behind it: connections end, loops finish what
                     they are at; precopied.c cleans (destination_clean), migrate/destination.py offers the guest again
  daemon dies        before the guest has been resumed (or only the agent's socket ends): the waiting guest attaches again, and
                     nobody remembers what is in its memory
  another guest      comes into the same memory and userfaultfd, without precopy: no byte of the first one may be seen

Steps are as fine as what races. What one thread does with nobody else in it is one step (the arming of all pages, a scan, a
page's pending mark taken and the page read): a write of the guest's is before or behind it. A torn read of a page that is
written meanwhile is no step of its own: the page has been written since it was armed, so it is stale whatever was sent.

Left out: discards (the code has none); more than one bulk connection (nor these). The destination daemon's death *after* the
resumption, which leaves the migration STALLED today: page_states.py explores the return, and only there does it show that
PRESENT is stored before CONTINUE. The union of modes is the waiting guest's MISSING | MINOR (``missing_registered``). The
source's registration for tracking is WP alone and needs no more: it is another userfaultfd, made when that guest is whole and
the first one unregistered (memory belongs to one userfaultfd at a time), so that no fault of its guest waits for a page.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .page_states import Guards, Model, Size, Step
from .page_world import (
    ABSENT,
    HELD,
    HELD_ZERO,
    PRESENT,
    RECEIVING,
    REQUESTED,
    ZERO,
    Job,
    Page,
    Precopy,
    World,
    with_job,
    with_page,
)

MARK = (-1, 0)  # the frame on the bulk connection behind which nothing is precopied
JUDGED = {f"stores {state} to": state for state in (ABSENT, PRESENT, ZERO)}


@dataclass(frozen=True)
class PrecopyGuards(Guards):
    arm_before_read: bool = True  # a page is armed before it is read: a write behind that is found by the next scan
    quiesced: bool = True  # the guest is paused only when the mark has come: no precopied copy is in flight
    scan_after_pause: bool = True  # the final scan is behind the pause
    judge_compares: bool = True  # the stale set changes HELD and HELD_ZERO by compare-and-swap, and no other state
    held_asks: bool = True  # a fault on a held page asks the source, it does not map
    clear_old: bool = True  # old bytes go from the file before HELD_ZERO or ZERO is stored
    wanted_outlives_hold: bool = True  # a fault that came while a precopied page was being placed asks when it is HELD
    clean: bool = True  # what was precopied goes from the memory before it is offered to another guest
    clean_urgent: bool = True  # and what came as urgent (or was mapped as zero) before the resume was refused
    wake_when_offered: bool = True  # threads that still sleep fault again: nobody knows of the events that were read
    clean_at_attach: bool = True  # a daemon that knows nothing of a waiting guest's memory empties all of it


@dataclass(frozen=True)
class PrecopySize(Size):
    restarts: int = 0
    rounds: int = 2
    writes: int = 2
    """By the source's guest, before it is paused."""
    failures: bool = False
    """The first attempt may come to nothing at any moment before the guest is resumed, and another guest follows."""
    early: bool = True
    """Threads of the waiting guest touch its memory before it is resumed."""


def initial(size: PrecopySize) -> list[World]:
    def world(contents: tuple[int, ...]) -> World:
        pages = tuple(Page(ABSENT, False, None, False, value, value, False) for value in contents)
        precopy = Precopy(size.rounds - 1, size.writes)
        return World(pages, (None,) * size.guest_threads, size.accesses, False, (), (), (), None, None, True, 0, None, precopy)

    return [world((0,)), world((1,))] if size.pages == 1 else [world((0, 1))]


def _now(world: World) -> Precopy:
    assert world.precopy is not None
    return world.precopy


def _with(world: World, **fields: object) -> World:
    return world._replace(precopy=_now(world)._replace(**fields))  # type: ignore[arg-type]


class PrecopyModel(Model):
    def __init__(self, size: PrecopySize, guards: PrecopyGuards) -> None:
        super().__init__(size, guards)
        self.size: PrecopySize = size
        self.guards: PrecopyGuards = guards

    def done(self, world: World) -> bool:
        return super().done(world) and (world.precopy is None or world.precopy.running)

    def successors(self, world: World) -> Iterator[Step]:
        precopy = world.precopy
        if precopy is None:
            yield from super().successors(world)
            return
        yield from self._destination_thread(world, "fault_thread")
        yield from self._destination_thread(world, "bulk_thread")
        if precopy.ended:
            yield from self._clean(world)
            return
        if not world.paused:
            yield from self._source_guest(world)
            yield from self._precopy_thread(world, precopy)
        else:
            yield from self._stream_thread(world, precopy)
        if world.paused or not self.guards.gate:
            yield from self._serve(world)
        if precopy.running or self.size.early:
            yield from self._guest(world)
        if precopy.running:
            yield from self._complete(world)
        else:
            yield from self._not_running_yet(world)

    # --- source: the guest, the rounds ---

    def _source_guest(self, world: World) -> Iterator[Step]:
        precopy = _now(world)
        if precopy.writes:
            for p, page in enumerate(world.pages):
                for version in {0, 2} - {page.source}:
                    dirty = with_page(world, p, page._replace(source=version, truth=version, written=True))
                    yield f"guest writes page {p} = {version} at the source", _with(dirty, writes=precopy.writes - 1)
        if precopy.source == "quiet" and (precopy.inbox == "marked" or not self.guards.quiesced):
            following = "scan" if self.guards.scan_after_pause else "settle"
            yield "pause at the source", _with(world._replace(paused=True), source=following)

    def _precopy_thread(self, world: World, precopy: Precopy) -> Iterator[Step]:
        step, p = precopy.source, precopy.at
        if step == "arm":
            armed = [page._replace(written=page.written and not self.guards.arm_before_read) for page in world.pages]
            yield "arm all pages", _with(world._replace(pages=tuple(armed)), source="send")
        elif step == "send":
            while p < len(world.pages) and not world.pages[p].pending:
                p += 1
            if p == len(world.pages):
                yield "round ends", _with(world, at=0, rounds=precopy.rounds - 1, source="collect" if precopy.rounds else "mark")
                return
            page = world.pages[p]
            read = with_page(world, p, page._replace(pending=False))._replace(bulk=(*world.bulk, (p, page.source)))
            following = "send" if self.guards.arm_before_read else "arm late"
            yield f"precopy sends page {p} = {page.source}", _with(read, source=following, at=p)
        elif step == "arm late":
            armed_late = with_page(world, p, world.pages[p]._replace(written=False))
            yield f"arm page {p}, behind its read", _with(armed_late, source="send")
        elif step == "collect":
            yield "collect: arm what was written, the next round", _with(self._collected(world), source="send")
        elif step == "mark":
            if not self.guards.scan_after_pause:
                world = self._collected(world)
                world = _with(world, verdict=tuple(page.pending for page in world.pages))
            marked = world._replace(bulk=(*world.bulk, MARK)) if self.guards.quiesced else world
            yield "mark", _with(marked, source="quiet")

    def _collected(self, world: World) -> World:
        """dirty_collect: each page that was written becomes pending and is armed, in one step of the kernel's (PAGEMAP_SCAN)."""
        keep = not self.guards.arm_before_read
        pages = [page._replace(pending=page.pending or page.written, written=page.written and keep) for page in world.pages]
        return world._replace(pages=tuple(pages))

    def _stream_thread(self, world: World, precopy: Precopy) -> Iterator[Step]:
        if precopy.source == "scan":
            stale = tuple(page.pending or page.written for page in world.pages)
            yield f"final scan: stale {stale}", _with(world, source="settle", verdict=stale)
        elif precopy.source == "settle" and precopy.inbox in ("ahead", "final"):
            assert precopy.verdict is not None
            lacking = zip(world.pages, precopy.verdict, strict=True)
            pages = tuple(page._replace(streamed=not lacks) for page, lacks in lacking)
            yield "source takes LACKS", _with(world._replace(pages=pages), source="stream", verdict=None)
        elif precopy.source == "stream":
            yield from self._stream(world)

    # --- what may happen until the guest runs at the destination ---

    def _not_running_yet(self, world: World) -> Iterator[Step]:
        if world.paused:
            yield "resume at the destination: running", _with(world, running=True)
        if self.size.failures:
            ended = _with(world._replace(requests=(), urgent=(), bulk=()), ended=True, verdict=None)
            yield ("resume refused" if world.paused else "attempt fails"), ended
            dead = world._replace(fault_thread=None, bulk_thread=None)
            empty = self.guards.clean_at_attach
            yield from self._another_guest(dead, "daemon dies, guest attaches", lambda page: empty)

    def _clean(self, world: World) -> Iterator[Step]:
        if world.fault_thread is None and world.bulk_thread is None:
            yield from self._another_guest(world, "clean", lambda page: self.guards.clean and page.in_file)

    def _another_guest(self, world: World, label: str, emptied: Callable[[Page], bool]) -> Iterator[Step]:
        """Its source's guest is paused already. The page states are those of a new migration."""
        threads = (None,) * len(world.threads) if self.guards.wake_when_offered else world.threads
        world = world._replace(threads=threads, paused=True, precopy=None, requests=(), urgent=(), bulk=())
        for contents in ((0,), (11,)) if len(world.pages) == 1 else ((11, 0),):
            pages = []
            for page, value in zip(world.pages, contents, strict=True):
                cache, mapped = (None, False) if emptied(page) else (page.cache, page.mapped)
                pages.append(Page(ABSENT, False, cache, mapped, value, value, False))
            yield f"{label}; another guest comes: {contents}", world._replace(pages=tuple(pages))

    # --- destination ---

    def _access(self, world: World, p: int, page: Page) -> Iterator[Step]:
        if world.precopy is None or world.precopy.running:
            yield from super()._access(world, p, page)
        elif not world.paused:
            yield f"guest reads page {p}", world._replace(broken=f"page {p} is mapped before the source has paused")
        else:  # loading its state: it only reads
            yield from list(super()._access(world, p, page))[:1]

    def _destination_thread(self, world: World, name: str) -> Iterator[Step]:
        precopy = world.precopy
        if name == "fault_thread" or precopy is None or precopy.ended or world.bulk_thread is not None:
            yield from super()._destination_thread(world, name)
        elif precopy.inbox == "precopy" and world.bulk and world.bulk[0] == MARK:
            yield "bulk thread: the mark has come", _with(world._replace(bulk=world.bulk[1:]), inbox="marked")
        elif precopy.running and precopy.inbox in ("precopy", "marked"):  # precopy: only where no mark is waited for
            yield from self._judge(world, precopy)
        elif precopy.inbox == "ahead":
            yield from self._map_ahead(world, precopy)
        elif precopy.inbox != "marked":
            yield from super()._destination_thread(world, name)

    def _claim(self, world: World, name: str, p: int, value: int) -> Iterator[Step]:
        precopy = world.precopy
        if name == "bulk_thread" and precopy is not None and precopy.inbox == "precopy":
            yield from self._claim_precopy(world, p, value)
        else:
            yield from super()._claim(world, name, p, value)

    def _claim_precopy(self, world: World, p: int, value: int) -> Iterator[Step]:
        """page_claim_precopy: exactly these states, and nobody waiting."""
        page = world.pages[p]
        if page.state not in (ABSENT, HELD, HELD_ZERO):
            yield f"bulk_thread drops precopied page {p} = {value}: {page.state}", world
            return
        claimed = with_page(world, p, page._replace(state=RECEIVING, in_file=page.in_file or value != 0))
        step = "place" if value else "clear held"
        yield f"bulk_thread claims precopied page {p} = {value}", with_job(claimed, "bulk_thread", Job(step, p, value, True))

    def _unasked(self, page: Page) -> bool:
        return False  # the rule of the code goes by what was asked for, not by the state: let the damage itself show

    def _first_step(self, value: int) -> str:
        return super()._first_step(value) if value else "clear"

    def _job(self, world: World, name: str, job: Job) -> Iterator[Step]:
        p, page, step = job.page, world.pages[job.page], job.step
        label = f"{name} {step} page {p}"
        if step == "place":
            yield label, with_job(with_page(world, p, page._replace(cache=job.value)), name, job._replace(step="hold"))
        elif step in ("clear held", "clear"):  # destination_clear_old
            if page.in_file and self.guards.clear_old:
                page = page._replace(cache=None, mapped=False)
            following = "hold" if step == "clear held" else "zero"
            yield label, with_job(with_page(world, p, page), name, job._replace(step=following))
        elif step == "hold":
            idle = with_job(world, name, None)
            if page.wanted and self.guards.wanted_outlives_hold:
                asked = with_job(world, name, Job("send", p, 0, False))
                yield f"{label}, wanted: asks", with_page(asked, p, page._replace(state=REQUESTED))
            else:
                state = HELD if job.value else HELD_ZERO
                yield label, with_page(idle, p, page._replace(state=state, wanted=False))
        elif step in JUDGED:  # only without judge_compares: what the page has become meanwhile does not count
            stored = with_page(world, p, page._replace(state=JUDGED[step], wanted=False))
            yield label, with_job(stored, name, None)
        else:
            if step in ("half", "zeropage") and self.guards.clean_urgent:  # before it is there, as for what is precopied
                world = with_page(world, p, page._replace(in_file=True))
            yield from super()._job(world, name, job)

    def _event(self, world: World, name: str, p: int) -> Iterator[Step]:
        page = world.pages[p]
        if page.state not in (HELD, HELD_ZERO):
            yield from super()._event(world, name, p)
            return
        label = f"{name} finds page {p} {page.state}"
        if self.guards.held_asks:
            asked = with_page(world, p, page._replace(state=REQUESTED, wanted=True))
            yield label, with_job(asked, name, Job("send", p, 0, False))
        else:
            yield label, with_job(world, name, Job("zeropage" if page.state == HELD_ZERO else "continue", p, 0, True))

    # --- destination: the stale set, what is lacking, what is mapped ahead ---

    def _judge(self, world: World, precopy: Precopy) -> Iterator[Step]:
        p, stale = precopy.judged, precopy.verdict
        if stale is None:
            return
        if p == len(world.pages):
            lacks = tuple(page.state == ABSENT for page in world.pages)
            yield f"bulk_thread sends LACKS {lacks}", _with(world, inbox="ahead", judged=0, verdict=lacks)
            return
        page, following = world.pages[p], _with(world, judged=p + 1)
        label = f"bulk_thread judges page {p} {page.state}, {'stale' if stale[p] else 'final'}"
        if page.state not in (HELD, HELD_ZERO):
            yield f"{label}: not held", following
            return
        state = ABSENT if stale[p] else PRESENT if page.state == HELD else ZERO
        if self.guards.judge_compares:
            yield label, with_page(following, p, page._replace(state=state))
        else:
            yield f"{label}: looks", with_job(following, "bulk_thread", Job(f"stores {state} to", p, 0, True))

    def _map_ahead(self, world: World, precopy: Precopy) -> Iterator[Step]:
        p = precopy.judged
        if p == len(world.pages):
            yield "bulk_thread has mapped ahead", _with(world, inbox="final")
            return
        following = _with(world, judged=p + 1)
        if world.pages[p].state == PRESENT:
            following = with_job(following, "bulk_thread", Job("continue", p, 0, True))
        yield f"bulk_thread comes to page {p} {world.pages[p].state}, mapping ahead", following
