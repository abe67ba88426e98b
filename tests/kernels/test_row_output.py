"""The check of outputs on a GPU equals the float64 reference: in Triton's interpreter without one, compiled with
one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.output_checks import (
    KV_SUM,
    KV_SUMS,
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    NONFINITE_REFERENCE,
    OUTPUT_SUM,
    OUTPUT_SUMS,
)
from glassbox.core.rows import ROW_BATCH
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.reference.row_output import kept_kv_ref, row_output_ref
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.row_output import CachedLayers, row_output
from tests.kernels.row_stats_cases import BASE, INF, LARGE, MIXED, NAN, Case, Sequence, make_inputs
from tests.kernels.test_row_probe import Group, Operations, move_to_table_of
from tests.kernels.tolerances import assert_output_sums

# The interpreter computes in numpy, which warns where the kernel means to reach infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = FP8_TYPES
NONFINITE = OUTPUT_SUM["nonfinite"]
# Of the outputs, relative to a value: far above rounding in the reference, so that the sums are well known.
ERROR = 0.02


class Outputs(Group):
    """A group with V, the outputs that were served for its rows, and the rows' K and V as computed.

    Args:
        value_size: head size of V; None is K's.
        values: numbers written to the first element of a value, as a case's `keys`.
        v_scale: of each layer, as a case's `k_scale`.
    """

    def __init__(
        self,
        case: Case,
        *changes: dict[str, Any],
        value_size: int | None = None,
        values: tuple[tuple[int, int, int, float], ...] = (),
        v_scale: float | tuple[float, ...] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(case, *changes, seed=seed)
        of_values = replace(case, head_size=value_size or case.head_size, keys=values, k_scale=v_scale)
        self.values = [make_inputs(of_values, DEVICE, 1000 + 10 * seed + i) for i in range(len(changes))]
        for inputs, of_layer in zip(self.inputs, self.values, strict=True):
            move_to_table_of(self.inputs[0], of_layer)
            inputs.params = replace(inputs.params, v_scale=of_layer.params.k_scale)
        generator = torch.Generator().manual_seed(seed)
        rows, layers = len(self.rows), len(changes)
        shape = (rows, layers, 2, case.kv_heads, case.head_size)
        dtype = BF16 if case.dtype in FP8_TYPES else case.dtype
        self.kept_kv = torch.randn(shape, generator=generator).to(dtype).to(DEVICE) if value_size is None else None
        size = of_values.head_size
        self.outputs = torch.empty(rows, layers, case.heads, size)
        noise = torch.randn(self.outputs.shape, generator=generator)
        for row in range(rows):
            for layer in range(layers):
                q, k, p = self.operands(row, layer)
                v = self.dense_values(row, layer)
                attention = row_probe_ref(q, k, self.positions[row], **self.options(p))
                v = v[: self.positions[row] + 1].repeat_interleave(case.heads // case.kv_heads, 1)
                of_row = torch.einsum("hn,nhd->hd", attention, v)
                size = float(v.nan_to_num(0, 0, 0).abs().mean())
                self.outputs[row, layer] = of_row + ERROR * size * noise[row, layer]
        self.outputs = self.outputs.to(dtype).to(DEVICE)

    def dense_values(self, row: int, layer: int) -> Tensor:
        """float64 [n, Hkv, Dv], with its scale in it."""
        inputs = self.values[layer]
        v, scale = inputs.keys[self.batch[row]].double(), inputs.params.k_scale
        return v if scale is None else v * scale.cpu().double().view(1, -1, 1)

    @staticmethod
    def options(p: LayerParams) -> dict[str, Any]:
        return {
            "scale": p.scale,
            "sliding_window": p.sliding_window,
            "chunk_size": p.chunk_size,
            "soft_cap": p.soft_cap,
            "alibi_slopes": None if p.alibi_slopes is None else p.alibi_slopes.cpu(),
            "sinks": None if p.sinks is None else p.sinks.cpu(),
        }

    @property
    def cached(self) -> CachedLayers:
        keys, values = ([one.k_cache for one in half] for half in (self.inputs, self.values))
        return CachedLayers.of(keys, values, [one.params for one in self.inputs], self.case.heads)

    def measure(self) -> tuple[Tensor, Tensor | None]:
        table = self.inputs[0].block_table
        return row_output(self.queries, self.outputs, self.cached, table, self.rows, self.kept_kv)

    def check(self) -> Tensor:
        """Everything against the reference; returns the sums, on the CPU."""
        sums, kv_sums = self.measure()
        assert [sums.dtype, sums.shape] == [F32, (*self.outputs.shape[:3], len(OUTPUT_SUMS))]
        kv_dtype = self.inputs[0].k_cache.dtype
        rounding = OutputRounding.of(
            self.case.dtype, self.outputs.dtype, fp8_cache=kv_dtype in FP8_TYPES, on_gpu=ON_GPU
        )
        expected = torch.empty(sums.shape, dtype=torch.float64)
        for row, position in enumerate(self.positions):
            for layer in range(len(self.inputs)):
                q, k, p = self.operands(row, layer)
                v, served = self.dense_values(row, layer), self.outputs[row, layer].cpu()
                expected[row, layer] = row_output_ref(q, k, v, served, position, rounding=rounding, **self.options(p))
                if kv_sums is not None:
                    self._check_kv(kv_sums[row, layer].cpu(), row, layer)
        assert_output_sums(sums.cpu(), expected)
        return sums.cpu()

    def _check_kv(self, actual: Tensor, row: int, layer: int) -> None:
        assert self.kept_kv is not None
        for head in range(self.case.kv_heads):
            expected = []
            for which, inputs in enumerate((self.inputs[layer], self.values[layer])):
                stored = inputs.keys[self.batch[row]][self.positions[row], head]
                scales = inputs.params.k_scale
                scale = 1.0 if scales is None else float(scales[head % scales.numel()])
                largest = torch.finfo(stored.dtype).max if stored.dtype in FP8_TYPES else None
                computed = self.kept_kv[row, layer, which, head].cpu()
                expected.append(kept_kv_ref(stored.float(), scale, computed, largest))
            torch.testing.assert_close(actual[head].double(), torch.cat(expected), rtol=1e-5, atol=1e-6, equal_nan=True)
            assert len(actual[head]) == len(KV_SUMS)


LONG = replace(BASE, name="long", sequences=(Sequence(1, 500, 20), Sequence(1, 5, 5)), page=24)
CASES: tuple[tuple[Case, tuple[dict[str, Any], ...], dict[str, Any]], ...] = (
    (MIXED, ({}, {}), {}),
    (replace(BASE, name="one-key", sequences=(Sequence(1, 1, 1), Sequence(1, 1, 0))), ({}, {}), {}),
    (replace(BASE, name="fp16-hnd", dtype=F16, layout="hnd"), ({}, {}), {}),
    (replace(BASE, name="fp32", dtype=F32), ({}, {}), {"value_size": 80}),
    (replace(MIXED, name="windows"), ({"sliding_window": 33}, {}, {"sliding_window": 1}), {}),
    (replace(MIXED, name="chunks"), ({"chunk_size": 33}, {}, {"chunk_size": 5}), {}),
    (LONG, ({}, {"sliding_window": 100}), {}),
    (replace(BASE, name="soft-caps", q_magnitude=4.0), ({"soft_cap": 5.0}, {}, {"soft_cap": 30.0}), {}),
    (replace(BASE, name="alibi", alibi=True), ({}, {"soft_cap": 5.0}), {}),
    (replace(BASE, name="sinks", sinks=True), ({}, {"sliding_window": 16}), {}),
    (
        replace(BASE, name="all", sinks=True, alibi=True, dtype=F16),
        ({"soft_cap": 8.0, "sliding_window": 40}, {"sliding_window": 7}),
        {},
    ),
    (replace(BASE, name="mha-d80", heads=3, kv_heads=3, head_size=80), ({}, {}), {"value_size": 48}),
    (replace(BASE, name="gqa7-d96", heads=14, head_size=96), ({},), {}),
    (replace(BASE, name="mqa20-d128", heads=20, kv_heads=1, head_size=128, page=64), ({}, {}), {}),
    (replace(BASE, name="d256-page24", head_size=256, page=24), ({},), {}),
    (replace(BASE, name="latent", heads=20, kv_heads=1, head_size=576), ({}, {}), {"value_size": 512}),
    (
        replace(BASE, name="latent-fp8", heads=4, kv_heads=1, head_size=576, kv_dtype=E4M3, k_scale=0.7),
        ({},),
        {"value_size": 512, "v_scale": 0.7},
    ),
    (replace(BASE, name="fp8-e4m3", kv_dtype=E4M3), ({"k_scale": 0.7}, {"k_scale": (2.0, 0.5)}), {"v_scale": 0.3}),
    (replace(BASE, name="fp8-e5m2", kv_dtype=E5M2, dtype=F16), ({"k_scale": (0.5, 1.5)},), {"v_scale": (3.0, 0.1)}),
    (
        replace(BASE, name="fp8-q", kv_dtype=E4M3, dtype=E4M3, page=24),
        ({"q_scale": 0.5, "k_scale": 2.0}, {"q_scale": 1.5}),
        {"v_scale": 2.0},
    ),
    # The largest score comes late: everything that was summed before counts nothing.
    (replace(BASE, name="late", sequences=(Sequence(1, 300, 20),)), ({"keys": ((0, 280, 0, 900.0),)},), {}),
    (replace(BASE, name="zero-q", q_magnitude=0.0), ({},), {}),
)


class TestAgainstReference:
    @pytest.mark.parametrize(("case", "changes", "options"), CASES, ids=[case.name for case, _, _ in CASES])
    def test_every_sum(self, case: Case, changes: tuple[dict[str, Any], ...], options: dict[str, Any]) -> None:
        """Rows of several sequences, also in the middle of them, in layers that differ; block tables out of order."""
        Outputs(case, *changes, **options).check()

    @settings(max_examples=12)
    @given(st.data())
    def test_any_group(self, data: st.DataObject) -> None:
        """Random lengths, rows, shapes and features."""
        lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=2))
        sequences = tuple(Sequence(data.draw(st.integers(1, min(n, 2))), n, n) for n in lengths)
        kv_heads = data.draw(st.integers(1, 2))
        case = Case(
            "random",
            sequences,
            heads=kv_heads * data.draw(st.integers(1, 17)),
            kv_heads=kv_heads,
            head_size=data.draw(st.sampled_from([64, 80, 96, 128])),
            page=data.draw(st.sampled_from([8, 16, 20, 48, 64, 128])),
            dtype=data.draw(st.sampled_from([BF16, F16, F32])),
            alibi=data.draw(st.booleans()),
            sinks=data.draw(st.booleans()),
        )
        layer = st.fixed_dictionaries(
            {
                "sliding_window": st.sampled_from([None, 1, 9, 70]),
                "soft_cap": st.sampled_from([0.0, 4.0]),
                "k_scale": st.sampled_from([None, 0.5]),
            }
        )
        changes = data.draw(st.lists(layer, min_size=1, max_size=2))
        value_size = data.draw(st.sampled_from([None, 32, 80]))
        Outputs(case, *changes, value_size=value_size, seed=data.draw(st.integers(0, 99))).check()

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
    @pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
    def test_long_and_many_rows(self, case: Case) -> None:
        """The same over the whole GPU, with 40,000 keys, too."""
        first = make_inputs(case, "cpu").rows
        listed = case.rows or tuple((int(b), 0) for b in first[:, ROW_BATCH].tolist() if b >= 0)
        Outputs(replace(case, rows=listed[:: max(len(listed) // 6, 1)]), {}, {"sliding_window": 300}).check()


class TestCache:
    def test_elements_at_the_end_of_their_type(self) -> None:
        """The row's own K and V of an FP8 cache are counted where they are its largest number."""
        end, under = 448.0, 416.0
        case = replace(BASE, kv_dtype=E4M3, keys=((0, 36, 1, -end), (2, 129, 0, under), (2, 5, 0, end)))
        group = Outputs(case, {}, values=((2, 129, 1, end),))
        group.check()
        _, kv_sums = group.measure()
        assert kv_sums is not None
        assert kv_sums[..., KV_SUM["key_saturated"]].tolist() == [[[0, 1]], [[0, 0]], [[0, 0]]]
        assert kv_sums[..., KV_SUM["value_saturated"]].tolist() == [[[0, 0]], [[0, 0]], [[0, 1]]]

    def test_nothing_was_kept(self) -> None:
        """Then there are no sums of K and V, and those of the outputs are the same."""
        group = Outputs(BASE, {})
        expected, _ = group.measure()
        group.kept_kv = None
        sums, kv_sums = group.measure()
        assert kv_sums is None
        assert torch.equal(sums, expected)


