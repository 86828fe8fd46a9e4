"""The demo without any privilege: an ordinary user, no capability, and a userfaultfd for user-mode faults only.

Interpreter and packages may lie where nobody but root gets to (a clone below /root, 0700): the test runs in a mount
namespace of its own, in which each such folder is covered by an open one that holds only what the demo needs.
"""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEADLINE_SECONDS = 50.0
NOBODY = 65534
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

# Runs as the demo's own process before it becomes the demo: what it lacks, its children lack (no_new_privs).
BECOME_DEMO = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({name: value.split() for name, value in status.items()}), flush=True)
os.execv(sys.executable, [sys.executable, "-P", "-m", "migrate", "demo", "--memory", "128M", "--json"])
"""
DEMO = [sys.executable, "-P", "-c", BECOME_DEMO]
DROP_ALL = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"]
DROP_ALL += ["--bounding-set=-all", "--no-new-privs"]


def needed_folders() -> list[Path]:
    """What this interpreter is made of: its environment, its installation, and each hop of the links between them."""
    folders = [Path(sys.prefix), Path(sys.exec_prefix), Path(sys.base_prefix), Path(sys.base_exec_prefix)]
    hop = Path(sys.executable)
    while hop.is_symlink():
        hop = hop.parent / hop.readlink()
        folders.append(hop.parent)
    # Their outermost ones, by the names that they are used by and by those without links; /usr is open everywhere.
    named = {name for folder in folders for name in (Path(os.path.normpath(folder)), folder.resolve())}
    return sorted(name for name in named if not any(name != other and name.is_relative_to(other) for other in named))


def is_open(folder: Path) -> bool:
    return folder.stat().st_mode & (stat.S_IROTH | stat.S_IXOTH) == stat.S_IROTH | stat.S_IXOTH


def open_the_way(folders: list[Path]) -> str:
    """A script for a private mount namespace, after which anyone may read the folders. It stages them on a folder of
    the system's that none of them lies below, and leaves a scratch folder for anyone at ``$scratch``."""
    stage = next(
        stage
        for stage in map(Path, ("/mnt", "/media", "/srv", "/opt"))
        if stage.is_dir() and not any(folder.is_relative_to(stage) for folder in folders)
    )
    lines = [f"mount -t tmpfs -o mode=0755 none {stage}", f"scratch={stage}/scratch", 'mkdir -m 1777 "$scratch"']
    covers: dict[Path, list[tuple[Path, Path]]] = {}
    for number, folder in enumerate(folders):
        closed = next((above for above in reversed([folder, *folder.parents]) if not is_open(above)), None)
        if closed is None:
            continue
        staged = stage / str(number)
        source, place = shlex.quote(str(folder)), shlex.quote(str(staged))
        if is_open(folder):
            lines += [f"mkdir {place}", f"mount --bind {source} {place}"]
        else:  # made under a strict umask: nothing in it can be read either, so a copy of it
            lines += [f"cp --archive {source} {place}", f"chmod -R a+rX {place}"]
        covers.setdefault(closed, []).append((staged, folder))
    for closed, held in covers.items():
        lines.append(f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(closed))}")
        for staged, folder in held:
            place = shlex.quote(str(folder))
            lines += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(staged))} {place}"]
    return "\n".join(["umask 022", *lines])


def run_demo(command: list[str]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The process's own /proc/self/status and the demo's summary. The command's group is ended and reaped by the deadline."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert process.returncode == 0, f"status {process.returncode}\n{said}\n{complained}"
    status, _, summary = said.partition("\n")
    return json.loads(status), json.loads(summary)


def assert_moved(summary: dict[str, Any]) -> None:
    assert summary["migration"]["state"] == "complete"
    assert summary["guest"]["event"] == "verified"


@pytest.mark.requires("uffd", "root")
def test_demo_as_nobody_with_no_capability_left() -> None:
    namespaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    demo = shlex.join([*DROP_ALL, *DEMO])
    script = f'{open_the_way(needed_folders())}\ncd "$scratch"\nTMPDIR=$scratch HOME=$scratch exec {demo}\n'
    status, summary = run_demo([*namespaces, "sh", "-euc", script])
    assert set(status["Uid"] + status["Gid"]) == {str(NOBODY)}
    assert status["Groups"] == []
    assert {name: int(status[name][0], 16) for name in CAPABILITY_SETS} == dict.fromkeys(CAPABILITY_SETS, 0)
    assert status["NoNewPrivs"] == ["1"]
    assert_moved(summary)


@pytest.mark.requires("uffd")
def test_demo_as_whoever_runs_the_tests() -> None:
    status, summary = run_demo(DEMO)
    assert status["Uid"] == [str(os.geteuid())] * 4
    assert_moved(summary)
