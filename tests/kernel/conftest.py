"""The program of kernel facts, compiled once a session; each fact is a process of its own, killed and reaped at its deadline."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FACT_DEADLINE_SECONDS = 20
CompiledFacts = Callable[[str], None]
SOURCES = ("facts.c", "facts_registering.c", "facts_resolving.c")
COMPILER = ("cc", "-std=gnu11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-pthread")


@pytest.fixture(scope="session")
def facts_program(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("facts") / "facts"
    sources = [str(repository / "tests/kernel" / name) for name in SOURCES]
    subprocess.run([*COMPILER, f"-I{repository}/migrate/uffd", "-o", str(program), *sources], check=True, timeout=60)
    return program


@pytest.fixture
def fact(facts_program: Path) -> CompiledFacts:
    """``fact("continue-of-a-hole-is-efault")`` fails with what the kernel did instead."""

    def holds(name: str) -> None:
        run = subprocess.run([str(facts_program), name], capture_output=True, text=True, timeout=FACT_DEADLINE_SECONDS)
        assert run.returncode == 0, f"exit {run.returncode}: {run.stderr}"

    return holds
