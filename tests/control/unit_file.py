"""A systemd unit as lines, and what its SystemCallFilter= comes to (systemd.exec(5))."""

import re
import subprocess
from functools import cache
from pathlib import Path

ANALYZE_DEADLINE_SECONDS = 20


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=ANALYZE_DEADLINE_SECONDS, check=False)


def settings(unit: Path) -> list[tuple[str, str]]:
    """(name, value) in the order of the file."""
    lines = [line for line in unit.read_text().splitlines() if line and line[0] not in "#["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def values(unit: Path, name: str) -> list[str]:
    return [value for key, value in settings(unit) if key == name]


def value(unit: Path, name: str) -> str:
    """Of a name that occurs once."""
    [only] = values(unit, name)
    return only


@cache
def call_sets() -> dict[str, list[str]]:
    """``@set`` to its members, which may be sets themselves: as this machine's systemd has them."""
    done = analyze("syscall-filter")
    assert done.returncode == 0, done.stderr
    sets: dict[str, list[str]] = {}
    members: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines():
        if line.startswith("@"):
            members = sets.setdefault(line.strip(), [])
        elif re.match(r"\s+[@a-z_]", line):
            members.append(line.strip())
    return sets


def calls_of(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    return {call for member in call_sets()[name] for call in calls_of(member)}


def allowed_calls(unit: Path) -> set[str]:
    """An allow list, as the first line has no ``~``: each further line adds to it, or takes away."""
    first, *_ = filters = values(unit, "SystemCallFilter")
    assert not first.startswith("~")
    allowed: set[str] = set()
    for line in filters:
        named = {call for name in line.removeprefix("~").split() for call in calls_of(name)}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed | calls_of("@default")
