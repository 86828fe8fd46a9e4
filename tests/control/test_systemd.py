"""The units: accepted and rated by systemd's own tools, at one with the code, and daemons that run under what they forbid."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from typer.main import get_command

from migrate import pair
from migrate.cli import daemons
from migrate.descriptor_store import StoredName
from proto.messages import REGIONS_MAX, Refused, encode
from proto.states import Role

from ..failure.fakes import FakeGuest
from ..guests.test_unprivileged import CAPABILITY_SETS, NOBODY, needed_folders, open_the_way
from .service_manager import ServiceManager
from .unit_file import allowed_calls, analyze, value, values

ROLES = ("source", "destination")
EXPOSURE_MAX = 1.5
MEMBERS = 65123  # a group of nobody's in the confined run, and of the sockets there
RUN_DEADLINE_SECONDS = 40.0
ENVIRONMENT_VARIABLE_BYTES_MAX = 128 << 10  # MAX_ARG_STRLEN, include/uapi/linux/binfmts.h


@pytest.fixture(scope="session")
def units(repository: Path) -> dict[str, Path]:
    return {role: repository / f"deploy/systemd/postcopy-{role}.service" for role in ROLES}


def installed(unit: Path, directory: Path, change: tuple[str, str] = ("", "")) -> Path:
    """A copy that starts the command that is here."""
    text = unit.read_text().replace("ExecStart=/opt/postcopy/bin/", f"ExecStart={Path(sys.prefix) / 'bin'}/")
    old, new = change
    assert old in text
    copy = directory / unit.name
    copy.write_text(text.replace(old, new) if old else text)
    return copy


# --- systemd's own tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_unit_is_accepted_without_a_word(units: dict[str, Path], tmp_path: Path, role: str) -> None:
    done = analyze("verify", installed(units[role], tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("RestrictRealtime=", "RestrictRealtim="), "'RestrictRealtim' in section"),
        (("WatchdogSec=30s", "WatchdogSec=often"), "ignoring: often"),
    ],
    ids=["name", "value"],
)
def test_mistake_is_seen(units: dict[str, Path], tmp_path: Path, change: tuple[str, str], said: str) -> None:
    assert said in analyze("verify", installed(units["source"], tmp_path, change)).stderr


def test_drop_in_that_keeps_descriptors_over_a_stop(units: dict[str, Path], repository: Path, tmp_path: Path) -> None:
    unit = installed(units["source"], tmp_path)
    drop_ins = tmp_path / f"{unit.name}.d"
    drop_ins.mkdir()
    (drop_ins / "preserve.conf").write_text((repository / "deploy/systemd/preserve.conf").read_text())
    version = re.match(r"systemd (\d+)", analyze("--version").stdout)
    assert version is not None
    said = analyze("verify", unit).stderr
    if int(version[1]) >= 254:
        assert said == ""
    else:
        assert re.fullmatch(r".*: Unknown key.* 'FileDescriptorStorePreserve' in section .*, ignoring\.\n", said)


def exposure(unit: Path) -> float:
    """0 (confined) to 10, as systemd rates it."""
    done = analyze("security", "--offline=true", unit)
    assert done.returncode == 0, done.stderr
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d) ", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


@pytest.mark.parametrize("role", ROLES)
def test_exposure(units: dict[str, Path], role: str) -> None:
    assert exposure(units[role]) <= EXPOSURE_MAX


@pytest.mark.parametrize("line", ["CapabilityBoundingSet=\n", "RestrictNamespaces=yes\n", "IPAddressDeny=any\n"])
def test_what_is_left_open_is_rated(units: dict[str, Path], tmp_path: Path, line: str) -> None:
    assert exposure(installed(units["source"], tmp_path, (f"\n{line}", "\n"))) > exposure(units["source"])


# --- at one with the code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_command_line_is_one_that_the_daemon_takes(units: dict[str, Path], role: str) -> None:
    path, command, *options = value(units[role], "ExecStart").split()
    assert (path, command) == ("/opt/postcopy/bin/postcopy", role)
    assert options.pop() == "$OPTIONS"
    assert value(units[role], "Environment") == "OPTIONS="
    assert value(units[role], "EnvironmentFile") == f"-/etc/postcopy/{role}.env"
    app = typer.Typer()
    daemons.register(app, app)
    command_line = get_command(app).commands[role]
    assert command_line.make_context(role, list(options)).params["socket_group"] == "postcopy"
    with pytest.raises(Exception, match="No such option: --no-such-option"):
        command_line.make_context(role, [*options, "--no-such-option"])


@pytest.mark.parametrize("role", ROLES)
def test_paths_and_group_agree(units: dict[str, Path], repository: Path, role: str) -> None:
    unit = units[role]
    options = value(unit, "ExecStart").split()
    assert options[options.index("--runtime-dir") + 1] == f"%t/{value(unit, 'RuntimeDirectory')}" == f"%t/postcopy/{role}"
    group = options[options.index("--socket-group") + 1]
    assert group == value(unit, "SupplementaryGroups")
    assert f"\ng {group} -\n" in (repository / "deploy/systemd/postcopy.sysusers.conf").read_text()


@pytest.mark.parametrize("role", ROLES)
def test_reload_is_the_signal_that_has_files_read_anew(units: dict[str, Path], role: str) -> None:
    """Not Type=notify-reload, which systemd before 253 does not know. What is said meanwhile: test_notify.py."""
    assert (value(units[role], "Type"), value(units[role], "ExecReload")) == ("notify", "/bin/kill -HUP $MAINPID")


def test_both_units_forbid_the_same(units: dict[str, Path]) -> None:
    source, destination = (units[role].read_text().split("[Service]")[1] for role in ROLES)
    assert re.sub(r"\bsource\b", "destination", source) == destination


def test_names_of_all_stored_descriptors_fit_one_variable(units: dict[str, Path]) -> None:
    longest = StoredName(Role.DESTINATION, "f" * 32, f"memory-{REGIONS_MAX - 1}", "g" * 64)
    names_bytes = int(value(units["source"], "FileDescriptorStoreMax")) * (len(str(longest)) + 1) + len("LISTEN_FDNAMES=")
    assert names_bytes < ENVIRONMENT_VARIABLE_BYTES_MAX


def test_addresses_are_those_of_the_default(units: dict[str, Path]) -> None:
    """What the unit lets through is what the daemon binds unless told otherwise."""
    assert [values(units["source"], name) for name in ("IPAddressDeny", "IPAddressAllow")] == [["any"], ["localhost"]]
    for address in (daemons.SOURCE_METRICS, daemons.DESTINATION_METRICS, daemons.DESTINATION_LISTEN):
        assert address.startswith("127.0.0.1:")


# --- daemons that are confined --------------------------------------------------------------------------------------


def build_confined(unit: Path, repository: Path, directory: Path, *, without: str = "") -> Path:
    """The launcher for this unit; ``without``: with one system call fewer."""
    calls = allowed_calls(unit)
    assert not without or without in calls
    lines = [f"#ifdef __NR_{name}\n__NR_{name},\n#endif\n" for name in sorted(calls - {without})]  # those of this machine
    (directory / "allowed_calls.h").write_text("".join(lines))
    (directory / "allowed_families.h").write_text(",\n".join(value(unit, "RestrictAddressFamilies").split()))
    program = directory / "confined"
    source = repository / "tests/control/confined_main.c"
    options = ["-std=gnu11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{directory}"]
    subprocess.run(["cc", *options, "-o", program, source], check=True, timeout=30)
    return program


# In a namespace of its own, as nobody: both daemons behind the launcher, a guest of all three kinds of memory beside them.
MOVE = """
import json, sys
from pathlib import Path
from unittest import mock
import httpx
from migrate import pair

