"""Kernel features used for real, each by ``postcopy-trial`` (trial.c) in a process of its own, ended and reaped at a deadline."""

import functools
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import PostcopyError, errno_text

PROGRAM = Path(__file__).with_name("postcopy-trial")
DEADLINE_SECONDS = 5.0
STATUS_WORKS = 0
STATUS_DOES_NOT = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """``step``: what failed, empty when all went well; ``error_number`` 0: it succeeded and did something else."""

    step: str = ""
    error_number: int = 0

    @property
    def works(self) -> bool:
        return not self.step

    @property
    def forbidden(self) -> bool:
        """A seccomp filter killed the process for a system call: whoever makes it here dies of it."""
        return self.step == f"killed by {signal.SIGSYS.name}"

    def __str__(self) -> str:
        if not self.step:
            return "works"
        return f"{self.step}: {errno_text(self.error_number) if self.error_number else 'not what was expected'}"


@functools.cache
def attempt(name: str) -> Outcome:
    """Once a process. Names are in trial.c. Raises PostcopyError when the program itself cannot be run."""
    try:
        done = subprocess.run(
            [PROGRAM, name], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(f"no end within {DEADLINE_SECONDS:.0f} s")
    except OSError as error:
        raise PostcopyError(f"{PROGRAM}", expected="the program that comes with the package", got=error) from error
    if done.returncode == STATUS_WORKS:
        return Outcome()
    step, _, number = done.stdout.strip().rpartition(" ")
    if done.returncode == STATUS_DOES_NOT and step and number.isdigit():
        return Outcome(step, int(number))
    return Outcome(
        f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit status {done.returncode}"
    )
