"""Cost on the CPU of all rows of a prompt beside vLLM's own attention of that prompt, layer for layer.

    python tests/bench/bench_prompt_rows_cpu.py
    OMP_NUM_THREADS=1 python tests/bench/bench_prompt_rows_cpu.py --csv prompt_rows_cpu.csv

A case is a whole prompt in one layer, its keys in pages; the time is the median of runs in turns.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from vllm import _custom_ops as ops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from glassbox.kernels.layer_params import LayerParams  # noqa: E402
from glassbox.kernels.prompt_rows_cpu import PromptChunk, PromptWishes, prompt_rows_cpu  # noqa: E402
from tests.bench.bench_row_stats_cpu import SHAPES, Shape, milliseconds, revision, write_csv  # noqa: E402
from tests.kernels.test_row_stats_cpu import PlainReader  # noqa: E402

LENGTHS = (128, 512, 1500)
BLOCK = 128
_MEASURED = ("native", "torch", "grams", "squares")


def ways(shape: Shape, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What computes the prompt's attention, and what measures it, by name."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-length // BLOCK)
    cache = torch.zeros(blocks, shape.kv_heads, 2 * BLOCK, shape.head_size, dtype=dtype)
    key_half, value_half = cache.chunk(2, dim=2)
    q = torch.randn(length, shape.heads, shape.head_size, generator=generator).to(dtype)
    keys, values = (
        torch.randn(length, shape.kv_heads, shape.head_size, generator=generator).to(dtype) for _ in range(2)
    )
    ops.cpu_attn_reshape_and_cache(keys, values, key_half, value_half, torch.arange(length), "vec", 1.0, 1.0, "auto")
    starts, lens = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    table = torch.arange(blocks, dtype=torch.int32)
    scale = shape.head_size**-0.5
    output = torch.empty_like(q)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_size, seq_lens=lens,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=True,
        kv_cache_dtype="auto",
    )  # fmt: skip

    def attention() -> None:
        ops.cpu_attention_with_kv_cache(
            query=q, key_cache=key_half, value_cache=value_half, output=output, query_start_loc=starts, seq_lens=lens,
            scale=scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table[None], softcap=0.0,
            scheduler_metadata=metadata, s_aux=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip

    padded = torch.zeros(blocks * BLOCK, shape.kv_heads, shape.head_size, dtype=dtype)
    padded[:length] = keys
    # As vLLM's pages for CPUs lie, [D, BLOCK].
    reader = PlainReader(padded.view(blocks, BLOCK, shape.kv_heads, -1).transpose(1, 2), transposed=True)
    chunk = PromptChunk(q, 0, reader, table.long(), BLOCK, LayerParams(scale))
    heads, spans = range(shape.heads), torch.zeros(0, 2, dtype=torch.int32)
    return {
        "attention": attention,
        "native": lambda: prompt_rows_cpu(chunk, PromptWishes(heads, spans), native=True),
        "torch": lambda: prompt_rows_cpu(chunk, PromptWishes(heads, spans)),
        "grams": lambda: prompt_rows_cpu(chunk, PromptWishes(heads, spans, grams=True), native=True),
        "squares": lambda: prompt_rows_cpu(chunk, PromptWishes(heads, spans, squares=True), native=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    commit, lines = revision(), []
    for shape in SHAPES:
        for length in LENGTHS:
            for dtype in (torch.bfloat16, torch.float32):
                found = milliseconds(ways(shape, length, dtype), options.rounds)
                ratios = [found[way] / found["attention"] for way in _MEASURED]
                name = str(dtype).removeprefix("torch.")
                times = [f"{value:.2f}" for value in found.values()]
                lines.append([shape.name, str(length), name, *times, *(f"{ratio:.2f}" for ratio in ratios)])
                print("  ".join(f"{text:>13}" for text in lines[-1]), flush=True)
    if options.csv:
        header = ["model", "tokens", "dtype", "attention_ms", *(f"{way}_ms" for way in _MEASURED)]
        write_csv(options.csv, commit, [*header, *(f"{way}_ratio" for way in _MEASURED)], lines)


if __name__ == "__main__":
    main()