launcher, group = sys.argv[1:]
memory = ["2M:hugetlb", "--memory", "2M", "--memory", "1M:tmpfs", "--stay"]

class ConfinedPair(pair.Pair):
    def daemon(self, role):
        with mock.patch.object(pair, "COMMAND", (launcher, *pair.COMMAND)):
            return super().daemon(role)

with ConfinedPair(arguments=["--socket-group", group]) as two:
    there = two.guest(two.destination, "there", *memory, waiting=True)
    here = two.guest(two.source, "here", *memory)
    here.event("stepped")
    state = two.move("here", two.source, two.destination).state
    back = there.event("verified", "failed") if state == "complete" else {}
    metrics = httpx.get(f"http://{two.destination.metrics_address}/metrics", trust_env=False).text
    said = {"state": state, "guest": back, "faults": "postcopy_fault_latency_seconds_count" in metrics, "daemons": []}
    for daemon in (two.source, two.destination):
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        sock = (daemon.runtime_dir / "api.sock").stat()
        said["daemons"].append({
            "status": {name: words.split() for name, words in (line.split(":", 1) for line in status.splitlines())},
            "socket": [oct(sock.st_mode & 0o777), sock.st_gid],
        })
        said["log"] = daemon.log()
    print(json.dumps(said))
"""


def run_in_namespace(script: str) -> dict[str, Any]:
    """What MOVE prints. The group of processes is ended by the deadline; nothing of the mounts is left."""
    namespaces = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        [*namespaces, "sh", "-euc", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, complained = process.communicate(timeout=RUN_DEADLINE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{said}\n{complained}"
    answer: dict[str, Any] = json.loads(said)
    return answer


@pytest.mark.requires("uffd", "hugetlb", "root")
def test_guest_moves_between_confined_daemons(units: dict[str, Path], repository: Path, tmp_path: Path) -> None:
    confined = build_confined(units["source"], repository, tmp_path)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={MEMBERS}", "--inh-caps=-all", "--ambient-caps=-all"]
    drop += ["--bounding-set=-all", "--no-new-privs", sys.executable, "-P", "-c", MOVE]
    script = f"""{open_the_way(needed_folders())}
