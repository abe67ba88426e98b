"""The check of outputs on the CPU equals the float64 reference, whatever the batch and its layers are like."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glassbox.core.output_checks import OUTPUT_SUMS
from glassbox.core.rows import ROW_QUERY
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.reference.row_output import kept_kv_ref, row_output_ref
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.row_output_cpu import row_output_cpu
from glassbox.kernels.row_stats_cpu import LayerRows
from tests.kernels.simulated_layer import PagesReader
from tests.kernels.test_row_stats_cpu import Batch
from tests.kernels.tolerances import assert_output_sums

NAN, INF = math.nan, math.inf


@dataclass
class Values(Batch):
    """A batch with V, of a head size of its own, and the outputs that were served for its rows."""

    value_size: int | None = None
    kv_dtype: torch.dtype | None = None
    kv_scales: tuple[float, float] = (1.0, 1.0)
    transposed_values: bool = False
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        generator = torch.Generator().manual_seed(1000 + self.seed)
        stored = self.kv_dtype or self.dtype
        size = self.value_size or self.head_size
        self.keys = [k.to(stored) for k in self.keys]
        self.values = [torch.randn(len(k), self.num_kv_heads, size, generator=generator).to(stored) for k in self.keys]
        self.noise = torch.randn(len(self.rows), self.num_heads, size, generator=generator)
        self.computed = torch.randn(len(self.rows), 2, self.num_kv_heads, self.head_size, generator=generator)

    @property
    def rounding(self) -> OutputRounding:
        fp8 = self.kv_dtype in FP8_TYPES
        return OutputRounding.of(self.dtype, self.output_dtype, fp8_cache=fp8, on_gpu=False)

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype in FP8_TYPES else self.dtype

    def reader(self, tensors: list[Tensor], scale: float, order_seed: int) -> tuple[Any, np.ndarray]:
        stored, self.keys = self.keys, [x.float() for x in tensors]
        size, self.head_size = self.head_size, tensors[0].shape[-1]
        dtype, self.dtype = self.dtype, torch.float32
        pages, table = self.cache(order_seed)
        self.keys, self.head_size, self.dtype = stored, size, dtype
        return PagesReader(pages.to(tensors[0].dtype), scale), table


class Layers:
    """Layers over the same sequences: one per batch; outputs are wrong by `error`, relative to values."""

    def __init__(self, *batches: Values, error: float = 0.02) -> None:
        self.batches, self.error = batches, error
        first = batches[0]
        self.order = np.lexsort((first.row_list[:, ROW_QUERY], first.row_list[:, 1]))
        self.outputs = torch.stack([self._served(b) for b in batches])  # [L, R, H, Dv], of the row list

    def _operands(self, b: Values, row: int) -> tuple[Tensor, Tensor, Tensor]:
        sequence = b.rows[row][0]
        k, v = b.keys[sequence].double() * b.kv_scales[0], b.values[sequence].double() * b.kv_scales[1]
        return b.q[int(b.row_list[row, ROW_QUERY])], k, v

    def _served(self, b: Values) -> Tensor:
        out = []
        for row, position in enumerate(b.positions):
            q, k, v = self._operands(b, row)
            p = row_probe_ref(
                q, k, position, scale=b.scale, sliding_window=b.window, soft_cap=b.soft_cap, alibi_slopes=b.slopes,
                sinks=b.learned,
            )  # fmt: skip
            group = b.num_heads // b.num_kv_heads
            r = torch.einsum("hn,nhd->hd", p, v[: position + 1].repeat_interleave(group, 1))
            out.append(r + self.error * b.kv_scales[1] * b.noise[row])
        return torch.stack(out).to(b.output_dtype)

    def measure(self, **options: int) -> tuple[Tensor, Tensor]:
        first = self.batches[0]
        layers, values, plan = [], [], None
        for b in self.batches:
            k, table = b.reader(b.keys, b.kv_scales[0], first.seed)
            v, _ = b.reader(b.values, b.kv_scales[1], first.seed)
            plan = plan or first.plan(table, **options)
            layers.append(LayerRows.select(b.q, k, plan, b.params))
            values.append(v)
        assert plan is not None
        kept = None
        if first.value_size is None:
            kept = torch.stack([b.computed for b in self.batches])[:, plan.row_index]
        sums, of_kv = row_output_cpu(layers, values, self.outputs[:, plan.row_index], plan, kept)
        return sums, torch.empty(0) if of_kv is None else of_kv

    def check(self, **options: int) -> Tensor:
        sums, of_kv = self.measure(**options)
        first = self.batches[0]
        assert sums.shape == (len(first.rows), len(self.batches), first.num_heads, len(OUTPUT_SUMS))
        assert sums.dtype == torch.float32
        for row, position in enumerate(first.positions):
            for n, b in enumerate(self.batches):
                q, k, v = self._operands(b, row)
                expected = row_output_ref(
                    q, k, v, self.outputs[n, row], position, rounding=b.rounding, scale=b.scale,
                    sliding_window=b.window, soft_cap=b.soft_cap, alibi_slopes=b.slopes, sinks=b.learned,
                )  # fmt: skip
                assert_output_sums(sums[row, n], expected, f"row {row}, layer {n}")
                if of_kv.numel():
                    self._check_kv(of_kv[row, n], b, row, position)
        return sums

    def _check_kv(self, actual: Tensor, b: Values, row: int, position: int) -> None:
        sequence = b.rows[row][0]
        for head in range(b.num_kv_heads):
            parts = []
            for which, (stored, scale) in enumerate(zip((b.keys, b.values), b.kv_scales, strict=True)):
                x = stored[sequence][position, head]
                largest = torch.finfo(x.dtype).max if x.dtype in FP8_TYPES else None
                parts.append(kept_kv_ref(x, scale, b.computed[row, which, head], largest))
            torch.testing.assert_close(actual[head].double(), torch.cat(parts), rtol=1e-5, atol=1e-6)


MIXED = Values(
    [(1, 1, 1), (37, 37, 37), (200, 1, 20), (48, 16, 40), (16, 1, 5)],
    [(3, 15), (1, 0), (1, 17), (0, 0), (1, 36), (2, 0), (3, 0), (4, 0)],
    num_heads=6,
    num_kv_heads=2,
)
BF16, F16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2


class TestAgainstReference:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"dtype": BF16},
            {"dtype": F16},
            {"window": 9},
            {"window": 1},
            {"window": 9, "sinks": True, "soft_cap": 5.0},
            {"alibi": True},
            {"alibi": True, "soft_cap": 3.0, "sinks": True, "dtype": BF16},
            {"sinks": True},
            {"soft_cap": 3.0, "gain": 4.0},
            {"num_heads": 5, "num_kv_heads": 1, "head_size": 80, "block_size": 32},
            {"num_heads": 20, "num_kv_heads": 1, "value_size": 48},
            {"gain": 8.0},
            {"gain": 0.0},
            {"dtype": BF16, "kv_dtype": E4M3, "kv_scales": (0.7, 0.03)},
            {"dtype": F16, "kv_dtype": E5M2, "kv_scales": (2.0, 1.0)},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("num_layers", [1, 3])
    def test_mixed_batch(self, change: dict, num_layers: int) -> None:
        """Prefill, decode, a row with one key, rows of one request in the middle of it, in every kind of layer."""
        first = replace(MIXED, **change)
        others = [replace(first, seed=n, scale=first.scale / (1 + n)) for n in range(1, num_layers)]
        Layers(first, *others).check()
