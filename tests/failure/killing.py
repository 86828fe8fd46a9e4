"""A move of a commuter whose daemons are killed on its way, and started anew."""

import signal
from types import TracebackType
from typing import Self

from migrate.errors import NotFoundError, PostcopyError
from migrate.pair import DaemonProcess, Pair
from migrate.session import MigrationStatus

from ..path.commuter import Commuter, until

DECIDED_SECONDS = 30.0


def slain(pair: Pair, daemon: DaemonProcess) -> DaemonProcess:
    """SIGKILL, and the next one: same runtime directory, same address."""
    daemon.signal(signal.SIGKILL)
    return pair.again(daemon)


class KilledMove:
    """``kill`` as often as wanted, then ``ends``."""

    def __init__(self, guest: Commuter, **options: str | float | bool) -> None:
        self.guest = guest
        with guest.is_at.client() as client:
            self.id = client.migrate(guest.guest_id, guest.goes_to.address, **options).id

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
        """SIGKILL, and only then the new ones: both are dead at once."""
        guest, pair = self.guest, self.guest.pair
        for daemon in [guest.is_at] * source + [guest.goes_to] * destination:
            daemon.signal(signal.SIGKILL)
        if source:
            guest.is_at = pair.again(guest.is_at)
        if destination:
            guest.goes_to = pair.again(guest.goes_to)

    def ends(self) -> str:
        """``complete``, the guest has checked itself at the other daemon; or ``here``, it runs where it was and can be moved."""
        guest = self.guest
        until(lambda: self._decided() != "", f"one place for {guest.guest_id}: {self._told()}", DECIDED_SECONDS)
        decided = self._decided()
        if decided == "complete":
            guest.arrived()
        else:
            until(guest.waiting_again, "the waiting guest waits again")
        return decided

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

    def _told(self) -> str:
        return f"{self._states()}; {self.state_at(self.guest.is_at)} here, {self.state_at(self.guest.goes_to)} there"
