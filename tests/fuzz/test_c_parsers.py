"""The C parsers on bytes that nobody has checked: their corpus, and inputs made of it, under sanitizers.

Guided by coverage, and with 10^6 inputs each, by ``make fuzz``; what that finds goes into corpus/.
"""

import re
from pathlib import Path

import pytest

from ..path.test_sanitizers import RUN_DEADLINE_SECONDS, built, run

CORPUS = Path(__file__).parent / "corpus"
TARGETS = sorted(folder.name for folder in CORPUS.iterdir())
NEED_UFFD = {"inbox", "preload"}
NEED = {name: pytest.mark.requires("asan", *(["uffd"] if name in NEED_UFFD else [])) for name in TARGETS}


@pytest.fixture(scope="module")
def programs(repository: Path) -> Path:
    return built(repository, "asan", [f"fuzz-{name}" for name in TARGETS])


@pytest.mark.timeout(180)  # may compile first
@pytest.mark.parametrize("target", [pytest.param(name, marks=NEED[name]) for name in TARGETS])
def test_parser_holds(programs: Path, target: str, fuzz_runs: int, fuzz_seed: int) -> None:
    files = sorted(map(str, (CORPUS / target).iterdir()))
    said = run([str(programs / f"fuzz-{target}"), str(fuzz_seed), str(fuzz_runs), *files], RUN_DEADLINE_SECONDS)
    assert re.fullmatch(rf"{len(files)} files, {fuzz_runs} made of them: held\n", said)
