"""Settings: command line first, then the environment (``POSTCOPY_…``), then these defaults."""

import grp
import os
import stat
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

from migrate.errors import HostLacksError
from migrate.host.sentences import runtime_directory_refused

PRIVATE = 0o700
OPEN_TO_GROUP = 0o750  # entered and listed by members, written by us alone


class Settings(BaseSettings):
    """``POSTCOPY_RUNTIME_DIR``: where daemons keep their sockets. ``POSTCOPY_LOG_LEVEL``: debug, info, warning, error."""

    model_config = SettingsConfigDict(env_prefix="POSTCOPY_")

    runtime_dir: Path | None = None
    log_level: str = "info"


def runtime_base() -> Path:
    """POSTCOPY_RUNTIME_DIR, XDG_RUNTIME_DIR/postcopy, or /tmp/postcopy-UID (TMPDIR, if set, for /tmp)."""
    settings = Settings()
    if settings.runtime_dir is not None:
        return settings.runtime_dir
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    if xdg:
        return Path(xdg) / "postcopy"
    # Not tempfile.gettempdir(): it goes by what can be written now and ends at the current directory, so two would not meet.
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"postcopy-{os.getuid()}"


def default_runtime_dir(role: str) -> Path:
    return runtime_base() / role


def make_private(directory: Path, group_id: int | None = None) -> None:
    """A 0700 directory of ours; with a group 0750, its members may enter. Raises HostLacksError when it is
    somebody else's or cannot be made, or the group is not one of ours."""
    base = runtime_base()
    if directory.parent == base:  # ours alone too: who owns the parent can put another directory in its place
        _make_own(base)
        if group_id is not None:
            share_with_group(base, group_id, OPEN_TO_GROUP)
        elif stat.S_IMODE(base.stat().st_mode) != OPEN_TO_GROUP:  # so another daemon's group, if any, still comes through
            base.chmod(PRIVATE)
    _make_own(directory)
    if group_id is None:
        directory.chmod(PRIVATE)
    else:
        share_with_group(directory, group_id, OPEN_TO_GROUP)


def socket_group_id(group: str) -> int:
    """Of a group's name or number. Raises HostLacksError for a name that there is not."""
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        why = f"there is no group {group}"
        raise HostLacksError("socket group", why, f"make it (groupadd --system {group}), or name another") from None


def share_with_group(path: Path, group_id: int, mode: int) -> None:
    """Raises HostLacksError when the group is not one of this process's."""
    try:
        if path.stat().st_gid != group_id:
            os.chown(path, -1, group_id)
    except (PermissionError, OverflowError) as error:
        why = f"this process is no member of group {group_id} ({error})"
        remedy = "add it (SupplementaryGroups= in a systemd unit, else usermod --append --groups), or name another --socket-group"
        raise HostLacksError("socket group", why, remedy) from error
    path.chmod(mode)


def _make_own(directory: Path) -> None:
    try:
        directory.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        refused = runtime_directory_refused(directory, error_number=error.errno or 0)
        raise HostLacksError("runtime directory", *refused) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise HostLacksError("runtime directory", *runtime_directory_refused(directory, uid=status.st_uid))
