"""``python -P -m migrate.api > migrate/api/openapi.json``: the document anew, from the code that is installed."""

import sys
from pathlib import Path

from migrate.api import build_api
from migrate.api.document import text_of
from migrate.daemon import Daemon

if __name__ == "__main__":
    daemon = Daemon("source", Path(), listen_at=None, metrics_at=None, insecure=False)
    sys.stdout.write(text_of(build_api(daemon)))
