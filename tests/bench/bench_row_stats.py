"""Speed of the row_stats kernel alone, on one GPU.

    python tests/bench/bench_row_stats.py --suite all --csv-dir out      # targets, sweep, alternatives, gate
    python tests/bench/bench_row_stats.py --suite tune --csv-dir out     # every tiling and grid
    python tests/bench/bench_row_stats.py --suite latent --csv-dir out   # latent attention (MLA), in many tilings

Time is the GPU's, from CUDA events around replayed graphs; bandwidth is the bytes of K a perfect kernel reads, over
that time. Pages lie in random blocks with V interleaved, as vLLM keeps them. Every launch of a graph reads other blocks
than the one before, so that nothing larger than L2 is measured from it (short contexts fit, and say so by their rate).
"""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.core import rows as row_list  # noqa: E402
from glassbox.kernels.layer_params import LayerParams  # noqa: E402
from glassbox.kernels.row_stats import RowStatsWorkspace, Tiling, row_stats  # noqa: E402
from tests.kernels.row_stats_cases import make_accumulators  # noqa: E402

DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_SIZE, PAGE, LAYERS = 32, 8, 128, 16, 32
# Of latent attention (MLA): DeepSeek's vectors, and other tilings than those it takes.
LATENT, ROTARY = 512, 64
LATENT_TILINGS = (
    Tiling(keys=64, warps=8, stages=3, heads=128, held=True, beside=1),
    Tiling(keys=64, warps=8, stages=2, heads=128, held=True, beside=1),
    Tiling(keys=32, warps=8, stages=4, heads=128, held=True, beside=1),
    Tiling(keys=32, warps=8, stages=6, heads=128, held=True, beside=1),
    Tiling(keys=32, warps=8, stages=2, heads=128, beside=1),
    Tiling(keys=64, warps=4, stages=3, heads=64, held=True, beside=1),
    Tiling(keys=32, warps=4, stages=3, heads=64, held=True),
    Tiling(keys=64, warps=4, stages=2, heads=64, beside=1),
    Tiling(keys=32, warps=4, stages=4, heads=64, beside=1),
    Tiling(keys=64, warps=4, stages=3, beside=1),
    Tiling(keys=64, warps=8, stages=3, beside=1),
    Tiling(keys=32, warps=4, stages=5, beside=1),
    Tiling(keys=32, warps=4, stages=2),
)
PARAMS = LayerParams(scale=HEAD_SIZE**-0.5)
Row = dict[str, object]


@dataclass
class Batch:
    """`batch` decode rows of `context` keys each over one shared cache; `tables` are disjoint choices of blocks."""

    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    k: torch.Tensor
    kv: torch.Tensor
    tables: list[torch.Tensor]
    starts: torch.Tensor
    seq_lens: torch.Tensor
    rows: torch.Tensor
    num_rows: torch.Tensor


