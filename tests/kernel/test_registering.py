"""What the code relies on when memory is registered, against the running kernel. The facts themselves: facts_registering.c."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL_PAGES = (
    "minor-only-reads-zeroes-from-a-hole",
    "missing-and-minor-tell-all-four-flags",
    "torn-page-faults-as-minor",
    "minor-of-anonymous-memory-is-einval",
    "registering-without-api-is-einval",
    "second-userfaultfd-is-ebusy",
    "registering-a-subset-keeps-both-modes",
    "registering-other-modes-replaces",
    "registering-both-puts-minor-only-right",
    "page-mapped-before-never-faults",
    "blocking-userfaultfd-polls-as-error",
    "user-mode-only-needs-no-privilege",
    "sealed-file-does-not-shrink",
)
HUGE_PAGES = ("pwrite-of-hugetlb-is-einval", "writev-without-a-huge-page-is-efault")


@pytest.mark.requires("uffd")
@pytest.mark.parametrize("name", SMALL_PAGES)
def test_registering(fact: Callable[[str], None], name: str) -> None:
    fact(name)


@pytest.mark.requires("uffd", "hugetlb")
@pytest.mark.parametrize("name", HUGE_PAGES)
def test_hugetlb_files(fact: Callable[[str], None], name: str) -> None:
    fact(name)


def test_every_fact_is_asked(repository: Path) -> None:
    source = (repository / "tests/kernel/facts_registering.c").read_text()
    assert sorted(re.findall(r'^    \{"([a-z-]+)"', source, re.MULTILINE)) == sorted(SMALL_PAGES + HUGE_PAGES)
