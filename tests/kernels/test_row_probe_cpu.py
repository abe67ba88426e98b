"""Full rows, top positions and span masses on the CPU equal the float64 reference, whatever the batch looks like."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glassbox.kernels.reference.row_probe import row_probe_ref, span_mass_ref, top_k_ref
from glassbox.kernels.row_probe_cpu import NO_POSITION, RowAnswer, RowQuestion, row_probe_cpu
from tests.kernels.test_row_stats_cpu import Batch, PlainReader

ROUNDING = 2.0**-23
ALL = RowQuestion(top_k=5, spans=((0, 3), (2, 9), (40, 60)), row=True)


def probe(batch: Batch, questions: list[RowQuestion] | None = None, **options: int) -> list[RowAnswer]:
    pages, table = batch.cache()
    plan = batch.plan(table, **options)
    questions = questions or [ALL] * len(batch.rows)
    return row_probe_cpu(batch.q, PlainReader(pages, batch.transposed), plan, batch.params, questions)


def attention(batch: Batch, row: int) -> torch.Tensor:
    """float64 [H, position + 1]."""
    query = int(batch.row_list[row, 0])
    return row_probe_ref(
        batch.q[query], batch.keys[batch.rows[row][0]], batch.positions[row], scale=batch.scale,
        sliding_window=batch.window, soft_cap=batch.soft_cap, alibi_slopes=batch.slopes, sinks=batch.learned,
    )  # fmt: skip


def assert_answers(batch: Batch, questions: list[RowQuestion], answers: list[RowAnswer]) -> None:
    """Everything that was asked, against the reference."""
    assert len(answers) == len(questions)
    # A score's error is an error of its exponential; masses are at most 1.
    tolerance = 8 * ROUNDING * max(2.0, batch.magnitude())
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        expected = attention(batch, row)
        n = batch.positions[row] + 1
        assert 0 <= answer.first < n
        assert not expected[:, : answer.first].any()
        if question.row:
            assert answer.row is not None
            np.testing.assert_allclose(answer.row, expected[:, answer.first :], rtol=0, atol=tolerance)
        else:
            assert answer.row is None
        heads = list(question.heads) if question.heads is not None else list(range(batch.num_heads))
        np.testing.assert_allclose(
            answer.head_sum, expected[heads, answer.first :].sum(0), rtol=0, atol=tolerance * len(heads)
        )
        visible = n if batch.window is None else min(n, batch.window)
        for head in range(batch.num_heads):
            count = min(question.top_k, visible)
            positions, mass = answer.topk_positions[head], answer.topk_mass[head]
            assert positions.shape == mass.shape == (question.top_k,)
            # Which of two nearly equal keys comes first is rounding; their masses are what they are.
            np.testing.assert_allclose(mass[:count], top_k_ref(expected[head], count)[1], rtol=0, atol=tolerance)
            np.testing.assert_allclose(mass[:count], expected[head][positions[:count]], rtol=0, atol=tolerance)
            assert len(set(positions[:count].tolist())) == count
            assert (positions[count:] == NO_POSITION).all()
            assert (mass[count:] == 0).all()
            for s, (start, end) in enumerate(question.spans):
                wanted = span_mass_ref(expected[head], start, end)
                assert answer.span_mass[head, s] == pytest.approx(wanted, abs=10 * tolerance)


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
            {"window": 9, "sinks": True, "soft_cap": 5.0},
            {"alibi": True},
            {"sinks": True},
            {"soft_cap": 3.0, "gain": 4.0},
            {"num_heads": 5, "num_kv_heads": 1, "head_size": 80, "block_size": 32},
            {"gain": 40.0},
        ],
    )
    def test_mixed_batch(self, change: dict) -> None:
        """Prefill, decode, a row with one key, rows of one request, in every kind of layer."""
        batch = replace(MIXED, **change)
        assert_answers(batch, [ALL] * len(batch.rows), probe(batch))

    def test_long_rows_in_several_tiles(self) -> None:
        """A row whose keys come in many reads is one row."""
        batch = replace(MIXED, lengths=[(700, 3, 650), (5, 1, 4)], rows=[(0, 0), (0, 2), (1, 0)])
        assert_answers(batch, [ALL] * 3, probe(batch, key_budget=2 * 16 * 2 * 64))

    def test_each_row_gets_what_it_asked(self) -> None:
        """Rows of one step ask for different things."""
        questions = [
            RowQuestion(top_k=32),
            RowQuestion(spans=((0, 1),)),
            RowQuestion(row=True),
            RowQuestion(top_k=1, heads=(1, 4)),
            RowQuestion(),
            RowQuestion(top_k=3, spans=((10, 12), (0, 500)), heads=(), row=True),
            RowQuestion(top_k=8),
            RowQuestion(top_k=20),
        ]
        assert_answers(MIXED, questions, probe(MIXED, questions))

    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
        st.sampled_from([None, 1, 7]),
        st.integers(0, 1000),
        st.data(),
    )
    def test_any_batch(self, lengths: list, window: int | None, seed: int, data: st.DataObject) -> None:
        """Random lengths, rows and questions."""
        batch = replace(
            MIXED, lengths=[(max(n, q), q, p) for n, q, p in lengths], rows=[(0, 0)], window=window, seed=seed
        )
        everything = [(b, i) for b, (_, q, _) in enumerate(batch.lengths) for i in range(q)]
        batch = replace(batch, rows=sorted(data.draw(st.sets(st.sampled_from(everything), min_size=1, max_size=8))))
        spans = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70)).map(lambda s: (s[0], s[0] + s[1])))
        question = st.builds(RowQuestion, st.integers(0, 8), spans.map(tuple), st.none(), st.booleans())
        questions = [data.draw(question) for _ in batch.rows]
        assert_answers(batch, questions, probe(batch, questions))


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    def test_a_bad_score(self, value: float, soft_cap: float | None) -> None:
        """The head has no positions and no mass, and NaN where a number would be wrong; other rows have theirs."""
        batch = replace(MIXED, soft_cap=soft_cap)
        batch.keys[2][100, 0, 0] = value
        answers = probe(batch)
        bad = answers[4]
        assert bad.row is not None
        for heads, broken in ((slice(0, 3), True), (slice(3, 6), False)):
            assert broken == bool(np.isnan(bad.row[heads]).all())
            assert broken == bool(np.isnan(bad.span_mass[heads]).all())
            assert broken == bool((bad.topk_positions[heads] == NO_POSITION).all())
        good = [i for i in range(len(batch.rows)) if i != 4]
        clean = probe(replace(MIXED, soft_cap=soft_cap))
        for i in good:
            np.testing.assert_array_equal(clean[i].row, answers[i].row)


class TestErrors:
    def test_a_plan_of_other_rows(self) -> None:
        """Says what the plan must be."""
        with pytest.raises(ValueError, match=r"must be for 1 rows, got 8; plan the probed rows"):
            probe(MIXED, [ALL])
