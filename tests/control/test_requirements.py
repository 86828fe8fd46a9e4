"""What tests/conftest.py does with a feature that the machine lacks: said and deselected, or run because it is required."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LACKING = """

host.PROBES["timens"] = lambda: host.Feature("timens", False, "this kernel has none", "use another")
host.PROBES["netns"] = lambda: host.Feature("netns", True, "it is there")
"""
TESTS = """
import pytest


@pytest.mark.requires("netns")
def test_has_all():
    pass


@pytest.mark.requires("netns", "timens")
def test_needs_what_is_not_there():
    raise SystemError("no clock of its own")
"""


@pytest.fixture
def suite(tmp_path: Path, repository: Path) -> Path:
    """A suite of two tests under the real conftest, on a machine that lacks time namespaces."""
    (tmp_path / "conftest.py").write_text((repository / "tests" / "conftest.py").read_text() + LACKING)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def run_pytest(suite: Path, require: str) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "--rootdir", str(suite)]
    environment = {**os.environ, "POSTCOPY_REQUIRE": require}
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, timeout=50, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_the_machine_lacks_is_deselected_with_the_reason(suite: Path) -> None:
    status, said = run_pytest(suite, "netns")
    assert status == pytest.ExitCode.OK
    assert "timens: no, this kernel has none; use another" in said
    assert "test_needs_what_is_not_there" in said
    assert said.splitlines()[-1].strip("= ").startswith("1 passed, 1 deselected in ")


def test_what_is_required_runs_and_fails(suite: Path) -> None:
    status, said = run_pytest(suite, "netns, timens")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "SystemError: no clock of its own" in said
    assert said.splitlines()[-1].strip("= ").startswith("1 failed, 1 passed in ")


def test_a_feature_that_nobody_knows_is_an_error(suite: Path) -> None:
    status, said = run_pytest(suite, "netns,clairvoyance")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "no such feature: clairvoyance; there are uffd, uffd-kernel," in said
