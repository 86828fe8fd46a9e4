"""Children that go when this process does, however it ends: also by SIGKILL, which leaves nobody to end them.

They are started in a process group of their own (``process_group`` of Popen), and so is what they start. Beside them waits a
shell at the end of a pipe that only this process holds: with this process the pipe ends, and the shell kills the group, itself
included. Considered: PR_SET_PDEATHSIG, which goes by the *thread* that has forked and ends no grandchild (QEMU). A terminal's
Ctrl-C reaches this process alone, which then ends its children as always.
"""

import atexit
import os
import signal
import subprocess

WATCH = "read -r _; kill -KILL 0"  # 0: its process group
END_SECONDS = 5.0
_watching: "subprocess.Popen[bytes] | None" = None
_of_pid = 0  # after a fork it is the other process's, and so is the pipe


def group_that_goes_with_us() -> int:
    """For ``process_group``; there as long as this process is."""
    global _watching, _of_pid
    if _watching is None or _of_pid != os.getpid() or _watching.poll() is not None:
        _watching = subprocess.Popen(["sh", "-c", WATCH], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
        _of_pid = os.getpid()
        atexit.register(_end, _watching, _of_pid)
    return _watching.pid


def _end(watching: "subprocess.Popen[bytes]", of_pid: int) -> None:
    """Whoever still runs here has not been ended as it should: the group goes with the shell."""
    if os.getpid() == of_pid:
        assert watching.stdin is not None
        watching.stdin.close()
        try:
            watching.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # somebody forked from here holds the pipe too
            os.killpg(watching.pid, signal.SIGKILL)
            watching.wait()
