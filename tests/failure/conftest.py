"""Two daemons for a whole module of bad input, and a guest that has nothing to do with it: it must come through."""

from collections.abc import Iterator

import pytest

from migrate.pair import Pair

from ..path.commuter import Commuter


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def commuter(pair: Pair) -> Commuter:
    """Of 4 MiB, a size that no fake guest has."""
    return Commuter(pair, "commuter", "4M", options=("--rate", "5000"))


@pytest.fixture
def unharmed(commuter: Commuter) -> Iterator[Commuter]:
    """Whatever the test sent to a daemon, the other guest there moves on and finds itself whole."""
    yield commuter
    commuter.move()
