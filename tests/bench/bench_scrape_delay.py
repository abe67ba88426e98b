"""How long a scrape of vLLM's port holds up its other requests: a real server, a large model's metrics at detail head.

    python -m tests.bench.bench_scrape_delay [--layers 80 --heads 64 --seconds 20 --rounds 3] [--before CHECKOUT]

A client asks `/health` every 4 ms while another one scrapes `/metrics` once a second, in turns in three ways: not at
all; vLLM's metrics alone (`on_vllm_port: false`); and with the page that the exporter has written. With --before also a
server of another checkout, which rendered the metrics itself. The snapshots are made up, of a model that nobody could
serve here; all else is what `vllm serve` does. Counted are the requests that a scrape overlaps; their delay is what
they took beyond the median of those without any scrape.
"""

import argparse
import csv
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from glassbox.cli.demo.demo_model import demo_model
from glassbox.store.metrics_page import NAME
from tests.serving import GlassboxServer, wait_for

ROOT: Final = Path(__file__).resolve().parents[2]
EVERY_S: Final = 0.004
_PROMETHEUS: Final = {"detail": "head", "max_series": 10_000_000}

# In a process of their own: this one's lock must not be what is measured.
_SCRAPER: Final = """
import sys, time, urllib.request
url, seconds = sys.argv[1], float(sys.argv[2])
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    started = time.monotonic()
    with urllib.request.urlopen(url, timeout=300) as answer:
        size = 0
        while piece := answer.read(1 << 20):
            size += len(piece)
    ended = time.monotonic()
    print(started, ended, size)
    time.sleep(max(0.0, 1.0 - (ended - started)))
"""
_WORKER: Final = """
import sys, time
from pathlib import Path
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import changed, make_snapshot
run_dir, layers, heads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
one = make_snapshot(layers=tuple(range(layers)), heads=heads, num_layers_total=layers, start_time_s=time.time())
for number in range(10**9):
    write_snapshot(run_dir, changed(one, steps=1000 + number, time_s=time.time()))
    time.sleep(5)
"""
_ASKER: Final = """
import http.client, sys, time
port, every_s, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    started = time.monotonic()
    connection.request("GET", "/health")
    connection.getresponse().read()
    took = time.monotonic() - started
    print(started, started + took)
    time.sleep(max(0.0, every_s - took))
"""


@dataclass(frozen=True)
class Asked:
    """What was measured in one turn.

    Attributes:
        requests: float64 [N, 2], when each began and ended (monotonic seconds).
        scrapes: float64 [S, 3], likewise, and bytes of the answer.
    """

    requests: np.ndarray
    scrapes: np.ndarray

    @property
    def times(self) -> np.ndarray:
        """Seconds of each request; of those that a scrape overlaps, if there are scrapes."""
        took = self.requests[:, 1] - self.requests[:, 0]
        if not len(self.scrapes):
            return took
        during = (self.requests[:, :1] < self.scrapes[:, 1]) & (self.requests[:, 1:] > self.scrapes[:, 0])
        return took[during.any(axis=1)]

    def row(self, idle_s: float) -> dict[str, float]:
        """Of the table: delays in ms."""
        delays = 1000 * (self.times - idle_s)
        quantiles = {f"p{q}_ms": round(float(np.percentile(delays, q)), 2) for q in (50, 99, 100)}
        scrape_s = np.median(self.scrapes[:, 1] - self.scrapes[:, 0]) if len(self.scrapes) else 0.0
        size = self.scrapes[-1, 2] if len(self.scrapes) else 0
        return {
            "requests": len(delays),
            **quantiles,
            "scrape_ms": round(float(1000 * scrape_s), 1),
            "mb": round(float(size) / 1e6, 2),
        }


