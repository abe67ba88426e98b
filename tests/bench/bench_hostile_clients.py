"""What clients that ask for everything cost the others: eight hostile ones beside four, on a real server.

    python -m tests.bench.bench_hostile_clients [--requests 3 --rounds 8] [--csv docs/data/hostile_clients_cpu.csv]

The configuration is configs/production.yaml, and in a second part the same with `requests.opt_in: true`, with its
budget and without; a probe scores what is traced. Eight clients send prompts of 1,500 tokens; in turns they ask for
nothing, and for all there is: every row of the prompt, top 32, 16 spans, whole rows, a summary in the answer, and half
of them all signals that are made while a request runs at all layers and heads, the other half those on demand, too, at
as many as these may have. Each sends so many requests, however long that takes. Four others send short requests all the
while, and the tokens a second that they get are compared: the median of the ratios of rounds. Measuring's share of wall
time, as glassbox counts it, scatters less than that. What scoring and summing up cost are other processes' seconds.
"""

import argparse
import asyncio
import contextlib
import csv
import itertools
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from glassbox.cli.bench.serving import commit
from glassbox.cli.demo.demo_model import demo_model
from glassbox.core.cpu import cpu_model
from glassbox.core.signal_table import MAX_KEPT_PLACES, SIGNAL_NAMES, SIGNALS
from tests import probe_samples
from tests.serving import EFFECT_S, MODEL_NAME, GlassboxServer

