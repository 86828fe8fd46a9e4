"""What demo and bench stand on: daemons and guests that go with whoever started them."""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

STARTS = r"""
import sys
from migrate.pair import Pair

GRANDCHILD = "sleep 600 & printf '{\"event\": \"begun\", \"pid\": %d}\\n' $!; wait"  # as QEMU is one
with Pair() as pair:
    guest = pair.guest(pair.source, "left", "1M")
    shell = pair.child("shell", ["-c", GRANDCHILD], command=["sh"])
    pids = [pair.source.pid, pair.destination.pid, guest.pid, shell.pid, shell.event("begun")["pid"]]
    print(pair.directory, *pids, flush=True)
    sys.stdin.read()
"""


@pytest.mark.requires("uffd")
def test_children_go_with_who_is_killed() -> None:
    command = [sys.executable, "-P", "-c", STARTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter, ExitStack() as stack:
        try:
            assert starter.stdout is not None
            directory, *pids = starter.stdout.readline().split()
            ends = [os.pidfd_open(int(pid)) for pid in pids]
            for end in ends:
                stack.callback(end_of, end)
            assert len(ends) == 5
            assert select.select(ends, [], [], 0)[0] == []
            stack.callback(shutil.rmtree, directory)
        finally:
            starter.kill()
        for end in ends:
            assert select.select([end], [], [], 20)[0] == [end]


def end_of(process: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(process)
