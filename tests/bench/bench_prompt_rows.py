"""GPU time of measuring all rows of a prompt's chunk in one layer, beside the attention of that chunk.

    python tests/bench/bench_prompt_rows.py --csv docs/data/prompt_rows_h200.csv
    python tests/bench/bench_prompt_rows.py --tune        # other tiles, 8,192 rows; six minutes

Pages of 16 tokens lie in random order with V interleaved, as vLLM keeps them. The attention is vLLM's FlashAttention 3
over the same cache where vLLM is installed, else torch's over K and V that lie in one piece. Times are the median of
CUDA events around one call, memory for the answers included.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs without glassbox installed

from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.prompt_rows import PromptChunk, PromptTiling, Tile, _tiling, prompt_rows
from tests.bench.bench_row_stats import eager_time_us

PAGE = 16


@dataclass(frozen=True)
class Shape:
    """Of a layer: query and KV heads, head size; and rows of a chunk, after so many keys."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    before: int = 0


LLAMA = Shape("Llama-3.1-8B", 32, 8, 128, 8192)
SHAPES = (
    LLAMA,
    Shape("Llama-3.1-8B", 32, 8, 128, 2048),
    Shape("Llama-3.1-8B", 32, 8, 128, 2048, before=30720),
    Shape("Llama-3.1-8B", 32, 8, 128, 512),
    Shape("Llama-3.1-8B", 32, 8, 128, 64, before=8128),
    Shape("Llama-3.2-1B", 32, 8, 64, 8192),
    Shape("SmolLM2-135M", 9, 3, 64, 8192),
    Shape("head size 256", 16, 8, 256, 8192),
)
TILES = {
    "by_rows": (
        *(Tile(64, 64, 4, stages, registers) for stages in (2, 3) for registers in (None, 168)),
        Tile(64, 64, 4, 3, 128),
        Tile(64, 32, 4, 3),
        Tile(64, 32, 4, 4),
        Tile(64, 32, 4, 3, 128),
        Tile(64, 128, 4, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 2, 128),
        Tile(128, 32, 8, 3),
        Tile(128, 32, 8, 3, 128),
    ),
    "by_keys": (
        Tile(128, 64, 8, 2, 128),
        *(Tile(64, 128, 8, stages, 128) for stages in (2, 3)),
        Tile(64, 128, 8, 2),
        Tile(128, 128, 8, 2),
        Tile(128, 128, 8, 2, 128),
        Tile(32, 128, 8, 3),
        Tile(32, 128, 8, 4, 128),
        *(Tile(64, 64, 4, stages) for stages in (2, 3, 4)),
        Tile(64, 64, 4, 3, 128),
        Tile(32, 64, 4, 3),
        Tile(128, 64, 4, 2),
    ),
}


class Layer:
    """One layer's queries and cache."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.keys = shape, shape.before + shape.rows
        blocks = -(-self.keys // PAGE)
        like = {"dtype": torch.bfloat16, "device": "cuda"}
        self.q = torch.randn(shape.rows, shape.heads, shape.head_size, **like)
        self.kv = torch.randn(blocks, PAGE, shape.kv_heads, 2 * shape.head_size, **like)
        self.table = torch.randperm(blocks, device="cuda").int()
        self.scale = shape.head_size**-0.5

    def measure(self, tiling: PromptTiling | None = None, spans: torch.Tensor | None = None) -> Callable[[], object]:
        """Measures all rows in all heads."""
        cache = self.kv.transpose(1, 2)[..., : self.shape.head_size]
        heads = torch.arange(self.shape.heads, dtype=torch.int32, device="cuda")
        chunk, params = PromptChunk(0, self.shape.rows, self.shape.before), LayerParams(self.scale)
        return lambda: prompt_rows(self.q, cache, self.table, chunk, params, heads, spans=spans, tiling=tiling)

    def attention(self) -> tuple[str, Callable[[], object]]:
        """Name and call of the attention."""
        size = self.shape.head_size
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError:
            q = self.q.transpose(0, 1)[None]
            kv = self.kv[self.table.long()].flatten(0, 1)[: self.keys].transpose(0, 1)[None].contiguous()
            kv = kv.repeat_interleave(self.shape.heads // self.shape.kv_heads, 1)
            k, v = kv[..., :size].contiguous(), kv[..., size:].contiguous()
            bias = torch.nn.attention.bias.causal_lower_right(self.shape.rows, self.keys)
            return "torch SDPA", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
        ends = torch.tensor([0, self.shape.rows], dtype=torch.int32, device="cuda")
        used = torch.tensor([self.keys], dtype=torch.int32, device="cuda")
        return "FlashAttention 3", lambda: flash_attn_varlen_func(
            self.q, self.kv[..., :size], self.kv[..., size:], max_seqlen_q=self.shape.rows, cu_seqlens_q=ends,
            max_seqlen_k=self.keys, seqused_k=used, softmax_scale=self.scale, causal=True,
            block_table=self.table[None], fa_version=3,
        )  # fmt: skip


def versions() -> dict[str, str]:
    """What the times hold for."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def compare() -> Iterator[dict[str, object]]:
    """A line for each shape."""
    for shape in SHAPES:
        layer = Layer(shape)
        name, attend = layer.attention()
        attention_us = eager_time_us(attend, 15)
        plain_us = eager_time_us(layer.measure(), 15)
        spans = torch.tensor([(0, 64), (64, layer.keys // 2), (layer.keys // 2, layer.keys)], device="cuda").int()
        spans_us = eager_time_us(layer.measure(spans=spans), 15)
        yield {
            "shape": shape.name, "rows": shape.rows, "keys": layer.keys, "heads": shape.heads,
            "head_size": shape.head_size, "attention": name, "attention_us": f"{attention_us:.0f}",
            "prompt_rows_us": f"{plain_us:.0f}", "ratio": f"{plain_us / attention_us:.2f}",
            "with_spans_over_all_keys_us": f"{spans_us:.0f}", **versions(),
            "command": "python tests/bench/bench_prompt_rows.py",
        }  # fmt: skip


def tune() -> Iterator[dict[str, object]]:
    """A line for each tile of a pass, for three head sizes; the other pass keeps its own."""
    for shape in (LLAMA, Shape("Llama-3.2-1B", 32, 8, 64, 8192), Shape("head size 256", 16, 8, 256, 8192)):
        layer = Layer(shape)
        usual = _tiling(layer.q, layer.kv.transpose(1, 2)[..., : shape.head_size])
        for which, tile in ((which, tile) for which, tiles in TILES.items() for tile in tiles):
            try:
                us = eager_time_us(layer.measure(usual._replace(**{which: tile})), 5)
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
                continue
            yield {
                "head_size": shape.head_size, "pass": which, **tile._asdict(), "both_passes_us": f"{us:.0f}",
                **versions(), "command": "python tests/bench/bench_prompt_rows.py --tune",
            }  # fmt: skip


def main() -> None:
    """Print the lines, and write them if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    lines = []
    for line in tune() if args.tune else compare():
        print(*line.values(), flush=True)
        lines.append(line)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