ROOT: Final = Path(__file__).resolve().parents[2]
HOSTILE, OTHERS = 8, 4
# Until what was done is in a snapshot, and shown.
SNAPSHOT_S: Final = 7.0
LONGEST_S: Final = 300.0
CONFIGURATIONS: Final = ("production", "opt_in: true", "opt_in: true, no budget")
_MODULES: Final = {
    "exporter": "glassbox.processes.exporter",
    "on_demand": "glassbox.processes.exporter.signal_process",
}
_EVERYTHING: Final[dict[str, Any]] = {
    "glassbox": "trace",
    "glassbox_prompt": "all",
    "glassbox_top_k": 32,
    "glassbox_rows": 1,
    "glassbox_spans": [f"span{n}={100 * n}:{100 * n + 90}" for n in range(15)] + ["rest=1500:100000"],
    "glassbox_respond": 1,
}
# What the hostile ones ask for in turns: no request may have signals on demand at all layers and heads.
EVERYTHING: Final[tuple[dict[str, Any], ...]] = (
    {**_EVERYTHING, "glassbox_signals": [signal.name for signal in SIGNALS if signal.cost == "streaming"]},
    {
        **_EVERYTHING,
        "glassbox_signals": list(SIGNAL_NAMES),
        "glassbox_layers": [0, 10, 20, 29],
        "glassbox_heads": list(range(MAX_KEPT_PLACES // 4)),
    },
)


async def load(
    url: str,
    seconds: float,
    *,
    asks: bool,
    prompt: int = 1500,
    requests: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> float:
    """Tokens a second that the others get while hostile ones ask for everything or for nothing.

    Args:
        url: of the server.
        seconds: how long, at most.
        asks: for everything.
        prompt: tokens of the hostile ones' prompts.
        requests: that each hostile one sends; it is over when the last one is answered. None: as many as there is time.
        stopped: whether to end at once.
    """
    began = time.monotonic()
    end, tokens = began + seconds, 0

    async def client(http: httpx.AsyncClient, number: int, length: int, answer: int, most: int | None) -> None:
        nonlocal tokens
        # Prompts that nobody has sent before: one of which every row is asked for takes nothing from the prefix cache.
        rng, counted = random.Random(), number >= HOSTILE
        for _ in itertools.count() if most is None else range(most):
            ids = [rng.randrange(1000, 40_000) for _ in range(length)]
            body: dict[str, Any] = {"model": MODEL_NAME, "prompt": ids, "max_tokens": answer, "ignore_eos": True}
            if asks and not counted:
                body["vllm_xargs"] = EVERYTHING[number % len(EVERYTHING)]
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    tokens += counted and line.startswith("data: {")

    async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
        hostile = [asyncio.create_task(client(http, n, prompt, 48, requests)) for n in range(HOSTILE)]
        tasks = [*hostile, *(asyncio.create_task(client(http, HOSTILE + n, 64, 32, None)) for n in range(OTHERS))]
        while time.monotonic() < end and not stopped() and not all(task.done() for task in hostile):
            await asyncio.sleep(0.05)
        rate = tokens / (time.monotonic() - began)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    for one in found:
        if isinstance(one, httpx.HTTPStatusError):
            raise one
    return rate


def seconds_of(server: GlassboxServer) -> dict[str, float]:
    """That the exporter, its process for signals on demand and the API server have computed for."""
    found: dict[str, float] = {}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            name = next((name for name, module in _MODULES.items() if module in words), "api_server")
            if name in _MODULES or process.pid == server.pid:
                times = process.cpu_times()
                found[name] = found.get(name, 0.0) + times.user + times.system
    return found


def measured_s(server: GlassboxServer) -> float:
    """What measuring has cost until now, in seconds of the worker."""
    time.sleep(SNAPSHOT_S)
    return server.metric("glassbox_overhead_seconds_total") or 0.0


def thinned(server: GlassboxServer) -> dict[str, int]:
    """What the budget has refused so far, and left out of traces."""
    return {
        "refused": int(server.metric("glassbox_trace_refused_total", reason="budget") or 0),
        "skipped_steps": int(server.metric("glassbox_trace_skipped_steps_total") or 0),
    }


def measure(server: GlassboxServer, name: str, config: dict[str, Any], requests: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    server.write_config(config)
    time.sleep(EFFECT_S)
    asyncio.run(load(server.url, LONGEST_S, asks=True, requests=1))
    ratios, shares, before = [], [], thinned(server)
    used: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        rate = {}
        for asks in random.sample([False, True], 2):
            before_s, computed = measured_s(server), seconds_of(server)
            began = time.monotonic()
            rate[asks] = asyncio.run(load(server.url, LONGEST_S, asks=asks, requests=requests))
            seconds = time.monotonic() - began
            used[asks].append({of: (s - computed.get(of, 0.0)) / seconds for of, s in seconds_of(server).items()})
            if asks:
                shares.append((measured_s(server) - before_s) / seconds)
        ratios.append(rate[True] / rate[False])
        print(name, f"{ratios[-1]:.3f} {shares[-1]:.4f} {seconds:.0f} s", used[False][-1], used[True][-1], flush=True)
    return {
        "configuration": name,
        "throughput_ratio": round(statistics.median(ratios), 3),
        "ratios": " ".join(f"{ratio:.3f}" for ratio in sorted(ratios)),
        "measuring_share": round(statistics.median(shares), 4),
        **{
            f"{process}_share{'' if asks else '_else'}": round(
                statistics.median(one.get(process, 0.0) for one in used[asks]), 3
            )
            for process in (*_MODULES, "api_server")
            for asks in (True, False)
        },
        **{what: count - before[what] for what, count in thinned(server).items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run it and print, or write, a row for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3, help="of each hostile client in a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    # SIGTERM ends it as Ctrl-C does, so that servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    production = yaml.safe_load((ROOT / "configs" / "production.yaml").read_text(encoding="utf-8"))
    production["export"]["interval_s"] = 5  # only for what this script reads
    asked = {**production, "requests": {**production["requests"], "opt_in": True}}
    unlimited = {**asked, "sampling": {**production["sampling"], "overhead_budget": None}}
    configs = dict(zip(CONFIGURATIONS, (production, asked, unlimited), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        probes = [{"file": str(probe_samples.write(Path(folder)))}]
        configs = {name: {**one, "probes": probes} for name, one in configs.items()}
        begin = configs[CONFIGURATIONS[1]]
        with GlassboxServer(demo_model(), Path(folder), config=begin, start_timeout_s=900.0) as server:
            rows = [
                measure(server, name, configs[name], options.requests, options.rounds)
                for name in options.configurations
            ]
    for row in rows:
        print(row)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            words = shlex.join(["python", "-m", "tests.bench.bench_hostile_clients", *sys.argv[1:]])
            file.write(f"# command: {words}\n# commit: {os.environ.get('COMMIT') or commit()}\n")
            file.write(f"# hardware: {cpu_model()}\n# versions: vllm {version('vllm')}\n")
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
