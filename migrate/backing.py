"""The waiting guest's memory around a migration: emptied before it, backed for it, emptied again when it came to nothing."""

from migrate.control import ControlConnection
from migrate.dataplane import DestinationPlane
from migrate.errors import PostcopyError
from migrate.guest_link import GuestLink, GuestState
from migrate.room import no_huge_pages
from migrate.session import Migration


async def empty(migration: Migration, plane: DestinationPlane) -> None:
    """Nothing is in the guest's memory but what this migration brings. Raises DataPlaneError."""
    result = await migration.on_own_thread("clean", plane.clean)
    migration.join_loops()
    if result.reason != "finished":
        raise result.error()


async def back(migration: Migration, plane: DestinationPlane, guest: GuestLink, control: ControlConnection) -> None:
    """Its huge pages are here. Raises NoRoomError, or what ended the migration meanwhile."""
    if all(region.page_bytes == 4096 for region in guest.regions):
        return
    result = await control.beside(migration.on_own_thread("room", plane.back))
    if result.reason != "finished":
        raise no_huge_pages(guest.regions, result.error_number) or result.error()


async def give_back(migration: Migration, plane: DestinationPlane | None, guest: GuestLink) -> None:
    """A guest whose migration did not happen waits for another one, with nothing of this one in its memory."""
    try:
        if plane is not None:
            await empty(migration, plane)
        guest.state = GuestState.WAITING
    except PostcopyError as error:
        guest.state = GuestState.LOST
        migration.log.error("the waiting guest could not be emptied: restart it", reason=str(error))
