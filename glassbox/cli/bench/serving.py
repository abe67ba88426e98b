"""What glassbox costs a real `vllm serve` on this CPU: throughput and memory, against servers without it.

    glassbox bench
    glassbox bench --starts 6 --csv serving_cpu.csv
    glassbox bench --instructions avx2               # all servers as on a CPU without AVX-512

Three servers of the same model stay up side by side:

    default    with the plugin and the packaged configuration (sample_rate 0.01)
    off        without the plugin (GLASSBOX_DISABLE=1), started before `off again`
    off again  without the plugin

Short, identical batches of requests go to them in turns, in an order that is shuffled for each round and after a few
unmeasured tokens, so that whatever else the machine does hits all alike. Then half as many rounds with the YAML of the
server with the plugin edited to sample_rate 1.0. A round gives one ratio: throughput over
the mean of the two servers without the plugin.

Servers differ for as long as they live, two without the plugin by up to 3 %, and the one that is started first is the
slower one (2-core AVX-512 server, 2026-11). So all are started anew several times, the one with the plugin first,
second and third in turns (make it a multiple of three starts), and a start, the median of its rounds, is one
observation. The table shows the mean of the starts, the lowest and the highest of them, and the mean for CPU time; a
second one in which processes CPU time went up. How far `off` and `off again` are from 1 is what servers differ by.
"""

import argparse
import contextlib
import csv
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from glassbox import __version__
from glassbox.cli.bench.instructions import AVX2, CHOICES, NATIVE, InstructionsError, environment, loaded_library
from glassbox.cli.demo.demo_model import demo_model
from glassbox.cli.demo.ports import free_port
from glassbox.cli.demo.vllm_server import VllmServer
from glassbox.config.load import load_config, packaged_config
from glassbox.core.cpu import cpu_flags, cpu_model, serving_dtype

ROOT: Final = Path(__file__).resolve().parents[3]
MODEL_NAME: Final = "bench"
BYTES_PER_MB: Final = 1_000_000
MAX_LOAD: Final = 0.5
WARM_TOKENS: Final = 4
RELOAD_S: Final = 2.0  # an edit is in force by then; the deadline of the configuration watcher

OFF: Final = "off"
DEFAULT: Final = "default"
RATE_1: Final = "rate 1.0"
AGAIN: Final = "off again"
_PROCESSES: Final = {"VLLM::Worker": "worker", "VLLM::Engine": "engine"}
# Arm -> the least ratio of throughput that is promised.
TARGETS: Final = {DEFAULT: 0.98, RATE_1: 0.90}
MEMORY_TARGET_MB: Final = 100.0


@dataclass
class Arm:
    """One thing that is measured: a server and the changes to its configuration."""

    name: str
    server: VllmServer
    config_path: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def apply(self, base: dict[str, Any]) -> None:
        """Write this arm's configuration; waits until it is in force if it is another one."""
        text = yaml.safe_dump({**base, **self.changes})
        if self.config_path.read_text() == text:
            return
        fresh = self.config_path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.config_path)
        time.sleep(RELOAD_S)


@dataclass(frozen=True)
class Batch:
    """Requests that are sent at the same time; `prompts` are token ids."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """One batch on one arm: output tokens per second, and CPU seconds of the server's processes, by what they are."""

    tokens_per_s: float
    cpu_s_of: Mapping[str, float]

    @property
    def cpu_s(self) -> float:
        """Of all processes."""
        return sum(self.cpu_s_of.values())


@dataclass(frozen=True)
class Options:
    """What is measured."""

    starts: int
    rounds: int
    batch_size: int
    prompt_tokens: int
    max_tokens: int
    eager: bool
    dtype: str
    instructions: str = NATIVE


def batches(options: Options, count: int) -> Iterator[Batch]:
    """Batches of random tokens: no two share a prefix that a cache could serve."""
    rng = random.Random(0)
    for _ in range(count):
        prompts = tuple(
            # The vocabulary's ordinary tokens; special ones are below.
            tuple(rng.randrange(1000, 40000) for _ in range(options.prompt_tokens))
            for _ in range(options.batch_size)
        )
        yield Batch(prompts, options.max_tokens)


