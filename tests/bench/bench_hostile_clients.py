"""What clients that ask for everything cost the others: eight hostile ones beside four, on a real server.

    python -m tests.bench.bench_hostile_clients [--seconds 20 --rounds 5] [--csv docs/data/hostile_clients_cpu.csv]

The configuration is configs/production.yaml, and in a second part the same with `requests.opt_in: true`, with its
budget and without; a probe scores what is traced. Eight clients send prompts of 1,500 tokens; in turns they ask for
nothing, and for all there is: every row of the prompt, top 32, 16 spans, whole rows, a summary in the answer, and half
of them all signals that are made while a request runs at all layers and heads, the other half those on demand, too, at
as many as these may have. Four others send short requests all the while, and what they get is compared: the median of
the ratios of rounds. Measuring's share of wall time, as glassbox counts it, scatters less than that. What scoring and
summing up cost are other processes' seconds, of the exporter and of the API server.
"""

import argparse
import asyncio
import contextlib
import csv
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from glassbox.cli.demo.demo_model import demo_model
from glassbox.core.signal_table import MAX_KEPT_PLACES, SIGNAL_NAMES, SIGNALS
from tests import probe_samples
from tests.serving import EFFECT_S, MODEL_NAME, GlassboxServer

ROOT: Final = Path(__file__).resolve().parents[2]
HOSTILE, OTHERS = 8, 4
# Until what was done is in a snapshot, and shown.
SNAPSHOT_S: Final = 7.0
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
    url: str, seconds: float, *, asks: bool, prompt: int = 1500, stopped: Callable[[], bool] = lambda: False
) -> int:
    """Tokens that the others got within so many seconds, while hostile ones ask for everything or for nothing."""
    end, tokens = time.monotonic() + seconds, 0

    async def client(http: httpx.AsyncClient, number: int, length: int, answer: int, *, counted: bool) -> None:
        nonlocal tokens
        rng = random.Random(number)
        while time.monotonic() < end:
            ids = [rng.randrange(1000, 40_000) for _ in range(length)]
            body: dict[str, Any] = {"model": MODEL_NAME, "prompt": ids, "max_tokens": answer, "ignore_eos": True}
            if asks and not counted:
                body["vllm_xargs"] = EVERYTHING[number % len(EVERYTHING)]
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    tokens += counted and line.startswith("data: {") and time.monotonic() < end

    async with httpx.AsyncClient(base_url=url, timeout=300.0) as http:
        asking = [client(http, n, prompt, 48, counted=False) for n in range(HOSTILE)]
        asking += [client(http, 100 + n, 64, 32, counted=True) for n in range(OTHERS)]
        tasks = [asyncio.create_task(one) for one in asking]
        while time.monotonic() < end and not stopped():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tokens


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


def measure(server: GlassboxServer, name: str, config: dict[str, Any], seconds: float, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    server.write_config(config)
    time.sleep(EFFECT_S)
    asyncio.run(load(server.url, 5.0, asks=True))
    ratios, shares = [], []
    used: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        tokens = {}
        for asks in random.sample([False, True], 2):
            before_s = measured_s(server)
            computed = seconds_of(server)
            tokens[asks] = asyncio.run(load(server.url, seconds, asks=asks))
            used[asks].append({name: s - computed.get(name, 0.0) for name, s in seconds_of(server).items()})
            if asks:
                shares.append((measured_s(server) - before_s) / seconds)
        ratios.append(tokens[True] / tokens[False])
        print(name, f"{ratios[-1]:.3f} {shares[-1]:.4f}", used[False][-1], used[True][-1], flush=True)
    return {
        "configuration": name,
        "throughput_ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "measuring_share": round(statistics.median(shares), 4),
        **{
            f"{process}_share{'' if asks else '_else'}": round(
                statistics.median(one.get(process, 0.0) for one in used[asks]) / seconds, 3
            )
            for process in (*_MODULES, "api_server")
            for asks in (True, False)
        },
        "refused": int(server.metric("glassbox_trace_refused_total", reason="budget") or 0),
        "skipped_steps": int(server.metric("glassbox_trace_skipped_steps_total") or 0),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run it and print, or write, a row for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    # SIGTERM ends it as Ctrl-C does, so that servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    production = yaml.safe_load((ROOT / "configs" / "production.yaml").read_text(encoding="utf-8"))
    production["export"]["interval_s"] = 5  # only for what this script reads
    asked = {**production, "requests": {**production["requests"], "opt_in": True}}
    unlimited = {**asked, "sampling": {**production["sampling"], "overhead_budget": None}}
    configs = {"production": production, "opt_in: true": asked, "opt_in: true, no budget": unlimited}
    with tempfile.TemporaryDirectory() as folder:
        probes = [{"file": str(probe_samples.write(Path(folder)))}]
        configs = {name: {**one, "probes": probes} for name, one in configs.items()}
        begin = configs["opt_in: true"]
        with GlassboxServer(demo_model(), Path(folder), config=begin, start_timeout_s=900.0) as server:
            rows = [measure(server, name, one, options.seconds, options.rounds) for name, one in configs.items()]
    for row in rows:
        print(row)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