install --mode=755 {shlex.quote(str(confined))} "$scratch/confined"
cd "$scratch"
TMPDIR=$scratch HOME=$scratch exec {shlex.join(drop)} "$scratch/confined" {MEMBERS}
"""
    said = run_in_namespace(script)
    assert said["state"] == "complete", said["log"]
    assert said["guest"]["event"] == "verified"
    assert said["faults"]
    for daemon in said["daemons"]:
        status = daemon["status"]
        assert set(status["Uid"] + status["Gid"]) == {str(NOBODY)}
        assert {name: int(status[name][0], 16) for name in CAPABILITY_SETS} == dict.fromkeys(CAPABILITY_SETS, 0)
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        assert daemon["socket"] == ["0o660", MEMBERS]


def refusal_by(launcher: Path, directory: Path) -> Refused:
    """Of a guest that attaches to a daemon behind the launcher."""
    options = ["--runtime-dir", str(directory / "runtime"), "--metrics", "off"]
    with ServiceManager(directory / "notify") as manager, FakeGuest("web", "running") as guest:
        with mock.patch.object(pair, "COMMAND", (str(launcher), *pair.COMMAND)):
            daemon = pair.Process("confined", ["source", *options], directory / "log", {"NOTIFY_SOCKET": manager.address})
        try:
            manager.until_told(READY="1")
            guest.connect(directory / "runtime" / "guests.sock")
            guest.send(encode(guest.hello()), guest.descriptors())
            return guest.connection.refused()
        finally:
            daemon.kill()


@pytest.mark.requires("uffd")
def test_call_that_is_not_allowed_is_missed(units: dict[str, Path], repository: Path, tmp_path: Path) -> None:
    """So the launcher confines, and the move above shows that all that is needed is allowed."""
    refused = refusal_by(build_confined(units["source"], repository, tmp_path, without="fstatfs"), tmp_path)
    assert refused.got == "[Errno 1] fstatfs"
