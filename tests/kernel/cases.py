"""A case: one fact of the kernel in one kind of memory, in a process of its own.

Whatever touches registered memory can hang for ever, and a process can be killed. The server of cases is a second pytest that
has collected this folder and then, instead of running it, forks a child for each case that it is asked for: single-threaded,
everything imported, a few milliseconds a case. The child that is not done at its deadline is killed; all that it had started
is killed and reaped with it.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from .memory import Kind

CASE_DEADLINE_SECONDS = 10.0
SERVER_DEADLINE_SECONDS = 40.0
SOCKET_VARIABLE = "POSTCOPY_CASES_SOCKET"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TOUCHED_WITHOUT_END = 3
"""Exit status of a case that was to die by a signal, and did not."""

LAST_WORDS = "dies here"

Body = Callable[..., None]
InAChild = Callable[[int], None]
libc = ctypes.CDLL(None)


def case(
    kinds: Iterable[Kind] | Mapping[Kind, object] = (),
    *,
    requires: Iterable[str] = (),
    dies_of: signal.Signals | None = None,
    deadline_seconds: float = CASE_DEADLINE_SECONDS,
) -> Callable[[Body], Callable[..., None]]:
    """Make a test of ``body(kind)``, run in a child for each kind; ``body(kind, expected)`` where ``kinds`` says what is expected
    of each; ``body()`` without kinds. ``dies_of``: what comes after ``dies_here()`` must end its process by that signal."""

    def of(body: Body) -> Callable[..., None]:
        def of_each_kind(in_a_child: InAChild, parameters: tuple[object, ...]) -> None:
            in_a_child(-dies_of if dies_of else 0)

        def by_itself(in_a_child: InAChild) -> None:
            in_a_child(-dies_of if dies_of else 0)

        test = of_each_kind if kinds else by_itself
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body, test.dies, test.deadline_seconds = body, dies_of is not None, deadline_seconds  # type: ignore[attr-defined]
        marked = pytest.mark.requires("uffd", *requires)(test)
        return pytest.mark.parametrize("parameters", _parameters(kinds))(marked) if kinds else marked

    return of


def dies_here() -> None:
    """Said by a case right before what must end it: a signal that comes earlier is not the one that was meant."""
    print(LAST_WORDS, flush=True)


def _parameters(kinds: Iterable[Kind] | Mapping[Kind, object]) -> list[Any]:
    def one(kind: Kind) -> Any:
        values = (kind, kinds[kind]) if isinstance(kinds, Mapping) else (kind,)
        return pytest.param(values, id=kind.value, marks=[pytest.mark.requires("hugetlb")] if kind.is_hugetlb else [])

    return [one(kind) for kind in kinds]


class CaseServer:
    """Asked by the tests' own process."""

    def __init__(self, repository: Path, features: Iterable[str]) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, SOCKET_VARIABLE: str(theirs.fileno()), "POSTCOPY_REQUIRE": ",".join(features)}
        environment.pop("PYTEST_ADDOPTS", None)  # it collects all, whatever is run
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)]
        self._log = os.memfd_create("log", os.MFD_CLOEXEC)
        self._process = subprocess.Popen(
            command, cwd=repository, env=environment, pass_fds=[theirs.fileno()], stdout=self._log, stderr=subprocess.STDOUT
        )
        theirs.close()
        self._file = ours.makefile("rw")
        ours.settimeout(SERVER_DEADLINE_SECONDS)
        self._socket = ours

    def run(self, node_id: str) -> tuple[int, str]:
        """Status as of subprocess (negative: the signal), and what the case said."""
        self._file.write(json.dumps(node_id) + "\n")
        self._file.flush()
        answer = self._file.readline()
        if not answer:
            raise RuntimeError(f"the server of cases ended:\n{os.pread(self._log, 1 << 16, 0).decode(errors='replace')}")
        status, said = json.loads(answer)
        return int(status), str(said)

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        try:
            self._process.wait(SERVER_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            os.close(self._log)


def serve(items: Mapping[str, pytest.Item]) -> None:
    """The server's own loop, until the asker closes its end."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.freeze()  # no child walks, and so copies, what all share
    with socket.socket(fileno=int(os.environ[SOCKET_VARIABLE])) as asker, asker.makefile("rw") as file:
        for line in file:
            file.write(json.dumps(_run_in_a_child(items[json.loads(line)])) + "\n")
            file.flush()


def _run_in_a_child(item: Any) -> tuple[int, str]:
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _be_the_case(item, output)
    pidfd = os.pidfd_open(pid)
    in_time, _, _ = select.select([pidfd], [], [], item.function.deadline_seconds)
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # not reaped yet: the group's number is still its own
    os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while True:  # what it had started is ours now
        try:
            os.wait()
        except ChildProcessError:
            break
    os.close(pidfd)
    os.lseek(output, 0, os.SEEK_SET)
    with open(output, errors="replace") as file:
        said = file.read()
    return status, said if in_time else f"not done after {item.function.deadline_seconds} s\n{said}"


def _be_the_case(item: Any, output: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        item.function.body(*(item.callspec.params["parameters"] if hasattr(item, "callspec") else ()))
        status = TOUCHED_WITHOUT_END if item.function.dies else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
