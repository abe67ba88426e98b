"""A server under mixed traffic, aborts, scrapes and edits of its configuration, all at once, stays what it was.

The short form runs with the other tests; the long one (`make soak`, GLASSBOX_SOAK_S seconds, 900 unless set) also
looks for growth of memory, against what an idle observer may need.
"""

import contextlib
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from tests.e2e.mixed_traffic import MixedTraffic
from tests.e2e.samples import counts_against_rows, glassbox_samples
from tests.serving import GlassboxServer

pytestmark = pytest.mark.e2e

SHORT_S: Final = 40.0
LONG_S: Final = float(os.environ.get("GLASSBOX_SOAK_S", "900"))
EDIT_S: Final = 2.5
BYTES_PER_MB: Final = 1_000_000
# The worker of vLLM 0.32 on a CPU keeps some 2 MB for each number of tokens that a step has had, with or without the
# plugin, and takes its time the first time: until it has seen the common ones, neither memory nor throughput says
# anything.
MOST_TOKENS: Final = 256
# Caches of the tokenizer and of vLLM's prefix cache fill up, too.
WARM_UP_SHARE: Final = 0.3
# Of one process over an hour; a server that leaks a snapshot (0.5 MB) every ten seconds would gain 170.
MAX_GROWTH_MB_PER_H: Final = 60.0

EDITS: Final[tuple[dict[str, Any], ...]] = (
    {"sample_rate": 0.3},
    {"sample_rate": 1.0, "export": {"interval_s": 1, "prometheus": {"detail": "head", "max_series": 100_000}}},
    {"sample_rate": 1.0, "sampling": {"layers": {"every": 4}, "max_rows_per_step": 16}},
    {"sample_rate": 7.0},  # out of range: the last good configuration stays
    {"sample_rate": 0.0},
    {"sample_rate": 1.0, "sampling": {"overhead_budget": 0.05}, "log_level": "debug"},
    {"sample_rate": 1.0, "sampling": {"prefill_rows_per_request": 64}, "export": {"interval_s": 0.5}},
    {"enabled": False},
    {"sample_rate": 1.0, "export": {"interval_s": 1, "prometheus": {"detail": "model"}}},
)


@dataclass
class Watched:
    """What was seen while the soak went on.

    Attributes:
        edits, scrapes: how many there were.
        falls: counters (sums over their labels) that fell from one scrape to the next.
        memory_mb: seconds and USS, per process.
    """

    traffic: MixedTraffic
    edits: int = 0
    scrapes: int = 0
    falls: list[str] = field(default_factory=list)
    memory_mb: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def warm_up(server: GlassboxServer) -> None:
    """A step of each number of tokens."""
    rng = random.Random(0)
    for tokens in range(1, MOST_TOKENS + 1):
        server.complete([rng.randrange(1000, 40_000) for _ in range(tokens)], max_tokens=1)


def soak(server: GlassboxServer, seconds: float) -> Watched:
    """Traffic, an edit every few seconds and a scrape between them, for so long."""
    begin = time.monotonic()
    highest: dict[str, float] = {}
    edits = itertools.cycle(EDITS)
    with MixedTraffic(server.url) as traffic:
        watched = Watched(traffic)
        # Every edit at least once, on a slow machine too.
        while (now := time.monotonic() - begin) < seconds or watched.edits < len(EDITS):
            server.edit_config(**next(edits))
            watched.edits += 1
            time.sleep(EDIT_S / 2)
            # Sums over labels: they must not fall when the detail changes.
            totals: dict[str, float] = {}
            for (name, _), value in glassbox_samples(server.metrics()).items():
                if name.endswith(("_total", "_count")):
                    totals[name] = totals.get(name, 0.0) + value
            for name, value in totals.items():
                if value < highest.get(name, 0.0):
                    watched.falls.append(f"{name} from {highest[name]} to {value} after {now:.0f} s")
                highest[name] = value
            watched.scrapes += 1
            measure(server, now, watched)
            time.sleep(EDIT_S / 2)
    return watched


