"""A real Prometheus as a child process: starts the `prometheus` on PATH, on loopback, and asks it. For demo and tests.

with PrometheusServer(folder, ["127.0.0.1:9464"]) as prometheus:
    prometheus.wait_for("glassbox_steps_total")
"""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from glassbox.cli.demo.ports import HOST, free_port

PROMETHEUS = shutil.which("prometheus")
# Prometheus's own limit of a query is 120 s; beside a vLLM that keeps every core busy some do take over 10.
ANSWER_TIMEOUT_S = 120.0


class PrometheusServer:
    """A Prometheus process that scrapes targets every `interval_s` seconds; its data lies in `directory`.

    Args:
        directory: for configuration, data and log (`prometheus.log`).
        targets: host:port, scraped at /metrics.
        interval_s: of scraping, and of evaluating rules whose group has no interval of its own.
        evaluation_s: of the latter, if it is another one.
        rule_files: alerting and recording rules.
        job: value of the label `job`.
        labels: further labels of the targets.
        changing_jobs: further jobs, whose targets are set while it runs (`set_targets`).
        scrape_configs: further jobs in the words of Prometheus' own configuration.
        features: experimental ones to switch on, such as exemplar-storage.
        remote_write: where samples are sent, in the words of Prometheus' own configuration.

    Raises:
        RuntimeError: if there is no `prometheus` on PATH.
    """

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        *,
        interval_s: float = 0.5,
        rule_files: Sequence[Path] = (),
        job: str = "vllm",
        labels: Mapping[str, str] | None = None,
        evaluation_s: float | None = None,
        changing_jobs: Sequence[str] = (),
        scrape_configs: Sequence[Mapping[str, object]] = (),
        features: Sequence[str] = (),
        remote_write: Sequence[Mapping[str, object]] = (),
    ) -> None:
        if PROMETHEUS is None:
            raise RuntimeError("prometheus must be on PATH; install the Debian package prometheus")
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._directory = directory
        self._log = directory / "prometheus.log"
        interval, evaluation = (f"{int(seconds * 1000)}ms" for seconds in (interval_s, evaluation_s or interval_s))
        jobs: list[Mapping[str, object]] = [*scrape_configs]
        if targets:
            static = {"targets": list(targets), "labels": dict(labels or {})}
            jobs.append({"job_name": job, "static_configs": [static]})
        for name in changing_jobs:
            self.set_targets(name, ())
            files = [str(self._targets_path(name))]
            jobs.append({"job_name": name, "file_sd_configs": [{"files": files, "refresh_interval": "1s"}]})
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": evaluation},
            "rule_files": [str(path) for path in rule_files],
            "scrape_configs": jobs,
            "remote_write": list(remote_write),
        }
        path = directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._command = [
            PROMETHEUS,
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address={HOST}:{self.port}",
            "--log.level=warn",
            *(f"--enable-feature={name}" for name in features),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process and wait for it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _wait_until_ready(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                ended = self._process is None or self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"prometheus is not ready: {self._log.read_text()}") from None
                time.sleep(0.05)

    def set_targets(self, job: str, targets: Sequence[str]) -> None:
        """Let one of `changing_jobs` scrape these (host:port) from the next second on; what it has of others stays."""
        path = self._targets_path(job)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": list(targets)}]))
        fresh.replace(path)

    def _targets_path(self, job: str) -> Path:
        return self._directory / f"targets-{job}.json"

    def api(self, path: str, **parameters: str) -> Any:
        """The field `data` of an answer of the HTTP API, e.g. `api("targets")`."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=ANSWER_TIMEOUT_S) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> dict[frozenset[tuple[str, str]], float]:
        """An instant query: labels (without the name) and value of each series of the result."""
        result = self.api("query", query=expression)["result"]
        return {
            frozenset((name, value) for name, value in series["metric"].items() if name != "__name__"): float(
                series["value"][1]
            )
            for series in result
        }

    def wait_for(self, expression: str, timeout_s: float = 60.0) -> dict[frozenset[tuple[str, str]], float]:
        """Ask until the answer is not empty.

        Raises:
            TimeoutError: if it stays empty; the message holds the state of the targets.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := self.query(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer to {expression!r}; targets: {self.api('targets')['activeTargets']}")
            time.sleep(0.1)
        return found
