"""What glassbox adds to the start of `vllm serve`: seconds to ready and to the first token, and where they go.

    python -m tests.bench.bench_start [--rounds 5] [--csv FILE] [--graphs] [--model DIRECTORY] [-- --max-model-len 4096]

Servers start one after the other, in turns: twice without the plugin (`plain`, `again`: how far these two are apart is
what the machine makes), with it, and both with empty caches of kernels (`cold plain`, `cold glassbox`): glassbox's own,
and Triton's on a GPU. vLLM's caches are the usual ones in all of them. A start of `plain` and one of `glassbox` come
first and are not counted: they fill the caches that are to be warm. --graphs leaves out --enforce-eager: on a GPU
graphs are captured then.

`ready_s` is from the start of the process to the first answer of /health, `first_token_s` to the first token of a
streamed completion that is asked for then. `cpu_s` is the processor time of the server's processes until that token,
which a busy machine disturbs less. `compiled` counts the files that the start has added to the caches of kernels: 0
with a warm one. `part_*` is what glassbox itself measures in the worker, `glassbox_start_seconds`. At the end a start
of each of the two, in which Python tells what each import takes, gives the modules that only the plugin brings.
"""

import argparse
import csv
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import vllm

from glassbox.cli.demo.demo_model import demo_model
from glassbox.core.start_parts import START_PARTS
from tests.serving import BASE_ARGS, MODEL_NAME, GlassboxServer

PLAIN: Final = ("plain", "again")
# Whether the plugin is loaded, and whether the caches of kernels are empty.
KINDS: Final = {
    "plain": (False, False),
    "again": (False, False),
    "glassbox": (True, False),
    "cold plain": (False, True),
    "cold glassbox": (True, True),
}
_CONFIG: Final = {"sample_rate": 0.01}
_IMPORT: Final = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)")


@dataclass(frozen=True)
class Setting:
    """What all servers have in common: model, arguments of `vllm serve`, and a folder for caches that stay warm."""

    model: Path
    args: tuple[str, ...]
    warm: Path


def kernel_caches(root: Path) -> dict[str, str]:
    """Environment in which compiled kernels are kept below a folder, and all else where it usually is."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "XDG_CACHE_HOME": str(root),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or str(usual / "vllm"),
    }


def kernels_in(root: Path) -> set[Path]:
    """What was compiled: shared libraries, and Triton's binaries."""
    return {path for path in root.rglob("*") if path.suffix in {".so", ".cubin", ".hsaco"}}


@contextmanager
def served(kind: str, setting: Setting, **more: str) -> Iterator[tuple[GlassboxServer, Path, float]]:
    """A server of a kind that is ready; also the folder of its kernels, and when it was started."""
    with_plugin, cold = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="glassbox-start-") as name:
        folder = Path(name)
        caches = folder / "caches" if cold else setting.warm
        env = {**kernel_caches(caches), "VLLM_PLUGINS": "glassbox" if with_plugin else "", **more}
        server = GlassboxServer(
            setting.model, folder, config=_CONFIG, base_args=setting.args, env=env, start_timeout_s=1200
        )
        started = time.monotonic()
        with server:
            yield server, caches, started


def start(kind: str, setting: Setting) -> dict[str, Any]:
    """One start: a row of the table."""
    before = kernels_in(setting.warm)
    with served(kind, setting) as (server, caches, started):
        ready = time.monotonic()
        first_token(server)
        token = time.monotonic()
        spent = processor_seconds(server)
        new = len(kernels_in(caches) - before)
        parts = parts_of(server) if KINDS[kind][0] else dict.fromkeys(START_PARTS, 0.0)
    return {
        "kind": kind,
        "ready_s": round(ready - started, 2),
        "first_token_s": round(token - started, 2),
        "cpu_s": round(spent, 2),
        "compiled": new,
        **{f"part_{part}": round(seconds, 3) for part, seconds in parts.items()},
        "load": round(os.getloadavg()[0], 2),
    }


