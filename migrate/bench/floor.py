"""The floor: ``postcopy-floor``, the same job in bare C (floor.c), and the warm memory that both sides need alike."""

import json
import subprocess
from pathlib import Path
from typing import Any

from migrate.errors import PostcopyError

PROGRAM = Path(__file__).with_name("postcopy-floor")
RUN_DEADLINE_SECONDS = 90


def bare_c(program: Path, what: str, **options: int) -> dict[str, Any]:
    """One run of a program of ours. Raises PostcopyError with what it wrote on standard error."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run([program, what, *arguments], capture_output=True, text=True, timeout=RUN_DEADLINE_SECONDS, check=False)
    if done.returncode != 0:
        got = f"{done.returncode}: {done.stderr.strip()}"
        raise PostcopyError(f"{program.name} {what}", expected="exit status 0", got=got)
    return dict(json.loads(done.stdout))


def floor(scenario: str, **options: int) -> dict[str, Any]:
    return bare_c(PROGRAM, scenario, **options)


def warm(size_bytes: int) -> None:
    """Leave that much free memory that has been touched a moment before: in a virtual machine, memory that the host has to
    give back first costs microseconds a page, at random. The floor does the same for itself."""
    command: list[str | Path] = [PROGRAM, "warm", f"--memory-bytes={size_bytes}"]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=RUN_DEADLINE_SECONDS, check=True)