def cpu_seconds(server: VllmServer) -> defaultdict[str, float]:
    """CPU time that the living processes of a server have used, by what they are."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # vLLM names its own processes; the kernel cuts names off at 15 characters.
            found = (what for name, what in _PROCESSES.items() if process.name().startswith(name))
            seconds[next(found, "API server")] += times.user + times.system
    return seconds


def memory_mb(server: VllmServer) -> dict[int, float]:
    """Proportional set size of each of a server's processes, in MB: pages that n processes share count 1/n."""
    sizes = {}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes[process.pid] = process.memory_full_info().pss / BYTES_PER_MB
    return sizes


def run_batch(client: httpx.Client, pool: ThreadPoolExecutor, server: VllmServer, batch: Batch) -> Sample:
    """Send a batch and wait for all answers."""

    def send(prompt: tuple[int, ...]) -> int:
        body = {"model": MODEL_NAME, "prompt": list(prompt), "max_tokens": batch.max_tokens}
        # Every answer has the same length, whatever the model says.
        body |= {"temperature": 0, "ignore_eos": True}
        reply = client.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    cpu = cpu_seconds(server)
    begin = time.perf_counter()
    tokens = sum(pool.map(send, batch.prompts))
    seconds = time.perf_counter() - begin
    expected = batch.max_tokens * len(batch.prompts)
    if tokens != expected:
        raise RuntimeError(f"the answers must have {expected} tokens, got {tokens}")
    return Sample(tokens / seconds, {what: now - cpu[what] for what, now in cpu_seconds(server).items()})


def measure(arms: Sequence[Arm], base: dict[str, Any], options: Options, seed: int) -> dict[str, list[Sample]]:
    """One sample per arm and round; the order of the arms is shuffled for each round."""
    samples: dict[str, list[Sample]] = {arm.name: [] for arm in arms}
    work = list(batches(options, options.rounds + 2))
    with httpx.Client(timeout=300.0) as client, ThreadPoolExecutor(options.batch_size) as pool:
        for arm in arms:  # compiled graphs, caches, allocators
            arm.apply(base)
            for batch in work[:2]:
                run_batch(client, pool, arm.server, batch)
        order = random.Random(seed)
        for number, batch in enumerate(work[2:]):
            for arm in order.sample(arms, len(arms)):
                arm.apply(base)
                # What the other server or the pause has put out of caches.
                run_batch(client, pool, arm.server, Batch(work[0].prompts, WARM_TOKENS))
                # The same prompts for all arms; two arms of one server must not find them cached.
                httpx.post(f"{arm.server.url}/reset_prefix_cache", timeout=30.0).raise_for_status()
                samples[arm.name].append(run_batch(client, pool, arm.server, batch))
            shown = "  ".join(f"{arm.name} {samples[arm.name][-1].tokens_per_s:6.1f}" for arm in arms)
            print(f"round {number + 1:2d}/{options.rounds}  tokens/s: {shown}", flush=True)
    return samples


@dataclass(frozen=True)
class Row:
    """One line of the result: the ratio to a server without the plugin, mean, lowest and highest of the starts."""

    arm: str
    tokens_per_s: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    cpu_added: Mapping[str, float]
    target: float | None


@dataclass(frozen=True)
class Ratio:
    """One arm in one start of the servers, against those without the plugin: medians over the rounds.

    Attributes:
        speed, cpu: ratios, below 1 if it is slower or takes more CPU time.
        cpu_added: CPU time of each process more than without the plugin, as a share of that of all processes.
    """

    tokens_per_s: float
    speed: float
    cpu: float
    cpu_added: Mapping[str, float]