class TestNotFinite:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("soft_cap", [0.0, 5.0])
    def test_a_key(self, value: float, soft_cap: float) -> None:
        """Heads that see it are as the reference says: a score of -inf has no weight, others make the output NaN."""
        case = replace(MIXED, soft_cap=soft_cap, keys=((0, 67, 0, value), (3, 65, 1, value)))
        group = Outputs(case, {})
        # row_probe_ref takes a score of minus infinity for an error, which a kernel doesn't.
        group.outputs.nan_to_num_(0.0)
        group.check()

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_value(self, value: float) -> None:
        """A value that rows see makes their output so in one element; rows before it don't see it."""
        sums = Outputs(MIXED, {}, values=((0, 67, 0, value),)).check()
        first = sums[:5, 0, :, NONFINITE].tolist()  # of positions 65 to 69
        assert first == [[0] * 4] * 2 + [[NONFINITE_BOTH] * 2 + [0] * 2] * 3

    def test_only_one_of_the_two(self) -> None:
        """Is said; all other sums are 0 then."""
        group = Outputs(BASE, {})
        group.outputs[0, 0, 1, 5] = NAN
        group.outputs[2, 0, 3, 0] = INF
        sums = group.check()
        assert sums[..., NONFINITE].nonzero().tolist() == [[0, 0, 1], [2, 0, 3]]
        assert sums[0, 0, 1].tolist() == [0.0] * (len(OUTPUT_SUMS) - 1) + [NONFINITE_OUTPUT]
        group = Outputs(BASE, {}, values=((0, 3, 0, NAN),))
        group.outputs[0].nan_to_num_(0.0)
        assert group.check()[0, 0, :, NONFINITE].tolist() == [NONFINITE_REFERENCE] * 2 + [0] * 2

    def test_an_output_beyond_its_type(self) -> None:
        """Float16 has no number for it: output and reference are alike."""
        group = Outputs(
            replace(BASE, dtype=F16, kv_dtype=F16, sequences=(Sequence(1, 1, 1),)),
            {},
            values=((0, 0, 0, 6e4),),
            v_scale=2.0,
        )
        assert group.outputs[0, 0, 0, 0] == INF
        assert group.check()[0, 0, :, NONFINITE].tolist() == [NONFINITE_BOTH] * 2 + [0] * 2

    def test_a_key_that_nobody_sees(self) -> None:
        """Behind the row or before its window it spoils nothing."""
        case = replace(MIXED, keys=((0, 69, 0, NAN), (1, 3, 1, NAN)), sliding_window=30, rows=((0, 0), (1, 0)))
        group = Outputs(case, {}, values=((0, 69, 0, INF), (1, 3, 1, NAN)))
        group.outputs.nan_to_num_(0.0)  # made with 0 times what is not seen
        assert not group.check()[..., NONFINITE].any()


