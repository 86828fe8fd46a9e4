"""README's "Your own VM", as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.host.suite import ADMINISTRATOR_PATH
from migrate.pair import COMMAND

SECTION = "\n## Your own VM\n"
DEADLINE_SECONDS = 80.0


@pytest.mark.requires("uffd-full", "qemu", "root", "netns")
@pytest.mark.timeout(100)
def test_five_lines_move_a_machine(repository: Path, tmp_path: Path) -> None:
    """In a network namespace of its own, where the ports that it names are free, and gone with its process namespace. There is
    nothing on its disk: what runs is the firmware, which looks for something to boot."""
    section = (repository / "README.md").read_text().split(SECTION)[1].split("\n## ")[0]
    block = [line.removeprefix("    ") for line in section.splitlines() if line.startswith("    ")]
    assert len(block) == 5
    (tmp_path / "vm.img").write_bytes(bytes(1 << 20))
    script = "\n".join(["ip link set lo up", *block, "postcopy list --daemon destination"])
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), ADMINISTRATOR_PATH]),
            "POSTCOPY_RUNTIME_DIR": str(tmp_path),
            "TMPDIR": str(tmp_path),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^state +complete", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^downtime +[0-9.]+ ms, as the guest saw it", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"vm +│ running │ 512 MiB of 4 KiB pages", done.stdout), done.stdout


@pytest.mark.requires("uffd-full", "linux-guest")
@pytest.mark.timeout(100)
def test_demo(repository: Path) -> None:
    command = [*COMMAND, "demo", "--guest", "qemu", "--memory", "160M"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "guest verified: no bad page, no error of its disk, none of " in done.stdout
