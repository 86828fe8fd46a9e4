"""Guests that are attached to this daemon."""

from typing import TYPE_CHECKING

from fastapi import APIRouter

from migrate.api.models import GuestInfo, RegionInfo, ResolveRequest
from migrate.api.problems import refusals
from migrate.region import shape_text

if TYPE_CHECKING:
    from migrate.daemon import Daemon
    from migrate.guest_link import GuestLink


def guest_info(daemon: "Daemon", guest: "GuestLink") -> GuestInfo:
    migration = daemon.migration_of(guest)
    return GuestInfo(
        id=guest.guest_id,
        state=guest.state,
        size_bytes=guest.size_bytes,
        shape=shape_text(guest.shape),
        regions=[RegionInfo(size_bytes=size_bytes, page_bytes=page_bytes) for size_bytes, page_bytes in guest.shape],
        pid=guest.pid,
        migration_id=None if migration is None else migration.id,
    )


def add_routes(routes: APIRouter, daemon: "Daemon") -> None:
    @routes.get(
        "/v1/guests",
        tags=["guests"],
        operation_id="listGuests",
        summary="All attached guests",
        response_description="In the order in which they attached.",
        responses=refusals({}),
    )
    async def guests() -> list[GuestInfo]:
        return [guest_info(daemon, guest) for guest in daemon.guests.values()]

    @routes.get(
        "/v1/guests/{guest_id}",
        tags=["guests"],
        operation_id="getGuest",
        summary="One guest",
        response_description="The guest.",
        responses=refusals({404: ("not-found", "No guest of that id is attached."), 422: ("request-invalid", "The path.")}),
    )
    async def guest(guest_id: str) -> GuestInfo:
        found = daemon.guests.get(guest_id)
        if found is None:
            raise daemon.no_such_guest(guest_id)
        return guest_info(daemon, found)

    @routes.post(
        "/v1/guests/{guest_id}/resolve",
        tags=["guests"],
        operation_id="resolveGuest",
        summary="Decide where a paused guest runs",
        response_description="As it is at this moment.",
        responses=refusals(
            {
                400: ("request-malformed", "The body is not JSON."),
                404: ("not-found", "No guest of that id is attached, or leaves without its process."),
                409: (
                    "not-resolvable",
                    "It is neither paused nor stalled, its destination has said that it runs there, or its process has ended.",
                ),
                413: ("request-too-large", "The body."),
                415: ("media-type", "The body is not declared as application/json."),
                422: ("request-invalid", "The path, or the body."),
            }
        ),
    )
    async def resolve(guest_id: str, request: ResolveRequest) -> GuestInfo:
        """For a guest of which it cannot be learned whether its destination has resumed it. Whoever decides answers for
        it: no guest may run at two places."""
        return guest_info(daemon, daemon.resolve(guest_id, here=request.runs == "here"))
