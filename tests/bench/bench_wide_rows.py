"""Ways to measure the rows of latent attention, against each other: loads, where the queries are, tilings.

    W8_COMPILE=i/n python tests/bench/bench_wide_rows.py DIR     # compile a share of them, several side by side
    python tests/bench/bench_wide_rows.py DIR                    # check and measure all of them, for W8_SECONDS at most
"""

import csv
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.core import rows as row_list  # noqa: E402
from glassbox.core.statistics import NUM_STATISTICS  # noqa: E402
from glassbox.kernels.layer_params import LayerParams  # noqa: E402
from glassbox.kernels.reference.row_stats import row_stats_ref  # noqa: E402
from glassbox.kernels.row_stats import RowStatsWorkspace, Tiling, row_stats  # noqa: E402
from tests.bench import bench_row_stats as bench  # noqa: E402
from tests.kernels.row_stats_cases import MIXED, Sequence, make_accumulators, make_inputs  # noqa: E402
from tests.kernels.tolerances import assert_two_oracles  # noqa: E402

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SHAPES = ((64, 4096), (1, 131072), (16, 8192), (1, 1024))


def tiling(keys, warps, stages, heads, loads=2, hold=True, inner=True, registers=None, merge=16):
    return Tiling(keys, warps, stages, registers, heads, loads, inner, hold, merge=merge)


# (heads, type, tiling, programs per SM), those that matter most first
T = tiling
KINDS = [
    (128, BF16, T(64, 8, 3, 128), 1),
    (128, BF16, T(32, 8, 6, 128), 1),
    (64, BF16, T(32, 4, 3, 64), 2),
    (64, BF16, T(64, 4, 3, 64), 1),
    (16, BF16, T(64, 4, 3, 16, hold=False), 1),
    (16, BF16, T(32, 4, 2, 16, hold=False), 2),
    (16, BF16, T(64, 8, 3, 16, hold=False), 1),
    (16, BF16, T(32, 4, 3, 64), 2),
    (128, FP8, T(64, 8, 4, 128), 1),
    (64, FP8, T(32, 4, 4, 64), 2),
    (16, FP8, T(64, 4, 4, 16, hold=False), 1),
    (128, BF16, T(32, 8, 2, 128, hold=False), 1),
    (128, BF16, T(32, 8, 2, 128, loads=0, hold=False, inner=False), 2),  # as it was
    (128, BF16, T(32, 8, 2, 128, loads=0, hold=False, inner=False), 1),
    (128, BF16, T(32, 8, 2, 128, loads=0, hold=False), 1),
    (128, BF16, T(32, 8, 2, 128, loads=1, hold=False), 1),
    (128, BF16, T(64, 8, 3, 128, inner=False), 1),
    (128, BF16, T(64, 8, 3, 128, merge=32), 1),
    (128, BF16, T(64, 8, 3, 128, merge=64), 1),
    (16, BF16, T(64, 8, 3, 16, hold=False, merge=64), 1),
    (64, BF16, T(32, 4, 6, 64), 1),
    (64, BF16, T(32, 4, 4, 64, hold=False), 1),
    (64, BF16, T(64, 4, 2, 64, hold=False), 1),
    (16, BF16, T(32, 4, 5, 16, hold=False), 1),
    (16, BF16, T(64, 4, 3, 64), 1),
    (16, BF16, T(32, 4, 3, 16, hold=False), 2),
    (16, BF16, T(32, 4, 2, 16, loads=1, hold=False), 2),
    (16, BF16, T(32, 4, 2, 16, loads=0, hold=False, inner=False), 2),  # as it was
    (16, BF16, T(16, 4, 6, 16, hold=False), 2),
    (16, BF16, T(32, 4, 6, 16, hold=False), 1),
    (16, BF16, T(32, 8, 3, 16, hold=False), 2),
    (128, BF16, T(64, 8, 2, 128), 1),
    (128, BF16, T(32, 8, 4, 128), 1),
    (128, BF16, T(32, 4, 3, 64), 2),
    (128, BF16, T(64, 8, 3, 128, loads=1), 1),
    (128, BF16, T(64, 8, 3, 128, loads=0), 1),
    (64, BF16, T(64, 4, 3, 64, loads=1), 1),
    (64, BF16, T(64, 4, 3, 64, loads=0), 1),
    (128, FP8, T(32, 8, 6, 128), 1),
    (128, FP8, T(64, 8, 3, 128), 1),
    (128, FP8, T(32, 8, 2, 128, loads=0, hold=False, inner=False), 2),  # as it was
    (64, FP8, T(64, 4, 4, 64), 1),
    (16, FP8, T(32, 4, 4, 16, hold=False), 2),
    (16, FP8, T(64, 8, 4, 16, hold=False), 1),
    (16, FP8, T(32, 4, 4, 64), 2),
]