class Cache:
    """One KV cache for all cases, filled once: [blocks, PAGE, kv_heads, 2 * head_size]."""

    def __init__(
        self,
        gib: float,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
        head_size: int = HEAD_SIZE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        blocks = int(gib * 2**30) // (PAGE * kv_heads * head_size * 2 * dtype.itemsize)
        self._fill(torch.empty(blocks, PAGE, kv_heads, 2 * head_size, dtype=dtype, device=DEVICE))
        self.heads, self.head_size = heads, head_size

    def _fill(self, kv: torch.Tensor) -> None:
        """The cache, its second dimension the tokens of a page."""
        self.kv, self.page = kv, kv.shape[1]
        for part in kv.split(2**14):
            part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=DEVICE))
        self.order = torch.randperm(len(kv), device=DEVICE, dtype=torch.int32)

    def queries(self, batch: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Of so many rows."""
        return torch.randn(batch, self.heads, self.head_size, dtype=torch.bfloat16, device=DEVICE)

    def keys(self) -> torch.Tensor:
        """[blocks, kv_heads, page, head_size]."""
        return self.kv.transpose(1, 2)[..., : self.head_size]

    def batch(self, batch: int, context: int, max_rows: int = 256) -> Batch:
        """Rows over blocks in random order."""
        per_row = -(-context // self.page)
        need = batch * per_row
        tables = [t.view(batch, per_row) for t in self.order.split(need) if t.numel() == need][:8]
        if not tables:
            raise ValueError(f"cache must hold {need} blocks, has {self.order.numel()}; raise --cache-gib")
        rows = torch.zeros(max(max_rows, batch), row_list.NUM_ROW_COLUMNS, dtype=torch.int32, device=DEVICE)
        rows[:batch, row_list.ROW_QUERY] = rows[:batch, row_list.ROW_BATCH] = torch.arange(batch)
        rows[:, row_list.ROW_PHASE], rows[:, row_list.ROW_SLOT] = row_list.ROW_DECODE, -1
        rows[:, row_list.ROW_PROMPT_LEN] = context // 2
        return Batch(
            q=self.queries(batch),
            k=self.keys(),
            kv=self.kv,
            tables=tables,
            starts=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.full((batch,), context, dtype=torch.int32, device=DEVICE),
            rows=rows,
            num_rows=torch.tensor([batch], dtype=torch.int32, device=DEVICE),
        )


class LatentCache(Cache):
    """One latent cache: [blocks, page, LATENT + ROTARY]; queries come in vLLM's two parts."""

    def __init__(self, gib: float, heads: int, dtype: torch.dtype, page: int) -> None:
        self.heads, self.head_size = heads, LATENT + ROTARY
        blocks = int(gib * 2**30) // (page * self.head_size * dtype.itemsize)
        self._fill(torch.empty(blocks, page, self.head_size, dtype=dtype, device=DEVICE))

    def queries(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        latent, rotary = (
            torch.randn(batch, self.heads, size, dtype=torch.bfloat16, device=DEVICE) for size in (LATENT, ROTARY)
        )
        return latent, rotary

    def keys(self) -> torch.Tensor:
        return self.kv.unsqueeze(1)


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
    # The clock of an idle GPU takes some time to rise.
    ready = time.monotonic() + 0.1
    while time.monotonic() < ready:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def eager_time_us(call: Callable[[], object], repeats: int = 7) -> float:
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


def kernel_time_us(b: Batch, tiling: Tiling | None = None, programs_per_sm: int | None = None) -> float:
    """Time of row_stats on a batch."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    programs = None if programs_per_sm is None else programs_per_sm * sms
    heads, head_size = (b.q if isinstance(b.q, torch.Tensor) else b.q[0]).shape[1], b.k.shape[3]
    params = LayerParams(scale=head_size**-0.5)
    workspace = RowStatsWorkspace(DEVICE, b.rows.shape[0], heads, programs)
    accumulators = make_accumulators(heads, DEVICE)

    def launch(i: int) -> None:
        row_stats(
            b.q, b.k, b.tables[i % len(b.tables)], b.starts, b.seq_lens, b.rows, b.num_rows, params, accumulators,
            workspace, tiling=tiling,
        )  # fmt: skip

    return graph_time_us(launch, launches=16)


def copy_gb_s() -> float:
    """Device-to-device copy bandwidth, bytes read plus bytes written: the best of a memcpy and two copy kernels."""
    source = torch.empty(2**30, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    ways: tuple[Callable[[], object], ...] = (
        lambda: target.copy_(source),
        lambda: torch.add(source, 0.0, out=target),
        lambda: torch.neg(source.view(torch.int32), out=target.view(torch.int32)),
    )
    rates = [2 * source.nbytes / eager_time_us(way) / 1e3 for way in ways]
    print("copy", *(f"{rate:.0f}" for rate in rates), "GB/s: memcpy, float32 add, int32 neg", flush=True)
    return max(rates)


def measure(case: str, b: Batch, copy: float, **more: object) -> Row:
    """One line of the result: time and share of the copy bandwidth."""
    batch, context = len(b.seq_lens), int(b.seq_lens[0])
    time_us = kernel_time_us(b, **more)  # type: ignore[arg-type]
    key_bytes = b.k.shape[1] * b.k.shape[3] * b.k.itemsize
    rate = batch * context * key_bytes / time_us / 1e3
    row: Row = {"case": case, "batch": batch, "context": context, "time_us": round(time_us, 2)}
    row |= {"k_gb_s": round(rate, 1), "copy_gb_s": round(copy, 1), "share_of_copy": round(rate / copy, 4)}
    return row


def suite_tune(cache: Cache, copy: float) -> list[Row]:
    """Tilings and grids on the two target shapes, on small ones and on many short rows."""
    result = []
    shapes = [
        cache.batch(*s) for s in ((64, 4096), (1, 131072), (1, 1024), (16, 8192), (64, 512), (256, 256), (256, 64))
    ]
    for keys, stages, registers in itertools.product((64, 128), (3, 5), (None, 168, 128)):
        tiling = Tiling(keys, 4, stages, registers)
        for per_sm, b in itertools.product((2, 3, 4), shapes):
            try:
                row = measure("tune", b, copy, tiling=tiling, programs_per_sm=per_sm)
            except triton.runtime.errors.OutOfResources:
                continue
            result.append(row | asdict(tiling) | {"programs_per_sm": per_sm})
    return result


def suite_targets(cache: Cache, copy: float) -> list[Row]:
    """The two shapes with a target."""
    return [measure("target", cache.batch(*shape), copy) for shape in ((64, 4096), (1, 131072)) for _ in range(3)]


def suite_sweep(cache: Cache, copy: float) -> list[Row]:
    """Time over context length and over rows."""
    shapes = [(b, 2**c) for b in (1, 16, 64) for c in range(7, 18) if b * 2**c <= 2**21]
    shapes += [(2**r, 4096) for r in range(9)] + [(2**r, 256) for r in range(9)]
    return [measure("sweep", cache.batch(*shape), copy) for shape in dict.fromkeys(shapes)]


def suite_shapes(cache: Cache, copy: float) -> list[Row]:
    """Other head counts, head sizes and types than the target's, at 64 x 4,096 keys."""
    result = []
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    kinds = ((32, 8, 128, fp8), (32, 32, 128, bf16), (32, 8, 64, bf16), (64, 8, 128, bf16), (64, 4, 128, bf16))
    for heads, kv_heads, head_size, dtype in (*kinds, (16, 8, 256, bf16), (32, 8, 80, bf16), (32, 8, 64, fp8)):
        made = Cache(8.0, heads, kv_heads, head_size, dtype)
        row = measure("shape", made.batch(64, 4096), copy)
        row |= {"heads": heads, "kv_heads": kv_heads, "head_size": head_size, "kv_dtype": str(dtype).split(".")[1]}
        result.append(row)
    return result


def suite_latent(cache: Cache, copy: float) -> list[Row]:
    """Latent attention: DeepSeek V3's heads, and what tensor parallelism leaves of them; FP8 and small pages, too.

    Other tilings, in bfloat16 and pages of 64. They compile for a minute: several processes with LATENT_SHARD=i/n fill
    Triton's cache side by side, before one without it measures, for LATENT_SECONDS at most.
    """
    part, parts = map(int, os.environ.get("LATENT_SHARD", "0/1").split("/"))
    end = time.monotonic() + float(os.environ.get("LATENT_SECONDS", "inf"))
    shapes = ((64, 4096), (1, 131072), (16, 8192), (1, 1024))
    kinds = [(heads, dtype, 64) for heads in (128, 64, 16) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    kinds += [(heads, torch.bfloat16, page) for page in (32, 16) for heads in (128, 64, 16)]
    asked: list[tuple[int, torch.dtype, int, Tiling | None]] = [(*kind, None) for kind in kinds]
    asked += [(tiling.heads, torch.bfloat16, 64, tiling) for tiling in LATENT_TILINGS]
    made: dict[tuple[int, torch.dtype, int], list[Batch]] = {}
    result = []
    for heads, dtype, page, tiling in asked[part::parts]:
        if (heads, dtype, page) not in made:
            latent = LatentCache(6.0 if parts == 1 else 0.5, heads, dtype, page)
            made[heads, dtype, page] = [latent.batch(*shape) for shape in (shapes if parts == 1 else shapes[-1:])]
        for b in made[heads, dtype, page]:
            if time.monotonic() > end:
                return result
            try:
                row = measure("latent", b, copy, tiling=tiling)
            except triton.runtime.errors.OutOfResources:
                continue
            row |= {"heads": heads, "kv_dtype": str(dtype).split(".")[1], "page": page, "is_default": tiling is None}
            if tiling is not None:
                row |= {"tile_heads" if name == "heads" else name: value for name, value in asdict(tiling).items()}
            result.append(row)
    return result


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
    batch, context = b.tables[0].shape[0], b.tables[0].shape[1] * PAGE
    assert isinstance(b.q, torch.Tensor)
    k = b.k.transpose(1, 2)[b.tables[0]].view(batch, context, KV_HEADS, HEAD_SIZE).permute(0, 2, 3, 1)
    q = b.q.view(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_SIZE)
    s = (q @ k).float().view(batch, HEADS, context) * PARAMS.scale
    return _statistics(s, s.amax(-1), torch.softmax(s, -1), context // 2)


def lse_alternative(b: Batch) -> torch.Tensor:
    """LSE from the flash attention in torch, p = e^(s - LSE) from one matmul, statistics by torch; [B, H, S]."""
    batch, context = b.tables[0].shape[0], b.tables[0].shape[1] * PAGE
    kv = b.kv[b.tables[0]].view(batch, context, KV_HEADS, 2 * HEAD_SIZE).transpose(1, 2)
    k, v = kv[..., :HEAD_SIZE], kv[..., HEAD_SIZE:]
    assert isinstance(b.q, torch.Tensor)
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
            time_us = eager_time_us(partial(call, b))
            row: Row = {"case": name, "batch": shape[0], "context": shape[1], "time_us": round(time_us, 2)}
            result.append(row | {"ratio_to_row_stats": round(time_us / float(str(ours["time_us"])), 2)})
    return result


@triton.jit
def _empty_kernel(num_rows_ptr):
    """What every gated kernel must cost."""
    if tl.load(num_rows_ptr) == 0:
        return
    tl.store(num_rows_ptr, 0)


def suite_gate(cache: Cache, copy: float) -> list[Row]:
    """Cost of a launch with an empty row list in a graph of 32 layers: in line, and on a branch beside a kernel."""
    b = cache.batch(64, 4096)
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    accumulators, side = make_accumulators(HEADS, DEVICE), torch.cuda.Stream()
    a = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
    w = torch.randn(4096, 4096, dtype=torch.bfloat16, device=DEVICE) / 64
    sms = torch.cuda.get_device_properties(0).multi_processor_count

    def gated(per_sm: int) -> None:
        if per_sm == 0:
            _empty_kernel[(sms,)](empty)
            return
        row_stats(b.q, b.k, b.tables[0], b.starts, b.seq_lens, b.rows, empty, PARAMS, accumulators, spaces[per_sm])

    pending: list[torch.cuda.Event] = []

    def layer(how: str, per_sm: int, i: int) -> None:
        main, forked = torch.cuda.current_stream(), how.startswith("forked")
        x = a @ w
        if how == "in line":
            gated(per_sm)
        if forked:
            if how == "forked, joined a layer later" and i > 0:
                main.wait_event(pending.pop())
            side.wait_stream(main)
            with torch.cuda.stream(side):
                gated(per_sm)
                pending[:] = [side.record_event()]
        x = x @ w
        # The warm-up call stands alone.
        if how == "forked" or not torch.cuda.is_current_stream_capturing():
            main.wait_stream(side)
        torch.relu_(x)
        if forked and i == LAYERS - 1:
            main.wait_stream(side)

    spaces = {per_sm: RowStatsWorkspace(DEVICE, b.rows.shape[0], HEADS, per_sm * sms) for per_sm in (1, 2, 4)}
    result = []
    ways = ("in line", "forked", "forked, joined a layer later", "forked, joined at the end")
    for per_sm in (0, *spaces):
        times: dict[str, list[float]] = {how: [] for how in ("none", *ways)}
        for _ in range(5):
            for how, values in times.items():
                values.append(graph_time_us(partial(layer, how, per_sm), launches=LAYERS, replays=31))
        for how in ways:
            deltas = [x - y for x, y in zip(times[how], times["none"], strict=True)]
            name = f"{'row_stats' if per_sm else 'empty kernel'}, {how}"
            row: Row = {"case": name, "programs": (per_sm or 1) * sms, "layer_us": round(times["none"][0], 2)}
            row |= {"added_us": round(statistics.median(deltas), 3)}
            result.append(row | {"added_us_min": round(min(deltas), 3), "added_us_max": round(max(deltas), 3)})
    return result


SUITES = {
    "tune": suite_tune,
    "targets": suite_targets,
    "sweep": suite_sweep,
    "shapes": suite_shapes,
    "latent": suite_latent,
    "alternatives": suite_alternatives,
    "gate": suite_gate,
}


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def write_csv(path: Path, rows: list[Row], commit: str) -> None:
    """Write the rows, each with where it was measured."""
    where: Row = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "command": " ".join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
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
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all", help="all is all but tune and latent")
    parser.add_argument("--csv-dir", type=Path, default=Path("."))
    parser.add_argument("--cache-gib", type=float, default=10.0)
    parser.add_argument("--commit", default=None, help="where git is not at hand")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    names = [n for n in SUITES if n not in {"tune", "latent"}] if args.suite == "all" else [args.suite]
    copy = copy_gb_s()
    cache = Cache(args.cache_gib)
    for name in names:
        rows = SUITES[name](cache, copy)
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        write_csv(args.csv_dir / f"row_stats_{name}.csv", rows, args.commit or _commit())


if __name__ == "__main__":
    main()
