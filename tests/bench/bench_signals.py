"""What each signal takes from whoever computes it: seconds of one core a head, by the request's tokens.

    python tests/bench/bench_signals.py [--tokens 1024 2048 4096] [--signals routing tracker ...] [--csv FILE]

Queries and keys of one head are normal random numbers; the attention is made of them. The time is the median of the
CPU time of the process, with one thread, so that other work of the machine doesn't count.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy is loaded
    os.environ[name] = "1"

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.core.signal_table import SIGNAL_NAMES, SIGNALS  # noqa: E402
from glassbox.core.statistics import INDEX, NUM_STATISTICS  # noqa: E402
from glassbox.signals.kept_head import KeptHead  # noqa: E402
from glassbox.signals.registry import signal_values  # noqa: E402
from glassbox.store.trace_record import RequestTrace  # noqa: E402
from tests.bench.bench_row_stats_cpu import revision, write_csv  # noqa: E402
from tests.trace_samples import make_trace  # noqa: E402

DIM, SCALE, PROMPT_ROWS = 128, 128**-0.5, 256


def trace_of(tokens: int) -> RequestTrace:
    """Of one layer and head, with all that a signal on demand, and the streaming ones of attention, read."""
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((2, tokens, DIM)).astype(np.float32)
    head = KeptHead(queries.astype(np.float64), keys.astype(np.float64), scale=SCALE)
    received, squares = np.zeros(tokens), np.zeros(tokens)
    stats = np.zeros((tokens, 1, 1, NUM_STATISTICS + 1), dtype=np.float32)
    for start in range(0, tokens, PROMPT_ROWS):
        stop = min(start + PROMPT_ROWS, tokens)
        rows = head.attention(start, stop)  # [rows, stop]
        own = rows[np.arange(stop - start), np.arange(start, stop)]
        received[:stop] += rows.sum(axis=0)
        squares[:stop] += (rows**2).sum(axis=0)
        squares[start:stop] -= own**2
        stats[start:stop, 0, 0, INDEX["effective_keys"]] = 1 / (rows**2).sum(axis=1)
        stats[start:stop, 0, 0, INDEX["self_logprob"]] = np.log(own)
        stats[start:stop, 0, 0, INDEX["top1_ratio"]] = rows.max(axis=1)
    singular = np.linalg.svd(np.linalg.qr(queries)[1] @ np.linalg.qr(keys)[1].T, compute_uv=False)[:16]
    return make_trace(
        prompt_len=tokens - 1, positions=tuple(range(tokens)), layers=(0,), heads=(0,), top_k=0, spans=(),
        attention=False, num_generated=2, stats=stats, span_mass=np.zeros((tokens, 1, 1, 0), np.float32),
        previous_mass=np.zeros((tokens, 1, 1), np.float32), received=received[None, None].astype(np.float32),
        received_squares=squares[None, None].astype(np.float32),
        singular_values=singular[None, None].astype(np.float32),
        queries=queries[:, None, None], keys=keys[:, None, None], logprobs=np.full(2, -1, np.float32),
        score_params=np.array([[[SCALE, 0, 0, np.nan]]], np.float32),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=(1024, 2048, 4096))
    parser.add_argument("--signals", nargs="+", choices=SIGNAL_NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    # Those of answers and spans are made of a few numbers a row, and of no attention.
    asked = options.signals or [one.name for one in SIGNALS if one.prompt]
    lines = []
    for tokens in options.tokens:
        trace = trace_of(tokens)
        for name in asked:
            times = []
            for _ in range(options.rounds):
                began = time.process_time()
                found = signal_values(trace, [name])[name]
                times.append(time.process_time() - began)
                if found.refused:
                    raise SystemExit(f"{name}: {found.refused}")
            lines.append([name, str(tokens), f"{statistics.median(times):.4f}"])
            print("  ".join(f"{text:>14}" for text in lines[-1]), flush=True)
    if options.csv:
        write_csv(options.csv, revision(), ["signal", "tokens", "seconds_per_head"], lines)


if __name__ == "__main__":
    main()