def launch(inputs, chosen, programs, out=None):
    """One launch of a made case."""
    heads = inputs.q.shape[1]
    row_stats(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.query_start_loc, inputs.seq_lens, inputs.rows,
        inputs.num_rows, inputs.params, make_accumulators(heads, bench.DEVICE),
        RowStatsWorkspace(bench.DEVICE, inputs.rows.shape[0], max(heads, chosen.heads), programs), sink_tokens=inputs.sink_tokens,
        local_window=inputs.local_window, out=out, tiling=chosen,
    )  # fmt: skip


def small_case(heads, dtype):
    """Sequences with tiles of every kind; what float64 and float32 say of them; how large scores can be."""
    case = replace(
        MIXED, heads=heads, kv_heads=1, head_size=576, page=64, max_rows=256, local_window=128, kv_dtype=dtype,
        k_scale=0.7 if dtype == FP8 else None, num_programs=7, rows=None,
        sequences=(Sequence(1, 900, 450), Sequence(2, 257, 200), Sequence(1, 1, 1), Sequence(1, 400, 500)),
    )  # fmt: skip
    inputs = make_inputs(case, bench.DEVICE)
    count = int(inputs.num_rows)
    rows = inputs.rows.cpu()[:count]
    starts, lengths, batch = inputs.query_start_loc.tolist(), inputs.seq_lens.tolist(), rows[:, row_list.ROW_BATCH]
    answers, largest = [], 0.0
    for oracle in (torch.float64, torch.float32):
        q = inputs.q.cpu().float().to(oracle)[rows[:, row_list.ROW_QUERY].long()]
        scale = 1.0 if inputs.params.k_scale is None else float(inputs.params.k_scale)
        keys = [k.float().to(oracle) * scale for k in inputs.keys]
        answers.append(
            row_stats_ref(
                q, keys,
                [lengths[b] - starts[b + 1] + int(t) for t, b in zip(rows[:, row_list.ROW_QUERY], batch.tolist())],
                request=batch.tolist(), phase=(rows[:, row_list.ROW_PHASE] & row_list.ROW_DECODE).tolist(),
                prompt_len=rows[:, row_list.ROW_PROMPT_LEN].tolist(), scale=inputs.params.scale,
                sliding_window=None, chunk_size=None, soft_cap=None, alibi_slopes=None, sinks=None,
                sink_tokens=inputs.sink_tokens, local_window=inputs.local_window, dtype=oracle,
            )
        )  # fmt: skip
        for k in keys:
            if len(k):
                largest = max(largest, float(torch.einsum("rhd,nd->rhn", q.abs(), k[:, 0].abs()).max()))
    return inputs, answers, inputs.params.scale * largest


def error_of(chosen, small):
    """Empty if a way gives the reference's numbers."""
    inputs, (expected, same_dtype), magnitude = small
    out = torch.full((inputs.rows.shape[0], inputs.q.shape[1], NUM_STATISTICS + 1), -7.5, device=bench.DEVICE)
    launch(inputs, chosen, 7, out)
    try:
        assert_two_oracles(out.cpu()[: int(inputs.num_rows)], expected, same_dtype, magnitude, 900)
    except AssertionError as error:
        return str(error)
    return ""


# Of ordinary heads, few rows: (heads, KV heads, head size), least tiles of a program, largest row list, programs per SM.
FEW_SHAPES = ((1, 64), (1, 512), (1, 640), (1, 4096), (8, 512), (64, 512), (256, 128))
FEW = [
    (model, least, most, per_sm)
    for model in ((32, 8, 128), (14, 2, 64))
    for least, most, per_sm in (
        (1, 256, 2), (2, 256, 2), (4, 256, 2), (8, 256, 2), (16, 256, 2), (1, 256, 1), (4, 256, 1), (1, 16, 2), (4, 16, 2),
    )
]  # fmt: skip


