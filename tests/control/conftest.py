"""Two daemons for a module, and the command line as a user has it."""

import subprocess
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from migrate.pair import COMMAND, Pair

COMMAND_DEADLINE_SECONDS = 30
Cli = Callable[..., subprocess.CompletedProcess[str]]
API_PROFILE = "api"


def pytest_configure(config: pytest.Config) -> None:
    """How many requests the API conformance test makes of each operation: known before it is imported. The same in every run of
    the suite, others in each run of `make fuzz`."""
    examples = int(config.getoption("--fuzz-runs")) // 100
    settings.register_profile(
        API_PROFILE,
        max_examples=max(examples, 20),
        derandomize=examples <= 20,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


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
