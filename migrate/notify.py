"""What a daemon and its service manager say to each other: sd_notify(3), the watchdog, the descriptor store, sd_listen_fds(3).

Sources: man pages of systemd 252, FDPOLL of 246. Nothing here raises, waits or ends the daemon: a manager that is gone or
whose queue is full shows in what is returned. Without NOTIFY_SOCKET nothing is done at all.
"""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping, Sequence
from enum import Enum, auto

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


class Told(Enum):
    YES = auto()
    NOBODY = auto()  # no NOTIFY_SOCKET, or nobody behind it any more
    LATER = auto()  # the manager's queue is full: another time it may take it
    NO = auto()


def is_managed() -> bool:
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(state: str, descriptors: Sequence[int] = ()) -> Told:
    """For example ``READY=1`` or ``STATUS=…``; several assignments are lines of one text."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return Told.NOBODY
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.connect(address)
            if descriptors:
                socket.send_fds(sock, [state.encode()], list(descriptors), socket.MSG_NOSIGNAL)
            else:
                sock.send(state.encode(), socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return Told.LATER
    except (FileNotFoundError, ConnectionRefusedError):
        return Told.NOBODY
    except (OSError, ValueError):  # ValueError: an address that cannot be one
        return Told.NO
    return Told.YES


def reloading() -> Told:
    """Its configuration is read anew; ``READY=1`` says that this is over. The time tells the manager which request it is."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def store(name: str, descriptor: int) -> Told:
    """Have the manager keep a duplicate, which it hands to this daemon's next life. FDPOLL=0: it lets go only when told,
    not because poll(2) reports an error, as it does for a userfaultfd that somebody made blocking."""
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])


def unstore(name: str) -> Told:
    """The manager closes all that it keeps under this name."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def extend_timeout(seconds: float) -> Told:
    """The end (or start) that is under way may take at least so much longer; to be said again before that is over."""
    return notify(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def watchdog_period_seconds() -> float | None:
    """How often to say WATCHDOG=1: at half of what the manager allows, as sd_watchdog_enabled(3) advises. None: not at all."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    allowed_us = _count(os.environ.get("WATCHDOG_USEC", ""))
    return allowed_us / 2e6 if allowed_us and is_managed() else None


def take_descriptors(environment: MutableMapping[str, str] | None = None) -> list[tuple[str, int]]:
    """What the manager passed to this process, each with its name; close-on-exec from here on, and the caller's to close.

    Once: the variables are taken out of the environment, so that no child believes they are meant for it.
    """
    environment = os.environ if environment is None else environment
    given = {name: environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if given["LISTEN_PID"] != str(os.getpid()):
        return []
    names = given["LISTEN_FDNAMES"].split(":")
    taken: list[tuple[str, int]] = []
    with contextlib.suppress(OSError):  # they are in a row: behind one that is not open there is none
        for index in range(_count(given["LISTEN_FDS"])):
            os.set_inheritable(FIRST_DESCRIPTOR + index, False)
            taken.append((names[index] if index < len(names) else "unknown", FIRST_DESCRIPTOR + index))
    return taken


def _count(text: str) -> int:
    """0 for what is no number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