def measure(server: GlassboxServer, now_s: float, watched: Watched) -> None:
    """Note the memory that each of the server's processes has for itself."""
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            name = f"{process.pid} {process.name()}"
            size = process.memory_full_info().uss / BYTES_PER_MB
            watched.memory_mb.setdefault(name, []).append((now_s, size))


def growth_mb_per_h(points: list[tuple[float, float]]) -> float:
    """Slope of a process's memory after warm-up: median of the slopes between the halves (Theil and Sen)."""
    warm = points[int(len(points) * WARM_UP_SHARE) :]
    half = len(warm) // 2
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(warm[:half], warm[-half:], strict=True)]
    return statistics.median(slopes) * 3600


@contextlib.contextmanager
def unharmed(server: GlassboxServer) -> Iterator[None]:
    """The server still runs after the block, has counted no error, and logged no traceback in between."""
    begin = len(server.log_path.read_text(errors="replace").splitlines())
    errors = server.metric("glassbox_errors_total") or 0.0
    yield
    server.restore_config()
    assert server.running
    assert (server.metric("glassbox_errors_total") or 0.0) == errors
    log = server.log_path.read_text(errors="replace").splitlines()[begin:]
    assert [line for line in log if "Traceback" in line] == []
    # An edit that is out of range is an error in the log, and meant to be one.
    assert [line for line in log if " ERROR " in line and "sample_rate" not in line] == []


def assert_all_well(server: GlassboxServer, watched: Watched) -> None:
    """Every request was answered, no counter fell, and afterwards the server measures as it did."""
    assert watched.traffic.failures == []
    assert watched.falls == []
    server.restore_config()
    server.wait_metric("glassbox_sample_rate", lambda rate: rate == 1.0)
    server.wait_metric("glassbox_config_last_reload_successful", lambda ok: ok == 1.0)
    before = server.settled_rows()
    server.complete("After the storm", max_tokens=6, ignore_eos=True)
    server.wait_metric("glassbox_attention_rows_total", lambda rows: rows is not None and rows > before)
    server.settled_rows()
    assert counts_against_rows(glassbox_samples(server.metrics())) == {}


class TestShort:
    @pytest.mark.timeout(900)
    def test_a_server_survives_edits_aborts_and_scrapes(self, server: GlassboxServer) -> None:
        """40 seconds of all of it: every request answered, no counter falls, no error, and it still measures."""
        with unharmed(server):
            watched = soak(server, SHORT_S)
            assert set(watched.traffic.answered) == {"chat", "streamed", "completion", "aborted", "long"}
            assert_all_well(server, watched)


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(LONG_S + 1200)
    def test_memory_does_not_grow(self, start_server: Callable[..., GlassboxServer], tmp_path: Path) -> None:
        """The same for a quarter of an hour and with JSONL; no process of the server gains memory all the while."""
        jsonl = {"path": str(tmp_path / "windows.jsonl"), "max_mb": 1}
        server = start_server(config={"sample_rate": 1.0, "export": {"interval_s": 1, "jsonl": jsonl}})
        warm_up(server)
        with unharmed(server):
            watched = soak(server, LONG_S)
            assert_all_well(server, watched)
        # The exporter is started and ended by edits; processes that lived all along are compared.
        lasting = {name: points for name, points in watched.memory_mb.items() if len(points) == watched.scrapes}
        assert len(lasting) >= 2
        growth = {name: growth_mb_per_h(points) for name, points in lasting.items()}
        for name, points in watched.memory_mb.items():
            print(f"{name}: {points[0][1]:.0f} -> {points[-1][1]:.0f} MB, {growth.get(name, float('nan')):+.1f} MB/h")
        assert {name: slope for name, slope in growth.items() if slope > MAX_GROWTH_MB_PER_H} == {}