def ask(server: GlassboxServer, seconds: float, scraped: bool) -> Asked:
    """Ask for a while, with a scrape a second or without."""
    program = [sys.executable, "-c"]
    scraper = None
    if scraped:
        scraper = subprocess.Popen(
            [*program, _SCRAPER, f"{server.url}/metrics", str(seconds)], stdout=subprocess.PIPE, text=True
        )
    port = server.url.rsplit(":", 1)[1]
    asker = subprocess.Popen([*program, _ASKER, port, str(EVERY_S), str(seconds)], stdout=subprocess.PIPE, text=True)
    if os.sched_getscheduler(server.pid) == os.SCHED_FIFO:
        run_first(asker.pid)
    asked = asker.communicate()[0]
    said = scraper.communicate()[0] if scraper is not None else ""
    return Asked(_table(asked, 2), _table(said, 3))


def _table(text: str, columns: int) -> np.ndarray:
    return np.array([float(word) for word in text.split()]).reshape(-1, columns)


@contextmanager
def changing_snapshots(run_dir: Path, layers: int, heads: int, checkout: Path) -> Iterator[None]:
    """Snapshots of the model that isn't there, each interval a new one, in the format of the server's checkout."""
    command = [sys.executable, "-c", _WORKER, str(run_dir), str(layers), str(heads)]
    worker = subprocess.Popen(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
    try:
        yield
    finally:
        worker.terminate()
        worker.wait()


def run_first(pid: int) -> None:
    """Real-time priority for all threads of a process: what else a shared machine does must not be measured."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(5))


Found = dict[str, list[Asked]]


@contextmanager
def large_server(layers: int, heads: int, checkout: Path | None, *, realtime: bool) -> Iterator[GlassboxServer]:
    """A server in whose run directory there is a large model, too; of this checkout or of another one."""
    checkout = ROOT if checkout is None else checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        config = {"sample_rate": 0.01, "export": {"interval_s": 5, "prometheus": _PROMETHEUS}}
        server = GlassboxServer(demo_model(), Path(folder), config=config, env={"PYTHONPATH": str(checkout)})
        with server:
            server.complete("Hello", max_tokens=4)
            with changing_snapshots(server.run_dir, layers, heads, checkout):
                time.sleep(25)
                if realtime:
                    run_first(server.pid)
                yield server


def measure(server: GlassboxServer, seconds: float, rounds: int) -> Found:
    """Of each way, what `ask` found in each round; the ways take turns."""
    found: Found = {}
    for _ in range(rounds):
        for name, shown, scraped in (("no scrape", True, False), ("page", True, True), ("vLLM alone", False, True)):
            prometheus = {**_PROMETHEUS, "on_vllm_port": shown}
            server.edit_config(export={"interval_s": 5, "prometheus": prometheus})
            wait_for((server.run_dir / NAME).exists, lambda there, shown=shown: there is shown, 60, "the page")
            time.sleep(3)
            found.setdefault(name, []).append(ask(server, seconds, scraped))
            print(name, found[name][-1].row(0.0), flush=True)
    return found


def measure_before(server: GlassboxServer, seconds: float, rounds: int) -> Found:
    """Likewise of a server that renders metrics itself."""
    found: Found = {}
    for _ in range(rounds):
        for name, scraped in (("no scrape, before", False), ("rendered, before", True)):
            found.setdefault(name, []).append(ask(server, seconds, scraped))
            print(name, found[name][-1].row(0.0), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run it and print, or write, one row for each way and round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="a checkout of glassbox to compare with")
    parser.add_argument("--realtime", action="store_true", help="real-time priority for the API server and who asks it")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    # SIGTERM ends it as Ctrl-C does, so that servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with large_server(options.layers, options.heads, None, realtime=options.realtime) as server:
        found = measure(server, options.seconds, options.rounds)
    if options.before is not None:
        with large_server(options.layers, options.heads, options.before, realtime=options.realtime) as server:
            found |= measure_before(server, options.seconds, options.rounds)
    rows = [
        {"way": way, "round": number, **one.row(statistics.median(np.median(a.times) for a in found[idle]))}
        for way, of in found.items()
        for number, one in enumerate(of)
        for idle in ["no scrape, before" if "before" in way else "no scrape"]
    ]
    for row in rows:
        print(row)
    print(platform.processor() or platform.machine())
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
