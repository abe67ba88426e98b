"""What a fleet costs the Prometheus that scrapes it: series, memory, CPU, rules, dashboards, remote write.

    python -m tests.bench.bench_fleet --capture                                  # pages of a real server, once
    python -m tests.bench.bench_fleet --servers 50 100 200 --csv docs/data/fleet_cpu.csv
    python -m tests.bench.bench_fleet --servers 500 --keep rules --write recorded
    python -m tests.bench.bench_fleet --history --servers 10 20

The pages of tests/bench/data are those of a real `vllm serve` (SmolLM2-135M: 30 layers of 9 heads, all rows measured of
48 requests), one for each detail. `tests/fleet.py` shows them as so many servers. A real Prometheus scrapes these
every 15 seconds, evaluates deploy/prometheus/rules.yaml as shipped and writes all its samples to a receiver that counts
bytes. In the last third of the time what Prometheus says of itself is taken down; then every query of every panel is
asked once, for one moment and for all servers. Rules look back ten minutes, so fewer minutes show less than they cost.

`--keep rules` and `--write recorded` put docs/performance.md's snippets for operators into the configuration.
`--history` asks for what `glassbox-history` compares with: a day of recorded series, written by promtool, since no run
is as long. A run whose Prometheus takes more than `--max-gb` is stopped.
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from glassbox.cli.bench.serving import commit
from glassbox.cli.dashboards import check, generated
from glassbox.cli.dashboards.rules import build_groups, recordings, seconds_of
from glassbox.cli.demo.demo_model import demo_model
from glassbox.core.cpu import cpu_model
from tests.fleet import Fleet, FleetPage, read_page
from tests.prometheus_server import PROMTOOL, PrometheusServer
from tests.serving import GlassboxServer

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = Path(__file__).parent / "data"
RULES: Final = ROOT / generated.RULES_PATH
DETAILS: Final = ("model", "layer", "head")
SCRAPE_S: Final = 15.0
EVALUATION_S: Final = 30.0
HISTORY_S: Final = 120.0
LAYERS: Final = 30
SLOWEST: Final = 10
COLUMNS: Final = (
    *("servers", "detail", "keep", "write", "minutes", "what", "seconds", "share", "samples", "peak_samples", "error"),
    *("page_samples", "series", "series_per_server", "samples_per_s", "chunks", "rss_gb", "cpu_cores"),
    *("written_bytes_per_s", "written_per_server", "missed", "failed", "up"),
    *("cpu", "load_average", "prometheus", "command", "commit"),
)
# Grafana's variables, all servers chosen; $__rate_interval is four scrapes.
VALUES: Final = {
    "$__rate_interval": "1m",
    "$baseline": "5m",
    "$job": ".+",
    "$instance": ".+",
    "$model_name": ".+",
    "$engine": ".+",
    "$phase": "decode",
}
# What docs/performance.md gives to operators of many servers: all that is scraped, or no buckets but those that rules
# ask for; all of it written to another Prometheus, or no attention but what rules have made of it.
SNIPPETS: Final = ROOT / "docs/performance.md"
KEEPS: Final = {"everything": "", "rules": "metric_relabel_configs"}
WRITES: Final = {"everything": "", "recorded": "write_relabel_configs"}


def snippet(key: str) -> list[dict[str, object]]:
    """The relabelling of the YAML block in docs/performance.md that begins with `key`; none if it is empty.

    Raises:
        ValueError: if there is no such block.
    """
    if not key:
        return []
    found = re.search(rf"```yaml\n({key}:.*?)```", SNIPPETS.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{SNIPPETS.name} must have a YAML block that begins with {key}:, and has none")
    return list(yaml.safe_load(found[1])[key])


def page_path(detail: str) -> Path:
    """Where the captured page of a detail lies."""
    return PAGES / f"metrics_{detail}.txt.gz"


def capture() -> None:
    """Write the page of each detail as a real server shows it, after 48 requests of which every row was measured."""
    PAGES.mkdir(exist_ok=True)
    prompts = [[1000 + 37 * (n * n + step) % 40_000 for step in range(16 + 4 * n)] for n in range(48)]
    with (
        tempfile.TemporaryDirectory() as folder,
        GlassboxServer(demo_model(), Path(folder), config={"sample_rate": 1.0}) as server,
    ):
        for first in range(0, len(prompts), 8):
            some = prompts[first : first + 8]
            server.post("/v1/completions", timeout_s=900, prompt=some, max_tokens=32, temperature=0, ignore_eos=True)
        server.settled_rows(120)
        for detail in DETAILS:
            shown = {"detail": detail, "max_series": 200_000}
            server.edit_config(export={"prometheus": shown})
            server.metrics_text()  # the exporter writes the next one
            time.sleep(20)
            page_path(detail).write_bytes(gzip.compress(server.metrics_text().encode(), mtime=0))
            print(page_path(detail).name, page_path(detail).stat().st_size, "bytes", flush=True)


class TooLargeError(Exception):
    """Prometheus takes more memory than it may."""


@dataclass
class Observed:
    """What Prometheus said of itself, several times."""

    prometheus: PrometheusServer
    max_bytes: float
    rules: dict[str, list[float]] = field(default_factory=dict)
    rss: float = 0.0

    def look(self) -> dict[str, float]:
        """Its numbers now, by name (labels left out, values added up); remembers the largest and the groups'."""
        numbers: dict[str, float] = {"monotonic_s": time.monotonic()}
        for line in self._page().splitlines():
            if line.startswith("#"):
                continue
            series, value = line.rsplit(" ", 1)
            name = series.split("{", 1)[0]
            numbers[name] = numbers.get(name, 0.0) + float(value)
            if name == "prometheus_rule_group_last_duration_seconds":
                self.rules.setdefault(series.rsplit(";", 1)[1].rstrip('"}'), []).append(float(value))
        self.rss = max(self.rss, numbers["process_resident_memory_bytes"])
        if self.rss > self.max_bytes:
            raise TooLargeError(f"{self.rss / 1e9:.1f} GB")
        return numbers

    def _page(self) -> str:
        with urllib.request.urlopen(f"{self.prometheus.url}/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def group_rows(self) -> Iterator[dict[str, Any]]:
        """The longest evaluation of each group, against its interval, and the samples that one reads."""
        for group in build_groups():
            interval_s = seconds_of(group.interval) if group.interval else EVALUATION_S
            longest = max(self.rules[group.name])
            share = round(longest / interval_s, 4)
            samples = sum(ask(self.prometheus, rule.expr).samples for rule in group.rules)
            yield {"what": f"group {group.name}", "seconds": round(longest, 3), "share": share, "samples": samples}


def dashboard_queries() -> dict[str, str]:
    """By "dashboard / panel target"; each query once."""
    found: dict[str, str] = {}
    for board in generated.dashboards().values():
        for where, expression in check.expressions(board):
            found.setdefault(check.plain(expression, VALUES), where)
    return {where: expression for expression, where in found.items()}


@dataclass(frozen=True)
class Answer:
    """What a query took: seconds, samples that it read, the most that it held at once, and why it was refused."""

    seconds: float
    samples: int
    peak_samples: int
    error: str


def ask(prometheus: PrometheusServer, expression: str, **of_range: str) -> Answer:
    """Ask for one moment, or with `start`, `end` and `step` for many."""
    began = time.monotonic()
    try:
        data = prometheus.api("query_range" if of_range else "query", query=expression, stats="all", **of_range)
    except urllib.error.HTTPError as error:
        return Answer(round(time.monotonic() - began, 3), 0, 0, json.load(error)["error"])
    except TimeoutError:
        return Answer(round(time.monotonic() - began, 3), 0, 0, "no answer")
    samples = data["stats"]["samples"]
    seconds = round(time.monotonic() - began, 3)
    return Answer(seconds, samples["totalQueryableSamples"], samples["peakSamples"], "")


def scraping(fleet: Fleet, keep: str, write: str, folder: Path) -> PrometheusServer:
    """A Prometheus with the shipped rules that scrapes the fleet, not yet started."""
    job = {"job_name": "vllm", "static_configs": fleet.targets(), "metric_relabel_configs": snippet(KEEPS[keep])}
    return PrometheusServer(
        folder,
        [],
        interval_s=SCRAPE_S,
        evaluation_s=EVALUATION_S,
        rule_files=[RULES],
        scrape_configs=[job],
        remote_write=[{"url": fleet.write_url, "write_relabel_configs": snippet(WRITES[write])}],
    )


def run(servers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one run: the fleet, each group of rules, and the panels whose queries take longest."""
    minutes: float = options.minutes
    page = FleetPage(read_page(page_path(options.detail)))
    fleet = Fleet(page, servers)
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet.serving(),
        scraping(fleet, options.keep, options.write, Path(folder)) as prometheus,
    ):
        observed = Observed(prometheus, options.max_gb * 1e9)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 40 * minutes:
                time.sleep(5)
                observed.look()
            observed.rules.clear()
            first, written, since = observed.look(), fleet.written_bytes, time.monotonic()
            while time.monotonic() - began < 60 * minutes:
                time.sleep(5)
                observed.look()
            last, seconds = observed.look(), time.monotonic() - since
            rows = [_fleet_row(page, servers, first, last, observed.rss, (fleet.written_bytes - written) / seconds)]
            rows[0]["up"] = sum(prometheus.query("sum(up)").values())
            rows += observed.group_rows()
            rows += _panel_rows(prometheus, observed)
        except TooLargeError as error:
            rows = [{"what": "stopped", "error": f"Prometheus took {error}"}]
    of_run = {name: getattr(options, name) for name in ("detail", "keep", "write", "minutes")}
    return [{"servers": servers, **of_run, **row} for row in rows]


def _fleet_row(
    page: FleetPage, servers: int, first: Mapping[str, float], last: Mapping[str, float], rss: float, written: float
) -> dict[str, Any]:
    def rate(name: str) -> float:
        return (last[name] - first[name]) / (last["monotonic_s"] - first["monotonic_s"])

    return {
        "what": "fleet",
        "page_samples": page.samples,
        "series": int(last["prometheus_tsdb_head_series"]),
        "series_per_server": round(last["prometheus_tsdb_head_series"] / servers, 1),
        "samples_per_s": round(rate("prometheus_tsdb_head_samples_appended_total")),
        "chunks": int(last["prometheus_tsdb_head_chunks"]),
        "rss_gb": round(rss / 1e9, 2),
        "cpu_cores": round(rate("process_cpu_seconds_total"), 3),
        "written_bytes_per_s": round(written),
        "written_per_server": round(written / servers, 1),
        "missed": int(last["prometheus_rule_group_iterations_missed_total"]),
        "failed": int(last["prometheus_rule_evaluation_failures_total"]),
    }


def _panel_rows(prometheus: PrometheusServer, observed: Observed) -> Iterator[dict[str, Any]]:
    """All queries together, then the ten that take longest, and the one that reads most over an hour."""
    asked: dict[str, Answer] = {}
    queries = dashboard_queries()
    for where, expression in queries.items():
        asked[where] = ask(prometheus, expression)
        observed.look()
    refused = sum(bool(answer.error) for answer in asked.values())
    yield {
        "what": f"{len(asked)} queries of panels",
        "seconds": round(sum(answer.seconds for answer in asked.values()), 2),
        "samples": sum(answer.samples for answer in asked.values()),
        "error": f"{refused} refused" if refused else "",
    }
    for where, answer in sorted(asked.items(), key=lambda found: -found[1].seconds)[:SLOWEST]:
        yield {"what": where, **asdict(answer)}
    most = max(asked, key=lambda where: asked[where].samples)
    end = time.time()
    hour = {"start": f"{end - 3600:.0f}", "end": f"{end:.0f}", "step": f"{SCRAPE_S:.0f}"}
    yield {"what": f"an hour of {most}", **asdict(ask(prometheus, queries[most], **hour))}


def recorded_day(path: Path, servers: int) -> int:
    """Write a day of what the history looks back at, every minute, as promtool reads it; returns the samples."""
    groups = build_groups()
    labels_of = {rule.record: rule.labels for rule in recordings(groups)}
    (history,) = (group for group in groups if group.name == "glassbox-history")
    wanted = sorted({name for rule in history.rules for name, _ in check.selectors(rule.expr)})
    end = int(time.time()) - 3600
    samples = 0
    with path.open("w", encoding="utf-8") as file:
        for name in wanted:
            file.write(f"# TYPE {name} gauge\n")
            values = {
                "instance": [f"server-{server:03d}:8000" for server in range(servers)],
                "engine": ["0"],
                "layer": [str(layer) for layer in range(LAYERS)],
                "phase": ["decode"] if "lookback" in name else ["prefill", "decode"],
                "job": ["vllm"],
                "model_name": ["smollm2"],
            }
            mine = [label for label in values if label in labels_of[name]]
            for found in itertools.product(*(values[label] for label in mine)):
                series = name + "{" + ",".join(f'{a}="{b}"' for a, b in zip(mine, found, strict=True)) + "}"
                for minute in reversed(range(24 * 60)):
                    file.write(f"{series} {0.4 + 0.001 * (minute % 17):.3f} {end - 60 * minute}\n")
                samples += 24 * 60
        file.write("# EOF\n")
    return samples


def run_history(servers: int) -> list[dict[str, Any]]:
    """Rows of each rule that compares with the last day."""
    assert PROMTOOL is not None, "needs promtool"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = recorded_day(folder / "day.txt", servers)
        blocks = [PROMTOOL, "tsdb", "create-blocks-from", "--max-block-duration=48h", "openmetrics"]
        subprocess.run([*blocks, str(folder / "day.txt"), str(folder / "tsdb")], check=True, capture_output=True)
        (folder / "day.txt").unlink()
        (group,) = (group for group in build_groups() if group.name == "glassbox-history")
        with PrometheusServer(folder, []) as prometheus:
            for rule in group.rules:
                answers = [ask(prometheus, rule.expr) for _ in range(3)]
                rows.append({"what": rule.title, **asdict(min(answers, key=lambda answer: answer.seconds))})
    seconds = round(sum(row["seconds"] for row in rows), 3)
    total = {"what": "group glassbox-history, a day", "seconds": seconds, "share": round(seconds / HISTORY_S, 4)}
    total["samples"] = sum(row["samples"] for row in rows)
    return [{"servers": servers, "detail": "layer", "page_samples": samples, **row} for row in (total, *rows)]


def _prometheus_version() -> str:
    assert PROMTOOL is not None, "needs promtool"
    done = subprocess.run([PROMTOOL, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[2]


def add_to_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row; what a kind of row doesn't have is empty. Runs may be added up in one file."""
    there = path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not there:
            writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print, or write, its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capture", action="store_true", help="start a vLLM and store its pages")
    parser.add_argument("--servers", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--detail", choices=DETAILS, default="layer")
    parser.add_argument("--keep", choices=list(KEEPS), default="everything")
    parser.add_argument("--write", choices=list(WRITES), default="everything")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--max-gb", type=float, default=6.0)
    parser.add_argument("--history", action="store_true", help="only the rules that look back a day")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    # SIGTERM ends it as Ctrl-C does, so that servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.capture:
        capture()
        return
    of_all = {
        "cpu": cpu_model(),
        "prometheus": _prometheus_version(),
        "command": " ".join(["python -m tests.bench.bench_fleet", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
    }
    for servers in options.servers:
        rows = run_history(servers) if options.history else run(servers, options)
        for row in rows:
            print({name: value for name, value in row.items() if value not in ("", None)}, flush=True)
        if options.csv is not None:
            load = f"{os.getloadavg()[0]:.1f}"
            add_to_csv(options.csv, [{**row, **of_all, "load_average": load} for row in rows])


if __name__ == "__main__":
    main()