def ratios_of_start(samples: dict[str, list[Sample]]) -> dict[str, Ratio]:
    """Ratios within each round, then their median: a slow minute of the machine hits a whole round."""
    without = list(zip(samples[OFF], samples[AGAIN], strict=True))
    processes = sorted({what for both in without for sample in both for what in sample.cpu_s_of})
    baseline = [
        Sample(
            statistics.fmean(sample.tokens_per_s for sample in both),
            {what: statistics.fmean(sample.cpu_s_of[what] for sample in both) for what in processes},
        )
        for both in without
    ]
    ratios = {}
    for name, of_arm in samples.items():
        rounds = list(zip(of_arm, baseline, strict=True))
        ratios[name] = Ratio(
            statistics.median(mine.tokens_per_s for mine in of_arm),
            statistics.median(mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in rounds),
            statistics.median(theirs.cpu_s / mine.cpu_s for mine, theirs in rounds),
            {
                what: statistics.median(
                    (mine.cpu_s_of[what] - theirs.cpu_s_of[what]) / theirs.cpu_s for mine, theirs in rounds
                )
                for what in processes
            },
        )
    return ratios


def summarise(starts: Sequence[dict[str, Ratio]]) -> list[Row]:
    """One line per arm."""
    rows = []
    for name in starts[0]:
        of_arm = [start[name] for start in starts]
        speeds = [ratio.speed for ratio in of_arm]
        cpu = statistics.fmean(ratio.cpu for ratio in of_arm)
        tokens = statistics.fmean(ratio.tokens_per_s for ratio in of_arm)
        added = {what: statistics.fmean(ratio.cpu_added[what] for ratio in of_arm) for what in of_arm[0].cpu_added}
        target = TARGETS.get(name)
        rows.append(Row(name, tokens, statistics.fmean(speeds), min(speeds), max(speeds), cpu, added, target))
    return rows


