"""Pages and files of a server that isn't there: snapshots as `/metrics` and `export.jsonl` show them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.export.families import build_families
from glassbox.export.jsonl import WindowSummaries
from glassbox.export.liveness import Life, liveness_families
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import Detail, merge
from glassbox.store.snapshot import Snapshot
from tests.export_samples import changed, make_snapshot

VLLM_LINES = (
    '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0",model_name="tiny/model"} 3.0\n'
)


class Families(Collector):
    """Shows these metrics in a registry."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def metrics_page(snapshots: Sequence[Snapshot], detail: Detail, *, of_the_moment: bool = True) -> str:
    """Text of `/metrics`, vLLM's own metrics included.

    Args:
        of_the_moment: with ages, exporter and sinks, of which some have no engine.
    """
    registry, engines = CollectorRegistry(), merge(snapshots)
    families = build_families(engines, detail)
    if of_the_moment:
        families = [*families, *liveness_families(Life(engines, 5.0, True), Path("/none"), 5000.0)]
    registry.register(Families([to_metric(family) for family in families]))
    return VLLM_LINES + generate_latest(registry).decode()


def write_jsonl(path: Path, rounds: Sequence[Sequence[Snapshot]], detail: Detail) -> Path:
    """A file of `export.jsonl`: one round of lines for each list of snapshots."""
    summaries = WindowSummaries()
    lines = [line for snapshots in rounds for line in summaries.summarize(merge(snapshots), detail)]
    path.write_text("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))
    return path


def later(snapshot: Snapshot, seed: int, seconds: float = 5.0) -> Snapshot:
    """The same worker, some seconds and some rows later."""
    more = make_snapshot(seed=seed, layers=snapshot.layers, heads=snapshot.rows.shape[1])
    overhead: Any = snapshot.numbers["overhead_seconds"]
    return changed(
        snapshot,
        time_s=snapshot.time_s + seconds,
        steps=snapshot.steps + 100,
        sampled_steps=snapshot.sampled_steps + 1,
        overhead_seconds=overhead + 0.25,
        window_max=more.window_max,
        **{name: getattr(snapshot, name) + getattr(more, name) for name in CUMULATIVE_ARRAYS},
    )


class PageServer:
    """Answers each GET with `status` and `body`, which a test may change at any time.

    Attributes:
        url: of it.
        paths: that were asked for.
    """

    def __init__(self, body: str, status: int = 200) -> None:
        self.body, self.status = body, status
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name http.server asks for
                outer.paths.append(self.path)
                data = outer.body.encode()
                self.send_response(outer.status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; a connection is refused afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serve_page(body: str, status: int = 200) -> Iterator[PageServer]:
    """A `PageServer` for the length of a block."""
    server = PageServer(body, status)
    try:
        yield server
    finally:
        server.close()
