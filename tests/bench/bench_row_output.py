"""GPU time of a canary's check, as `measure/gpu_measurer.py` makes it: 8 rows that see at most 32,768 keys together.

    python tests/bench/bench_row_output.py --out docs/data/canary_h200.csv

The model has the shape of Llama-3.1-8B (32 layers, 32 heads, 8 KV heads, D = 128) in bfloat16 with random numbers; the
cases are those of `bench_gpu.py`, with as many rows as a check takes of them. Reported is the median of CUDA events
around one check, and its share of the default `canary.interval_s`, 30 s.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without glassbox installed

from glassbox.kernels.cached_layers import CachedLayers
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_output import row_output

LAYERS, HEADS, KV_HEADS, D, BLOCK = 32, 32, 8, 128, 16
ROWS, KEYS, INTERVAL_S = 8, 32768, 30.0
# batch and keys that a decode row sees in the middle of the case's answer
CASES = {"64:512:256": (64, 640), "1:512:128": (1, 576), "16:8192:64": (16, 8224), "256:128:128": (256, 192)}
CASES["32:4096:8"] = (32, 4100)


def measure(batch: int, keys: int, repeats: int = 20) -> tuple[int, float]:
    """Rows of a check, and milliseconds that it takes."""
    rows = max(1, min(ROWS, batch, KEYS // keys))
    blocks = -(-keys // BLOCK)
    caches = [
        torch.randn(rows * blocks, KV_HEADS, BLOCK, 2 * D, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)
    ]
    table = torch.randperm(rows * blocks, device="cuda").int().view(rows, blocks)
    queries, outputs = torch.randn(2, rows, LAYERS, HEADS, D, dtype=torch.bfloat16, device="cuda").unbind()
    kept = torch.randn(rows, LAYERS, 2, KV_HEADS, D, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([[row, keys - 1] for row in range(rows)], dtype=torch.int32, device="cuda")
    params = [LayerParams(scale=D**-0.5)] * LAYERS
    times = []
    for _ in range(repeats + 3):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        layers = CachedLayers.of([c[..., :D] for c in caches], [c[..., D:] for c in caches], params, HEADS)
        row_output(queries, outputs, layers, table, places, kept)
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return rows, statistics.median(times[3:])


def main() -> None:
    """Write one line per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    lines = []
    for case, (batch, keys) in CASES.items():
        rows, ms = measure(batch, keys)
        lines.append({
            "case": case, "rows": rows, "keys": keys, "check_ms": f"{ms:.2f}",
            "share_of_30_s": f"{ms / 1000 / INTERVAL_S:.6f}", "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__, "commit": args.commit, "command": "python tests/bench/bench_row_output.py",
        })  # fmt: skip
    out = args.out.open("w", newline="", encoding="utf-8") if args.out else sys.stdout
    writer = csv.DictWriter(out, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)


if __name__ == "__main__":
    main()
