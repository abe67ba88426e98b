"""Speed of the row_stats kernel alone, on one GPU.

    python tests/bench/bench_row_stats.py --suite all --csv-dir out      # targets, sweep, alternatives, gate
    python tests/bench/bench_row_stats.py --suite tune --csv-dir out     # every tiling and grid

Time is the GPU's, from CUDA events around replayed graphs; bandwidth is the bytes of K a perfect kernel reads, over
that time. Pages lie in random blocks with V interleaved, as vLLM keeps them. Every launch of a graph reads other blocks than
the one before, so that nothing larger than L2 is measured from it (short contexts fit and say so by their rate).
"""

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from glassbox.kernels.row_stats import LayerParams, RowStatsWorkspace, Tiling, row_stats  # noqa: E402
from row_stats_cases import make_accumulators  # noqa: E402

DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_SIZE, PAGE = 32, 8, 128, 16
PARAMS = LayerParams(scale=HEAD_SIZE**-0.5)
KEY_BYTES = KV_HEADS * HEAD_SIZE * 2
Row = dict[str, object]


@dataclass
class Batch:
    """`batch` decode rows of `context` keys each over one shared cache; `tables` are disjoint choices of blocks."""

    q: torch.Tensor
    k: torch.Tensor
    kv: torch.Tensor
    tables: list[torch.Tensor]
    starts: torch.Tensor
    seq_lens: torch.Tensor
    rows: torch.Tensor
    num_rows: torch.Tensor


class Cache:
    """One KV cache for all cases, filled once: [blocks, PAGE, KV_HEADS, 2 * HEAD_SIZE] bfloat16."""

    def __init__(self, gib: float) -> None:
        blocks = int(gib * 2**30) // (PAGE * KEY_BYTES * 2)
        self.kv = torch.empty(blocks, PAGE, KV_HEADS, 2 * HEAD_SIZE, dtype=torch.bfloat16, device=DEVICE).normal_()
        self.order = torch.randperm(blocks, device=DEVICE, dtype=torch.int32)

    def batch(self, batch: int, context: int, max_rows: int = 256) -> Batch:
        """Rows over blocks in random order."""
        per_row = -(-context // PAGE)
        need = batch * per_row
        tables = [t.view(batch, per_row) for t in self.order.split(need) if t.numel() == need][:8]
        if not tables:
            raise ValueError(f"cache must hold {need} blocks, has {self.order.numel()}; raise --cache-gib")
        rows = torch.zeros(max(max_rows, batch), 5, dtype=torch.int32, device=DEVICE)
        rows[:batch, 0] = rows[:batch, 1] = torch.arange(batch)
        rows[:, 2], rows[:, 3], rows[:, 4] = 1, context // 2, -1
        return Batch(
            q=torch.randn(batch, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=DEVICE),
            k=self.kv.transpose(1, 2)[..., :HEAD_SIZE],
            kv=self.kv,
            tables=tables,
            starts=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.full((batch,), context, dtype=torch.int32, device=DEVICE),
            rows=rows,
            num_rows=torch.tensor([batch], dtype=torch.int32, device=DEVICE),
        )


def graph_time_us(launch: Callable[[int], None], launches: int, replays: int = 7) -> float:
    """Median time of one launch, in microseconds, over replays of a graph of `launches`."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    times = []
    for _ in range(replays + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[1:])


def eager_time_us(call: Callable[[], None], repeats: int = 7) -> float:
    """Median GPU time of a call that allocates, in microseconds."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def kernel_time_us(
    b: Batch, tiling: Tiling | None = None, programs_per_sm: int | None = None, params: LayerParams = PARAMS
) -> float:
    """Time of row_stats on a batch."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    programs = None if programs_per_sm is None else programs_per_sm * sms
    workspace = RowStatsWorkspace(DEVICE, b.rows.shape[0], HEADS, programs)
    accumulators = make_accumulators(HEADS, DEVICE)

    def launch(i: int) -> None:
        row_stats(
            b.q, b.k, b.tables[i % len(b.tables)], b.starts, b.seq_lens, b.rows, b.num_rows, params, accumulators,
            workspace, tiling=tiling,
        )  # fmt: skip

    return graph_time_us(launch, launches=16)


def copy_gb_s() -> float:
    """Device-to-device copy bandwidth, bytes read plus bytes written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    time_us = graph_time_us(lambda _: target.copy_(source), launches=4)
    return 2 * source.numel() / time_us / 1e3


