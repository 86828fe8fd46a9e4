"""A move of a commuter whose daemons are killed on its way, and started anew."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from migrate.errors import NotFoundError, PostcopyError
from migrate.pair import DaemonProcess, Pair, Process
from migrate.session import MigrationStatus

from ..path.commuter import until

DECIDED_SECONDS = 30.0


def slain(pair: Pair, daemon: DaemonProcess) -> DaemonProcess:
    """SIGKILL, and the next one: same runtime directory, same address."""
    daemon.signal(signal.SIGKILL)
    return pair.again(daemon)


class Traveller(Protocol):
    """A guest that has two selves, such as a Commuter."""

    pair: Pair
    runs: Process
    waits: Process
    is_at: DaemonProcess
    goes_to: DaemonProcess

    def arrived(self) -> object:
        """Checks itself at the other daemon; its selves have changed roles."""


class KilledMove:
    """``kill`` as often as wanted, then ``ends``."""

    def __init__(self, guest: Traveller, **options: str | float | bool) -> None:
        self.guest = guest
        with guest.is_at.client() as client:
            self.id = client.migrate(guest.runs.name, guest.goes_to.address, **options).id
        self.service_seconds = 0.0
        """From when the daemons were back until the guest ran, and where it lacked pages they came."""
        self._back_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def state_at(self, daemon: DaemonProcess) -> str:
        """Of the migration as that daemon knows it; "" when it knows of none."""
        with daemon.client() as client:
            try:
                return str(client.status(self.id).state)
            except PostcopyError as error:
                if error.code != NotFoundError.code:
                    raise
                return ""

    def reaches(self, *states: str) -> None:
        until(lambda: self.state_at(self.guest.is_at) in states, " or ".join(states))

    def kill(self, *, source: bool, destination: bool) -> None:
        """SIGKILL, and only then the new ones: both are dead at once, and come back in either order."""
        guest, pair = self.guest, self.guest.pair
        killed = [guest.is_at] * source + [guest.goes_to] * destination
        for daemon in killed:
            daemon.signal(signal.SIGKILL)
        with ThreadPoolExecutor(len(killed)) as pool:
            back = list(pool.map(pair.again, killed))
        if source:
            guest.is_at = back[0]
        if destination:
            guest.goes_to = back[-1]
        self._back_at = time.monotonic()

    def ends(self) -> str:
        """``complete``, the guest has checked itself at the other daemon; or ``here``, it runs where it was and can be moved."""
        guest = self.guest
        self._comes_to(self._is_served, "service")
        self.service_seconds = time.monotonic() - self._back_at
        self._comes_to(lambda: self._decided() != "", "one place")
        decided = self._decided()
        if decided == "complete":
            guest.arrived()
        else:
            until(lambda: self._states()[1] == "waiting", "the waiting guest waits again")
        return decided

    def _is_served(self) -> bool:
        """It runs here, or runs there and its pages come."""
        here, _ = self._states()
        return here == "running" or self.state_at(self.guest.goes_to) in ("postcopy", "complete") or self._decided() != ""

    def status(self, daemon: DaemonProcess) -> MigrationStatus:
        with daemon.client() as client:
            return client.status(self.id)

    def _states(self) -> tuple[str, str]:
        """Of the two processes, as their daemons see them now."""
        found = []
        for daemon, name in ((self.guest.is_at, self.guest.runs.name), (self.guest.goes_to, self.guest.waits.name)):
            with daemon.client() as client:
                found.append(next((one["state"] for one in client.guests() if one["id"] == name), ""))
        return found[0], found[1]

    def _decided(self) -> str:
        """Never two that run."""
        here, there = self._states()
        assert (here, there) != ("running", "running"), "two owners"
        if there == "running" and here in ("", "waiting"):
            return "complete"
        return "here" if (here, there) == ("running", "waiting") else ""

    def _comes_to(self, condition: Callable[[], bool], what: str) -> None:
        try:
            until(condition, what, DECIDED_SECONDS)
        except AssertionError:
            raise AssertionError(f"no {what} for {self.guest.runs.name} in {self.id}: {self._told()}") from None

    def _told(self) -> str:
        return f"{self._states()}; {self.state_at(self.guest.is_at)} here, {self.state_at(self.guest.goes_to)} there"
