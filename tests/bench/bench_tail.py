"""What glassbox does to the tail of latency: `vllm serve` under the load of vLLM's own `vllm bench serve`, in turns.

    python -m tests.bench.bench_tail run DIR --csv docs/data/tail_cpu.csv            # 25 minutes on two cores
    python -m tests.bench.bench_tail run DIR --quick                                 # 5 minutes
    python -m tests.bench.bench_tail run DIR --deadline-s 540 --csv CSV              # on a GPU; again for more starts
    python -m tests.bench.bench_tail table DIR --csv CSV                             # of what lies in DIR already

Three servers of one model stay up side by side: one with the plugin, whose configuration is edited for each setting,
and two without (`plain`, `again`), since two servers of one kind differ, too. Where there is a GPU, the model has the
shape of Llama-3.1-8B and random weights, and the servers share the GPU; on a CPU it is the demo's.

An unlimited load from so many clients finds the rate of requests at which a plain server is saturated. Then each arm in
turns gets streaming requests of random tokens at 0.5, 0.8 and 1 of that rate (Poisson arrivals, the same ones for all
arms of a round), in an order that is shuffled for each round and rate. A start is all of that once, or `--rounds`
times; the server with the plugin is started first, second and third in turns. Each part's latencies are kept in DIR,
and what lies there from earlier runs with the same options is pooled with them.

The table has p50, p99 and p99.9 of inter-token latency and of the time to the first token over all rounds, and their
ratio to the mean of that quantile of the two plain servers, with an interval of 95 % (`tail_quantiles.py`).
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from glassbox.cli.bench.serving import commit
from glassbox.cli.demo.demo_model import demo_model
from glassbox.cli.demo.vllm_server import VllmServer
from glassbox.config.load import packaged_config
from glassbox.core.cpu import cpu_model, serving_dtype
from tests.bench.bench_gpu import LLAMA
from tests.bench.bench_load import SERVED_NAME, Load, Shape, random_model
from tests.bench.tail_quantiles import Requests, tail

PLAIN: Final = ("plain", "again")
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "sample_rate 0.1": {"sample_rate": 0.1},
    "sample_rate 1.0": {"sample_rate": 1.0},
    "1 % traced": {"requests": {"trace_rate": 0.01}},
}
LOADS: Final = (0.5, 0.8, 1.0)
METRICS: Final = {"itl": "inter-token latency", "ttft": "time to first token"}
# (setting, quantile) -> the most that is promised, beyond what two plain servers differ by.
TARGETS: Final = {("default", 0.99): 1.01, ("default", 0.999): 1.02, ("sample_rate 0.1", 0.99): 1.03}
SETTLE_S: Final = 0.5  # beyond the metric that tells that an edit is in force
EFFECT_S: Final = 15.0


@dataclass(frozen=True)
class Plan:
    """What is measured; parts with another plan are not pooled.

    Attributes:
        gpu: whether the servers run on one.
        shape: of the load.
        part_s: how long one arm is loaded at one rate.
        eager, dtype: of vLLM.
        settings: of the plugin, names of SETTINGS.
    """

    gpu: bool
    shape: Shape
    part_s: float
    eager: bool
    dtype: str
    settings: tuple[str, ...]


def has_gpu() -> bool:
    """Asked in another process: this one forks, which CUDA doesn't survive."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_cuda) != ""


def _cuda() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


