"""A step's traced rows: who gets which part, and what is asked of whom."""

from typing import Any

import numpy as np

from glassbox.kernels.row_probe_cpu import RowAnswer
from glassbox.sampling import NUM_ROW_COLUMNS, ROW_SLOT
from glassbox.statistics import NUM_STATISTICS
from glassbox.trace_active import ActiveTrace
from glassbox.trace_record import Span, TraceOptions
from glassbox.trace_step import LayersAnswer, TracedRows, TracedStep
from tests.trace_samples import make_host

HOST = make_host(layers=(0, 4, 8), num_heads=3)


def trace(options: TraceOptions, layer_rows: tuple[int, ...] = (0, 1, 2), heads: tuple[int, ...] = (0, 1, 2)) -> Any:
    return ActiveTrace(
        HOST, "a", why="opt_in", options=options, traceparent=None, prompt_len=4, layer_rows=layer_rows,
        head_columns=heads,
    )  # fmt: skip


def rows_of(one: ActiveTrace, first: int, *positions: int) -> TracedRows:
    phases = np.array([position >= 4 for position in positions], dtype=np.uint8)
    return TracedRows(one, first, np.array(positions, dtype=np.int32), phases)


def answer(layer: int, position: int, first: int = 0) -> RowAnswer:
    """Attention of three heads that differs from place to place; two top positions, one span."""
    n = position + 1 - first
    p = np.arange(1, 3 * n + 1, dtype=np.float32).reshape(3, n) + layer
    p /= p.sum(axis=-1, keepdims=True)
    best = np.argsort(-p, axis=-1)[:, :2]
    return RowAnswer(
        first=first,
        topk_positions=(best + first).astype(np.int32),
        topk_mass=np.take_along_axis(p, best, -1),
        span_mass=p[:, :1],
        head_sum=p.sum(0),
        row=p,
    )


class TestStatistics:
    def test_each_trace_gets_its_rows_layers_and_heads(self) -> None:
        """Rows stand anywhere in the row list; layers that were not measured are NaN."""
        whole, part = trace(TraceOptions()), trace(TraceOptions(), layer_rows=(0, 2), heads=(1,))
        row_list = np.zeros((6, NUM_ROW_COLUMNS), dtype=np.int32)
        step = TracedStep(
            [rows_of(whole, 0, 3, 4), rows_of(part, 2, 7)], row_list, np.array([1, 2, 5]), num_layers=3, num_heads=3
        )
        stats = np.arange(6 * 3 * (NUM_STATISTICS + 1), dtype=np.float32).reshape(6, 3, -1)
        step.add_stats(0, stats)
        step.add_stats(2, stats + 1000)
        assert step.questions(0, 3) == []
        step.commit()
        np.testing.assert_array_equal(stats[[1, 2]], whole.record().stats[:, 0])
        np.testing.assert_array_equal(stats[[1, 2]] + 1000, whole.record().stats[:, 2])
        assert np.isnan(whole.record().stats[:, 1]).all()
        np.testing.assert_array_equal(stats[5, 1], part.record().stats[0, 0, 0])
        assert part.record().stats.shape == (1, 2, 1, NUM_STATISTICS + 1)

    def test_a_layer_with_fewer_heads(self) -> None:
        """What it has not got is NaN."""
        one = trace(TraceOptions())
        step = TracedStep([rows_of(one, 0, 5)], np.zeros((1, 5), dtype=np.int32), np.array([0]), 3, 3)
        step.add_stats(1, np.ones((1, 2, NUM_STATISTICS + 1), dtype=np.float32))
        step.commit()
        assert np.isnan(one.record().stats[0, 1]).tolist() == [[False] * 10, [False] * 10, [True] * 10]


