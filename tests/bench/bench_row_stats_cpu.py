"""Speed of the two CPU measurements of row statistics: the native kernel, and torch, on as many cores as torch has.

    python tests/bench/bench_row_stats_cpu.py
    OMP_NUM_THREADS=1 python tests/bench/bench_row_stats_cpu.py --csv row_stats_cpu.csv

A case is a step's rows in all layers of a model, measured as a worker does; the time is the median of runs in turns.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.core.cpu import cpu_model  # noqa: E402
from glassbox.kernels.row_stats_cpu import LayerRows, row_stats_cpu  # noqa: E402
from glassbox.kernels.row_stats_native import NativeStep  # noqa: E402
from tests.kernels.test_row_stats_cpu import Batch, PlainReader  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Rows:
    """Of a step: (sequence, query, prompt length) of its requests, and (request, query) of its rows."""

    name: str
    lengths: tuple[tuple[int, int, int], ...]
    rows: tuple[tuple[int, int], ...]


SHAPES = (Shape("SmolLM2-135M", 30, 9, 3, 64), Shape("Llama-3.1-8B", 32, 32, 8, 128))
STEPS = (
    Rows("1 decode row, 60 keys", ((60, 1, 20),), ((0, 0),)),
    Rows("1 decode row, 300 keys", ((300, 1, 20),), ((0, 0),)),
    Rows("8 decode rows, 300 keys", ((300, 1, 200),) * 8, tuple((b, 0) for b in range(8))),
    Rows("8 decode rows, 4000 keys", ((4000, 1, 200),) * 8, tuple((b, 0) for b in range(8))),
    Rows(
        "64 prefill rows, 256 keys", ((256, 256, 256),) * 8, tuple((b, 32 * i + 31) for b in range(8) for i in range(8))
    ),
)


def ways(shape: Shape, step: Rows, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What measures the step, by name."""
    batch = Batch(
        list(step.lengths), list(step.rows), num_heads=shape.heads, num_kv_heads=shape.kv_heads,
        head_size=shape.head_size, block_size=128, dtype=dtype, transposed=True,
    )  # fmt: skip
    pages, table = batch.cache()
    layer, lying = batch.native_layer(pages, transposed=True)
    reader = PlainReader(pages, transposed=True)

    def by_torch() -> None:
        plan = batch.plan(table)
        layers = [LayerRows.select(batch.q, reader, plan, batch.params) for _ in range(shape.layers)]
        some = plan.layers_at_once(shape.heads, shape.kv_heads * shape.head_size)
        for begin in range(0, shape.layers, some):
            row_stats_cpu(layers[begin : begin + some], plan)

    def by_kernel() -> None:
        assert lying.data_ptr()  # the kernel reads it by its address, so it must stay alive as long as this
        native = NativeStep(batch.native_rows(table), shape.layers, shape.heads, shape.head_size)
        for number in range(shape.layers):
            native.take(number, layer, batch.q)
        native.measure()

    return {"native": by_kernel, "torch": by_torch}


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of each, in turns, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(of) for name, of in times.items()}


def revision() -> str:
    """Of the working tree."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write_csv(
    path: Path, commit: str, header: Sequence[str], lines: Sequence[Sequence[str]], module: str | None = None
) -> None:
    """The lines of a measurement, below what and where it was; `module`, if it was run with -m."""
    with path.open("w", newline="") as file:
        file.write(f"# {cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit}\n")
        program = sys.argv[0] if module is None else f"-m {module}"
        file.write(f"# command: python {' '.join([program, *sys.argv[1:]])}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    commit, lines = revision(), []
    for shape in SHAPES:
        for step in STEPS:
            for dtype in (torch.bfloat16, torch.float32):
                found = milliseconds(ways(shape, step, dtype), options.rounds)
                name = str(dtype).removeprefix("torch.")
                ratio = found["torch"] / found["native"]
                lines.append([shape.name, step.name, name, *(f"{found[way]:.2f}" for way in found), f"{ratio:.1f}"])
                print(
                    "  ".join(f"{text:<26}" if i < 2 else f"{text:>9}" for i, text in enumerate(lines[-1])), flush=True
                )
    if options.csv:
        write_csv(options.csv, commit, ["model", "step", "dtype", "native_ms", "torch_ms", "ratio"], lines)


if __name__ == "__main__":
    main()
