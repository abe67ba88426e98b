"""A step's traced rows: who gets which part, and what is asked of whom."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.probe_answers import ProbeAnswers, PromptAnswers
from glassbox.measure.contract import AskedPrompt
from glassbox.processes.worker.traces.active import ActiveTrace
from glassbox.processes.worker.traces.traced_step import TracedPrompt, TracedRows, TracedStep
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
        step.add_stats([0], np.arange(6), stats[None])
        step.add_stats([2], np.arange(6), stats[None] + 1000)
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
        step.add_stats([1], np.arange(1), np.ones((1, 1, 2, NUM_STATISTICS + 1), dtype=np.float32))
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
        step.set_stats([0, 2], ring[:, [0, 2]])
        step.commit()
        np.testing.assert_array_equal(one.record().stats[:, [0, 2]], ring[[0, 2]][:, [0, 2]])
        assert np.isnan(one.record().stats[:, 1]).all(), "nobody measured it"

    def test_rows_of_each_layer(self) -> None:
        """Layers have rows of their own: a trace's are those that it has in the list of the layer."""
        one, other = trace(TraceOptions()), trace(TraceOptions(), (2,))
        row_list = np.zeros((4, NUM_ROW_COLUMNS), dtype=np.int32)
        step = TracedStep([rows_of(one, 0, 3), rows_of(other, 1, 4)], row_list, np.array([1, 3]), 3, 3)
        assert [({0, 1, 2}, [1]), ({2}, [3])] == [(set(layers), places.tolist()) for layers, places in step.wanted]
        stats = np.arange(3 * 3 * (NUM_STATISTICS + 1), dtype=np.float32).reshape(3, 3, -1)
        step.add_stats([0, 1], np.array([1]), np.stack([stats[:1], stats[:1] + 100]))
        step.add_stats([2], np.array([0, 1, 3]), stats[None] + 200)
        step.commit()
        of_one = one.record().stats[0]
        np.testing.assert_array_equal(np.stack([stats[0], stats[0] + 100, stats[1] + 200]), of_one)
        np.testing.assert_array_equal(stats[2] + 200, other.record().stats[0, 0])

    def test_rows_that_are_asked_something(self) -> None:
        """All questions are asked of all such rows at once, so each is listed in every layer that one of them names."""
        one, other = trace(TraceOptions(top_k=2), (0,)), trace(TraceOptions(top_k=2), (2,))
        row_list = np.zeros((2, NUM_ROW_COLUMNS), dtype=np.int32)
        step = TracedStep([rows_of(one, 0, 3), rows_of(other, 1, 4)], row_list, np.array([0, 1]), 3, 3)
        assert ({0, 2}, [0, 1]) == (set(step.wanted[-1].local_layers), step.wanted[-1].places.tolist())


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


