"""What the built-in guest tells on standard output: all of it to a program, what can be read to a person."""

import io
import json

import pytest

from migrate.guests.stepping import say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdout", "touch"),
    [(io.StringIO(), {"count": 2, "buckets": [[64, 2]]}), (Terminal(), {"count": 2})],
    ids=["pipe", "terminal"],
)
def test_buckets_are_for_programs(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, touch: dict[str, object]) -> None:
    monkeypatch.setattr("sys.stdout", stdout)
    say("verified", steps=7, touch={"count": 2, "buckets": [[64, 2]]})
    assert json.loads(stdout.getvalue()) == {"event": "verified", "steps": 7, "touch": touch}
