"""sd_notify(3): READY, STATUS and STOPPING to the service manager's socket, when there is one."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """For example ``READY=1`` or ``STATUS=…``. Does nothing without NOTIFY_SOCKET; never fails."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), address)
