"""Two daemons for a module, and the command line as a user has it."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from migrate.pair import COMMAND, Pair

COMMAND_DEADLINE_SECONDS = 30
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """``cli("list", "--json")``: exit status, standard output and standard error."""
    directory = tmp_path_factory.mktemp("cli")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command, deadline_seconds = [*COMMAND, *arguments], COMMAND_DEADLINE_SECONDS
        return subprocess.run(command, capture_output=True, text=True, cwd=directory, timeout=deadline_seconds, check=False)

    return run