class TestProbes:
    def test_rows_to_probe(self) -> None:
        """Only of requests that asked for more than statistics, in their order."""
        plain, asking = trace(TraceOptions()), trace(TraceOptions(top_k=2), layer_rows=(1,))
        row_list = np.arange(20, dtype=np.int32).reshape(4, NUM_ROW_COLUMNS)
        step = TracedStep([rows_of(plain, 0, 5), rows_of(asking, 1, 6, 7)], row_list, np.array([0, 1, 3]), 3, 3)
        np.testing.assert_array_equal(row_list[[1, 3]], step.probed)
        assert step.questions(0, 3) == []
        assert [(q.top_k, q.heads) for q in step.questions(1, 3)] == [(2, (0, 1, 2))] * 2

    def test_a_layer_that_only_another_request_wants(self) -> None:
        """Nothing is asked of the row there, and nothing is kept."""
        first, second = trace(TraceOptions(top_k=2), (0,)), trace(TraceOptions(top_k=2), (0, 1))
        step = TracedStep(
            [rows_of(first, 0, 5), rows_of(second, 1, 6)], np.zeros((2, 5), dtype=np.int32), np.arange(2), 3, 3
        )
        assert [q.top_k for q in step.questions(1, 3)] == [0, 2]
        step.add_answers(0, [answer(0, 5), answer(0, 6)])
        step.add_answers(1, [answer(1, 5), answer(1, 6)])
        step.commit()
        np.testing.assert_array_equal(first.record().topk_mass[0, 0], answer(0, 5).topk_mass)
        np.testing.assert_array_equal(second.record().topk_mass[0, 1], answer(1, 6).topk_mass)

    def test_everything_of_chosen_places(self) -> None:
        """Top positions, masses, rows, and the mean over exactly the chosen layers and heads."""
        options = TraceOptions(top_k=2, spans=(Span("a", 0, 1),), rows=True)
        one = trace(options, layer_rows=(0, 2), heads=(0, 2))
        step = TracedStep([rows_of(one, 0, 5)], np.zeros((1, 5), dtype=np.int32), np.array([0]), 3, 3)
        answers = {layer: answer(layer, 5) for layer in (0, 2)}
        for layer, found in answers.items():
            chosen = found.row
            assert chosen is not None
            step.add_answers(layer, [RowAnswer(0, found.topk_positions, found.topk_mass, found.span_mass,
                                               chosen[[0, 2]].sum(0), chosen)])  # fmt: skip
        step.commit()
        record = one.record()
        rows = np.stack([answers[layer].row[[0, 2]] for layer in (0, 2)])  # type: ignore[index]
        np.testing.assert_allclose(record.row(0), rows, atol=1e-3)
        mean = rows.mean(axis=(0, 1))
        assert record.mean_topk_positions[0].tolist() == np.argsort(-mean)[:2].tolist()
        np.testing.assert_allclose(record.mean_topk_mass[0], -np.sort(-mean)[:2], rtol=1e-6)
        np.testing.assert_allclose(record.span_mass[0, ..., 0], rows[..., 0], rtol=1e-6)

    def test_a_window(self) -> None:
        """Positions before the first visible key have no attention in the row and in the mean."""
        one = trace(TraceOptions(top_k=2, rows=True), (0,))
        step = TracedStep([rows_of(one, 0, 9)], np.zeros((1, 5), dtype=np.int32), np.array([0]), 3, 3)
        found = answer(0, 9, first=6)
        step.add_answers(0, [found])
        step.commit()
        record = one.record()
        assert record.row(0).shape == (1, 3, 10)
        assert not record.row(0)[..., :6].any()
        np.testing.assert_allclose(record.row(0)[0, :, 6:], found.row, atol=1e-3)
        assert record.mean_topk_positions[0, 0] == 9

    def test_scores_that_are_not_finite(self) -> None:
        """There is no mean of them, and no position."""
        one = trace(TraceOptions(top_k=2), (0,))
        step = TracedStep([rows_of(one, 0, 5)], np.zeros((1, 5), dtype=np.int32), np.array([0]), 3, 3)
        bad = answer(0, 5)
        step.add_answers(
            0, [RowAnswer(0, bad.topk_positions, bad.topk_mass, bad.span_mass, bad.head_sum * np.nan, bad.row)]
        )
        step.commit()
        assert one.record().mean_topk_positions.tolist() == [[-1, -1]]
        assert one.record().mean_topk_mass.tolist() == [[0, 0]]


