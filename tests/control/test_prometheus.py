"""Debian's Prometheus against two daemons: what deploy/prometheus scrapes, records and alerts, while a guest moves and after."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from migrate.bench.figures import Latencies
from migrate.dataplane import FOLDED_BOUNDS_SECONDS
from migrate.host.suite import ADMINISTRATOR_PATH
from migrate.pair import DaemonProcess, Pair
from migrate.session import MigrationStatus

from ..path.commuter import Commuter, until
from .prometheus_server import Prometheus, derived, promtool

GUEST = "watched-here"
REMOTE = f'guest="{GUEST}", kind="remote"'
RULE_FILES = ("recording.yml", "alerts.yml")
SECTION = "\n## Scrape it\n"
BLOCK_DEADLINE_SECONDS = 45
TIMED_PAGES = 4096
TOLERANCE = 0.1
UNDISTURBED = 2
"""The p99 of a guest that had its CPU whenever it wanted it is below so many times its p50."""
MOVES_MAX = 12


@pytest.fixture(scope="module", autouse=True)
def pasted(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """README's block as it is written, at work beside the other tests: Prometheus looks for its targets after five seconds only.

    In a network namespace of its own, where the ports that it names are free, and gone with its process namespace.
    """
    section = (repository / "README.md").read_text().split(SECTION)[1].split("\n## ")[0]
    block = [line.removeprefix("    ") for line in section.splitlines() if line.startswith("    ")]
    directory = str(tmp_path_factory.mktemp("readme"))
    path = os.pathsep.join([str(Path(sys.executable).parent), ADMINISTRATOR_PATH])
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        [*namespaces, "sh", "-euc", "\n".join(["ip link set lo up", *block])],
        cwd=repository,
        env={**os.environ, "PATH": path, "POSTCOPY_RUNTIME_DIR": directory, "TMPDIR": directory},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def configuration(repository: Path) -> Path:
    return repository / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def doomed(pair: Pair) -> DaemonProcess:
    """A daemon that has nothing to do but to be killed."""
    return pair.daemon("doomed")


@pytest.fixture(scope="module")
def prometheus(
    pair: Pair, doomed: DaemonProcess, configuration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    sources, destinations = [pair.source.metrics_address, doomed.metrics_address], [pair.destination.metrics_address]
    with Prometheus(derived(configuration, directory, sources, destinations), directory) as prometheus:
        yield prometheus


class Watched:
    """A migration of 1 MiB by faults alone, as Prometheus sees it at work, and its end."""

    during: dict[str, float]
    exposed: list[str]
    ended: MigrationStatus


@pytest.fixture(scope="module")
def watched(pair: Pair, prometheus: Prometheus) -> Watched:
    commuter = Commuter(pair, "watched", "1M", options=("--pattern", "permute", "--rate", "250"))
    assert commuter.guest_id == GUEST
    watched = Watched()
    with commuter.is_at.client() as here, commuter.goes_to.client() as there:
        until(lambda: len(prometheus.query("up == 1")) == 3, "all three daemons are scraped")
        begun = here.migrate(GUEST, commuter.goes_to.address, bulk=False)
        until(lambda: here.status(begun.id).pages_done > 0, "a page is there")
        commuter.waits.signal(signal.SIGSTOP)  # it touches no more pages until it has been looked at
        asked = {
            "phase": f'postcopy_migration_phase{{role="destination", guest="{GUEST}", phase="postcopy"}}',
            "pages": f'postcopy_migration_pages{{role="destination", guest="{GUEST}"}}',
            "lost": f'postcopy_lost_pages_total{{guest="{GUEST}"}}',
            "p99": f"guest_kind:postcopy_fault_latency_seconds:p99_5m{{{REMOTE}}}",
            "progress": f'guest:postcopy_migration_pages_final:ratio{{guest="{GUEST}"}}',
        }
        watched.during = {name: prometheus.value(expression) for name, expression in asked.items()}
        watched.exposed = [metrics_of(daemon) for daemon in (pair.source, pair.destination)]
        commuter.waits.signal(signal.SIGCONT)
        assert here.status(begun.id, settled_within_seconds=30).state == "complete"
        until(lambda: there.status(begun.id).settled, "both sides know")
        watched.ended = there.status(begun.id)
    commuter.end()
    return watched


def metrics_of(daemon: DaemonProcess) -> str:
    return httpx.get(f"http://{daemon.metrics_address}/metrics", trust_env=False, timeout=10).text


def rules_of(configuration: Path, *names: str) -> list[str]:
    return [rule for name in names for rule in re.findall(r"- (?:alert|record): (\S+)", (configuration / name).read_text())]


@pytest.mark.requires("uffd")
def test_every_alert_says_what_to_do(configuration: Path, prometheus: Prometheus) -> None:
    alerts = [rule for group in prometheus.api("rules", type="alert")["groups"] for rule in group["rules"]]
    assert [alert["name"] for alert in alerts] == rules_of(configuration, "alerts.yml")
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["name"]
        assert 20 < len(alert["annotations"]["summary"]) < 120, alert["name"]
        assert len(alert["annotations"]["description"]) > 100, alert["name"]


def test_configuration_and_rules_are_valid(configuration: Path) -> None:
    assert "2 rule files found" in promtool("check", "config", configuration / "prometheus.yml")
    for name in RULE_FILES:
        promtool("check", "rules", "--lint=all", "--lint-fatal", configuration / name)


@pytest.mark.parametrize("name", RULE_FILES)
def test_rules_do_what_they_say(configuration: Path, name: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", configuration / "tests" / name)


@pytest.mark.parametrize("name", RULE_FILES)
def test_every_rule_has_a_test(configuration: Path, name: str) -> None:
    tests = (configuration / "tests" / name).read_text()
    assert len(rules_of(configuration, name)) == {"recording.yml": 6, "alerts.yml": 8}[name]
    assert [rule for rule in rules_of(configuration, name) if f'"{rule}"' not in tests and f": {rule}{{" not in tests] == []


@pytest.mark.requires("uffd")
def test_exposition_has_nothing_to_complain_of(pair: Pair, watched: Watched) -> None:
    """In the middle of a migration and after it, by both daemons."""
    for text in (*watched.exposed, metrics_of(pair.source), metrics_of(pair.destination)):
        assert f'guest="{GUEST}"' in text
        assert promtool("check", "metrics", text=text) == ""


@pytest.mark.requires("uffd")
def test_migration_is_seen_while_it_runs(watched: Watched) -> None:
    assert watched.during["phase"] == 1
    assert watched.during["pages"] == 256
    assert watched.during["lost"] == 0
    assert 0 < watched.during["p99"] < 10
    assert 0 < watched.during["progress"] < 1


@pytest.mark.requires("uffd")
def test_histogram_is_whole_after_it(prometheus: Prometheus, watched: Watched) -> None:
    remote = watched.ended.faults["remote"]
    assert remote.count == 256
    prometheus.value(f"postcopy_fault_latency_seconds_count{{{REMOTE}}}", wanted=256)
    buckets = prometheus.query(f"postcopy_fault_latency_seconds_bucket{{{REMOTE}}}")
    assert len(buckets) == len(FOLDED_BOUNDS_SECONDS) + 1
    assert max(buckets) == 256
    p50 = prometheus.value(f"histogram_quantile(0.5, sum by (le) (postcopy_fault_latency_seconds_bucket{{{REMOTE}}}))")
    assert abs(p50 - remote.p50_seconds) <= bucket_width(p50)
    prometheus.value(f"guest_kind:postcopy_fault_latency_seconds:p50_5m{{{REMOTE}}}", wanted=p50)


@pytest.mark.requires("uffd")
def test_rules_are_evaluated_without_error(configuration: Path, prometheus: Prometheus, watched: Watched) -> None:
    def evaluated() -> set[tuple[str, str, str]]:
        rules = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
        return {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules}

    until(lambda: all(health != "unknown" for _, health, _ in evaluated()), "every rule has been evaluated")
    assert evaluated() == {(rule, "ok", "") for rule in rules_of(configuration, *RULE_FILES)}
    assert prometheus.value(f"guest_kind:postcopy_faults:rate1m{{{REMOTE}}}") > 0
    assert prometheus.value(f'guest_kind:postcopy_received_bytes:rate1m{{guest="{GUEST}", kind="urgent"}}') > 0


@pytest.mark.requires("uffd")
def test_daemon_that_is_killed_is_an_alert(prometheus: Prometheus, doomed: DaemonProcess) -> None:
    where = f'instance="{doomed.metrics_address}"'
    prometheus.value(f"up{{{where}}}", wanted=1)
    assert prometheus.query(f'ALERTS{{alertname="PostcopyDaemonDown", {where}}}') == []
    doomed.kill()
    prometheus.value(f"up{{{where}}}", wanted=0)
    prometheus.value(f'ALERTS{{alertname="PostcopyDaemonDown", alertstate="firing", {where}}}', wanted=1)
    (told,) = [alert for alert in prometheus.api("alerts")["alerts"] if alert["labels"]["alertname"] == "PostcopyDaemonDown"]
    assert told["annotations"]["summary"] == f"postcopy-source at {doomed.metrics_address} does not answer"


def place_on_one_cpu(pid: int, niceness: int) -> None:
    """All of its threads, and those that they start; ahead of other work where this user may say so."""
    cpu = min(os.sched_getaffinity(0))
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def bucket_width(seconds: float) -> float:
    """Of the exported bucket that a value lies in: what histogram_quantile cannot tell apart."""
    above = next(index for index, bound in enumerate(FOLDED_BOUNDS_SECONDS) if bound >= seconds)
    return FOLDED_BOUNDS_SECONDS[above] - FOLDED_BOUNDS_SECONDS[above - 1]


class Timed:
    """A guest that is moved by faults alone, and times each first touch itself."""

    def __init__(self, pair: Pair, prometheus: Prometheus) -> None:
        options = ("--pattern", "permute", "--write-ratio", "0", "--rate", "50000")
        self._pair, self._prometheus = pair, prometheus
        self._commuter = Commuter(pair, "timed", f"{TIMED_PAGES * 4096 >> 20}M", options=options)
        self._moves = 0
        for daemon in (pair.source, pair.destination):
            place_on_one_cpu(daemon.pid, niceness=-20)
        for guest in (self._commuter.waits, self._commuter.runs):
            place_on_one_cpu(guest.pid, niceness=-15)

    def move(self) -> dict[str, tuple[float, float]]:
        """p50 and p99 of this move's first touches in seconds: the guest's own, and from the exported histogram."""
        labels = 'guest=~"timed-.*", kind="remote"'
        bucket = f"postcopy_fault_latency_seconds_bucket{{{labels}}}"
        before, commuter, touched = self._prometheus.now(), self._commuter, Latencies()
        assert self._pair.move(commuter.guest_id, commuter.is_at, commuter.goes_to, bulk=False).state == "complete"
        touched.add(commuter.arrived()["first_touch"]["buckets"])
        guest = touched.figures()
        assert guest["n"] > 0.99 * TIMED_PAGES
        self._moves += 1
        self._prometheus.value(f"sum(postcopy_fault_latency_seconds_count{{{labels}}})", wanted=self._moves * TIMED_PAGES)
        gained = f"sum by (le) ({bucket} - {bucket} @ {before} or {bucket})"
        return {
            name: (guest[name], self._prometheus.value(f"histogram_quantile({share}, {gained})"))
            for name, share in (("p50", 0.5), ("p99", 0.99))
        }

    def end(self) -> None:
        self._commuter.end()


@pytest.mark.requires("uffd")
def test_exported_quantiles_agree_with_the_guest(pair: Pair, prometheus: Prometheus) -> None:
    """4,096 first touches, timed by the guest, against what Prometheus makes of the exported histogram of the same move.

    The guest's wait is longer by two wake-ups, which no daemon can see (deploy/README.md says how much). On one CPU, ahead
    of other work, each is a mere switch of threads, and both sides time the same. Where other work gets between all the
    same, that may be where the daemon cannot see it: of several moves the one that the guest itself found quietest counts.
    """
    timed = Timed(pair, prometheus)
    quietest = timed.move()
    for _ in range(MOVES_MAX - 1):
        if quietest["p99"][0] < UNDISTURBED * quietest["p50"][0]:
            break
        quietest = min(quietest, timed.move(), key=lambda move: move["p99"][0])
    timed.end()
    for name, (guest, exported) in quietest.items():
        tolerance = TOLERANCE * guest + bucket_width(exported)
        said = f"{name}: guest {guest * 1e6:.1f} µs, exported {exported * 1e6:.1f} µs, tolerance {tolerance * 1e6:.1f} µs"
        assert abs(exported - guest) <= tolerance, said


@pytest.mark.requires("uffd", "netns")
def test_readme_block_prints_the_p99(pasted: "subprocess.Popen[str]") -> None:
    said, _ = pasted.communicate(timeout=BLOCK_DEADLINE_SECONDS)
    assert pasted.returncode == 0, said
    assert re.search(r"^state +complete", said, re.MULTILINE), said
    (printed,) = re.findall(r'^guest_kind:\S+:p99_5m\{guest="web", kind="remote"\} => (\S+) @', said, re.MULTILINE)
    assert 0 < float(printed) < 10
