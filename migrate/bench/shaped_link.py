"""Two network namespaces with one shaped link between them, for as long as a block lasts; and a plain TCP transfer over it.

Needs root, ip, tc, nsenter and unshare. The namespaces have no name: each belongs to a process that waits for the end of its
input, so they go also when this one is killed, as soon as nothing runs in them.
"""

import os
import subprocess
import sys
from types import TracebackType
from typing import Self

from migrate.errors import HostLacksError, PostcopyError
from migrate.host.suite import ADMINISTRATOR_PATH

MBIT = 125_000
"""Bytes a second."""
ADDRESSES = ("10.241.0.1", "10.241.0.2")
DEVICE = "shaped0"
BURST, LATENCY = "64kb", "20ms"
COMMAND_SECONDS = 20.0
REMEDY = "run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN, on a kernel with veth and sch_tbf"


def _run(*command: str) -> str:
    """Raises HostLacksError with what it said."""
    environment = {**os.environ, "PATH": ADMINISTRATOR_PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except OSError as error:
        raise HostLacksError("shaped link", str(error), "install iproute2 and util-linux") from error
    if done.returncode != 0:
        why = f"{' '.join(command)}: {done.stderr.strip()}"
        raise HostLacksError("shaped link", why, REMEDY)
    return done.stdout


class ShapedLink:
    """``with ShapedLink(125_000_000) as link``: both directions so many bytes a second. Raises HostLacksError."""

    def __init__(self, bytes_per_second: int) -> None:
        self._bytes_per_second = bytes_per_second
        self._holders: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise HostLacksError("shaped link", f"this is uid {os.geteuid()}", "run as root: it makes network namespaces")
        try:
            for _ in ADDRESSES:
                self._hold()
            there = str(self._holders[1].pid)
            _run(*self.inside(0), "ip", "link", "add", "name", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", there)
            for end, address in enumerate(ADDRESSES):
                _run(*self.inside(end), "ip", "address", "add", f"{address}/30", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    _run(*self.inside(end), "ip", "link", "set", device, "up")
                self._shape(end, "add", self._bytes_per_second)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for holder in self._holders:
            holder.communicate(timeout=COMMAND_SECONDS)
        self._holders.clear()

    def _hold(self) -> None:
        """One namespace more."""
        command = ["unshare", "--net", "sh", "-c", "echo held; read -r _"]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            raise HostLacksError("shaped link", holder.communicate(timeout=COMMAND_SECONDS)[1].strip(), REMEDY)

    def _shape(self, end: int, verb: str, bytes_per_second: int) -> None:
        rate = f"{bytes_per_second * 8}bit"
        shaper = ("tbf", "rate", rate, "burst", BURST, "latency", LATENCY)
        _run(*self.inside(end), "tc", "qdisc", verb, "dev", DEVICE, "root", *shaper)

    def reshape(self, bytes_per_second: int) -> None:
        """From now on; what is in flight stays in flight."""
        for end in range(len(ADDRESSES)):
            self._shape(end, "change", bytes_per_second)

    def inside(self, end: int) -> tuple[str, ...]:
        """What goes in front of a command that is to run at that end of the link."""
        return ("nsenter", f"--net=/proc/{self._holders[end].pid}/ns/net")

    def transfer(self, congestion_control: str, seconds: float) -> float:
        """Bytes a second of one plain TCP connection from end 0 to end 1, as they arrive."""
        program = (sys.executable, "-P", "-m", "migrate.bench.plain_transfer")
        arrives = subprocess.Popen([*self.inside(1), *program, "receive", ADDRESSES[1]], stdout=subprocess.PIPE, text=True)
        try:
            assert arrives.stdout is not None
            port = arrives.stdout.readline().strip()
            command = [*self.inside(0), *program, "send", ADDRESSES[1], port, congestion_control, str(seconds)]
            subprocess.run(command, timeout=seconds + COMMAND_SECONDS, check=True)
            return float(arrives.communicate(timeout=COMMAND_SECONDS)[0])
        except (subprocess.SubprocessError, ValueError) as error:
            raise PostcopyError("plain TCP transfer", expected="to arrive", got=error) from error
        finally:
            arrives.kill()
            arrives.wait()
