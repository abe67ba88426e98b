"""Two API servers: /metrics of either shows the whole server, once."""

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from glassbox.export.families import build_families
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import merge
from glassbox.store.snapshot import read_snapshots
from tests.e2e.samples import Key, counts_against_rows, glassbox_samples
from tests.serving import GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

REQUESTS = 12
TOKENS = 6
PROMPT = list(range(1000, 1020))


@pytest.fixture(scope="module")
def pair(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlassboxServer]:
    """A server with two API processes that has answered some requests and rests."""
    folder = tmp_path_factory.mktemp("pair")
    routes = {"VLLM_PLUGINS": "glassbox"}
    with GlassboxServer(demo_model_path, folder, args=("--api-server-count", "2"), env=routes) as server:
        with ThreadPoolExecutor(4) as pool:
            # Different first tokens, so that no prompt is served from the prefix cache.
            list(
                pool.map(lambda n: server.complete([n, *PROMPT], TOKENS, ignore_eos=True), range(2000, 2000 + REQUESTS))
            )
        # All of them first: on a busy machine a snapshot may come later than `settled_rows` waits for a change.
        decoded = REQUESTS * (TOKENS - 1) * 30 * 9
        server.wait_metric("glassbox_attention_rows_total", lambda rows: (rows or 0) >= decoded, 60.0, phase="decode")
        server.settled_rows()
        yield server


def scrape(server: GlassboxServer, processes: list[psutil.Process], path: str = "/metrics/") -> tuple[int, str]:
    """A path over a connection of its own, and the id of the one of the processes that answered (0 if none did)."""
    with httpx.Client(base_url=server.url, timeout=60.0) as client, client.stream("GET", path) as reply:
        port = reply.extensions["network_stream"].get_extra_info("client_addr")[1]
        answering = 0
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                peers = {connection.raddr.port for connection in process.net_connections("tcp") if connection.raddr}
                answering = process.pid if port in peers else answering
        reply.read()
        return answering, reply.raise_for_status().text


@pytest.fixture(scope="module")
def scrapes(pair: GlassboxServer) -> dict[int, list[dict[Key, float]]]:
    """Many scrapes, by the process that answered."""
    found: dict[int, list[dict[Key, float]]] = {}
    deadline = time.monotonic() + 60.0
    processes = pair.processes()
    with ThreadPoolExecutor(4) as pool:
        while len(found) < 2 or min(len(texts) for texts in found.values()) < 5:
            assert time.monotonic() < deadline, f"scrapes by process: { {pid: len(s) for pid, s in found.items()} }"
            for pid, text in pool.map(lambda _: scrape(pair, processes), range(8)):
                found.setdefault(pid, []).append(glassbox_samples(text))
    return found


def settled(samples: dict[Key, float]) -> dict[Key, float]:
    """Without what changes while nothing is served: window maxima fade, as time goes by."""
    return {key: value for key, value in samples.items() if "window_max" not in key[0]}


