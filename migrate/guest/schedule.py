"""How the agent's thread asks to be scheduled."""

import contextlib
from collections.abc import Iterator

from migrate.guest._guest import lib


@contextlib.contextmanager
def prefer_latency() -> Iterator[None]:
    """This thread answers the daemon within a downtime: ask the scheduler for short slices (dataplane/schedule.c).

    Threads made inside inherit that; those made afterwards do not.
    """
    lib.schedule_soon()
    try:
        yield
    finally:
        lib.schedule_normal()