def measure(case: str, b: Batch, copy: float, **more: object) -> Row:
    """One line of the result: time and share of the copy bandwidth."""
    batch, context = len(b.seq_lens), int(b.seq_lens[0])
    time_us = kernel_time_us(b, **more)  # type: ignore[arg-type]
    rate = batch * context * KEY_BYTES / time_us / 1e3
    row: Row = {"case": case, "batch": batch, "context": context, "time_us": round(time_us, 2)}
    row |= {"k_gb_s": round(rate, 1), "copy_gb_s": round(copy, 1), "share_of_copy": round(rate / copy, 4)}
    return row


def suite_tune(cache: Cache, copy: float) -> list[Row]:
    """Every tiling and grid on the two target shapes, a small one and many short rows."""
    result = []
    shapes = [cache.batch(64, 4096), cache.batch(1, 131072), cache.batch(1, 1024), cache.batch(256, 256)]
    for keys, warps in ((64, 4), (128, 8), (128, 4), (32, 4), (64, 8)):
        for stages in (3, 5, 7):
            for per_sm in (1, 2, 3, 4):
                for b in shapes:
                    tiling = Tiling(keys, warps, stages)
                    try:
                        row = measure("tune", b, copy, tiling=tiling, programs_per_sm=per_sm)
                    except triton.runtime.errors.OutOfResources:
                        continue
                    result.append(row | {"keys": keys, "warps": warps, "stages": stages, "programs_per_sm": per_sm})
    return result


def suite_targets(cache: Cache, copy: float) -> list[Row]:
    """The two shapes with a target."""
    return [measure("target", cache.batch(*shape), copy) for shape in ((64, 4096), (1, 131072)) for _ in range(3)]


def suite_sweep(cache: Cache, copy: float) -> list[Row]:
    """Time over context length and over rows."""
    shapes = [(b, 2**c) for b in (1, 16, 64) for c in range(7, 18) if b * 2**c <= 2**21]
    shapes += [(2**r, 4096) for r in range(9)] + [(2**r, 256) for r in range(9)]
    return [measure("sweep", cache.batch(*shape), copy) for shape in dict.fromkeys(shapes)]


def _statistics(s: torch.Tensor, m: torch.Tensor, p: torch.Tensor, prompt: int) -> torch.Tensor:
    """All statistics from scores [B, H, n], their maximum [B, H] and p [B, H, n]."""
    n = s.shape[-1]
    age = torch.arange(n - 1, -1, -1, device=s.device, dtype=torch.float32)
    log_p = s - (m + torch.log(1 / p.amax(-1)))[..., None]
    context, generated = p[..., :prompt].mean(-1), p[..., prompt:].mean(-1)
    values = (
        -(p * log_p).sum(-1) / torch.log(torch.tensor(float(n))),
        1 / (p * p).sum(-1),
        m,
        p.amax(-1),
        p[..., :4].sum(-1),
        p[..., -128:].sum(-1),
        p @ age,
        log_p[..., -1],
        context / (context + generated),
    )
    return torch.stack(values, -1)


