"""A step's traced rows: who gets which part, and what is asked of whom."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.probe_answers import ProbeAnswers
from glassbox.processes.worker.traces.active import ActiveTrace
from glassbox.processes.worker.traces.traced_step import TracedRows, TracedStep
from glassbox.store.trace_record import Span, TraceOptions
from tests.trace_samples import make_host

HOST = make_host(layers=(0, 4, 8), num_heads=3)


def trace(options: TraceOptions, local_layers: tuple[int, ...] = (0, 1, 2), heads: tuple[int, ...] = (0, 1, 2)) -> Any:
    return ActiveTrace(
        HOST, "a", why="opt_in", options=options, traceparent=None, prompt_len=4, local_layers=local_layers,
        head_columns=heads,
    )  # fmt: skip


def rows_of(one: ActiveTrace, first: int, *positions: int) -> TracedRows:
    phases = np.array([position >= 4 for position in positions], dtype=np.uint8)
    return TracedRows(one, first, np.array(positions, dtype=np.int32), phases)


def attention(layer: int, position: int, heads: int = 3, first: int = 0) -> np.ndarray:
    """float32 [heads, position + 1] that differs from place to place; 0 before `first`."""
    p = np.zeros((heads, position + 1), dtype=np.float32)
    p[:, first:] = np.arange(1, p[:, first:].size + 1, dtype=np.float32).reshape(heads, -1) + layer
    return p / p.sum(axis=-1, keepdims=True)


def found(step: TracedStep, group: Sequence[int], rows: Sequence[dict[int, np.ndarray]]) -> ProbeAnswers[Any]:
    """What a probe finds in a group of layers: two top positions, one span of position 0, every kept row.

    Args:
        rows: of each probed row, attention [heads, position + 1] by layer.
    """
    asked = step.asked()
    assert asked is not None
    p = [np.stack([of_layer[layer] for layer in group]) for of_layer in rows]
    best = [np.argsort(-one, axis=-1, kind="stable")[..., :2].astype(np.int32) for one in p]
    total = np.zeros((len(rows), max(one.shape[-1] for one in p)), dtype=np.float32)
    for i, one in enumerate(p):
        total[i, : one.shape[-1]] = one[asked.chosen[i, list(group), : one.shape[1]]].sum(0)
    return ProbeAnswers(
        topk_positions=np.stack(best),
        topk_mass=np.stack([np.take_along_axis(one, b, -1) for one, b in zip(p, best, strict=True)]),
        span_mass=np.stack([one[..., :1] for one in p]),
        chosen_sum=total,
        attention=tuple(p[i].astype(np.float16) for i in asked.kept_attention),
    )


def step_of(*members: TracedRows) -> TracedStep:
    n = sum(len(member.positions) for member in members)
    return TracedStep(members, np.zeros((n, NUM_ROW_COLUMNS), dtype=np.int32), np.arange(n), 3, 3)


class TestStatistics:
    def test_each_trace_gets_its_rows_layers_and_heads(self) -> None:
        """Rows stand anywhere in the row list; layers that were not measured are NaN."""
        whole, part = trace(TraceOptions()), trace(TraceOptions(), local_layers=(0, 2), heads=(1,))
        row_list = np.zeros((6, NUM_ROW_COLUMNS), dtype=np.int32)
        step = TracedStep(
            [rows_of(whole, 0, 3, 4), rows_of(part, 2, 7)], row_list, np.array([1, 2, 5]), num_layers=3, num_heads=3
        )
        stats = np.arange(6 * 3 * (NUM_STATISTICS + 1), dtype=np.float32).reshape(6, 3, -1)
        step.add_stats([0], stats[None])
        step.add_stats([2], stats[None] + 1000)
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
        step.add_stats([1], np.ones((1, 1, 2, NUM_STATISTICS + 1), dtype=np.float32))
        step.commit()
        assert np.isnan(one.record().stats[0, 1]).tolist() == [[False] * 10, [False] * 10, [True] * 10]

    def test_statistics_by_slot(self) -> None:
        """What a GPU gives; rows for which a trace had no memory have a slot, too."""
        one = trace(TraceOptions())
        row_list = np.zeros((5, NUM_ROW_COLUMNS), dtype=np.int32)
        row_list[:, ROW_SLOT] = [-1, 0, -1, 1, 2]
        step = TracedStep([rows_of(one, 0, 3, 4)], row_list, np.array([1, 4]), num_layers=3, num_heads=3)
        assert step.num_slots == 3
        ring = np.arange(3 * 3 * 3 * (NUM_STATISTICS + 1), dtype=np.float32).reshape(3, 3, 3, -1)
        step.set_stats(ring)
        step.commit()
        np.testing.assert_array_equal(one.record().stats, ring[[0, 2]])


class TestProbes:
    def test_nothing_asked(self) -> None:
        """Statistics alone need no probe."""
        assert step_of(rows_of(trace(TraceOptions()), 0, 5)).asked() is None

    def test_rows_to_probe(self) -> None:
        """Only of requests that asked for more than statistics, in their order."""
        plain, asking = trace(TraceOptions()), trace(TraceOptions(top_k=2), local_layers=(1,), heads=(0, 2))
        row_list = np.arange(20, dtype=np.int32).reshape(4, NUM_ROW_COLUMNS)
        step = TracedStep([rows_of(plain, 0, 5), rows_of(asking, 1, 6, 7)], row_list, np.array([0, 1, 3]), 3, 3)
        asked = step.asked()
        assert asked is not None
        np.testing.assert_array_equal(row_list[[1, 3]], asked.rows)
        assert (asked.positions.tolist(), asked.top_k, asked.kept_attention, asked.local_layers) == ([6, 7], 2, (), {1})
        assert asked.chosen.tolist() == [[[False] * 3, [True, False, True], [False] * 3]] * 2

    def test_questions_of_several_requests(self) -> None:
        """The largest k, spans filled up, the rows of those that want them."""
        first = trace(TraceOptions(top_k=2, attention=True), (0, 2))
        second = trace(TraceOptions(top_k=1, spans=(Span("a", 0, 1),)), (1,))
        asked = step_of(rows_of(first, 0, 5, 6), rows_of(second, 2, 8)).asked()
        assert asked is not None
        assert (asked.top_k, asked.kept_attention, asked.positions.tolist()) == (2, (0, 1), [5, 6, 8])
        assert asked.spans.tolist() == [[[0, 0]], [[0, 0]], [[0, 1]]]
        assert asked.local_layers == {0, 1, 2}

    def test_a_layer_that_only_another_request_wants(self) -> None:
        """What was found there of the row is not kept, nor counted in its mean."""
        first, second = trace(TraceOptions(top_k=2), (0,)), trace(TraceOptions(top_k=2), (0, 1))
        step = step_of(rows_of(first, 0, 5), rows_of(second, 1, 6))
        rows = [{layer: attention(layer, position) for layer in (0, 1)} for position in (5, 6)]
        step.add_answers((0, 1), found(step, (0, 1), rows))
        step.commit()
        for one, of_row, layers in ((first, rows[0], (0,)), (second, rows[1], (0, 1))):
            p = np.stack([of_row[layer] for layer in layers])
            np.testing.assert_array_equal(one.record().topk_mass[0], -np.sort(-p)[..., :2])
            mean = p.mean(axis=(0, 1))
            np.testing.assert_allclose(one.record().mean_topk_mass[0], -np.sort(-mean)[:2], rtol=1e-6)

    def test_everything_of_chosen_places(self) -> None:
        """Top positions, masses, rows, and the mean over exactly the chosen layers and heads, in groups of layers."""
        options = TraceOptions(top_k=2, spans=(Span("a", 0, 1),), attention=True)
        one = trace(options, local_layers=(0, 2), heads=(0, 2))
        step = step_of(rows_of(one, 0, 5))
        of_layer = {layer: attention(layer, 5) for layer in range(3)}
        for group in ((0, 1), (2,)):
            step.add_answers(group, found(step, group, [of_layer]))
        step.commit()
        record = one.record()
        rows = np.stack([of_layer[layer][[0, 2]] for layer in (0, 2)])
        np.testing.assert_array_equal(record.attention(0), rows.astype(np.float16))
        np.testing.assert_array_equal(record.topk_mass[0], -np.sort(-rows)[..., :2])
        np.testing.assert_array_equal(record.span_mass[0, ..., 0], rows[..., 0])
        mean = rows.mean(axis=(0, 1))
        assert record.mean_topk_positions[0].tolist() == np.argsort(-mean, kind="stable")[:2].tolist()
        np.testing.assert_allclose(record.mean_topk_mass[0], -np.sort(-mean)[:2], rtol=1e-6)

    def test_a_layer_with_fewer_heads(self) -> None:
        """What it has not got is empty, and no part of the mean."""
        one = trace(TraceOptions(top_k=2, spans=(Span("a", 0, 1),)), (0, 1))
        step = step_of(rows_of(one, 0, 5))
        of_layer = {0: attention(0, 5), 1: attention(1, 5, heads=2)}
        for layer in (0, 1):
            step.add_answers((layer,), found(step, (layer,), [of_layer]))
        step.commit()
        record = one.record()
        assert record.topk_positions[0, 1, 2].tolist() == [-1, -1]
        assert np.isnan(record.span_mass[0, 1, 2]).all()
        mean = np.concatenate([of_layer[0], of_layer[1]]).mean(0)
        np.testing.assert_allclose(record.mean_topk_mass[0], -np.sort(-mean)[:2], rtol=1e-6)

    def test_a_window(self) -> None:
        """Positions before the first visible key have no attention in the row and in the mean."""
        one = trace(TraceOptions(top_k=2, attention=True), (0,))
        step = step_of(rows_of(one, 0, 9))
        p = attention(0, 9, first=6)
        step.add_answers((0,), found(step, (0,), [{0: p}]))
        step.commit()
        record = one.record()
        assert record.attention(0).shape == (1, 3, 10)
        np.testing.assert_array_equal(record.attention(0)[0], p.astype(np.float16))
        assert record.mean_topk_positions[0, 0] == 9

    def test_no_answer(self) -> None:
        """A probe that failed leaves no value anywhere, in a layer or in all; the mean is of those that answered."""
        one = trace(TraceOptions(top_k=2, spans=(Span("a", 0, 1),), attention=True), (0, 1))
        failed = trace(TraceOptions(top_k=2, attention=True), (0, 1))
        p = attention(0, 5)
        step = step_of(rows_of(one, 0, 5))
        step.add_answers((0,), found(step, (0,), [{0: p}]))
        step.commit()
        step_of(rows_of(failed, 0, 5)).commit()
        record = one.record()
        np.testing.assert_array_equal(record.attention(0)[0], p.astype(np.float16))
        np.testing.assert_allclose(record.mean_topk_mass[0], -np.sort(-p.mean(0))[:2], rtol=1e-6)
        assert np.isnan(record.attention(0)[1]).all()
        assert np.isnan(failed.record().attention(0)).all()
        assert [[-1, -1]] == failed.record().mean_topk_positions.tolist()
        assert [[0, 0]] == failed.record().mean_topk_mass.tolist()

    def test_scores_that_are_not_finite(self) -> None:
        """There is no mean of them, and no position."""
        one = trace(TraceOptions(top_k=2), (0,))
        step = step_of(rows_of(one, 0, 5))
        bad = found(step, (0,), [{0: attention(0, 5)}])
        step.add_answers((0,), replace(bad, chosen_sum=bad.chosen_sum * np.nan))
        step.commit()
        assert one.record().mean_topk_positions.tolist() == [[-1, -1]]
        assert one.record().mean_topk_mass.tolist() == [[0, 0]]