def few_rows(directory, only_compile=None):
    """Time of a launch for few rows, and of one for none."""
    caches, result = {}, []
    for (model, least, most, per_sm) in FEW[slice(*only_compile)] if only_compile else FEW:
        chosen = replace(Tiling(128 if model[2] == 64 and model[0] // model[1] <= 4 else 64, 4, 5), min_share=least)
        if only_compile:
            made = replace(MIXED, heads=model[0], kv_heads=model[1], head_size=model[2], max_rows=most,
                           sequences=(Sequence(1, 70, 35),), rows=None)  # fmt: skip
            launch(make_inputs(made, bench.DEVICE), chosen, 7)
            continue
        if model not in caches:
            caches[model] = bench.Cache(4.0, *model)
        cells = []
        for rows, context in ((0, 512), *FEW_SHAPES):
            if rows > most:
                continue
            b = caches[model].batch(max(rows, 1), context, most)
            b.num_rows.fill_(rows)
            time_us = bench.kernel_time_us(b, chosen, per_sm)
            key_bytes = rows * context * model[1] * model[2] * 2
            result.append({"heads": model[0], "kv_heads": model[1], "head_size": model[2], "least_tiles": least,
                           "max_rows": most, "per_sm": per_sm, "rows": rows, "context": context,
                           "time_us": round(time_us, 2), "bytes_us": round(key_bytes / 4.25e6, 2)})  # fmt: skip
            cells.append(f"{rows}x{context} {time_us:6.2f}")
        print(f"#9999 few {model} at least {least:2d} of {most} x{per_sm}: {'  '.join(cells)} us", flush=True)
    if result:
        with (directory / "few_rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(result[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(result)


def main():
    directory, share = Path(sys.argv[1]), os.environ.get("W8_COMPILE")
    begin, seconds = time.monotonic(), float(os.environ.get("W8_SECONDS", "inf"))
    if share:
        part, parts = map(int, share.split("/"))
        for heads, dtype, chosen, _ in KINDS[part::parts]:
            made = replace(MIXED, heads=heads, kv_heads=1, head_size=576, page=64, max_rows=256, kv_dtype=dtype,
                           k_scale=None, sequences=(Sequence(1, 70, 35),), rows=None)  # fmt: skip
            for with_out in (True, False):
                try:
                    inputs = make_inputs(replace(made, k_scale=0.7 if dtype == FP8 and with_out else None), bench.DEVICE)
                    out = torch.empty(256, heads, NUM_STATISTICS + 1, device=bench.DEVICE) if with_out else None
                    launch(inputs, chosen, 7, out)
                except Exception as error:  # noqa: BLE001
                    print(heads, dtype, chosen, type(error).__name__, str(error)[:200], flush=True)
        few_rows(directory, (part, None, parts))
        print(f"compiled {share} after {time.monotonic() - begin:.0f} s", flush=True)
        return
    first = os.environ.get("W8_FROM")
    if first is None:
        # A way that hangs or breaks the device's context must not take the others with it.
        at = 0
        while at < len(KINDS) and time.monotonic() - begin < seconds:
            left = seconds - (time.monotonic() - begin)
            child = subprocess.Popen(
                [sys.executable, __file__, str(directory)], stdout=subprocess.PIPE, text=True,
                env=os.environ | {"W8_FROM": str(at), "W8_SECONDS": str(left)},
            )  # fmt: skip
            watch = threading.Timer(40.0, child.kill)
            watch.start()
            for line in child.stdout:
                watch.cancel()
                watch = threading.Timer(20.0, child.kill)
                watch.start()
                print(line, end="", flush=True)
                if line.startswith("#"):
                    at = int(line[1:5]) + 1 if line[1:5] != "9999" else len(KINDS)
            watch.cancel()
            if child.wait() == 0:
                break
            print(f"#{at:4d} ended with {child.returncode}", flush=True)
            at += child.returncode != 3  # 3 has named the one that failed
        print(f"{time.monotonic() - begin:.0f} s, triton {triton.__version__}", flush=True)
        return
    copy = bench.copy_gb_s()
    smalls, batches = {}, {}
    for index, (heads, dtype, chosen, per_sm) in list(enumerate(KINDS))[int(first) :]:
        if time.monotonic() - begin > seconds:
            print("out of time", flush=True)
            break
        name = str(dtype).split(".")[1]
        kind = f"#{index:4d} {heads:4d} {name:13s} {chosen.keys:3d} keys {chosen.warps} warps {chosen.stages} stages " \
               f"{chosen.heads:3d} heads loads {chosen.loads} hold {chosen.hold:d} inner {chosen.inner:d} merge {chosen.merge} x{per_sm}"  # fmt: skip
        row = {"heads": heads, "kv_dtype": name, "keys": chosen.keys, "warps": chosen.warps, "stages": chosen.stages,
               "tile_heads": chosen.heads, "loads": chosen.loads, "hold": chosen.hold, "inner": chosen.inner,
               "per_sm": per_sm, "merge": chosen.merge}  # fmt: skip
        result = []
        try:
            if (heads, dtype) not in smalls:
                smalls[heads, dtype] = small_case(heads, dtype)
            wrong = error_of(chosen, smalls[heads, dtype])
            if wrong:
                print("      WRONG", wrong[:160], flush=True)
            if (heads, dtype) not in batches:
                cache = bench.LatentCache(6.0, heads, dtype)
                batches[heads, dtype] = [cache.batch(*shape) for shape in SHAPES]
            cells = []
            for b in batches[heads, dtype]:
                size, context = len(b.seq_lens), int(b.seq_lens[0])
                time_us = bench.kernel_time_us(b, chosen, per_sm)
                rate = size * context * 576 * dtype.itemsize / time_us / 1e3
                cells.append(f"{time_us:7.1f} us {100 * rate / copy:3.0f} %")
                result.append(row | {"batch": size, "context": context, "time_us": round(time_us, 2),
                              "share_of_copy": round(rate / copy, 4), "wrong": wrong})  # fmt: skip
            print(kind, " ".join(cells), flush=True)
        except triton.runtime.errors.OutOfResources as error:
            print(kind, str(error)[:200], flush=True)
        except Exception as error:
            print(kind, type(error).__name__, str(error)[:300], flush=True)
            if "CUDA" in str(error):
                sys.exit(3)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "wide_rows.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            for line in result:
                writer = csv.DictWriter(file, list(line), lineterminator="\n")
                if is_new:
                    writer.writeheader()
                is_new = False
                writer.writerow(line)
    few_rows(directory)


if __name__ == "__main__":
    main()