class TestSums:
    """What rows add to their request's sums: those of whole prompts, and those of the list."""

    OPTIONS = TraceOptions(prompt="all", signals=("spectral", "cyclic"), spans=(Span("a", 0, 1),))
    HOST = replace(HOST, head_size=6)

    def trace(self, **changes: Any) -> ActiveTrace:
        fields: dict[str, Any] = {"options": self.OPTIONS, "local_layers": (0, 2), "head_columns": (0, 2)}
        return ActiveTrace(self.HOST, "a", why="opt_in", traceparent=None, prompt_len=4, **(fields | changes))

    @staticmethod
    def asked(one: ActiveTrace, position: int = 0, num_rows: int = 4) -> TracedPrompt:
        spans = np.array([[0, 1]], dtype=np.int32)
        layers = frozenset(one.local_layers)
        return TracedPrompt(
            one, AskedPrompt(0, 0, num_rows, position, layers, one.head_columns, spans, True, True, position)
        )

    @staticmethod
    def answers(seed: int, heads: int = 2, size: int = 6, rows: int = 4) -> PromptAnswers[Any]:
        """Of heads 0 and 2, or of 0 alone, where each has a KV head of its own."""
        rng = np.random.default_rng(seed)
        number = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        q, k = number(rows, heads, size), number(rows, heads, size)
        return PromptAnswers(
            number(rows, heads, NUM_STATISTICS + 1), number(rows, heads), number(rows, heads, 1), number(heads, rows),
            1, np.einsum("nhd,nhe->hde", q, q, dtype=float), np.einsum("nhd,nhe->hde", k, k, dtype=float), q, k,
            number(heads, 4),
        )  # fmt: skip

    def test_a_prompt(self) -> None:
        """Each layer's answers stand at its heads; smaller heads are filled up, and what a layer lacks has no value."""
        one = self.trace()
        step = TracedStep([], np.zeros((0, NUM_ROW_COLUMNS), dtype=np.int32), np.arange(0), 3, 3, [self.asked(one)])
        assert (None, 0, {0, 2}) == (step.asked(), step.num_slots, step.local_layers)
        whole, fewer = self.answers(0), self.answers(1, heads=1, size=4)
        step.add_prompt(0, 0, whole)
        step.add_prompt(0, 2, fewer)
        step.commit()
        record = one.record()
        assert ([0, 1, 2, 3], [0] * 4) == (record.positions.tolist(), record.phases.tolist())
        for name in ("stats", "previous_mass", "span_mass", "queries"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(record, name)[:, 0], err_msg=name)
        np.testing.assert_array_equal(fewer.stats[:, 0], record.stats[:, 1, 0])
        assert np.isnan(record.stats[:, 1, 1]).all()
        np.testing.assert_array_equal(np.pad(fewer.queries[:, 0], ((0, 0), (0, 2))), record.queries[:, 1, 0])
        np.testing.assert_array_equal(np.pad(fewer.keys[:, 0], ((0, 0), (0, 2))), record.keys[:, 1, 0])
        np.testing.assert_array_equal(whole.received, record.received[0])
        np.testing.assert_array_equal(whole.score_params, record.score_params[0])
        assert () == record.notes
        assert np.isnan(record.singular_values).any(-1).tolist() == [[False, False], [False, True]]

    def test_rows_of_the_list(self) -> None:
        """Those of the prompt, measured once already, are not summed again; keys are shared by query heads."""
        one = self.trace(options=replace(self.OPTIONS, top_k=2))
        prompt = self.asked(one)
        step = TracedStep([rows_of(one, 0, 3, 4)], np.zeros((2, NUM_ROW_COLUMNS), dtype=np.int32), np.arange(2), 3, 3,
                          [prompt])  # fmt: skip
        asked = step.asked()
        assert asked is not None
        assert ((1,), True) == (asked.received, asked.queries)
        step.add_prompt(0, 0, self.answers(0))
        step.add_prompt(0, 2, self.answers(1))
        rng = np.random.default_rng(2)
        queries, keys = rng.standard_normal((2, 2, 3, 6), np.float32), rng.standard_normal((2, 2, 1, 6), np.float32)
        rows = [{layer: attention(layer, position) for layer in (0, 2)} for position in (3, 4)]
        received = np.stack([rows[1][layer] for layer in (0, 2)])
        step.add_answers((0, 2), replace(found(step, (0, 2), rows), received=(received,), queries=queries, keys=keys))
        step.commit()
        record = one.record()
        assert [0, 1, 2, 3, 4] == record.positions.tolist()
        expected = np.stack([self.answers(seed).received for seed in (0, 1)])
        np.testing.assert_allclose(expected + received[:, [0, 2], :4], record.received[..., :4], rtol=1e-6)
        np.testing.assert_array_equal(received[:, [0, 2], 4], record.received[..., 4])
        np.testing.assert_array_equal(queries[1][:, [0, 2]], record.queries[4])
        np.testing.assert_array_equal(keys[1][:, [0, 0]], record.keys[4])
        assert (record.topk_positions[3] >= 0).all()
        assert (record.topk_positions[:3] == -1).all()

    def test_nothing_was_answered(self) -> None:
        """A step that failed leaves no value where its rows count, and says nothing wrong."""
        one = self.trace()
        TracedStep(
            [rows_of(one, 0, 4)], np.zeros((1, NUM_ROW_COLUMNS), dtype=np.int32), np.arange(1), 3, 3, [self.asked(one)]
        ).commit()
        record = one.record()
        assert np.isnan(record.received).all()
        assert np.isnan(record.singular_values).all()
        assert np.isnan(record.stats).all()
        rows, kept = record.notes
        assert rows.startswith("rows of the prompt are missing in some layers")
        assert kept.startswith("queries and keys of layers 0, 8 don't make their attention")

    def test_attention_to_the_token_before(self) -> None:
        """By layer or by slot, as statistics are given."""
        before = np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3)
        stats = np.zeros((2, 2, 3, NUM_STATISTICS + 1), dtype=np.float32)
        one, other = trace(TraceOptions(), (0, 2), (1,)), trace(TraceOptions())
        step = step_of(rows_of(one, 0, 5, 6))
        step.add_stats([0, 2], np.arange(2), stats, before)
        step.commit()
        np.testing.assert_array_equal(before[:, :, 1].T, one.record().previous_mass[..., 0])
        row_list = np.zeros((2, NUM_ROW_COLUMNS), dtype=np.int32)
        row_list[:, ROW_SLOT] = [1, 0]
        step = TracedStep([rows_of(other, 0, 5, 6)], row_list, np.arange(2), 3, 3)
        ring = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
        step.set_stats([0, 1, 2], np.zeros((2, 3, 3, NUM_STATISTICS + 1), dtype=np.float32), ring)
        step.commit()
        np.testing.assert_array_equal(ring[[1, 0]], other.record().previous_mass)
