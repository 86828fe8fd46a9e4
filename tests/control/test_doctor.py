"""`postcopy doctor` where nothing is in the way: its report, its shape, and that it leaves nothing behind."""

import json
import os
import pty
import shlex
import subprocess
from pathlib import Path

import pytest

from migrate import __version__, host
from migrate.errors import PostcopyError
from migrate.host import limits, trial
from migrate.host.product import ROWS
from migrate.host.report import Report
from migrate.pair import COMMAND, DaemonProcess, Pair

from ..path.commuter import until
from .obstacles import in_namespace

DEADLINE_SECONDS = 20
COLUMNS = 100
LITERALS = {
    "group": ["guests", "transport", "limits", "later"],
    "need": ["core", "used", "later"],
    "verdict": ["yes", "limited", "no"],
}
FIELDS = {
    "Report": "schema_version postcopy works features facts",
    "Finding": "id title group need verdict reason remedy",
    "Facts": "kernel user unprivileged_userfaultfd devices memory limits network clock_source",
    "Kernel": "release machine config soft_dirty",
    "User": "uid name group capabilities_effective capabilities_permitted capabilities_bounding no_new_privs seccomp "
    "security_module initial_user_namespace",
    "Device": "path exists owner group mode permitted misc_minor",
    "Memory": "total_bytes available_bytes shared_memory_bytes shared_memory_free_bytes shmem_huge_pages huge_pages",
    "Pages": "page_bytes total free reserved surplus overcommit nodes",
    "NodePages": "node total free surplus",
    "Limits": "open_files_soft open_files_hard locked_bytes cgroup",
    "CgroupLimit": "kind path value used",
    "Network": "congestion_control_default congestion_control_available congestion_control_allowed queueing_discipline_default",
}
"""What scripts may rely on. A name that goes, or changes its meaning, raises SCHEMA_VERSION."""
Ended = subprocess.CompletedProcess[str]


def run_doctor(*arguments: str) -> Ended:
    command = [*COMMAND, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)


@pytest.fixture(scope="module")
def as_json() -> Ended:
    return run_doctor("--json")


@pytest.fixture(scope="module")
def as_text() -> Ended:
    return run_doctor()


@pytest.mark.requires("uffd")
def test_core_works_here_and_the_status_says_so(as_json: Ended) -> None:
    report = Report.model_validate_json(as_json.stdout)
    assert (as_json.returncode, as_json.stderr) == (0, "")
    assert report.works
    assert [one.verdict for one in report.features if one.need == "core"] == ["yes"]
    assert [one.id for one in report.features] == [row.name for row in ROWS]
    assert report.postcopy == __version__


@pytest.mark.requires("uffd", "uffd-kernel", "root", "hugetlb", "shared-memory", "qemu")
def test_no_surprises_for_root(as_text: Ended) -> None:
    assert as_text.returncode == 0
    assert as_text.stdout.splitlines()[-1] == "No surprises: guests can be moved from here and to here."


def test_every_no_and_every_limit_has_one_remedy(as_json: Ended) -> None:
    for one in Report.model_validate_json(as_json.stdout).features:
        assert bool(one.remedy) == (one.verdict != "yes"), one
        assert one.reason, one
        assert "\n" not in one.reason + one.remedy, one


def test_doctor_and_requirements_say_the_same(as_json: Ended) -> None:
    """Of what does not move by itself, as free bytes and pages do."""
    steady = {"uffd", "uffd-kernel", "page-granularity", "congestion-control", "clock", "kvm", "qemu", "dirty-tracking", "poison"}
    told = {one.id: one for one in Report.model_validate_json(as_json.stdout).features}
    for name in steady:
        feature = host.feature(name)
        assert (feature.verdict, feature.reason, feature.remedy) == (told[name].verdict, told[name].reason, told[name].remedy)


def test_shape_is_what_is_documented(as_json: Ended) -> None:
    schema = Report.model_json_schema()
    found = {"Report": schema, **schema["$defs"]}
    assert {name: " ".join(one["properties"]) for name, one in found.items()} == FIELDS
    assert all(set(one["required"]) == set(one["properties"]) for one in found.values())
    finding = schema["$defs"]["Finding"]["properties"]
    assert {name: finding[name]["enum"] for name in LITERALS} == LITERALS
    told = json.loads(as_json.stdout)
    assert list(told) == FIELDS["Report"].split()
    assert told["schema_version"] == 1


