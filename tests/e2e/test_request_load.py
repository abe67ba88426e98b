"""Many clients at once, a tenth of them traced, some of which go away: no error, no growth, nobody slowed down.

The short form runs with the other tests; the long one (`make soak`, GLASSBOX_SOAK_S seconds, 600 unless set) has 200
clients, watches the memory of each process, and compares the throughput with and without tracing.
"""

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil
import pytest
from httpx_sse import EventSource

from glassbox.config.load import packaged_config
from tests.e2e.test_soak import growth_mb_per_h, unharmed, warm_up
from tests.serving import MODEL_NAME, GlassboxServer, wait_for

pytestmark = pytest.mark.e2e

SHORT_S: Final = 30.0
LONG_S: Final = float(os.environ.get("GLASSBOX_SOAK_S", "600"))
TRACED_SHARE: Final = 0.1
# Throughput beside traced requests, against that of the same clients when nobody asks for a trace.
MIN_RATIO: Final = 0.98
ABORTED_SHARE: Final = 0.1
# Of one process: 1 MB a minute.
MAX_GROWTH_MB_PER_H: Final = 60.0
WINDOW_S: Final = 30.0
_OPTIONS: Final = (
    {},
    {"glassbox_top_k": 8},
    {"glassbox_top_k": 32, "glassbox_layers": [0, 15, 29]},
    {"glassbox_spans": ["start=0:4", "rest=4:2000"]},
    {"glassbox_rows": 1, "glassbox_layers": [29], "glassbox_heads": [0, 1]},
)


@dataclass
class Load:
    """Clients that ask one after the other, until told to stop.

    Attributes:
        traced_share: of the requests that ask for a trace.
        answered: finished requests by kind: untraced, traced, aborted.
        tokens: that all clients got while they were to ask. Whoever asks, requests are served in turn, so this falls as
            what untraced ones get does; how many of the random requests are traced scatters more than that.
        failures: what went wrong, a text each.
    """

    url: str
    clients: int
    traced_share: float = TRACED_SHARE
    answered: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)

    async def run(self, seconds: float, watch: Callable[[float], None] = lambda _: None, *, finish: bool) -> None:
        """Ask for so long.

        Args:
            seconds: to ask for.
            watch: called with the seconds since the start about each second.
            finish: wait for the last answers; otherwise all clients go away at once.
        """
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=self.clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=120.0, limits=limits) as client:
            asking = [asyncio.create_task(self._client(client, number, end)) for number in range(self.clients)]
            while time.monotonic() < end:
                await asyncio.to_thread(watch, seconds - (end - time.monotonic()))
                await asyncio.sleep(1.0)
            if not finish:
                for client_task in asking:
                    client_task.cancel()
            await asyncio.gather(*asking, return_exceptions=not finish)

    async def _client(self, client: httpx.AsyncClient, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            kind = "traced" if rng.random() < self.traced_share else "untraced"
            leaves = rng.random() < ABORTED_SHARE
            try:
                await self._ask(client, rng, end, traced=kind == "traced", leaves=leaves)
            except Exception as error:  # kept for the test, which names it in its message
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(1.0)
                continue
            self.answered["aborted" if leaves else kind] += 1

    async def _ask(
        self, client: httpx.AsyncClient, rng: random.Random, end: float, *, traced: bool, leaves: bool
    ) -> None:
        body: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": [rng.randrange(1000, 40_000) for _ in range(rng.randrange(4, 60))],
            "max_tokens": rng.randrange(2, 12),
            "ignore_eos": True,
            "stream": True,
        }
        # Drawn always: a client's requests are the same, whether or not some are traced.
        options = rng.choice(_OPTIONS)
        if traced:
            body["vllm_xargs"] = {"glassbox": "trace", **options}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            async for message in EventSource(answer).aiter_sse():
                if message.data == "[DONE]":
                    break
                if "error" in message.json():
                    raise RuntimeError(message.data)
                self.tokens += time.monotonic() < end
                if leaves:
                    break


def unfinished(server: GlassboxServer) -> float:
    """Requests that vLLM works at, or that wait."""
    return sum(server.metric(f"vllm:num_requests_{state}") or 0.0 for state in ("running", "waiting"))


def settle(server: GlassboxServer) -> None:
    """Nobody is traced any more, once the worker has heard that all are gone."""

    def active() -> float:
        server.complete("Wake up", max_tokens=1)
        return server.metric("glassbox_traced_requests_active") or 0.0

    wait_for(active, lambda count: count == 0.0, 90.0, "traces to end")


class TestShort:
    @pytest.mark.timeout(900)
    def test_everybody_is_answered(self, server: GlassboxServer) -> None:
        """30 seconds, 60 clients: no failure, no error, requests were traced, and all of them have ended."""
        load = Load(server.url, clients=60)
        before = server.metric("glassbox_traced_requests_total") or 0.0
        with unharmed(server):
            asyncio.run(load.run(SHORT_S, finish=True))
            assert [] == load.failures
            assert {"untraced", "traced", "aborted"} == set(load.answered)
            settle(server)
            # Those that were refused (max_active) are counted elsewhere.
            assert before < (server.metric("glassbox_traced_requests_total") or 0.0)


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(LONG_S + 1200)
    def test_memory_and_throughput(self, start_server: Callable[..., GlassboxServer]) -> None:
        """200 clients: every process' memory is flat after warm-up; windows with and without tracing take turns."""
        # vLLM's worker keeps some 2 MB for each number of tokens that a step has had. Those up to 256 come in the
        # warm-up, and there are no others: a window's first steps would have up to the prompts of 16 requests.
        server = start_server(args=("--max-num-batched-tokens", "256"), config=packaged_config().read_text())
        warm_up(server)
        memory: dict[int, list[tuple[float, float]]] = {}
        begin = time.monotonic()

        def watch(_: float) -> None:
            for process in server.processes():
                try:
                    size = process.memory_info().rss / 1e6
                except psutil.NoSuchProcess:
                    continue
                memory.setdefault(process.pid, []).append((time.monotonic() - begin, size))

        ratios: list[float] = []
        with unharmed(server):
            while time.monotonic() - begin < LONG_S:
                rates: dict[bool, float] = {}
                # In turns, and each first every other time.
                for traced in (False, True) if len(ratios) % 2 == 0 else (True, False):
                    load = Load(server.url, clients=200, traced_share=TRACED_SHARE if traced else 0.0)
                    asyncio.run(load.run(WINDOW_S, watch, finish=False))
                    wait_for(lambda: unfinished(server), lambda count: count == 0, 60.0, "requests to end")
                    assert [] == load.failures
                    rates[traced] = load.tokens / WINDOW_S
                ratios.append(rates[True] / rates[False])
                print(
                    f"tokens per second: {rates[False]:.1f} without traces, {rates[True]:.1f} beside them, "
                    f"ratio {ratios[-1]:.3f}",
                    flush=True,
                )
            settle(server)
        print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.3f}")
        growth = {pid: growth_mb_per_h(points) for pid, points in memory.items() if len(points) >= 20}
        for pid, slope in growth.items():
            print(f"{pid}: {memory[pid][0][1]:.0f} -> {memory[pid][-1][1]:.0f} MB, {slope:+.1f} MB/h")
        assert {pid: slope for pid, slope in growth.items() if slope > MAX_GROWTH_MB_PER_H} == {}
        assert statistics.median(ratios) >= MIN_RATIO