@contextlib.contextmanager
def server(
    folder: Path, options: Options, environ: Mapping[str, str], *, plugin: bool
) -> Iterator[tuple[VllmServer, Path]]:
    """A server, with these environment variables, and its configuration file."""
    folder.mkdir()
    config_path = folder / "glassbox.yaml"
    config_path.write_text(packaged_config().read_text())
    longest = options.prompt_tokens + options.max_tokens
    args = ["--served-model-name", MODEL_NAME, "--max-model-len", str(max(2048, longest)), "--dtype", options.dtype]
    args += ["--max-num-seqs", str(max(16, options.batch_size))]
    args += ["--enforce-eager"] if options.eager else []
    env = {
        # torch's memory in huge pages: where small ones lie may be why servers differ for as long as they live.
        "THP_MEM_ALLOC_ENABLE": "1",
        "GLASSBOX_CONFIG": str(config_path),
        "GLASSBOX_DISABLE": None if plugin else "1",
        "GLASSBOX_RUN_DIR": str(folder / "run"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
        # On a CPU vLLM 0.32 can't load what it has compiled ahead of time, and compiles for minutes at each start.
        "VLLM_USE_AOT_COMPILE": "0",
        **environ,
    }
    print(f"starting the server {'with' if plugin else 'without'} the plugin ...", flush=True)
    # Where nothing is compiled yet, the first start takes minutes.
    with VllmServer(
        demo_model(), args=args, env=env, log_path=folder / "server.log", cwd=folder, start_timeout_s=900.0
    ) as running:
        print(f"vLLM has loaded {loaded_library(options.instructions, running.processes())}", flush=True)
        yield running, config_path


def otel_memory_mb(arm: Arm, base: dict[str, Any]) -> float:
    """PSS of the exporter process that OTLP needs, once it has tried to send (nobody listens at the endpoint)."""
    before = set(memory_mb(arm.server))
    otel = {"enabled": True, "endpoint": f"http://127.0.0.1:{free_port()}"}
    arm.changes = {"export": {"interval_s": 1, "otel": otel}}
    arm.apply(base)
    time.sleep(6.0)
    added = {pid: size for pid, size in memory_mb(arm.server).items() if pid not in before}
    if not added:
        raise RuntimeError("no exporter process was started; see the server's log")
    return sum(added.values())


def commit() -> str:
    """Commit of the working tree, with `+` if it has changes; of an installed package its version."""
    if not (ROOT / "pyproject.toml").is_file():
        return f"glassbox {__version__}"
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _instructions(options: Options) -> str:
    """Which of the CPU's instructions the servers had, as far as it matters."""
    if options.instructions != NATIVE:
        return f"{options.instructions} alone"
    known = cpu_flags() & {"avx2", "avx512f", "amx_tile"}
    return " ".join(sorted(known)) or platform.machine()


def write_csv(path: Path, rows: Sequence[Row], memory: dict[str, float], options: Options, load: float) -> None:
    """The result with what is needed to repeat it, as comment lines; `load` is the load average before it began."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The servers inherit them: VLLM_CPU_OMP_THREADS_BIND alone moves the worker to another core.
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("VLLM_", "OMP_"))]
    facts = {
        "command": shlex.join([*settings, "glassbox", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": f"{cpu_model()}, {_instructions(options)}, load average {load:.1f} at the start",
        "versions": f"vllm {version('vllm')}, torch {version('torch')}, python {platform.python_version()}",
        "servers": f"{options.starts} starts, {options.rounds} rounds each (half as many of {RATE_1}), "
        f"{'eager' if options.eager else 'torch.compile'}, {options.dtype}",
        "batch": f"{options.batch_size} requests at once, {options.prompt_tokens} prompt and {options.max_tokens} "
        "output tokens",
    }
    with path.open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measure", "arm", "value", "lowest_start", "highest_start", "target"])
        for row in rows:
            writer.writerow(["tokens_per_s", row.arm, f"{row.tokens_per_s:.1f}", "", "", ""])
            spread = [f"{row.ratio:.3f}", f"{row.low:.3f}", f"{row.high:.3f}"]
            writer.writerow(["throughput_ratio", row.arm, *spread, row.target or ""])
            writer.writerow(["cpu_time_ratio", row.arm, f"{row.cpu_ratio:.3f}", "", "", ""])
            for what, share in row.cpu_added.items():
                writer.writerow([f"cpu_time_added_{what.replace(' ', '_')}", row.arm, f"{share:.4f}", "", "", ""])
        for name, size in memory.items():
            writer.writerow(["memory_mb", name, f"{size:.1f}", "", "", MEMORY_TARGET_MB])


def show(rows: Sequence[Row], memory: dict[str, float]) -> bool:
    """Print the tables; True if every target is met."""
    met = True
    print(f"\n{'arm':<11}{'tokens/s':>10}{'ratio':>8}{'starts':>16}{'CPU time':>10}{'target':>9}")
    for row in rows:
        ok = row.target is None or row.ratio >= row.target
        met &= ok
        target = "" if row.target is None else f">= {row.target:.2f}"
        print(
            f"{row.arm:<11}{row.tokens_per_s:>10.1f}{row.ratio:>8.3f}{f'{row.low:.3f} .. {row.high:.3f}':>16}"
            f"{row.cpu_ratio:>10.3f}{target:>9}{'' if ok else '  MISSED'}"
        )
    print(f"\n{'CPU time added':<16}" + "".join(f"{what:>12}" for what in rows[0].cpu_added))
    for row in rows:
        print(f"{row.arm:<16}" + "".join(f"{100 * share:>10.2f} %" for share in row.cpu_added.values()))
    print(f"\n{'memory added':<24}{'MB':>8}{'target':>10}")
    for name, size in memory.items():
        ok = size < MEMORY_TARGET_MB
        met &= ok
        print(f"{name:<24}{size:>8.1f}{f'< {MEMORY_TARGET_MB:.0f}':>10}{'' if ok else '  MISSED'}")
    return met


def bench(options: Options) -> tuple[list[Row], dict[str, float]]:
    """Start the servers several times."""
    starts: list[dict[str, Ratio]] = []
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="glassbox-bench-") as name:
        # Of all starts: what is compiled in it needs to be compiled only once.
        environ = environment(options.instructions, Path(name))
        for number in range(options.starts):
            ratios, memory_of_start = bench_once(options, environ, number)
            starts.append(ratios)
            shown = "  ".join(f"{arm} {ratio.speed:.3f}" for arm, ratio in ratios.items())
            print(f"start {number + 1} of {options.starts}, ratios: {shown}", flush=True)
            for what, size in memory_of_start.items():
                memory.setdefault(what, []).append(size)
    return summarise(starts), {what: statistics.median(sizes) for what, sizes in memory.items()}


def order_of_start(number: int) -> tuple[str, ...]:
    """In which order the servers of start `number` are started: the plugin's takes each place in turns."""
    order = [OFF, AGAIN]
    order.insert(number % 3, DEFAULT)
    return tuple(order)


def bench_once(options: Options, environ: Mapping[str, str], number: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Start a server with the plugin and two without it, measure, stop them."""
    base = load_config(packaged_config()).model_dump(mode="json", exclude_defaults=True)
    with tempfile.TemporaryDirectory(prefix="glassbox-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        arms = {
            arm: Arm(arm, *stack.enter_context(server(folder / arm, options, environ, plugin=arm == DEFAULT)))
            for arm in order_of_start(number)
        }
        off, default, again = arms[OFF], arms[DEFAULT], arms[AGAIN]
        ratios: dict[str, Ratio] = {}
        rate_1 = replace(default, name=RATE_1, changes={"sample_rate": 1.0})
        for arm, rounds in ((default, options.rounds), (rate_1, -(-options.rounds // 2))):
            found = ratios_of_start(measure([off, arm, again], base, replace(options, rounds=rounds), number))
            ratios |= {name: ratio for name, ratio in found.items() if name not in ratios}
        httpx.get(f"{default.server.url}/metrics", timeout=30.0).raise_for_status()
        memory = {"plugin": sum(memory_mb(default.server).values()) - sum(memory_mb(off.server).values())}
        memory["plugin and OTLP"] = memory["plugin"] + otel_memory_mb(default, base)
    return ratios, memory


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every target was met, else 1."""
    parser = argparse.ArgumentParser(
        prog="glassbox bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=3, help="of the three servers")
    parser.add_argument("--rounds", type=int, default=6, help="of a batch per arm in each start")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="vLLM's --enforce-eager: no torch.compile")
    parser.add_argument("--dtype", help="vLLM's --dtype (default: what the CPU is fast in with these instructions)")
    parser.add_argument(
        "--instructions",
        choices=CHOICES,
        default=NATIVE,
        help=f"all servers use only these of the CPU's ({AVX2}: no AVX-512 and no AMX)",
    )
    parser.add_argument("--csv", type=Path, help="also write the result there")
    given = parser.parse_args(argv)
    if given.starts < 1 or given.rounds < 1:
        parser.error("--starts and --rounds must be at least 1; use --starts 3 --rounds 6")
    options = Options(
        given.starts,
        given.rounds,
        given.batch_size,
        given.prompt_tokens,
        given.max_tokens,
        eager=given.eager,
        dtype=given.dtype or ("float32" if given.instructions == AVX2 else serving_dtype()),
        instructions=given.instructions,
    )
    # SIGTERM ends it as Ctrl-C does, so that the servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    load = os.getloadavg()[0]
    if load > MAX_LOAD:
        print(f"note: the machine is busy (load average {load:.1f}); numbers will scatter, see the arm {AGAIN}")
    try:
        rows, memory = bench(options)
    except InstructionsError as error:
        parser.error(str(error))
    met = show(rows, memory)
    if given.csv:
        write_csv(given.csv, rows, memory, options, load)
        print(f"\nwritten to {given.csv}")
    return 0 if met else 1
