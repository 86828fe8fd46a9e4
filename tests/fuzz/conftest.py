"""How many inputs: a few in the suite, many by ``make fuzz``."""

import pytest


@pytest.fixture(scope="session")
def fuzz_runs(request: pytest.FixtureRequest) -> int:
    """Of each C parser; the Python state machines get a tenth of it, which takes as long."""
    return int(request.config.getoption("--fuzz-runs"))


@pytest.fixture(scope="session")
def fuzz_seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--torture-seed"))
