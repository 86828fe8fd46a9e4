"""A migration as its source tells it: figures while it runs and, once its C side is gone, as they were at the end."""

from collections.abc import Callable
from dataclasses import asdict

from migrate.dataplane import SourcePlane
from migrate.guest_link import GuestLink
from migrate.precopy import PrecopyPolicy
from migrate.rounds import Rounds
from migrate.session import Migration, PrecopyInfo, RoundInfo
from proto.states import Role, State


class Departure(Migration):
    """What is known of a guest that leaves; ``migrate/source.py`` drives it."""

    role = Role.SOURCE

    def __init__(
        self, migration_id: bytes, guest: GuestLink, peer: str, precopy: PrecopyPolicy, on_end: Callable[[Migration], None]
    ) -> None:
        super().__init__(migration_id, guest.guest_id, peer, on_end)
        self.guest = guest
        self._rounds = Rounds(self, guest, precopy)
        self._plane: SourcePlane | None = None
        self._figures: dict[str, int] = {}
        self._stale_window_ns: int | None = None
        self._faults_there = 0

    def figures(self) -> dict[str, int]:
        return self._plane.figures() if self._plane is not None else self._figures

    def bulk_pace(self) -> int | None:
        return None if self._plane is None else self._plane.pace()

    def pages_done(self) -> int:
        figures = self.figures()
        if self.state is State.PRECOPY:
            return self.pages_total - figures.get("pages_pending", 0)
        return self.pages_total if self.state is State.COMPLETE else figures.get("pages_sent", 0)

    def pages_by_path(self) -> dict[str, int]:
        figures = self.figures()
        zero = sum(figures.get(f"pages_zero_{path}", 0) for path in ("urgent", "readahead", "bulk"))
        precopy = figures.get("pages_precopy", 0) + figures.get("pages_zero_precopy", 0)  # copies, one a round
        by_path = {path: figures.get(f"pages_{path}", 0) for path in ("urgent", "readahead", "bulk")}
        return {**by_path, "zero": zero, "precopy": precopy}

    def precopy_info(self) -> PrecopyInfo | None:
        if State.PRECOPY not in self._timeline:
            return None
        figures = self.figures()
        return PrecopyInfo(
            rounds_begun=len(self._rounds.done) + (self.state is State.PRECOPY),
            rounds=[RoundInfo(**asdict(one)) for one in self._rounds.done],
            bytes_moved=figures.get("bytes_precopy", 0),
            stale_pages=figures.get("pages_stale", 0),
            stale_window_seconds=None if self._stale_window_ns is None else self._stale_window_ns / 1e9,
            faults_held=None,
            faults_after=None,
            stale_pages_touched=None,
        )

    def faults_count(self) -> int:
        """As the destination tells it; until it does, what it has asked for."""
        return self._faults_there or self.figures().get("requests", 0)