class Servers:
    """The three of one start.

    Args:
        folder: of their files.
        model: what they serve.
        plan: how.
        place: of the one with the plugin in the order of starting, 0 .. 2.
    """

    def __init__(self, folder: Path, model: Path, plan: Plan, place: int) -> None:
        self._config = folder / "glassbox.yaml"
        self._base: dict[str, Any] = yaml.safe_load(packaged_config().read_text()) or {}
        self._config.write_text(yaml.safe_dump(self._base))
        self._model, self._plan = model, plan
        order = [*PLAIN]
        order.insert(place, "glassbox")
        self._of = {name: self._server(folder / name, plugin=name == "glassbox") for name in order}

    def _server(self, folder: Path, *, plugin: bool) -> VllmServer:
        folder.mkdir()
        plan = self._plan
        args = [
            "--served-model-name",
            SERVED_NAME,
            "--max-model-len",
            "4096",
            "--max-num-seqs",
            str(plan.shape.clients),
        ]
        args += ["--no-enable-prefix-caching", "--dtype", plan.dtype]
        args += ["--enforce-eager"] if plan.eager else []
        if plan.gpu:
            # Caches of a fixed size: three servers share a GPU.
            args += ["--load-format", "dummy", "--gpu-memory-utilization", "0.25"]
            args += ["--kv-cache-memory-bytes", str(17 << 30)]
        env = {
            "GLASSBOX_CONFIG": str(self._config),
            "GLASSBOX_DISABLE": None if plugin else "1",
            "GLASSBOX_RUN_DIR": str(folder / "run"),
        }
        if not plan.gpu:
            # For the last one see `glassbox.cli.bench.serving`.
            env |= {"THP_MEM_ALLOC_ENABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_AOT_COMPILE": "0"}
        return VllmServer(
            self._model, args=args, env=env, log_path=folder / "server.log", cwd=folder, start_timeout_s=900.0
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All of them; side by side on a GPU, where starting is not what takes the CPU's cores."""
        # The pool is left last: whoever waits in it for a server to start ends when that is stopped.
        with ThreadPoolExecutor(len(self._of) if self._plan.gpu else 1) as pool, contextlib.ExitStack() as stack:
            for server in self._of.values():
                stack.callback(server.stop)
            began = time.monotonic()
            list(pool.map(VllmServer.start, self._of.values()))
            print(f"{', '.join(self._of)}: started in {time.monotonic() - began:.0f} s", flush=True)
            yield

    def ready(self, arm: str) -> VllmServer:
        """The server of an arm, with the arm's setting in force."""
        if arm in PLAIN:
            return self._of[arm]
        server, setting = self._of["glassbox"], SETTINGS[arm]
        text = yaml.safe_dump({**self._base, **setting})
        if text != self._config.read_text():
            fresh = self._config.with_suffix(".new")
            fresh.write_text(text)
            fresh.replace(self._config)
            # The rate is what tells that an edit is in force; of other edits there is no such sign.
            time.sleep(2.0)
            self._wait_for_rate(server, yaml.safe_load(text).get("sample_rate", 0.01))
            time.sleep(SETTLE_S)
        return server

    def _wait_for_rate(self, server: VllmServer, rate: float) -> None:
        end = time.monotonic() + EFFECT_S
        while (found := metric(server, "glassbox_sample_rate")) != rate:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"glassbox_sample_rate must be {rate} within {EFFECT_S:g} s of the edit, got {found}; "
                    f"see {server.log_path}"
                )
            time.sleep(0.2)

    def measured(self) -> dict[str, float]:
        """What the plugin has counted."""
        time.sleep(6.0)  # the last steps reach the page with the next export
        names = ("glassbox_steps_total", "glassbox_sampled_steps_total", "glassbox_errors_total")
        return {name: metric(self._of["glassbox"], name) or 0.0 for name in names}