def torch_alternative(b: Batch) -> torch.Tensor:
    """Gather, matmul, softmax, statistics; [B, H, S]."""
    batch, context = b.q.shape[0], b.tables[0].shape[1] * PAGE
    k = b.k.transpose(1, 2)[b.tables[0]].view(batch, context, KV_HEADS, HEAD_SIZE).permute(0, 2, 3, 1)
    q = b.q.view(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_SIZE)
    s = (q @ k).float().view(batch, HEADS, context) * PARAMS.scale
    return _statistics(s, s.amax(-1), torch.softmax(s, -1), context // 2)


def lse_alternative(b: Batch) -> torch.Tensor:
    """LSE from the flash attention in torch, p = e^(s - LSE) from one matmul, statistics by torch; [B, H, S]."""
    batch, context = b.q.shape[0], b.tables[0].shape[1] * PAGE
    kv = b.kv[b.tables[0]].view(batch, context, KV_HEADS, 2 * HEAD_SIZE).transpose(1, 2)
    k, v = kv[..., :HEAD_SIZE], kv[..., HEAD_SIZE:]
    q = b.q.view(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_SIZE)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    lse = flash(q, k, v, scale=PARAMS.scale)[1].view(batch, HEADS, 1)
    s = (q @ k.transpose(-1, -2)).float().view(batch, HEADS, context) * PARAMS.scale
    return _statistics(s, s.amax(-1), torch.exp(s - lse), context // 2)


def suite_alternatives(cache: Cache, copy: float) -> list[Row]:
    """row_stats against two ways to have the same statistics from torch, checked to agree."""
    result = []
    for shape in ((64, 4096), (1, 131072), (16, 1024)):
        b = cache.batch(*shape)
        ours = measure("row_stats", b, copy)
        result.append(ours | {"ratio_to_row_stats": 1.0})
        out = torch.empty(b.rows.shape[0], HEADS, 10, device=DEVICE)
        workspace = RowStatsWorkspace(DEVICE, b.rows.shape[0], HEADS)
        row_stats(b.q, b.k, b.tables[0], b.starts, b.seq_lens, b.rows, b.num_rows, PARAMS,
                  make_accumulators(HEADS, DEVICE), workspace, out=out)  # fmt: skip
        for name, call in (("torch", torch_alternative), ("flash LSE + torch", lse_alternative)):
            # bfloat16 scores: the alternatives are the less exact side.
            torch.testing.assert_close(call(b), out[: len(b.seq_lens), :, :9], rtol=0.05, atol=0.05)
            time_us = eager_time_us(lambda b=b, call=call: call(b))
            row: Row = {"case": name, "batch": shape[0], "context": shape[1], "time_us": round(time_us, 2)}
            result.append(row | {"ratio_to_row_stats": round(time_us / float(str(ours["time_us"])), 2)})
    return result


def suite_gate(cache: Cache, copy: float) -> list[Row]:
    """Cost of a launch with an empty row list in a graph of 32 layers: in line, and on a branch beside the layer's kernel."""
    b = cache.batch(64, 4096)
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    accumulators, side = make_accumulators(HEADS, DEVICE), torch.cuda.Stream()
    a = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
    w = torch.randn(4096, 4096, dtype=torch.bfloat16, device=DEVICE) / 64
    result = []
    for per_sm in (1, 2, 4):
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        workspace = RowStatsWorkspace(DEVICE, b.rows.shape[0], HEADS, per_sm * sms)

        def gated(workspace: RowStatsWorkspace = workspace) -> None:
            row_stats(b.q, b.k, b.tables[0], b.starts, b.seq_lens, b.rows, empty, PARAMS, accumulators, workspace)

        def layer(how: str, gated: Callable[[], None] = gated) -> None:
            x = a @ w
            if how == "in line":
                gated()
            if how == "forked":
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    gated()
            x = x @ w
            if how == "forked":
                torch.cuda.current_stream().wait_stream(side)
            torch.relu_(x)

        times: dict[str, list[float]] = {"none": [], "in line": [], "forked": []}
        for _ in range(5):
            for how, values in times.items():
                values.append(graph_time_us(lambda _, how=how: layer(how), launches=32, replays=31))
        for how in ("in line", "forked"):
            deltas = [x - y for x, y in zip(times[how], times["none"], strict=True)]
            row: Row = {"case": f"gated {how}", "programs_per_sm": per_sm, "layer_us": round(times["none"][0], 2)}
            row |= {"added_us": round(statistics.median(deltas), 3)}
            result.append(row | {"added_us_min": round(min(deltas), 3), "added_us_max": round(max(deltas), 3)})
    return result


SUITES = {
    "tune": suite_tune,
    "targets": suite_targets,
    "sweep": suite_sweep,
    "alternatives": suite_alternatives,
    "gate": suite_gate,
}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_csv(path: Path, rows: list[Row], commit: str) -> None:
    """Write the rows, each with where it was measured."""
    where: Row = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "command": " ".join(["python", "tests/bench/bench_row_stats.py", *sys.argv[1:]]),
    }
    columns = list(dict.fromkeys(column for row in rows for column in row)) + list(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | where for row in rows)


def main() -> None:
    """Run suites, print their lines, write one CSV per suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help="all is all but tune")
    parser.add_argument("--csv-dir", type=Path, default=Path("."))
    parser.add_argument("--cache-gib", type=float, default=10.0)
    parser.add_argument("--commit", default=None, help="where git is not at hand")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    names = [n for n in SUITES if n != "tune"] if args.suite == "all" else [args.suite]
    copy = copy_gb_s()
    print(f"copy {copy:.0f} GB/s (read + written)", flush=True)
    cache = Cache(args.cache_gib)
    for name in names:
        rows = SUITES[name](cache, copy)
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        write_csv(args.csv_dir / f"row_stats_{name}.csv", rows, args.commit or _commit())


if __name__ == "__main__":
    main()
