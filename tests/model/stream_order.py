"""Model of precopy and settling over several bulk connections: in which order the copies of a page come, and what waits for what.

What stands for what:
  source's guest     writes until it is paused: a new version
  sender s           source, connection s: its share of a round (precopy.c, partition.h), its mark, after the pause stream.c;
                     sender 0 settles (settle.c)
  receiver s         destination, connection s (receive.c, inbox.c): holds, parks behind the mark, then what is final;
                     receiver 0 takes the stale set and says what is lacking (precopied.c)
  a connection       a queue: what comes by one keeps its order, what comes by two does not

Claims, faults and what is asked for as urgent are in precopy_states.py, with one connection; here nobody touches a page, so one
that bulk does not bring is never final. The guest is resumed at the destination as soon as it is paused: the latest moment for
what has to be in place by then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MARK, STALE = (-1, 0), (-2, 0)  # frames are (page, version) else
Step = tuple[str, "World"]


class Page(NamedTuple):
    source: int = 0
    written: bool = False  # since it was armed
    pending: bool = True  # to be sent in this round; after the pause: stale
    sent: bool = False  # since the pause
    held: int | None = None  # at the destination: precopied, not judged; None: absent, or final
    final: int | None = None


class World(NamedTuple):
    pages: tuple[Page, ...]
    queues: tuple[tuple[tuple[int, int], ...], ...]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    rounds: int  # left
    writes: int  # left
    paused: bool = False
    judged: bool = False
    lacks: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Guards:
    partitioned: bool = True  # a page's copies come by one connection, in whatever round
    all_marks: bool = True  # quiesced is said when the marks of all connections have come
    source_waits: bool = True  # the other senders begin when it is known what is lacking
    destination_waits: bool = True  # the other receivers go on when the stale set has been applied


def initial(pages: int, streams: int, rounds: int, writes: int) -> World:
    empty: tuple[tuple[int, int], ...] = ()
    return World((Page(),) * pages, (empty,) * streams, ("send",) * streams, ("precopy",) * streams, rounds - 1, writes)


def invariant(world: World) -> str | None:
    for p, page in enumerate(world.pages):
        if page.final is not None and (not world.paused or page.final != page.source):
            return f"page {p} is final as {page.final}, the truth is {page.source}"
    return None


def done(world: World) -> bool:
    return all(page.final is not None for page in world.pages)


def end(world: World) -> str | None:
    return None if done(world) else "a page never becomes final"


class Model:
    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def successors(self, world: World) -> Iterator[Step]:
        if not world.paused:
            yield from self._guest(world)
            yield from self._control(world)
        for s in range(len(world.queues)):
            yield from self._sender(world, s)
            yield from self._receiver(world, s)

    # --- source ---

    def _guest(self, world: World) -> Iterator[Step]:
        for p, page in enumerate(world.pages) if world.writes else ():
            written = with_page(world, p, page._replace(source=page.source + 1, written=True))
            yield f"guest writes page {p}", written._replace(writes=world.writes - 1)

    def _control(self, world: World) -> Iterator[Step]:
        """migrate/rounds.py: the next round when this one has gone out on all connections; the pause when it is quiesced."""
        streams = len(world.queues)
        if set(world.senders) == {"sent"} and world.rounds:
            pages = [page._replace(pending=page.pending or page.written, written=False) for page in world.pages]
            collected = world._replace(pages=tuple(pages), senders=("send",) * streams, rounds=world.rounds - 1)
            yield "collect: the next round", collected
        elif set(world.senders) == {"sent"}:
            yield "rounds end", world._replace(senders=("mark",) * streams)
        parked = [receiver == "parked" for receiver in world.receivers]
        if set(world.senders) == {"quiet"} and (all(parked) if self.guards.all_marks else any(parked)):
            pages = [page._replace(pending=page.pending or page.written) for page in world.pages]
            others = "wait" if self.guards.source_waits else "stream"
            paused = world._replace(paused=True, pages=tuple(pages), senders=("settle",) + (others,) * (streams - 1))
            yield "pause; sender 0 sends the stale set", with_frame(paused, 0, STALE)

    def _sender(self, world: World, s: int) -> Iterator[Step]:
        does = world.senders[s]
        if does == "send":
            share = s if self.guards.partitioned else s + world.rounds
            ours = [p for p, page in enumerate(world.pages) if page.pending and (p - share) % len(world.queues) == 0]
            if not ours:
                yield f"sender {s} has sent its share", with_sender(world, s, "sent")
                return
            p, page = ours[0], world.pages[ours[0]]
            sent = with_page(world, p, page._replace(pending=False))
            yield f"sender {s} sends page {p} = {page.source}", with_frame(sent, s, (p, page.source))
        elif does == "mark":
            yield f"sender {s} marks", with_frame(with_sender(world, s, "quiet"), s, MARK)
        elif does == "settle" and world.lacks is not None:
            lacking = zip(world.pages, world.lacks, strict=True)
            pages = tuple(page._replace(sent=page.sent or not lacks) for page, lacks in lacking)
            yield "sender 0 takes LACKS", with_sender(world._replace(pages=pages), s, "stream")
        elif does == "wait" and world.senders[0] == "stream":
            yield f"sender {s} begins", with_sender(world, s, "stream")
        elif does == "stream":
            for p, page in enumerate(world.pages):
                if not page.sent:
                    sent = with_page(world, p, page._replace(sent=True))
                    yield f"sender {s} sends final page {p} = {page.source}", with_frame(sent, s, (p, page.source))

    # --- destination ---

    def _receiver(self, world: World, s: int) -> Iterator[Step]:
        does, queue = world.receivers[s], world.queues[s]
        if does == "parked":
            if s == 0 and world.paused:
                yield "receiver 0 is resumed", with_receiver(world, s, "stale")
            elif s > 0 and world.paused and (world.judged or not self.guards.destination_waits):
                yield f"receiver {s} is resumed", with_receiver(world, s, "final")
        elif does == "lacks":
            lacks = tuple(page.held is None and page.final is None for page in world.pages)
            yield f"receiver 0 says LACKS {lacks}", with_receiver(world._replace(lacks=lacks), s, "final")
        elif queue:
            taken = world._replace(queues=(*world.queues[:s], queue[1:], *world.queues[s + 1 :]))
            yield from self._take(taken, s, does, *queue[0])

    def _take(self, world: World, s: int, does: str, p: int, version: int) -> Iterator[Step]:
        if (p, version) == MARK:
            yield f"receiver {s} parks", with_receiver(world, s, "parked")
            return
        if (p, version) == STALE:
            judged = world._replace(pages=tuple(judge(page) for page in world.pages), judged=True)
            yield "receiver 0 applies the stale set", with_receiver(judged, s, "lacks")
            return
        page = world.pages[p]
        if page.final is not None or (does == "final" and page.held is not None):
            yield f"receiver {s} drops page {p} = {version}", world
        elif does == "final":
            yield f"receiver {s} takes final page {p} = {version}", with_page(world, p, page._replace(final=version))
        else:
            yield f"receiver {s} holds page {p} = {version}", with_page(world, p, page._replace(held=version))


def judge(page: Page) -> Page:
    """page_judge: what is held is final, or lacking; every other page is left alone."""
    if page.held is None:
        return page
    return page._replace(held=None, final=page.final if page.pending else page.held)


def with_page(world: World, p: int, page: Page) -> World:
    return world._replace(pages=(*world.pages[:p], page, *world.pages[p + 1 :]))


def with_frame(world: World, s: int, frame: tuple[int, int]) -> World:
    return world._replace(queues=(*world.queues[:s], (*world.queues[s], frame), *world.queues[s + 1 :]))


def with_sender(world: World, s: int, does: str) -> World:
    return world._replace(senders=(*world.senders[:s], does, *world.senders[s + 1 :]))


def with_receiver(world: World, s: int, does: str) -> World:
    return world._replace(receivers=(*world.receivers[:s], does, *world.receivers[s + 1 :]))