def metric(server: VllmServer, name: str) -> float | None:
    """Sum of a metric's samples; None if there are none."""
    lines = [line for line in server.metrics_text().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else None


def parts(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """What lies in the folder of the same plan."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("part-*.json"))]
    return [part for part in found if part["plan"] == json.loads(json.dumps(asdict(plan)))]


def saturation(folder: Path, plan: Plan, load: Load, url: str) -> float:
    """Requests a second that a plain server answers if there are always as many as clients; found once for a folder."""
    path = folder / "saturation.json"
    if not path.exists():
        load.run(url, float("inf"), plan.shape.clients, seed=1)
        found = load.run(url, float("inf"), 8 * plan.shape.clients, seed=2)
        path.write_text(json.dumps({"requests_per_s": found["request_throughput"]}))
    return float(json.loads(path.read_text())["requests_per_s"])


def run(folder: Path, plan: Plan, model: Path, starts: int, rounds: int, deadline_s: float) -> None:
    """Measure, and keep each part's latencies in the folder."""
    began = time.monotonic()
    done = {int(part["start"]) for part in parts(folder, plan)}
    first = max(done, default=-1) + 1
    longest_round = 0.0
    for start in range(first, first + starts):
        home = folder / f"start{start}"
        home.mkdir()
        load = Load(model, plan.shape, home)
        servers = Servers(home, model, plan, start % 3)
        with servers.running():
            for arm in (*PLAIN, plan.settings[0]):  # compiled kernels, caches, allocators
                load.run(servers.ready(arm).url, float("inf"), 2 * plan.shape.clients, seed=0)
            most = saturation(folder, plan, load, servers.ready("plain").url)
            print(f"saturated at {most:.2f} requests a second", flush=True)
            for number in range(rounds):
                if time.monotonic() - began + longest_round > deadline_s:
                    print("no time for another round", flush=True)
                    break
                round_began = time.monotonic()
                for at in LOADS:
                    one_rate(folder, plan, servers, load, (start, number, at), most)
                longest_round = max(longest_round, time.monotonic() - round_began)
            print(json.dumps(servers.measured()), flush=True)
        if time.monotonic() - began + longest_round > deadline_s:
            break


def one_rate(
    folder: Path, plan: Plan, servers: Servers, load: Load, place: tuple[int, int, float], most: float
) -> None:
    """All arms in turns at one share of the saturated rate; place: start, round, share."""
    start, number, at = place
    rate = at * most
    count = max(2 * plan.shape.clients, round(rate * plan.part_s))
    seed = 1000 * start + 10 * number + LOADS.index(at) + 10
    arms = (*PLAIN, *plan.settings)
    found = {}
    for arm in random.Random(seed).sample(arms, len(arms)):
        found[arm] = load.run(servers.ready(arm).url, rate, count, seed)
    for arm in arms:
        kept = {name: found[arm][name] for name in ("ttfts", "itls", "output_throughput")}
        about = {"plan": asdict(plan), "start": start, "round": number, "load": at, "arm": arm, "rate": rate}
        (folder / f"part-{start}-{number}-{at}-{arm.replace(' ', '_')}.json").write_text(json.dumps(about | kept))
    shown = "  ".join(
        f"{arm} {1e3 * np.quantile(np.concatenate(_requests('itl', found[arm])), 0.99):.1f}" for arm in arms
    )
    print(f"start {start} round {number} {rate:.2f}/s, {count} requests: p99 of ITL in ms: {shown}", flush=True)


def _requests(name: str, part: Mapping[str, Any]) -> Requests:
    if name == "ttft":
        return [np.array([seconds]) for seconds in part["ttfts"]]
    return [np.array(seconds, dtype=np.float64) for seconds in part["itls"]]


def table(folder: Path, plan: Plan) -> list[dict[str, Any]]:
    """One line for each rate, metric, arm and quantile."""
    found = parts(folder, plan)
    arms = (*PLAIN, *plan.settings)
    lines = []
    for at in LOADS:
        of_rounds: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for part in found:
            if part["load"] == at:
                of_rounds.setdefault((part["start"], part["round"]), {})[part["arm"]] = part
        whole = [of_round for of_round in of_rounds.values() if set(arms) == set(of_round)]
        if not whole:
            continue
        for name in METRICS:
            quantiles = tail([{arm: _requests(name, one[arm]) for arm in arms} for one in whole], PLAIN)
            for arm, of_arm in quantiles.items():
                for quantile in of_arm:
                    if quantile.seconds is None:
                        continue
                    lines.append({
                        "load": at,
                        "requests_per_s": f"{np.mean([one[arm]['rate'] for one in whole]):.2f}",
                        "rounds": len(whole),
                        "metric": name,
                        "quantile": f"p{100 * quantile.at:g}",
                        "arm": arm,
                        "values": quantile.values,
                        "ms": f"{1e3 * quantile.seconds:.2f}",
                        "ratio": f"{quantile.ratio:.4f}",
                        "low": f"{quantile.low:.4f}",
                        "high": f"{quantile.high:.4f}",
                        "target": TARGETS.get((arm, quantile.at), ""),
                        "output_tokens_per_s": f"{np.mean([one[arm]['output_throughput'] for one in whole]):.1f}",
                    })  # fmt: skip
    return lines


def markdown(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[str]:
    """The table as docs/performance.md has it: a line for each rate, metric and quantile, a column for each arm."""
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        key = tuple(line[name] for name in ("load", "requests_per_s", "metric", "quantile"))
        found.setdefault(key, {})[line["arm"]] = line
    table = [f"| of saturation | | values | {PLAIN[0]}, ms | {' | '.join(arms)} |", "|---" * (4 + len(arms)) + "|"]
    for (load, rate, name, quantile), of in found.items():
        first = of[PLAIN[0]]
        ratios = " | ".join(f"{of[arm]['ratio']} [{of[arm]['low']}, {of[arm]['high']}]" for arm in arms)
        where = f"{load} ({rate}/s) | {METRICS[name]}, {quantile} | {first['values']:,}"
        table.append(f"| {where} | {first['ms']} | {ratios} |")
    return table


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """The table, below what and where it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def facts(plan: Plan) -> dict[str, str]:
    """What the result was measured with."""
    hardware = cpu_model()
    if plan.gpu:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            hardware = f"{pool.apply(_cuda)}, {hardware}"
    return {
        "command": shlex.join(["python", "-m", "tests.bench.bench_tail", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMMIT") or commit(),
        "hardware": hardware,
        "versions": f"vllm {version('vllm')}, torch {version('torch')}",
        "servers": f"{plan.dtype}, {'eager' if plan.eager else 'compiled'}, no prefix cache",
        "load": f"{plan.shape.clients} clients, {plan.shape.input_tokens} prompt and {plan.shape.output_tokens} output "
        f"tokens, {plan.part_s:g} s for each arm, rate and round",
    }


def plan_of(given: argparse.Namespace) -> Plan:
    """What was asked for, and for the rest what fits the device."""
    gpu = has_gpu() if given.device == "auto" else given.device == "gpu"
    clients, inputs, outputs = (64, 512, 128) if gpu else (16, 128, 32)
    part_s = 10.0 if gpu else 20.0
    settings = tuple(given.settings)
    if given.quick:
        part_s, settings = 8.0, ("default", "sample_rate 0.1")
    return Plan(
        gpu=gpu,
        shape=Shape(given.clients or clients, given.input_tokens or inputs, given.output_tokens or outputs),
        part_s=given.part_s or part_s,
        eager=given.eager or given.quick,
        dtype="bfloat16" if gpu else serving_dtype(),
        settings=settings,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "sample_rate 0.1"])
    parser.add_argument("--starts", type=int, help="of the three servers (default: 3, of a quick run and on a GPU 1)")
    parser.add_argument(
        "--rounds", type=int, help="of each start (default: 1, on a GPU as many as the deadline allows)"
    )
    parser.add_argument("--clients", type=int, help="requests at once (default: 16, on a GPU 64)")
    parser.add_argument("--input-tokens", type=int, help="of a request (default: 128, on a GPU 512)")
    parser.add_argument("--output-tokens", type=int, help="of a request (default: 32, on a GPU 128)")
    parser.add_argument("--part-s", type=float, help="of load for each arm, rate and round (default: 20, on a GPU 10)")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--quick", action="store_true", help="one eager start with parts of 8 s")
    parser.add_argument("--deadline-s", type=float, default=3600.0, help="no round begins that would end after it")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args(argv)
    # SIGTERM ends it as Ctrl-C does, so that the servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["HF_HUB_OFFLINE"] = "1"
    plan = plan_of(given)
    folder: Path = given.folder.absolute()
    if given.command == "run":
        folder.mkdir(parents=True, exist_ok=True)
        model = random_model(folder / "model", LLAMA) if plan.gpu else demo_model()
        starts = given.starts or (1 if plan.gpu or given.quick else 3)
        run(folder, plan, model, starts, given.rounds or (100 if plan.gpu else 1), given.deadline_s)
    lines = table(folder, plan)
    if not lines:
        sys.exit(f"no round of these options is complete in {folder}; use the options of `run`, or run it")
    print("\n".join(markdown(lines, (*PLAIN, *plan.settings))))
    if given.csv:
        write_csv(given.csv, lines, facts(plan))
        print(f"written to {given.csv}")


if __name__ == "__main__":
    main()
