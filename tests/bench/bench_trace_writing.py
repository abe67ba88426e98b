"""What writing the trace of a running request takes from a worker, by its rows.

    python tests/bench/bench_trace_writing.py [--layers 30 --heads 9] [--rows 50 200 1000] [--csv FILE]

A trace is written whole whenever a rule watches it. The time is the median of what the thread has computed (so that
other work of the machine doesn't count), of putting the rows together (`record`) and of writing the file, to --folder:
the run directory is on tmpfs as a rule.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.core.trace_arrays import without_values  # noqa: E402
from glassbox.core.trace_options import TraceOptions  # noqa: E402
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk  # noqa: E402
from glassbox.store.trace_record import write_trace  # noqa: E402
from tests.bench.bench_row_stats_cpu import revision, write_csv  # noqa: E402
from tests.trace_samples import make_host  # noqa: E402

PROMPT = 5


def traced(layers: int, heads: int) -> ActiveTrace:
    """A request of which every layer and head is kept."""
    host = make_host(layers=tuple(range(layers)), num_heads=heads, num_heads_total=heads)
    return ActiveTrace(
        host, "cmpl-0-00000000", why="opt_in", options=TraceOptions(), traceparent=None, prompt_len=PROMPT,
        local_layers=tuple(range(layers)), head_columns=tuple(range(heads)),
    )  # fmt: skip


def generate(trace: ActiveTrace, rows: int, rng: np.random.Generator) -> None:
    """Rows of generated tokens, one a step, until there are so many."""
    for number in range(trace.num_generated and trace.num_generated - 1, rows):
        arrays = without_values({"token": 1, **trace.sizes})
        arrays["positions"][:], arrays["phases"][:] = PROMPT + number, 1
        arrays["stats"][:] = rng.random(arrays["stats"].shape)
        trace.append(Chunk(arrays))


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    """Median of what this thread computes."""
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        function()
        times.append(1e3 * (time.thread_time() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=(50, 200, 1000))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/glassbox-bench"))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    trace, rng, lines = traced(options.layers, options.heads), np.random.default_rng(0), []
    try:
        for rows in sorted(options.rows):
            generate(trace, rows, rng)
            record = trace.record()
            assert len(record.positions) == rows
            joining = milliseconds(trace.record, options.rounds)
            writing = milliseconds(lambda record=record: write_trace(options.folder, record), options.rounds)
            place = [str(options.layers), str(options.heads), str(rows), f"{record.nbytes / 1e6:.1f}"]
            lines.append([*place, f"{joining:.1f}", f"{writing:.1f}", f"{joining + writing:.1f}"])
            print("  ".join(f"{text:>8}" for text in lines[-1]), flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if options.csv:
        header = ["layers", "heads", "rows", "megabytes", "record_ms", "write_ms", "total_ms"]
        write_csv(options.csv, revision(), header, lines)


if __name__ == "__main__":
    main()