def test_facts_are_those_of_this_machine(as_json: Ended) -> None:
    facts = Report.model_validate_json(as_json.stdout).facts
    assert facts.kernel.release == os.uname().release
    assert facts.user.uid == os.geteuid()
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    assert facts.user.capabilities_effective == status["CapEff"]
    assert str(facts.user.seccomp) == status["Seccomp"]
    for pool in facts.memory.huge_pages:
        assert Path(f"/sys/kernel/mm/hugepages/hugepages-{pool.page_bytes >> 10}kB").is_dir()
        assert pool.free <= pool.total
        assert pool.nodes, "every pool is somewhere"


def test_soft_dirty_is_believed_by_what_it_does(as_json: Ended) -> None:
    """clear_refs takes the request on every kernel; the trial agrees with the kernel's configuration where that is known."""
    kernel = Report.model_validate_json(as_json.stdout).facts.kernel
    assert kernel.config["CONFIG_MEM_SOFT_DIRTY"] in ("", "y" if kernel.soft_dirty else "n")


def test_text_in_a_pipe(as_text: Ended) -> None:
    """100 columns; only commands, indented under what they change, are as long as they are. No colours."""
    lines = as_text.stdout.splitlines()
    too_long = [line for line in lines if len(line) > COLUMNS and not line.startswith("    ")]
    assert too_long == []
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\x1b" not in as_text.stdout
    for row in ROWS:
        assert any(line.startswith(f"  {row.title}  ") for line in lines), row.title
    assert lines.count("nothing uses these yet") == 1


def test_text_on_a_terminal_has_colours() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([*COMMAND, "doctor"], stdin=subprocess.DEVNULL, stdout=theirs, env=environment) as child:
        os.close(theirs)
        told = b""
        try:
            while part := os.read(ours, 1 << 16):
                told += part
        except OSError:  # EIO: it has closed its end
            pass
        os.close(ours)
        assert child.wait(timeout=DEADLINE_SECONDS) in (0, 5)
    assert b"\x1b[32myes" in told


@pytest.mark.requires("uffd", "root")
def test_nothing_is_left_behind() -> None:
    """In a namespace where every place for files is empty: it still is afterwards, and so is the table of processes."""
    empty = "mount -t tmpfs none /dev/shm\nmount -t tmpfs none /run\nmkdir /run/temporary\nexport TMPDIR=/run/temporary\n"
    told = in_namespace(
        f"{empty}{shlex.join(COMMAND)} doctor >/dev/null\nfind /dev/shm /run -mindepth 1\nps -e -o comm=",
        namespaces=("--pid", "--fork", "--kill-child", "--mount-proc"),
    )
    assert sorted(told.split()) == ["/run/temporary", "ps", "sh"]


# ---- what it stands on ----


@pytest.mark.requires("uffd")
def test_descriptors_of_a_migration_are_as_the_limit_is_explained() -> None:
    def count(daemon: DaemonProcess) -> int:
        return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))

    with Pair() as pair, pair.source.client() as client:
        daemons = (pair.source, pair.destination)
        idle = [count(daemon) for daemon in daemons]
        assert all(number <= limits.DAEMON_DESCRIPTORS for number in idle), idle
        pair.guest(pair.destination, "there", "4M", "--no-verify", waiting=True)
        pair.guest(pair.source, "here", "4M", "--rate", "1").event("stepped")
        client.migrate("here", pair.destination.address, bulk=False)
        until(lambda: client.migrations()[0].state == "postcopy", "postcopy")
        added = [count(daemon) - before for daemon, before in zip(daemons, idle, strict=True)]
    assert all(limits.MIGRATION_DESCRIPTORS // 2 < number <= limits.MIGRATION_DESCRIPTORS for number in added), added


def test_trial_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial, "PROGRAM", tmp_path / "postcopy-trial")
    with pytest.raises(PostcopyError, match="expected the program that comes with the package"):
        trial.attempt("nothing of that name")


@pytest.mark.parametrize(
    ("what", "script", "outcome"),
    [
        pytest.param("fails", "echo UFFDIO_API 22; exit 1", trial.Outcome("UFFDIO_API", 22), id="says where it failed"),
        pytest.param("differs", "echo written-page 0; exit 1", trial.Outcome("written-page", 0), id="does something else"),
        pytest.param("dies", "kill -9 $$", trial.Outcome("killed by SIGKILL"), id="is killed"),
        pytest.param("is silent", "exit 1", trial.Outcome("exit status 1"), id="says nothing"),
        pytest.param("hangs", "exec sleep 60", trial.Outcome("no end within 0 s"), id="does not end"),
    ],
)
def test_trial_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, script: str, outcome: trial.Outcome) -> None:
    program = tmp_path / "postcopy-trial"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(trial, "PROGRAM", program)
    monkeypatch.setattr(trial, "DEADLINE_SECONDS", 0.3 if what == "hangs" else 10.0)
    found = trial.attempt(f"a program that {what}")
    assert found == outcome
    assert not found.works
