"""Whole attention, top positions and span masses on the CPU equal the float64 reference, whatever the batch is like."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassbox.core.rows import ROW_QUERY
from glassbox.core.trace_arrays import NO_POSITION
from glassbox.kernels.probe_answers import ProbeAnswers, Questions
from glassbox.kernels.reference.row_probe import row_probe_ref, span_mass_ref, top_k_ref
from glassbox.kernels.row_probe_cpu import row_probe_cpu
from glassbox.kernels.row_stats_cpu import LayerRows
from glassbox.kernels.row_stats_native import NativeProbe, NativeStep
from tests.kernels.test_row_stats_cpu import Batch, PlainReader, implementation

__all__ = ["implementation"]  # a fixture of this module, too

ROUNDING = 2.0**-23
HALF_ROUNDING = 2.0**-10
SPANS = ((0, 3), (2, 9), (40, 60), (0, 0))
MAX_ATTENTION_KEYS = 64


class Layers:
    """Layers over the same sequences: one per batch, which differ in queries, keys and parameters."""

    def __init__(self, *batches: Batch, seed: int = 0) -> None:
        self.batches = batches
        first = batches[0]
        self.num_rows, self.num_heads = len(first.rows), first.num_heads
        self.spans = [[(start + r, end + r) for start, end in SPANS] for r in range(self.num_rows)]
        shape = (self.num_rows, len(batches), self.num_heads)
        self.chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6

    def probe(self, key_budget: int | None = None, **options: Any) -> ProbeAnswers[torch.Tensor]:
        first = self.batches[0]
        _, table = first.cache()
        plan = first.plan(table, **({} if key_budget is None else {"key_budget": key_budget}))
        defaults: dict[str, Any] = {
            "top_k": 5,
            "spans": torch.tensor(self.spans, dtype=torch.int32),
            "kept_attention": range(self.num_rows),
            "max_attention_keys": MAX_ATTENTION_KEYS,
            "received": range(self.num_rows),
        }
        asked = Questions(positions=first.positions, chosen=self.chosen, **(defaults | options))
        if Batch.native:
            return self._native(table, asked.moved(torch.Tensor.numpy))
        layers = []
        for batch in self.batches:
            pages, same = batch.cache(order_seed=first.seed)
            assert (same == table).all()
            layers.append(LayerRows.select(batch.q, PlainReader(pages, batch.transposed), plan, batch.params))
        return row_probe_cpu(layers, plan, asked)

    def _native(self, table: np.ndarray, asked: Questions[np.ndarray]) -> ProbeAnswers[torch.Tensor]:
        first = self.batches[0]
        probe = NativeProbe(asked)
        rows = first.native_rows(table, np.arange(self.num_rows))
        step = NativeStep(rows, len(self.batches), self.num_heads, first.head_size, probe)
        alive = []
        for n, batch in enumerate(self.batches):
            layer, lying = batch.native_layer(batch.cache(order_seed=first.seed)[0], transposed=batch.transposed)
            alive.append(lying)
            step.take(n, layer, batch.q, n)
        step.measure()
        return probe.answers(range(len(self.batches))).moved(torch.from_numpy)

    def expected(self, row: int, layer: int) -> torch.Tensor:
        """float64 [H, position + 1]."""
        batch = self.batches[layer]
        query = int(batch.row_list[row, ROW_QUERY])
        return row_probe_ref(
            batch.q[query], batch.keys[batch.rows[row][0]], batch.positions[row], scale=batch.scale,
            sliding_window=batch.window, chunk_size=batch.chunk, soft_cap=batch.soft_cap,
            alibi_slopes=batch.slopes, sinks=batch.learned,
        )  # fmt: skip

    def check(self, **options: Any) -> ProbeAnswers[torch.Tensor]:
        """Everything that was asked, against the reference; every row is a kept row."""
        answers = self.probe(**options)
        positions = self.batches[0].positions
        max_attention_keys = options.get("max_attention_keys", MAX_ATTENTION_KEYS)
        assert answers.chosen_sum.shape == (self.num_rows, max(positions) + 1)
        for r, position in enumerate(positions):
            total, total_tolerance = np.zeros(answers.chosen_sum.shape[1]), 0.0
            for n, batch in enumerate(self.batches):
                expected = self.expected(r, n).numpy()
                # A score's error is an error of its exponential; masses are at most 1.
                tolerance = 8 * ROUNDING * max(2.0, batch.magnitude())
                visible = min(position % (batch.chunk or position + 1) + 1, batch.window or position + 1)
                self._check_top(answers, r, n, expected, visible, tolerance)
                for s, (start, end) in enumerate(self.spans[r]):
                    wanted = [span_mass_ref(of_head, start, end) for of_head in expected]
                    np.testing.assert_allclose(answers.span_mass[r, n, :, s], wanted, rtol=0, atol=10 * tolerance)
                last = expected[:, -max_attention_keys:]
                np.testing.assert_allclose(answers.attention[r][n], last, rtol=HALF_ROUNDING, atol=tolerance + 2.0**-24)
                np.testing.assert_allclose(answers.received[r][n], expected, rtol=0, atol=tolerance)
                chosen = self.chosen[r, n].numpy()
                total[: position + 1] += expected[chosen].sum(0)
                total_tolerance += tolerance * chosen.sum()
            np.testing.assert_allclose(answers.chosen_sum[r], total, rtol=0, atol=total_tolerance)
        return answers

    def _check_top(
        self, answers: ProbeAnswers, r: int, n: int, expected: np.ndarray, visible: int, tolerance: float
    ) -> None:
        top_k = answers.topk_mass.shape[-1]
        for head in range(self.num_heads):
            count = min(top_k, visible)
            positions = answers.topk_positions[r, n, head].numpy()
            mass = answers.topk_mass[r, n, head].numpy()
            # Which of two nearly equal keys comes first is rounding; their masses are what they are.
            best = top_k_ref(torch.from_numpy(expected[head]), count)[1]
            np.testing.assert_allclose(mass[:count], best, rtol=0, atol=tolerance)
            np.testing.assert_allclose(mass[:count], expected[head][positions[:count]], rtol=0, atol=tolerance)
            assert len(set(positions[:count].tolist())) == count
            assert (positions[count:] == NO_POSITION).all()
            assert (mass[count:] == 0).all()


MIXED = Batch(
    [(1, 1, 1), (37, 37, 37), (200, 1, 20), (48, 16, 40), (16, 1, 5)],
    [(0, 0), (1, 0), (1, 17), (1, 36), (2, 0), (3, 0), (3, 15), (4, 0)],
    num_heads=6,
    num_kv_heads=2,
)


class TestAgainstReference:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"transposed": True},
            {"dtype": torch.bfloat16},
            {"window": 9},
            {"chunk": 7},
            {"window": 9, "sinks": True, "soft_cap": 5.0},
            {"alibi": True},
            {"sinks": True},
            {"soft_cap": 3.0, "gain": 4.0},
            {"num_heads": 5, "num_kv_heads": 1, "head_size": 80, "block_size": 32},
            {"gain": 40.0},
        ],
    )
    @pytest.mark.parametrize("num_layers", [1, 3])
    def test_mixed_batch(self, change: dict, num_layers: int) -> None:
        """Prefill, decode, a row with one key, rows of one request, in every kind of layer."""
        first = replace(MIXED, **change)
        others = [replace(first, seed=n, scale=first.scale / (1 + n)) for n in range(1, num_layers)]
        Layers(first, *others).check()

    @pytest.mark.parametrize("window", [None, 300])
    def test_long_rows_in_several_tiles(self, window: int | None) -> None:
        """A row whose keys come in many reads is one row."""
        batch = replace(MIXED, lengths=[(700, 3, 650), (5, 1, 4)], rows=[(0, 0), (0, 2), (1, 0)], window=window)
        Layers(batch, replace(batch, seed=1)).check(key_budget=2 * 16 * 2 * 64)

    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
        st.sampled_from([None, 1, 7]),
        st.integers(1, 3),
        st.integers(0, 1000),
        st.integers(0, 8),
        st.data(),
    )
    def test_any_batch(
        self, lengths: list, window: int | None, num_layers: int, seed: int, top_k: int, data: st.DataObject
    ) -> None:
        """Random lengths and rows, in any order."""
        batch = replace(
            MIXED, lengths=[(max(n, q), q, p) for n, q, p in lengths], rows=[(0, 0)], window=window, seed=seed
        )
        everything = [(b, i) for b, (_, q, _) in enumerate(batch.lengths) for i in range(q)]
        rows = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=8, unique=True))
        batch = replace(batch, rows=rows)
        Layers(*[replace(batch, seed=seed + n) for n in range(num_layers)], seed=seed).check(top_k=top_k)


class TestQuestions:
    def test_nothing_asked(self) -> None:
        """No top positions, no rows."""
        answers = Layers(MIXED).probe(top_k=0, kept_attention=())
        assert answers.topk_mass.shape == (8, 1, 6, 0)
        assert answers.attention == ()

    def test_no_spans(self) -> None:
        """Nor spans."""
        answers = Layers(MIXED).probe(spans=torch.zeros(8, 0, 2, dtype=torch.int32))
        assert answers.span_mass.shape == (8, 1, 6, 0)

    @pytest.mark.parametrize("max_attention_keys", [1, 37, 1000])
    def test_some_rows_are_kept(self, max_attention_keys: int) -> None:
        """In the order asked, the last keys up to the own position, as in a probe that keeps all."""
        layers = Layers(replace(MIXED, window=30), replace(MIXED, window=30, seed=1))
        kept = layers.probe(kept_attention=(4, 3), max_attention_keys=max_attention_keys).attention
        whole = layers.probe(max_attention_keys=1000).attention
        assert [row.shape[2] for row in whole] == [position + 1 for position in MIXED.positions]
        for row, of_whole in zip(kept, (whole[4], whole[3]), strict=True):
            assert torch.equal(row, of_whole[..., -max_attention_keys:])


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    def test_a_bad_score(self, value: float, soft_cap: float | None) -> None:
        """The heads have no positions and no mass, and NaN where a number would be wrong; all else is as without."""
        clean = Layers(replace(MIXED, soft_cap=soft_cap), replace(MIXED, soft_cap=soft_cap, seed=1))
        spoiled = replace(MIXED, soft_cap=soft_cap)
        spoiled.keys[2][100, 0, 0] = value
        layers = Layers(spoiled, clean.batches[1])
        layers.chosen[4, 0] = clean.chosen[4, 0] = torch.tensor([False, False, False, True, True, True])
        expected, answers = clean.probe(), layers.probe()
        heads = slice(0, 3)
        assert (answers.topk_positions[4, 0, heads] == NO_POSITION).all()
        assert (answers.topk_mass[4, 0, heads] == 0).all()
        assert answers.span_mass[4, 0, heads].isnan().all()
        assert answers.attention[4][0, heads].isnan().all()
        for name in ("topk_positions", "topk_mass", "span_mass"):
            got, wanted = getattr(answers, name), getattr(expected, name)
            got[4, 0, heads] = wanted[4, 0, heads] = 0
            assert torch.equal(got, wanted), name
        for row, wanted in zip(answers.attention, expected.attention, strict=True):
            if row is answers.attention[4]:
                row[0, heads] = wanted[0, heads] = 0
            assert torch.equal(row, wanted)
        # Bad heads that were not chosen don't spoil the sum.
        torch.testing.assert_close(answers.chosen_sum, expected.chosen_sum, rtol=0, atol=1e-6)
        layers.chosen[4, 0, 0] = True
        spoiled_sum = layers.probe().chosen_sum
        assert spoiled_sum[4].isnan().all()
        assert not spoiled_sum[[0, 1, 2, 3, 5, 6, 7]].isnan().any()


class TestErrors:
    def test_a_plan_of_other_rows(self) -> None:
        """Says what the plan must be."""
        pages, table = MIXED.cache()
        plan = MIXED.plan(table)
        layer = LayerRows.select(MIXED.q, PlainReader(pages), plan, MIXED.params)
        with pytest.raises(ValueError, match=r"must be for 1 rows, got 8; plan the probed rows"):
            row_probe_cpu([layer], plan, Questions([3], 1, torch.zeros(1, 0, 2), torch.ones(1, 1, 6), (), 1))
