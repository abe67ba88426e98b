"""The check of outputs on the CPU equals the float64 reference, whatever the batch and its layers are like."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glassbox.core.output_checks import (
    KV_SUM,
    KV_SUMS,
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    NONFINITE_REFERENCE,
    OUTPUT_SUM,
    OUTPUT_SUMS,
)
from glassbox.core.rows import ROW_QUERY
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.reference.row_output import kept_kv_ref, row_output_ref
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.row_output_cpu import row_output_cpu
from glassbox.kernels.row_stats_cpu import LayerRows
from tests.kernels.simulated_layer import Layer, PagesReader
from tests.kernels.test_row_stats_cpu import Batch
from tests.kernels.tolerances import assert_output_sums

NAN, INF = math.nan, math.inf


@dataclass
class Values(Batch):
    """A batch with V, of a head size of its own, and the outputs that were served for its rows."""

    value_size: int | None = None
    kv_dtype: torch.dtype | None = None
    kv_scales: tuple[float, float] = (1.0, 1.0)
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
                q, k, position, scale=b.scale, sliding_window=b.window, chunk_size=b.chunk,
                soft_cap=b.soft_cap, alibi_slopes=b.slopes, sinks=b.learned,
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
        expected = torch.empty(sums.shape, dtype=torch.float64)
        for row, position in enumerate(first.positions):
            for n, b in enumerate(self.batches):
                q, k, v = self._operands(b, row)
                expected[row, n] = row_output_ref(
                    q, k, v, self.outputs[n, row], position, rounding=b.rounding, scale=b.scale,
                    sliding_window=b.window, chunk_size=b.chunk, soft_cap=b.soft_cap, alibi_slopes=b.slopes,
                    sinks=b.learned,
                )  # fmt: skip
                if of_kv.numel():
                    self._check_kv(of_kv[row, n], b, row, position)
        assert_output_sums(sums, expected)
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
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class TestAgainstReference:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"dtype": BF16},
            {"dtype": F16},
            {"window": 9},
            {"chunk": 7},
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

    @pytest.mark.parametrize("window", [None, 300])
    def test_long_rows_in_several_tiles(self, window: int | None) -> None:
        """A row whose keys come in many reads is one row."""
        batch = replace(MIXED, lengths=[(700, 3, 650), (5, 1, 4)], rows=[(0, 0), (0, 2), (1, 0)], window=window)
        Layers(batch, replace(batch, seed=1)).check(key_budget=2 * 16 * 2 * 64)

    @settings(max_examples=25)
    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
        st.sampled_from([None, 1, 7]),
        st.sampled_from([F32, BF16, F16]),
        st.integers(0, 1000),
        st.data(),
    )
    def test_any_batch(
        self, lengths: list, window: int | None, dtype: torch.dtype, seed: int, data: st.DataObject
    ) -> None:
        """Random lengths and rows, in any order."""
        batch = replace(MIXED, lengths=[(max(n, q), q, p) for n, q, p in lengths], rows=[], window=window, dtype=dtype)
        everything = [(b, i) for b, (_, q, _) in enumerate(batch.lengths) for i in range(q)]
        rows = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=6, unique=True))
        batch = replace(batch, rows=rows, seed=seed)
        Layers(batch, replace(batch, seed=seed + 1)).check()

    def test_no_rows(self) -> None:
        """Zero rows have zero sums."""
        pages, table = replace(MIXED, rows=[]).cache()
        plan = replace(MIXED, rows=[]).plan(table)
        reader = PagesReader(pages)
        layer = LayerRows.select(MIXED.q, reader, plan, MIXED.params)
        kept = torch.zeros(1, 0, 2, 2, 64)
        sums, of_kv = row_output_cpu([layer], [reader], torch.zeros(1, 0, 6, 64), plan, kept)
        assert sums.shape == (0, 1, 6, len(OUTPUT_SUMS))
        assert of_kv is not None
        assert of_kv.shape == (0, 1, 2, len(KV_SUMS))


class TestCache:
    def test_a_reader_that_widens(self) -> None:
        """It says which of its numbers is the largest of the stored type."""

        class Widened(PagesReader):
            largest = 448.0 / 256

            def read(self, block_ids: Tensor) -> Tensor:
                return super().read(block_ids).half() / 256

        layer = Layer((20, 33), kv_dtype=E4M3, kv_scales=(0.005, 0.05))
        output = layer.served()
        plain = layer.check(output)
        assert int(plain[1][..., KV_SUM["key_saturated"]].sum()) > 0
        widened = layer.check(output, reader=Widened, factor=256.0)
        for expected, got in zip(plain, widened, strict=True):
            torch.testing.assert_close(expected, got, rtol=1e-4, atol=1e-6)


class TestNotFinite:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    def test_a_key(self, value: float, soft_cap: float | None) -> None:
        """As the reference says: a score of -inf has no weight, others make the output NaN."""
        spoiled = replace(MIXED, soft_cap=soft_cap)
        spoiled.keys[2][100, 0, 0] = value
        layers = Layers(spoiled)
        layers.outputs.nan_to_num_(0.0)  # row_probe_ref takes -inf for an error, which a kernel doesn't
        layers.check()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_value(self, value: float) -> None:
        """It spoils the rows that see it, and none of the same request that doesn't."""
        spoiled = replace(MIXED)
        spoiled.values[1][20, 1, 3] = value
        codes = Layers(spoiled).check()[:, 0, :, OUTPUT_SUM["nonfinite"]]
        # Row 4 is at position 36 of that request, rows 1 and 2 at 0 and 17.
        assert codes.nonzero().tolist() == [[4, 3], [4, 4], [4, 5]]
        assert (codes[4, 3:] == NONFINITE_BOTH).all()

    def test_only_one_of_the_two(self) -> None:
        """Is said; all other sums are 0 then."""
        layers = Layers(MIXED)
        layers.outputs[0, 2, 1, 5] = NAN
        sums = layers.check()
        assert sums[2, 0, 1].tolist() == [0.0] * (len(OUTPUT_SUMS) - 1) + [NONFINITE_OUTPUT]
        spoiled = replace(MIXED)
        spoiled.values[1][3, 0, 0] = NAN
        layers = Layers(spoiled)
        layers.outputs.nan_to_num_(0.0)
        assert layers.check()[2, 0, :, OUTPUT_SUM["nonfinite"]].tolist() == [NONFINITE_REFERENCE] * 3 + [0] * 3


class TestErrors:
    def test_outputs_of_other_rows(self) -> None:
        """Says what they must be."""
        layers = Layers(MIXED)
        layers.outputs = layers.outputs[:, :, :5]
        with pytest.raises(
            ValueError, match=r"of 1 layers, 8 rows and 6 heads, got 1 values and outputs \[1, 8, 5, 64"
        ):
            layers.measure()
