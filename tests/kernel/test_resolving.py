"""What the code relies on when it fills, wakes and lets go, against the running kernel. The facts: facts_resolving.c."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL_PAGES = (
    "continue-of-a-hole-is-efault",
    "continue-of-a-mapped-page-is-eexist-and-wakes-nobody",
    "range-that-ends-early-is-eagain-with-progress",
    "range-over-a-mapped-page-ends-before-it",
    "writing-through-the-alias-wakes-nobody",
    "two-threads-give-two-messages-and-one-continue-wakes-both",
    "allocated-page-continues-as-zeroes",
    "zeropage-fills-a-hole",
    "unregistering-wakes-and-reads-zeroes",
    "closing-the-last-descriptor-reads-zeroes",
    "duplicate-keeps-threads-waiting",
    "late-copy-over-a-mapped-page-destroys-a-write",
    "continue-after-the-guest-ended-is-esrch",
    "continue-of-an-unmapped-range-is-enoent",
)
HUGE_PAGES = ("hugetlb-has-no-zeropage-but-fallocate",)


@pytest.mark.requires("uffd")
@pytest.mark.parametrize("name", SMALL_PAGES)
def test_resolving(fact: Callable[[str], None], name: str) -> None:
    fact(name)


@pytest.mark.requires("uffd", "hugetlb")
@pytest.mark.parametrize("name", HUGE_PAGES)
def test_resolving_huge_pages(fact: Callable[[str], None], name: str) -> None:
    fact(name)


def test_every_fact_is_asked(repository: Path) -> None:
    source = (repository / "tests/kernel/facts_resolving.c").read_text()
    assert sorted(re.findall(r'^    \{"([a-z-]+)"', source, re.MULTILINE)) == sorted(SMALL_PAGES + HUGE_PAGES)
