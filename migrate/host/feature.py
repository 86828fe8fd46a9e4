"""A feature of this machine, as one sentence."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["yes", "limited", "no"]


@dataclass(frozen=True, slots=True)
class Feature:
    """``reason``: how it is there, or why not. ``remedy``: the one thing to change, empty where nothing has to be.

    What is available and still has a remedy is limited: it works, and would work better.
    """

    name: str
    available: bool
    reason: str
    remedy: str = ""

    @property
    def verdict(self) -> Verdict:
        if not self.available:
            return "no"
        return "limited" if self.remedy else "yes"

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}, {self.reason}" + (f"; {self.remedy}" if self.remedy else "")
