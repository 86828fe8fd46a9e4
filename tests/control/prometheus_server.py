"""Debian's Prometheus, run for real: the configuration of deploy/prometheus with other addresses and shorter times."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from ..path.commuter import until

INTERVAL = "250ms"
START_DEADLINE_SECONDS = 15.0
END_DEADLINE_SECONDS = 10.0
SCRAPED_DEADLINE_SECONDS = 10.0


def derived(configuration: Path, directory: Path, sources: Sequence[str], destinations: Sequence[str]) -> Path:
    """A copy of deploy/prometheus in ``directory`` that scrapes these addresses often and alerts soon; its prometheus.yml."""
    copy = shutil.copytree(configuration, directory / "configuration")

    def targets(addresses: Sequence[str]) -> str:
        return ", ".join(f'"{address}"' for address in addresses)

    changes = {
        "prometheus.yml": (
            (r"(scrape|evaluation)_interval: 2s", rf"\1_interval: {INTERVAL}", 2),
            (r'"127\.0\.0\.1:9641"', targets(sources), 1),
            (r'"127\.0\.0\.1:9642"', targets(destinations), 1),
        ),
        "alerts.yml": ((r"for: 30s", "for: 500ms", 1),),
    }
    for name, substitutions in changes.items():
        text = (copy / name).read_text()
        for pattern, replacement, count in substitutions:
            text, replaced = re.subn(pattern, replacement, text)
            assert replaced == count, f"{name}: {pattern} is there {replaced} times"
        (copy / name).write_text(text)
    return copy / "prometheus.yml"


class Prometheus:
    """``with Prometheus(config, directory) as prometheus``: ready when entered, gone by its process id when left."""

    def __init__(self, config: Path, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._log = directory / "prometheus.log"

    def __enter__(self) -> Self:
        options = ("--config.file", self._config, "--storage.tsdb.path", self._directory / "data", "--web.listen-address")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", *options, "127.0.0.1:0"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory
            )
        try:
            until(lambda: self._address() != "" or self._ended(), "prometheus listens", START_DEADLINE_SECONDS)
            self._http = httpx.Client(base_url=f"http://{self._address()}", trust_env=False, timeout=10)
            until(lambda: self._http.get("/-/ready").status_code == 200 or self._ended(), "ready", START_DEADLINE_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()
        self._end()

    def _address(self) -> str:
        """Where it listens; empty until it says so."""
        found = re.search(r'msg="Listening on" address=(\S+)', self._log.read_text())
        return found[1] if found else ""

    def _ended(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_DEADLINE_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()

    def api(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of its HTTP API, which must be a success."""
        body = self._http.get(f"/api/v1/{path}", params=parameters).json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[float]:
        """An instant query: the value of each sample."""
        return [float(sample["value"][1]) for sample in self.api("query", query=expression)["result"]]

    def now(self) -> float:
        """Its own time, as ``@`` takes it."""
        return float(self.api("query", query="time()")["result"][1])

    def value(self, expression: str, wanted: float | None = None) -> float:
        """Of the one sample, as soon as there is one (that has the value wanted). Raises AssertionError."""
        seen: list[float] = []

        def there() -> bool:
            seen[:] = self.query(expression)
            return len(seen) == 1 and wanted in (None, seen[0])

        until(there, f"{expression} is {'there' if wanted is None else wanted}", SCRAPED_DEADLINE_SECONDS)
        return seen[0]


def promtool(*arguments: object, text: str = "") -> str:
    """What it said. Raises AssertionError with that when it complains of anything."""
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
