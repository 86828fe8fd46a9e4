"""Settings: command line first, then the environment (``POSTCOPY_…``), then these defaults."""

import os
import stat
import tempfile
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

from migrate.errors import HostLacksError
from migrate.host.sentences import runtime_directory_refused


class Settings(BaseSettings):
    """``POSTCOPY_RUNTIME_DIR``: where daemons keep their sockets. ``POSTCOPY_LOG_LEVEL``: debug, info, warning, error."""

    model_config = SettingsConfigDict(env_prefix="POSTCOPY_")

    runtime_dir: Path | None = None
    log_level: str = "info"


def runtime_base() -> Path:
    """POSTCOPY_RUNTIME_DIR, XDG_RUNTIME_DIR/postcopy, or /tmp/postcopy-UID."""
    settings = Settings()
    if settings.runtime_dir is not None:
        return settings.runtime_dir
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    return Path(xdg) / "postcopy" if xdg else Path(tempfile.gettempdir()) / f"postcopy-{os.getuid()}"


def default_runtime_dir(role: str) -> Path:
    return runtime_base() / role


def make_private(directory: Path) -> None:
    """A 0700 directory of ours. Raises HostLacksError when it is somebody else's or cannot be made."""
    base = runtime_base()
    if directory.parent == base:  # ours alone too: who owns the parent can put another directory in its place
        _make_own(base)
    _make_own(directory)


def _make_own(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        refused = runtime_directory_refused(directory, error_number=error.errno or 0)
        raise HostLacksError("runtime directory", *refused) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise HostLacksError("runtime directory", *runtime_directory_refused(directory, uid=status.st_uid))
    directory.chmod(0o700)
