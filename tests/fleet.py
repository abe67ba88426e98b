"""Many servers from one real page of `/metrics`: each has numbers of its own, and they advance with every scrape.

Owns how a captured page becomes those of a fleet and how they are served, all from one port of loopback. A page keeps
every line that it was captured with; only values change.
"""

import gzip
import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import numpy as np

from glassbox.cli.demo.vllm_server import HOST

# What vLLM answers with, whatever is asked for.
CONTENT_TYPE: Final = "text/plain; version=1.0.0; charset=utf-8"
# Of what a page has counted, how much more it counts from scrape to scrape: as much again in ten minutes of 15 seconds.
GROWTH: Final = 1 / 40
_WITH_PARTS: Final = frozenset({"histogram", "summary"})
_MOVING_GAUGES: Final = ("glassbox_attention_max_logit_window_max", "glassbox_attention_drift_")


class FleetPage:
    """A captured page of which every server has its own.

    A server's counters and buckets are the captured ones times one factor, which grows by `GROWTH` from scrape to
    scrape, rounded down: buckets stay cumulative, and a bucket that is empty stays empty. Points in time are as if the
    page had been captured at each scrape, the largest logit wanders, and other gauges are settings, which stay.

    Args:
        text: in Prometheus' text format.

    Attributes:
        samples: of one page.
    """

    def __init__(self, text: str) -> None:
        kinds: dict[str, str] = {}
        parts: list[str] = []
        values: list[float] = []
        moves: list[str] = []
        self.samples = 0
        for line in text.splitlines():
            if line.startswith("#"):
                if line.startswith("# TYPE "):
                    _, _, family, kind = line.split(" ")
                    kinds[family] = kind
                parts.append(line.replace("%", "%%"))
                continue
            series, value = line.rsplit(" ", 1)
            self.samples += 1
            move = _move(series.split("{", 1)[0], kinds)
            if move == "stays":
                parts.append(line.replace("%", "%%"))
            else:
                parts.append(series.replace("%", "%%") + " %s")
                values.append(float(value))
                moves.append(move)
        self._template = "\n".join(parts) + "\n"
        self._values = np.array(values)
        self._counts, self._sums, self._times, self._wanders = (
            np.array([move == name for move in moves], bool) for name in ("counts", "adds", "is a time", "wanders")
        )
        self._captured_s = float(self._values[self._times].max(initial=0.0))

    def at(self, server: int, scrape: int, now_s: float) -> bytes:
        """The page of a server's scrape, at that time."""
        factor = (0.5 + server * 0.618 % 1.0) * (1.0 + GROWTH * scrape)
        values = self._values.copy()
        values[self._counts] = np.floor(values[self._counts] * factor)
        values[self._sums] *= factor
        values[self._times] += now_s - self._captured_s
        values[self._wanders] *= 1.0 + 0.05 * math.sin(server + scrape)
        return (self._template % tuple(values.tolist())).encode()


def _move(name: str, kinds: Mapping[str, str]) -> str:
    """How the value of a sample changes; `kinds` are of families, and a histogram's has none of its samples' names."""
    family, suffix = name, ""
    for ending in ("_bucket", "_count", "_sum"):
        if name.endswith(ending) and kinds.get(name.removesuffix(ending)) in _WITH_PARTS:
            family, suffix = name.removesuffix(ending), ending
    if kinds.get(family) in _WITH_PARTS or kinds.get(family) == "counter":
        # Seconds and sums of statistics are no whole numbers.
        return "adds" if suffix == "_sum" or name.endswith("_seconds_total") else "counts"
    if name.endswith("_timestamp_seconds"):
        return "is a time"
    return "wanders" if name.startswith(_MOVING_GAUGES) else "stays"


def read_page(path: Path) -> str:
    """A captured page, compressed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


class _FleetServer(ThreadingHTTPServer):
    daemon_threads = True
    # A Prometheus connects to all of its targets within the first interval.
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A Prometheus that was ended, or gave a scrape up, which its `up` tells, is no error of the fleet."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Fleet:
    """Serves the pages of `servers` servers, and counts the bytes that are written to it from afar.

    Attributes:
        port: of all of them, once it is serving.
        written_bytes: in remote-write requests up to now; as sent, compressed.
    """

    def __init__(self, page: FleetPage, servers: int) -> None:
        self._page, self._servers = page, servers
        self._scrapes: defaultdict[int, int] = defaultdict(int)
        self._lock = threading.Lock()
        self.port = self.written_bytes = 0

    def targets(self) -> list[dict[str, Any]]:
        """For `static_configs`: each with the label `instance` of a server of its own."""
        return [
            {
                "targets": [f"{HOST}:{self.port}"],
                "labels": {"__metrics_path__": f"/{server}/metrics", "instance": f"server-{server:03d}:8000"},
            }
            for server in range(self._servers)
        ]

    @property
    def write_url(self) -> str:
        """Takes remote-write requests."""
        return f"http://{HOST}:{self.port}/write"

    @contextmanager
    def serving(self) -> Iterator["Fleet"]:
        """Answers in threads of its own until the block ends."""
        with _FleetServer((HOST, 0), self._handler()) as server:
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fleet = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # one connection for all scrapes of a target

            def do_GET(self) -> None:  # the name http.server asks for
                body = fleet._scraped(int(self.path.split("/")[1]))
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:  # the name http.server asks for
                length = len(self.rfile.read(int(self.headers["Content-Length"])))
                with fleet._lock:
                    fleet.written_bytes += length
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def _scraped(self, server: int) -> bytes:
        with self._lock:
            scrape = self._scrapes[server]
            self._scrapes[server] += 1
        return self._page.at(server, scrape, time.time())
