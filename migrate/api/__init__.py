"""The HTTP API on the daemon's unix socket: guests, migrations, events, the daemon. Every error is a problem (RFC 9457).

The document of it is openapi.json in this folder, served as it lies there: making it anew would cost the control loop tens of
milliseconds. ``python -P -m migrate.api`` makes it from the code, and tests/control/test_api_document.py compares.
"""

from typing import TYPE_CHECKING

from fastapi import FastAPI

from migrate import __version__
from migrate.api import daemon_routes, guests, migrations, streams
from migrate.api.document import DESCRIPTION, served
from migrate.api.guard import Guard
from migrate.api.problems import add_handlers

if TYPE_CHECKING:
    from migrate.daemon import Daemon


def build_api(daemon: "Daemon") -> FastAPI:
    app = FastAPI(
        title="postcopy daemon",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    add_handlers(app)
    for module in (guests, migrations, streams, daemon_routes):
        module.add_routes(app.router, daemon)
    app.add_api_route("/openapi.json", served, include_in_schema=False)
    app.add_middleware(Guard, daemon=daemon)
    return app
