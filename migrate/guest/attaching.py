"""To attach a guest to a daemon that may be starting, or starting again."""

import time
from pathlib import Path

import structlog

from migrate.errors import PostcopyError
from migrate.guest.agent import Agent
from proto.errors import ProtocolError

log = structlog.get_logger("postcopy.agent")
RECONNECT_SECONDS = (0.05, 0.1, 0.2, 0.25)
"""Between two attempts; the last one from then on, however long the daemon was away: once it is back the guest is served again
within a second, in which its source has to dial too (migrate/recovery.py)."""


def attach_when_there(agent: Agent, socket_path: Path, *, again: bool) -> None:
    """Try until the daemon is there: it may be starting, or starting again. ``again``: this guest has been attached before, so
    no refusal ends it either. Raises PostcopyError, ProtocolError, OSError at the first attachment."""
    told = ""
    for attempt in range(1_000_000):
        try:
            agent.attach(socket_path)
            return
        except (OSError, PostcopyError, ProtocolError) as error:
            if not again and not is_away(error):
                raise
            if told != str(error):
                told = str(error)
                log.warning("not attached yet, trying again", guest=agent.guest_id, socket=str(socket_path), reason=told)
            time.sleep(RECONNECT_SECONDS[min(attempt, len(RECONNECT_SECONDS) - 1)])
    raise PostcopyError(f"daemon at {socket_path}", expected="an answer", got="none")


def is_away(error: Exception) -> bool:
    """No daemon, or none any more: it may have ended amid our greeting."""
    return isinstance(error, ConnectionError | FileNotFoundError) or getattr(error, "code", "") == "connection-lost"