class TestTwoApiServers:
    def test_both_processes_show_the_same_numbers(self, scrapes: dict[int, list[dict[Key, float]]]) -> None:
        """Two processes answered, several times each, and all that they said is the same."""
        assert 0 not in scrapes, "the process that answered wasn't found"
        assert len(scrapes) == 2
        shown = [settled(samples) for of_process in scrapes.values() for samples in of_process]
        assert all(samples == shown[0] for samples in shown)

    def test_metrics_equal_the_run_directory(
        self, pair: GlassboxServer, scrapes: dict[int, list[dict[Key, float]]]
    ) -> None:
        """Each sample is what the workers' snapshots say, no more and no less."""
        engines = merge(read_snapshots(pair.run_dir))
        families = build_families(engines, "layer")
        expected = glassbox_samples(to_metric(family) for family in families)
        for of_process in scrapes.values():
            assert settled(of_process[-1]) == settled(expected)

    def test_rows_are_counted_once(self, scrapes: dict[int, list[dict[Key, float]]]) -> None:
        """N requests of 6 tokens make N * 5 decode rows and N * 8 prefill rows per head: nothing is doubled."""
        samples = next(iter(scrapes.values()))[0]

        def rows(phase: str) -> float:
            name = "glassbox_attention_rows_total"
            return sum(
                value for (found, labels), value in samples.items() if found == name and ("phase", phase) in labels
            )

        assert rows("decode") == REQUESTS * (TOKENS - 1) * 30 * 9
        assert rows("prefill") == REQUESTS * 8 * 30 * 9
        assert counts_against_rows(samples) == {}

    def test_both_processes_serve_the_snapshot(self, pair: GlassboxServer) -> None:
        """glassbox's routes are in each of them, and all that they show comes from the one run directory."""
        found: dict[int, list[Any]] = {}
        deadline = time.monotonic() + 60.0
        processes = pair.processes()
        path = "/glassbox/v1/snapshot?statistic=sink_ratio&phase=decode"
        with ThreadPoolExecutor(4) as pool:
            while len(found) < 2:
                assert time.monotonic() < deadline, f"only {list(found)} answered"
                for pid, text in pool.map(lambda _: scrape(pair, processes, path), range(8)):
                    found[pid] = json.loads(text)["engines"]
        assert 0 not in found, "the process that answered wasn't found"
        (engine,) = merge(read_snapshots(pair.run_dir))
        for answer in found.values():
            assert [engine.rows[:, :, 1].tolist()] == [shown["phases"]["decode"]["rows"] for shown in answer]

    def test_one_exporter_speaks_for_the_server(self, pair: GlassboxServer) -> None:
        """There is one exporter process, not one per API server."""
        exporters = [process for process in pair.processes() if "glassbox.processes.exporter" in process.cmdline()]
        assert len(exporters) == 1

    def test_a_stopped_exporter_is_seen_at_both(self, pair: GlassboxServer) -> None:
        """What it wrote stands still; that it gives no sign of life is told by whoever answers, as is its return."""
        (exporter,) = [process for process in pair.processes() if "glassbox.processes.exporter" in process.cmdline()]
        processes = pair.processes()

        def silences() -> dict[int, float]:
            """Of each process that answered."""
            found: dict[int, float] = {}
            deadline = time.monotonic() + 60.0
            while len(found) < 2:
                assert time.monotonic() < deadline, f"only {list(found)} answered"
                pid, text = scrape(pair, processes)
                lines = [line for line in text.splitlines() if line.startswith("glassbox_exporter_silence_seconds")]
                assert len(lines) == 1
                found[pid] = float(lines[0].split()[1])
            return found

        # It gives a sign of life every 10 seconds at least.
        exporter.suspend()
        try:
            wait_for(silences, lambda found: min(found.values()) > 12, 60.0, "both to tell of the silence")
        finally:
            exporter.resume()
        wait_for(silences, lambda found: max(found.values()) < 10, 60.0, "both to tell of the return")

    def test_openmetrics_is_strict(self, pair: GlassboxServer) -> None:
        """glassbox's part of the page that a scraper which asks for OpenMetrics gets."""
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = httpx.get(f"{pair.url}/metrics/", headers=accept, timeout=60.0).raise_for_status().text
        ours = [
            line for line in text.splitlines() if line.startswith(("glassbox_", "# HELP glassbox_", "# TYPE glassbox_"))
        ]
        families = list(text_string_to_metric_families("\n".join([*ours, "# EOF"]) + "\n"))
        assert {"glassbox_attention_max_logit", "glassbox_exporter_up"} <= {family.name for family in families}

    def test_vllms_own_metrics_are_still_there(self, pair: GlassboxServer) -> None:
        """And count the requests: glassbox's files don't disturb their merging."""
        assert pair.metric("vllm:request_success_total") == REQUESTS
