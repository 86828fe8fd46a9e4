"""The command line as operators and scripts use it: output, JSON, exit codes, progress."""

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from migrate import __version__
from migrate.cli import EXIT_CODES
from migrate.cli.migrations import result_code, rounds_of
from migrate.client import DaemonClient
from migrate.daemon_paths import API_SOCKET
from migrate.errors import DaemonUnreachableError, PostcopyError
from migrate.guest.memory import MemorySpec
from migrate.pair import COMMAND, Pair
from migrate.session import MigrationStatus
from proto.messages import Cancel, Prepared, Refused, Running
from proto.states import State

from ..failure.fakes import FakeDestination, FakeGuest
from ..path.commuter import Commuter, until

pytestmark = pytest.mark.requires("uffd")
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def commuter(pair: Pair) -> Commuter:
    return Commuter(pair, "cli", "4M", options=("--rate", "5000"))


def at(commuter: Commuter) -> tuple[str, str]:
    return "--daemon", str(commuter.is_at.runtime_dir)


def test_version(cli: Cli) -> None:
    run = cli("--version")
    assert (run.returncode, run.stdout) == (0, f"postcopy {__version__}\n")


def test_exit_codes_are_what_is_documented() -> None:
    assert EXIT_CODES == {
        "failed": 1,
        "usage": 2,
        "migration-failed": 3,
        "migration-stalled": 4,
        "host-lacks": 5,
        "daemon-unreachable": 6,
        "guest-failed": 7,
        "bound-missed": 8,
    }


@pytest.mark.parametrize("arguments", [("migrate",), ("fly",), ("list", "--colour"), ("guest", "workload")], ids=" ".join)
def test_wrong_command_line_is_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    run = cli(*arguments)
    assert run.returncode == 2
    assert run.stderr != ""


def test_wrong_pattern_is_2_and_names_those_there_are(cli: Cli) -> None:
    run = cli("guest", "workload", "--memory", "1M", "--pattern", "spiral")
    assert run.returncode == 2
    assert "sequential, random, zipf, chase, permute, got spiral" in run.stderr


