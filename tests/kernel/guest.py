"""A guest: a process of its own with the memory and the userfaultfd of a case, handled from the case's process.

For what a thread cannot do: fork(2) holds the interpreter's lock, and a process that ends takes its handler with it.
"""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.uffd import Feature, Mode, Userfaultfd

from .memory import Memory

Told = Callable[[], None]
Script = Callable[[Memory, Told], Any]


class Guest:
    """``script(memory, told)`` runs in the guest, after registering; ``told()`` there waits for ``tell()`` here.

    The memory is mapped before the guest is forked: both know its addresses, each has its own mapping, files are shared.
    Here ``memory.userfaultfd`` becomes the guest's, adopted from its socket.
    """

    def __init__(self, memory: Memory, script: Script, modes: Mode, features: Feature) -> None:
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self._socket.close()
            self._be_the_guest(memory, script, modes, features, theirs)
        theirs.close()
        _, [descriptor], _, _ = socket.recv_fds(self._socket, 1, 1)
        memory.userfaultfd = Userfaultfd.adopt(descriptor)

    @staticmethod
    def _be_the_guest(memory: Memory, script: Script, modes: Mode, features: Feature, link: socket.socket) -> None:
        status = 1
        try:
            memory.open(features)
            memory.register(modes)
            socket.send_fds(link, [b"r"], [memory.userfaultfd.fileno()])

            def told() -> None:
                link.sendall(b"w")
                link.recv(1)

            result = script(memory, told)
            link.sendall(b"d" + pickle.dumps(result))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def stops(self) -> None:
        """Wait until the guest waits to be told."""
        assert self._socket.recv(1) == b"w"

    def tell(self) -> None:
        self._socket.sendall(b"g")

    def ends(self) -> Any:
        """What the script returned; the guest is gone then."""
        said = b"".join(iter(lambda: self._socket.recv(1 << 16), b""))
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"the guest ended with status {status}"
        assert said[:1] == b"d"
        return pickle.loads(said[1:])

    @property
    def waits_in_a_fault(self) -> bool:
        return Path(f"/proc/{self.pid}/syscall").read_text().startswith("-1 ")
