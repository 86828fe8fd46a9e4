"""``forging_guest.py FORGERY guest workload …``: that guest, whose agent brings back other page states than it was given.

FORGERY: a state's number, for all pages; ``random:SEED``; ``none``: a file without a byte in it. What it was given is sealed.
"""

import os
import random
import sys
from pathlib import Path
from unittest.mock import patch

from migrate.cli import main
from migrate.guest.agent import Agent
from migrate.guests.workload import guest


def forged(forgery: str, count: int) -> bytes:
    if forgery == "none":
        return b""
    kind, _, seed = forgery.partition(":")
    return random.Random(int(seed)).randbytes(count) if kind == "random" else bytes([int(forgery)]) * count


class Forger(Agent):
    def attach(self, socket_path: Path) -> None:
        if self._role_said == "arriving" and self._states_fd >= 0:
            states_fd = os.memfd_create("not-what-was-kept", os.MFD_CLOEXEC)
            os.write(states_fd, forged(forgery, os.fstat(self._states_fd).st_size))
            os.dup2(states_fd, self._states_fd, inheritable=False)
            os.close(states_fd)
        super().attach(socket_path)


if __name__ == "__main__":
    forgery = sys.argv.pop(1)
    with patch.object(guest, "Agent", Forger):
        main()