class TestRows:
    def test_no_rows(self) -> None:
        """Zero rows have zero sums."""
        group = Outputs(BASE, {})
        group.queries, group.outputs, group.rows = group.queries[:0], group.outputs[:0], group.rows[:0]
        assert group.kept_kv is not None
        group.kept_kv = group.kept_kv[:0]
        sums, kv_sums = group.measure()
        assert sums.shape == (0, 1, 4, len(OUTPUT_SUMS))
        assert kv_sums is not None
        assert kv_sums.shape == (0, 1, 2, len(KV_SUMS))

    def test_rows_in_any_order_and_twice(self) -> None:
        """What a row's sums are does not depend on where it stands."""
        group = Outputs(MIXED, {}, {})
        expected, expected_kv = group.measure()
        order = [5, 0, 0, 3]
        assert group.kept_kv is not None
        group.queries, group.outputs = group.queries[order], group.outputs[order]
        group.rows, group.kept_kv = group.rows[order], group.kept_kv[order]
        sums, kv_sums = group.measure()
        assert expected_kv is not None
        assert kv_sums is not None
        assert torch.equal(sums, expected[order])
        assert torch.equal(kv_sums, expected_kv[order])

    def test_nothing_waits_for_the_device(self) -> None:
        """No number is read on the host."""
        group = Outputs(replace(MIXED, alibi=True, sinks=True, soft_cap=5.0), {})
        layers = group.cached
        with Operations() as seen:
            row_output(group.queries, group.outputs, layers, group.inputs[0].block_table, group.rows, group.kept_kv)
        assert seen.waiting == []

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="there is nothing to wait for")
    def test_the_driver_is_not_asked_to_wait(self) -> None:
        """torch's own watch over synchronising calls finds none."""
        group = Outputs(replace(MIXED, sinks=True), {}, {})
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                group.measure()
            finally:
                torch.cuda.set_sync_debug_mode("default")


