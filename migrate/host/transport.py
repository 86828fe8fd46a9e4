"""TCP as this user may have it: congestion control and pacing. Sources: tcp(7), Documentation/networking/ip-sysctl.rst."""

import socket
from pathlib import Path

from migrate.host.feature import Feature
from migrate.host.rights import read_text
from migrate.host.trial import attempt

SETTINGS = Path("/proc/sys/net/ipv4")


def available() -> list[str]:
    return read_text(SETTINGS / "tcp_available_congestion_control").split()


def allowed() -> list[str]:
    """Without CAP_NET_ADMIN."""
    return read_text(SETTINGS / "tcp_allowed_congestion_control").split()


def default() -> str:
    return read_text(SETTINGS / "tcp_congestion_control")


def queueing_discipline() -> str:
    """Of new interfaces."""
    return read_text("/proc/sys/net/core/default_qdisc")


def usable() -> list[str]:
    """Those that a socket of this process takes."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        for name in available():
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            except OSError:
                continue
            found.append(name)
    return found


def congestion_control() -> Feature:
    """What --congestion-control may name."""
    known, can = available(), usable()
    cannot = [name for name in known if name not in can]
    reason = f"{default()} unless told otherwise; --congestion-control may name {', '.join(can) or 'none'}"
    if not cannot:
        return Feature("congestion-control", True, reason)
    remedy = f'sysctl net.ipv4.tcp_allowed_congestion_control="{" ".join(known)}"'
    return Feature("congestion-control", True, f"{reason}, not {', '.join(cannot)} (no CAP_NET_ADMIN)", remedy)


def pacing() -> Feature:
    """The bulk stream below the bottleneck. TCP paces by itself since 4.13: no queueing discipline is needed for it."""
    outcome = attempt("pacing")
    if not outcome.works:
        return Feature("pacing", False, str(outcome), "allow setsockopt SO_MAX_PACING_RATE, or run Linux 4.13 or later")
    queue = queueing_discipline() or "unknown"
    paced = "fq paces" if queue == "fq" else f"TCP paces by itself (queueing discipline {queue})"
    return Feature("pacing", True, f"sockets take SO_MAX_PACING_RATE; {paced}")
