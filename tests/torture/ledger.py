"""What torture has done, for the table at the end; and how much of it there is to be."""

from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Scale:
    """A short version in the suite, the long one by `make torture` (--torture); the same seed makes the same moves."""

    long: bool
    seed: int

    def of(self, *, suite: _T, torture: _T) -> _T:
        return torture if self.long else suite


@dataclass(frozen=True)
class Row:
    what: str
    runs: int
    note: str


@dataclass
class Ledger:
    """A run that found a corrupt or lost guest has failed its test; what is counted here has been verified."""

    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, *, runs: int, note: str = "") -> None:
        self.rows.append(Row(what, runs, note))

    def lines(self) -> list[str]:
        """A table in Markdown, as README has it."""
        head = ["| what | runs, all verified | seen |", "|---|---|---|"]
        return head + [f"| {row.what} | {row.runs} | {row.note} |" for row in self.rows]