def first_token(server: GlassboxServer) -> None:
    """Wait for the first token of a completion."""
    body = {"model": MODEL_NAME, "prompt": "The sea is", "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        assert any(line.startswith("data: {") for line in answer.iter_lines())


def processor_seconds(server: GlassboxServer) -> float:
    """Of all processes of a server, those that have ended included."""
    total = 0.0
    for process in server.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def parts_of(server: GlassboxServer) -> dict[str, float]:
    """Seconds by part, as glassbox tells them; its first snapshot comes when it likes."""
    server.wait_metric("glassbox_start_seconds", lambda value: value is not None, 60.0)
    return {part: server.metric("glassbox_start_seconds", part=part) or 0.0 for part in START_PARTS}


def imports(kind: str, setting: Setting) -> tuple[Counter[str], dict[str, float]]:
    """How often each module was imported in the processes of a start, and the seconds of all these times."""
    with served(kind, setting, PYTHONPROFILEIMPORTTIME="1") as (server, _, _):
        log = server.log_path.read_text(errors="replace")
    times: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for microseconds, name in _IMPORT.findall(log):
        times[name] += 1
        seconds[name] += int(microseconds) / 1e6
    return times, seconds


def tell_imports(setting: Setting) -> None:
    """Which modules glassbox brings, over all processes: its own, and others'."""
    plain, _ = imports("plain", setting)
    with_plugin, seconds = imports("glassbox", setting)
    more = {name: count - plain[name] for name, count in with_plugin.items() if count > plain[name]}
    cost = {name: seconds[name] * count / with_plugin[name] for name, count in more.items()}
    for title, own in (("glassbox's modules", True), ("others' that only it imports", False)):
        chosen = [name for name in cost if (name.partition(".")[0] == "glassbox") is own]
        total = sum(cost[name] for name in chosen)
        print(f"{title}: {sum(more[name] for name in chosen)} imports, {total:.2f} s")
        for name in sorted(chosen, key=lambda name: -cost[name])[:8]:
            print(f"    {cost[name]:.3f} s  {more[name]} x {name}")


def summarise(rows: Sequence[Mapping[str, Any]]) -> None:
    """Medians and extremes of each kind, and what the plugin adds to the mean of the two plain ones, round by round."""
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        for name in ("ready_s", "first_token_s", "cpu_s"):
            values = [row[name] for row in own]
            if values:
                print(f"{kind:14} {name:14} {statistics.median(values):7.2f} [{min(values):.2f}, {max(values):.2f}]")
    kinds = {row["kind"] for row in rows}
    for kind, against in (("again", ("plain",)), ("glassbox", PLAIN), ("cold glassbox", ("cold plain",))):
        if not {kind, *against} <= kinds:
            continue
        for name in ("ready_s", "first_token_s", "cpu_s"):
            added = sorted(
                row[name] - statistics.fmean(_one(rows, row["round"], other)[name] for other in against)
                for row in rows
                if row["kind"] == kind
            )
            print(f"{kind} adds to {name}: {statistics.median(added):+.2f} s [{added[0]:+.2f}, {added[-1]:+.2f}]")


def _one(rows: Sequence[Mapping[str, Any]], number: int, kind: str) -> Mapping[str, Any]:
    return next(row for row in rows if (row["round"], row["kind"]) == (number, kind))


def write(path: Path, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    """As CSV, with what it was measured on in comments."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {machine()}, vllm {vllm.__version__}, commit {os.environ.get('COMMIT', 'unknown')}\n")
        file.write(f"# command: {command}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", type=Path, help="the demo's by default")
    parser.add_argument("--graphs", action="store_true", help="without --enforce-eager")
    parser.add_argument("--no-imports", action="store_true", help="without the two starts that tell of imports")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("args", nargs="*", help="further arguments of vllm serve, after --")
    options = parser.parse_args()
    # SIGTERM ends it as Ctrl-C does, so that servers are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = tuple(arg for arg in BASE_ARGS if not (options.graphs and arg == "--enforce-eager"))
    command = shlex.join(["python", "-m", "tests.bench.bench_start", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="glassbox-warm-") as warm:
        setting = Setting(options.model or demo_model(), (*base, *options.args), Path(warm))
        for kind in options.kinds:
            if kind not in {"again", "cold glassbox", "cold plain"}:
                start(kind, setting)
        rows: list[dict[str, Any]] = []
        for number in range(options.rounds):
            # Neighbours change from round to round.
            order = options.kinds if number % 2 else options.kinds[::-1]
            for kind in order:
                rows.append({"round": number, **start(kind, setting)})
                print(rows[-1], flush=True)
            if options.csv is not None:
                write(options.csv, rows, command)
        summarise(rows)
        if not options.no_imports:
            tell_imports(setting)


if __name__ == "__main__":
    main()