WRONG_VALUES = {
    "an id of two words": (("guest", "workload", "--memory", "1M", "--id", "a b"), "letters, digits and . _ -", "'a b'"),
    "an id of 65": (("guest", "workload", "--memory", "1M", "--id", "a" * 65), "1 to 64 letters", repr("a" * 65)),
    "QEMU, before it starts": (("guest", "qemu", "--id", "x y", "--", "no-such-program"), "1 to 64 letters", "'x y'"),
    "65 regions": (("guest", "workload", *["--memory", "1M"] * 65), "at most 64 regions", "65"),
    "no port": (("migrate", "web", "nowhere"), "HOST:PORT", "nowhere"),
    "no guest's id": (("migrate", "../x", "127.0.0.1:1"), "1 to 64 letters", "'../x'"),
    "no congestion control": (("source", "--congestion-control", "nosuch"), "reno", "'nosuch'"),
    "no log level": (("list",), "debug, info, warning, error", "loud"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_value_is_2_in_one_line(cli: Cli, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected, got = WRONG_VALUES[case]
    if case == "no log level":
        monkeypatch.setenv("POSTCOPY_LOG_LEVEL", "loud")
    run = cli(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(rf"postcopy: .+: expected .*{re.escape(expected)}.*, got {re.escape(got)}\n", run.stderr), run.stderr


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("status", "0"), ("cancel", "0"), ("limit", "0", "1M"), ("migrate", "guest", "[::1]:1")],
    ids=" ".join,
)
def test_no_daemon_is_6(cli: Cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = cli(*arguments, "--daemon", str(tmp_path))
    assert run.returncode == 6
    assert run.stderr.startswith(f"postcopy: daemon at {tmp_path}: expected one that answers")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""


def test_daemon_that_does_not_answer_is_not_one_to_start(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, DaemonClient(tmp_path) as client, ThreadPoolExecutor(1) as other:
        listener.bind(str(tmp_path / API_SOCKET))
        listener.listen()
        listener.settimeout(20)
        ended = other.submit(lambda: listener.accept()[0].close())
        with pytest.raises(DaemonUnreachableError, match="its log tells what it lacks"):
            client.guests()
        ended.result()


def test_too_little_memory_is_5_and_names_the_remedy(cli: Cli) -> None:
    run = cli("guest", "workload", "--memory", "4T:hugetlb")
    assert run.returncode == 5
    remedy = re.search(r"; sysctl vm\.nr_hugepages=(\d+)$", run.stderr.strip())
    assert remedy is not None, run.stderr
    assert int(remedy[1]) >= 2097152  # and those of others, which stay


def test_migrate_says_it_all_as_json(cli: Cli, commuter: Commuter) -> None:
    run = cli("migrate", commuter.guest_id, commuter.goes_to.address, "--json", *at(commuter))
    assert run.returncode == 0
    assert run.stderr == ""
    status = MigrationStatus.model_validate_json(run.stdout)
    assert status.state == "complete"
    assert status.pages_done == status.pages_total == 1024
    assert status.guest_id == commuter.guest_id
    left = commuter.is_at
    commuter.arrived()
    for daemon, role in ((left, "source"), (commuter.is_at, "destination")):
        again = cli("status", status.id[:12], "--json", "--daemon", str(daemon.runtime_dir))
        assert again.returncode == 0
        assert MigrationStatus.model_validate_json(again.stdout).role == role
    assert cli("status", "nothing", *at(commuter)).returncode == 1


def test_migrate_tells_how_it_goes_in_lines(cli: Cli, commuter: Commuter) -> None:
    run = cli("migrate", commuter.guest_id, commuter.goes_to.address, "--precopy", "2", *at(commuter))
    assert run.returncode == 0
    first = run.stderr.splitlines()[0]
    for word in ("/1024 pages", "MB/s", "faults", "ETA"):
        assert word in first
    told = (
        "migration",
        "downtime",
        "2 rounds, ",
        " pages stale, known ",
        "2 rounds were asked for",
        "moved",
        "total time",
        "urgent",
        "bulk",
        "zero",
        "precopy of 1024",
    )
    for word in told:
        assert word in run.stdout
    commuter.arrived()


def test_migrate_without_precopy_tells_of_its_faults(cli: Cli, commuter: Commuter) -> None:
    run = cli("migrate", commuter.guest_id, commuter.goes_to.address, "--precopy", "off", *at(commuter))
    assert run.returncode == 0
    for word in ("remote faults", "p50", "p99", "max", "no precopy was asked for", "0 precopy of 1024"):
        assert word in run.stdout
    commuter.arrived()


@pytest.mark.parametrize("rounds", ["0", "1001", "-1", "3.0", "some"])
def test_wrong_number_of_rounds_names_what_there_is(rounds: str) -> None:
    with pytest.raises(PostcopyError, match="--precopy: expected auto, off, or 1 to 1000 rounds, got") as raised:
        rounds_of(rounds)
    assert raised.value.code == "usage"


@pytest.mark.parametrize("memory", ["1.5G", "-1", "0", "5K", "1G:foo", "1M:hugetlb", "2049T", "1M\n", "٣M", "9" * 30])
def test_memory_that_cannot_be_is_wrong_usage(memory: str) -> None:
    with pytest.raises(PostcopyError, match="memory") as raised:
        MemorySpec.parse(memory)
    assert raised.value.code == "usage"


def test_endless_deadline_is_wrong_usage(cli: Cli, commuter: Commuter) -> None:
    run = cli("migrate", commuter.guest_id, commuter.goes_to.address, "--deadline", "inf", *at(commuter))
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_unsettled_migration_is_not_said_to_run_on_at_the_source(commuter: Commuter) -> None:
    settled = commuter.move()
    states = {"complete": 0, "stalled": 4, "failed": 3, "cancelled": 3}
    assert {state: result_code(settled.model_copy(update={"state": State(state)})) for state in states} == states
    assert result_code(settled.model_copy(update={"state": State.POSTCOPY, "settled": False})) == 6


def test_migration_id_stays_one_segment_of_its_path(commuter: Commuter) -> None:
    with commuter.is_at.client() as client:
        for typed in ("..", "../guests", "a/b", "a?b", "a#b", ""):
            with pytest.raises(PostcopyError, match="expected an id that `postcopy list` shows") as raised:
                client.status(typed)
            assert raised.value.code == "not-found"


def test_migrate_draws_a_bar_on_a_terminal(commuter: Commuter) -> None:
    """Standard error is a terminal of its own; what is drawn there is taken away again at the end."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "migrate", commuter.guest_id, commuter.goes_to.address, *at(commuter)]
    environment = {**os.environ, "TERM": "xterm"}
    drawn = b""
    with started(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        while part := read_terminal(ours):
            drawn += part
        out, _ = child.communicate(timeout=10)
    os.close(ours)
    assert child.returncode == 0
    assert b"complete" in out
    text = drawn.decode()
    assert "━" in text
    assert "pages" in text
    assert "\x1b[2K" in text
    commuter.arrived()


@contextlib.contextmanager
def started(command: list[str], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A command that runs beside the test, ended and reaped with it."""
    with subprocess.Popen(command, **how) as child:
        try:
            yield child
        finally:
            child.kill()


def read_terminal(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # EIO: nobody has the other end any more
        return b""


def test_list(cli: Cli, commuter: Commuter) -> None:
    run = cli("list", "--json", *at(commuter))
    assert run.returncode == 0
    told = json.loads(run.stdout)
    guest = next(one for one in told["guests"] if one["id"] == commuter.guest_id)
    assert guest == {
        "id": commuter.guest_id,
        "state": "running",
        "size_bytes": 4 << 20,
        "shape": "4 MiB of 4 KiB pages",
        "regions": [{"size_bytes": 4 << 20, "page_bytes": 4096}],
        "pid": commuter.runs.pid,
        "migration_id": None,
    }
    assert told["migrations"]
    for migration in told["migrations"]:
        MigrationStatus.model_validate(migration)
    text = cli("list", *at(commuter))
    assert text.returncode == 0
    assert commuter.guest_id in text.stdout
    assert told["migrations"][0]["id"][:12] in text.stdout


def test_failed_migration_is_3_and_the_guest_stays(cli: Cli, commuter: Commuter) -> None:
    with FakeDestination() as nobody:
        address = nobody.address
    run = cli("migrate", commuter.guest_id, address, *at(commuter))
    assert run.returncode == 3
    assert "failed" in run.stdout
    assert "connecting to" in run.stdout
    as_json = cli("migrate", commuter.guest_id, address, "--json", *at(commuter))
    assert as_json.returncode == 3
    assert json.loads(as_json.stdout)["error"]["code"] == "connection-failed"
    commuter.move()


def test_unknown_guest_is_1(cli: Cli, commuter: Commuter) -> None:
    run = cli("migrate", "nobody", "127.0.0.1:1", *at(commuter))
    assert run.returncode == 1
    assert f"expected one of {commuter.guest_id}, got no such guest" in run.stderr


def test_stalled_migration_is_4(cli: Cli, pair: Pair) -> None:
    with FakeGuest("stalls", "running") as guest, FakeDestination() as fake:
        guest.attach(pair.source.runtime_dir / "guests.sock")
        command = [*COMMAND, "migrate", "stalls", fake.address, "--daemon", str(pair.source.runtime_dir)]
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            fake.prepare(guest)
            fake.control.send(Prepared())
            guest.pauses()
            fake.control.send(Running(epoch=0))
            fake.control.send(Refused(code="failed", what="the destination", expected="to go on", got="its end"))
            out, _ = child.communicate(timeout=20)
    assert child.returncode == 4
    assert "stalled" in out


@pytest.mark.parametrize(("options", "code"), [((), 1), (("--yes",), 6)], ids=["asks", "does not"])
def test_resolve_asks_on_a_terminal(tmp_path: Path, options: tuple[str, ...], code: int) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    command = [*COMMAND, "resolve", "web", "--here", "--daemon", str(tmp_path), *options]
    run = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=20, check=False)
    os.close(ours)
    os.close(theirs)
    assert run.returncode == code
    assert ("if it runs at its destination too, both are damaged" in run.stderr) == (not options)


def test_cancel_before_the_switchover_leaves_the_guest_running(cli: Cli, commuter: Commuter) -> None:
    """The destination accepts and then nothing comes of it; whoever watches the migration is told too."""
    with FakeDestination() as fake, commuter.is_at.client() as client:
        command = [*COMMAND, "migrate", commuter.guest_id, fake.address, "--json", *at(commuter)]
        with started(command, stdout=subprocess.PIPE, text=True) as watching:
            fake.attach()  # and never ready
            migration = next(one for one in client.migrations() if not one.settled)
            run = cli("cancel", migration.id, "--json", *at(commuter))
            assert run.returncode == 0
            assert json.loads(run.stdout)["id"] == migration.id
            assert fake.control.receive(Cancel).reason == "asked by the operator"
            fake.control.receive_end()
            out, _ = watching.communicate(timeout=20)
        assert watching.returncode == 3
        assert json.loads(out)["state"] == "cancelled"
        assert json.loads(out)["error"]["code"] == "cancelled"
        too_late = cli("cancel", migration.id, *at(commuter))
        assert too_late.returncode == 1
        assert "expected a state before the switchover, got cancelled" in too_late.stderr
    commuter.move()


def test_cancel_says_so(cli: Cli, commuter: Commuter) -> None:
    with FakeDestination() as fake, commuter.is_at.client() as client:
        migration = client.migrate(commuter.guest_id, fake.address)
        fake.accept_offer()
        run = cli("cancel", migration.id[:8], *at(commuter))
        assert (run.returncode, run.stdout) == (0, f"cancelled: guest {commuter.guest_id} runs on at the source\n")
        assert client.status(migration.id, settled_within_seconds=10).state == "cancelled"
    commuter.move()


def test_limit_while_it_runs(cli: Cli, commuter: Commuter) -> None:
    with FakeDestination() as fake, commuter.is_at.client() as client:
        command = [*COMMAND, "migrate", commuter.guest_id, fake.address, "--bulk-limit", "2M", "--json", *at(commuter)]
        with started(command, stdout=subprocess.PIPE, text=True) as watching:
            fake.attach()
            migration = next(one for one in client.migrations() if not one.settled)
            assert migration.bulk_limit_bytes_per_second == 2 << 20
            run = cli("limit", migration.id[:8], "50M", *at(commuter))
            assert (run.returncode, run.stdout) == (0, f"bulk of guest {commuter.guest_id}: at most 52428800 bytes a second\n")
            run = cli("limit", migration.id, "none", *at(commuter))
            assert (run.returncode, run.stdout) == (0, f"bulk of guest {commuter.guest_id}: no limit\n")
            assert (
                json.loads(cli("limit", migration.id, "1K", "--json", *at(commuter)).stdout)["bulk_limit_bytes_per_second"]
                == 1024
            )
            for wrong in ("0", "fast", "2048T"):
                assert cli("limit", migration.id, wrong, *at(commuter)).returncode == 2
            client.cancel(migration.id)
            out, _ = watching.communicate(timeout=20)
        assert json.loads(out)["bulk_limit_bytes_per_second"] == 1024
        too_late = cli("limit", migration.id, "none", *at(commuter))
        assert too_late.returncode == 1
        assert "expected one under way, got cancelled" in too_late.stderr
    commuter.move()


def test_cancel_after_the_switchover_is_refused(cli: Cli, pair: Pair) -> None:
    slow = Commuter(pair, "too-late", "1M", options=("--pattern", "permute", "--rate", "250"))
    with slow.is_at.client() as client:
        migration = client.migrate(slow.guest_id, slow.goes_to.address, bulk=False)
        until(lambda: client.status(migration.id).state == "postcopy", "postcopy")
        run = cli("cancel", migration.id, *at(slow))
        assert run.returncode == 1
        assert "expected a state before the switchover, got postcopy" in run.stderr
        there = cli("cancel", migration.id, "--daemon", str(slow.goes_to.runtime_dir))
        assert there.returncode == 1
        assert "expected to be asked at the source" in there.stderr
        assert client.status(migration.id, settled_within_seconds=20).state == "complete"
    slow.arrived()
    slow.end()


def test_broken_guest_is_7_and_names_the_page(pair: Pair) -> None:
    guest = pair.guest(pair.source, "broken", "1M", "--write-ratio", "0")
    guest.event("stepped")  # its memory has been written, nobody writes it from here on
    files = [fd for fd in Path(f"/proc/{guest.pid}/fd").iterdir() if "postcopy-guest" in os.readlink(fd)]
    with files[0].open("r+b", buffering=0) as memory:
        for page in range(256):
            os.pwrite(memory.fileno(), b"garbage!", page * 4096 + 1000)
    failed = guest.event("failed")
    assert failed["failure"]
    assert guest.wait() == 7
    assert "page" in guest.log()