class TestAllLayersAtOnce:
    """What a GPU gives: statistics by slot, and answers for groups of layers."""

    def test_statistics_by_slot(self) -> None:
        """Rows for which a trace had no memory have a slot, too."""
        one = trace(TraceOptions())
        row_list = np.zeros((5, NUM_ROW_COLUMNS), dtype=np.int32)
        row_list[:, ROW_SLOT] = [-1, 0, -1, 1, 2]
        step = TracedStep([rows_of(one, 0, 3, 4)], row_list, np.array([1, 4]), num_layers=3, num_heads=3)
        assert step.num_slots == 3
        ring = np.arange(3 * 3 * 3 * (NUM_STATISTICS + 1), dtype=np.float32).reshape(3, 3, 3, -1)
        step.set_stats(ring)
        step.commit()
        np.testing.assert_array_equal(one.record().stats, ring[[0, 2]])

    def test_answers_are_those_of_one_layer_after_the_other(self) -> None:
        """Two requests that ask for unlike things, in two groups of layers, one of them with fewer heads."""
        positions = {"first": (5, 6), "second": (8,)}
        records = {}
        for at_once in (False, True):
            first = trace(TraceOptions(top_k=2, rows=True), layer_rows=(0, 2), heads=(0, 2))
            second = trace(TraceOptions(top_k=1, spans=(Span("a", 0, 1),)), layer_rows=(1, 2))
            step = TracedStep(
                [rows_of(first, 0, *positions["first"]), rows_of(second, 2, *positions["second"])],
                np.zeros((3, NUM_ROW_COLUMNS), dtype=np.int32), np.arange(3), 3, 3,
            )  # fmt: skip
            all_positions = [*positions["first"], *positions["second"]]
            heads = {0: 3, 1: 3, 2: 2}
            found = {
                layer: [_first_heads(answer(layer, position), heads[layer]) for position in all_positions]
                for layer in range(3)
            }
            if at_once:
                asked = step.asked()
                assert asked is not None
                assert (asked.top_k, asked.kept, asked.positions.tolist()) == (2, (0, 1), all_positions)
                assert asked.spans.tolist() == [[[0, 0]], [[0, 0]], [[0, 1]]]
                outer = [True, False, True]
                assert asked.chosen[0].tolist() == asked.chosen[1].tolist() == [outer, [False] * 3, outer]
                assert asked.chosen[2].tolist() == [[False] * 3, [True] * 3, [True] * 3]
                for group in ((0, 1), (2,)):
                    step.add_layers(_together(group, found, asked.chosen, all_positions), asked.kept)
            else:
                for layer in range(3):
                    questions = step.questions(layer, heads[layer])
                    step.add_answers(layer, [_to_question(a, q) for a, q in zip(found[layer], questions, strict=True)])
            step.commit()
            records[at_once] = (first.record(), second.record())
        for expected, got in zip(records[False], records[True], strict=True):
            for name in (
                "topk_positions",
                "topk_mass",
                "mean_topk_positions",
                "span_mass",
                "row_values",
                "row_offsets",
            ):
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
            np.testing.assert_allclose(got.mean_topk_mass, expected.mean_topk_mass, rtol=1e-6)
            assert (expected.mean_topk_mass > 0).all()

    def test_nothing_asked(self) -> None:
        """Statistics alone need no probe."""
        step = TracedStep([rows_of(trace(TraceOptions()), 0, 5)], np.zeros((1, 5), dtype=np.int32), np.array([0]), 3, 3)
        assert step.asked() is None


def _first_heads(whole: RowAnswer, n: int) -> RowAnswer:
    assert whole.row is not None
    return RowAnswer(
        0, whole.topk_positions[:n], whole.topk_mass[:n], whole.span_mass[:n], whole.row[:n].sum(0), whole.row[:n]
    )


def _to_question(whole: RowAnswer, question: Any) -> RowAnswer:
    """The part of an answer that the CPU gives to a question."""
    assert whole.row is not None
    k, heads = question.top_k, list(question.heads)
    return RowAnswer(
        0, whole.topk_positions[:, :k], whole.topk_mass[:, :k], whole.span_mass[:, : len(question.spans)],
        whole.row[heads].sum(0), whole.row if question.row else None,
    )  # fmt: skip


def _together(
    group: tuple[int, ...], found: dict[int, list[RowAnswer]], chosen: np.ndarray, positions: list[int]
) -> LayersAnswer:
    """The same answers as a GPU gives them."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([np.stack([getattr(found[layer][i], name) for layer in group]) for i in range(len(positions))])

    total = np.zeros((len(positions), max(positions) + 1), dtype=np.float32)
    for i in range(len(positions)):
        for layer in group:
            row = found[layer][i].row
            assert row is not None
            total[i, : positions[i] + 1] += row[chosen[i, layer, : len(row)]].sum(0)
    rows = tuple(np.stack([found[layer][i].row for layer in group]).astype(np.float16) for i in (0, 1))  # type: ignore[arg-type]
    return LayersAnswer(group, stacked("topk_positions"), stacked("topk_mass"), stacked("span_mass"), total, rows)