class TestErrors:
    def test_values_of_other_layers(self) -> None:
        """Says what they must be and what they are."""
        inputs = make_inputs(BASE, DEVICE)
        cache, other = inputs.k_cache, make_inputs(replace(BASE, page=32), DEVICE).k_cache
        with pytest.raises(ValueError, match=r"values must be one per layer .*, \[2, 16\], got 0 for 1 layers"):
            CachedLayers.of([cache], [], [inputs.params], 4)
        with pytest.raises(ValueError, match=r"values must be one per layer .*, \[2, 16\], got 1 .*\[\[2, 32\]\]"):
            CachedLayers.of([cache], [other], [inputs.params], 4)
        with pytest.raises(ValueError, match=r"caches must have .* of the first, .* at 1; probe such layers by them"):
            CachedLayers.of([cache] * 2, [cache, cache.float()], [inputs.params] * 2, 4)

    @pytest.mark.parametrize("name", ["queries", "outputs", "kept_kv"])
    def test_arguments_of_other_rows(self, name: str) -> None:
        """Names the argument, what it must be and what it is."""
        group = Outputs(BASE, {}, {})
        setattr(group, name, getattr(group, name)[:2])
        with pytest.raises(ValueError, match=rf"{name} must be \[3, .*\] .* 3 rows, got \[2, .*\]"):
            group.measure()

    def test_outputs_not_contiguous_in_the_head(self) -> None:
        """A stride in the last dimension is refused."""
        group = Outputs(BASE, {})
        group.outputs = group.outputs.repeat_interleave(2, 3)[..., ::2]
        with pytest.raises(ValueError, match="must be contiguous in their last dimension"):
            group.measure()

    def test_keys_and_values_of_other_sizes(self) -> None:
        """What was kept of both can't be of one size then."""
        group = Outputs(BASE, {}, value_size=80)
        group.kept_kv = torch.zeros(3, 1, 2, 2, 64, device=DEVICE)
        with pytest.raises(
            ValueError, match="kept_kv must be of layers with V of K's head size, 64, got 80, of at most 256; pass None"
        ):
            group.measure()
