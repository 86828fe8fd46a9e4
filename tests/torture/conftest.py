"""How much torture there is to be, and the table of what it has seen."""

import pytest

from .ledger import Ledger, Scale

LEDGER: pytest.StashKey[Ledger] = pytest.StashKey()


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    return Scale(bool(request.config.getoption("--torture")), int(request.config.getoption("--torture-seed")))


@pytest.fixture(scope="session")
def ledger(request: pytest.FixtureRequest) -> Ledger:
    return request.config.stash.setdefault(LEDGER, Ledger())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ledger = config.stash.get(LEDGER, None)
    if ledger is not None and config.getoption("--torture"):
        terminalreporter.section("torture")
        for line in ledger.lines():
            terminalreporter.line(line)
