"""A pause of a KVM guest whose vCPU is stalled in a fault of the kernel: it ends in time, or says that it did not.

Which page is withheld decides: KVM's own mapping of a page can be interrupted (Linux 6.2), the walk through the guest's page
tables and what is emulated cannot.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.requires("uffd", "uffd-kernel", "kvm")
PROGRAM = Path(__file__).with_name("kvm_stall.py")
DEADLINE_SECONDS = 50
SHORT_SECONDS = 0.3  # the program's


def stalled(first: int, end: int) -> dict[str, Any]:
    command = [sys.executable, "-P", PROGRAM, str(first), str(end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_page_table_is_waited_for() -> None:
    """The deadline passes, the guest runs on; a longer pause ends when the page has come, and the guest is intact."""
    told = stalled(1, 2)
    assert told == {"page": 1, "paused_seconds": None, "failure": "None"}


def test_page_of_data_is_not() -> None:
    """At once, well before the page; resumed, the vCPU asks for it again, and the guest is intact."""
    told = stalled(3, 2048)
    assert told["page"] >= 3
    assert told["paused_seconds"] is not None
    assert told["paused_seconds"] < SHORT_SECONDS
    assert told["failure"] == "None"
