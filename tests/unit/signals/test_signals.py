"""Signals of a request, against numbers written out by hand; real attention is in tests/integration/test_traces.py."""

import json

import numpy as np
import pytest

from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.signals import request_signals
from glassbox.store.trace_record import RequestTrace, Span
from tests.trace_samples import make_trace

POSITIONS = (3, 5, 6, 7, 8, 9)  # a prompt of 6 tokens, two of its rows and four generated ones


def with_stats(**columns: list[float]) -> RequestTrace:
    """A trace whose statistics are the given ones in each row, equal in all layers and heads."""
    stats = np.full((len(POSITIONS), 2, 3, NUM_STATISTICS + 1), np.nan, dtype=np.float32)
    for name, values in columns.items():
        stats[..., INDEX[name]] = np.array(values, dtype=np.float32)[:, None, None]
    return make_trace(positions=POSITIONS, stats=stats)


class TestMeansAndTrends:
    def test_of_decode_rows_only(self) -> None:
        """A straight line over the positions has its slope, per 100 tokens, and the mean of its points."""
        signals = request_signals(
            with_stats(entropy_ratio=[9, 9, 0.1, 0.2, 0.3, 0.4], lookback_ratio=[9, 9, 4, 3, 2, 1])
        )
        assert signals["decode_rows"] == 4
        assert signals["entropy_mean"] == pytest.approx(0.25)
        assert signals["entropy_trend"] == pytest.approx(10.0, rel=1e-5)
        assert signals["lookback_mean"] == pytest.approx(2.5)
        assert signals["lookback_trend"] == pytest.approx(-100.0)

    def test_gaps_in_the_positions(self) -> None:
        """A row that is missing moves no other: the trend is over positions."""
        trace = with_stats(entropy_ratio=[0, 0, 0.1, 0.2, np.nan, 0.4])
        assert request_signals(trace)["entropy_trend"] == pytest.approx(10.0, rel=1e-5)

    def test_layers_and_heads_weigh_the_same(self) -> None:
        """Means go over every place that has a number; one without leaves the others."""
        trace = with_stats(entropy_ratio=[0.5] * 6)
        trace.stats[2, 0, 0, INDEX["entropy_ratio"]] = np.nan
        trace.stats[3, 1, 2, INDEX["entropy_ratio"]] = 0.0
        assert request_signals(trace)["entropy_mean"] == pytest.approx(0.5 * 22 / 23)

    def test_nothing_generated(self) -> None:
        """A request that was aborted in its prompt has no answer to tell of, and JSON can say so."""
        signals = request_signals(make_trace(positions=(2, 5)))
        assert signals["decode_rows"] == 0
        for name in ("entropy_mean", "entropy_trend", "lookback_mean", "lookback_trend", "saturated_ratio"):
            assert signals[name] is None  # type: ignore[literal-required]
        assert signals["llm_check"] == {}
        json.dumps(signals, allow_nan=False)

    def test_one_generated_token(self) -> None:
        """There is no trend through one point."""
        signals = request_signals(make_trace(positions=(5, 6)))
        assert signals["entropy_mean"] is not None
        assert signals["entropy_trend"] is None


class TestSaturated:
    def test_share_above(self) -> None:
        """0.95 itself is not above it."""
        trace = with_stats(top1_ratio=[1, 1, 0.95, 0.951, 0.2, np.nan])
        assert request_signals(trace)["saturated_ratio"] == pytest.approx(1 / 3)


class TestFocus:
    def test_of_the_last_prompt_token(self) -> None:
        """The mean over the heads of its attention to each span's positions."""
        trace = make_trace(spans=(Span("instruction", 0, 2), Span("data", 2, 6)))
        attention = trace.attention(1).astype(np.float64)  # position 5 of 6 prompt tokens
        focus = request_signals(trace)["focus"]
        assert focus["instruction"] == pytest.approx(attention[..., :2].sum(-1).mean(), abs=1e-3)
        assert focus["data"] == pytest.approx(attention[..., 2:].sum(-1).mean(), abs=1e-3)
        assert focus["instruction"] + focus["data"] == pytest.approx(1, abs=1e-3)

    def test_important_heads(self) -> None:
        """Only those that are named, by global indices; one that was not kept is left out."""
        trace = make_trace(layers=(4, 9), heads=(2, 3, 5))
        focus = request_signals(trace, {(9, 3), (4, 5), (7, 7)})["focus"]
        expected = (trace.span_mass[1, 1, 1, 0] + trace.span_mass[1, 0, 2, 0]) / 2
        assert focus["system"] == pytest.approx(expected)
        assert request_signals(trace, set())["focus"] == {}

    def test_without_its_row(self) -> None:
        """With prefill_rows_per_request: 0 there is none."""
        assert request_signals(make_trace(positions=(6, 7)))["focus"] == {}


class TestLlmCheck:
    def test_by_layer(self) -> None:
        """Mean over heads and decode rows of the log of the diagonal."""
        trace = make_trace(layers=(4, 9))
        own = trace.stats[2:, ..., INDEX["self_logprob"]]
        found = request_signals(trace)["llm_check"]
        assert found == {4: pytest.approx(own[:, 0].mean()), 9: pytest.approx(own[:, 1].mean())}

    def test_a_diagonal_that_vanished(self) -> None:
        """ln 0 is no number that could be averaged."""
        trace = with_stats(self_logprob=[0, 0, -1, -2, -np.inf, -3])
        assert request_signals(trace)["llm_check"] == {0: pytest.approx(-2.0), 3: pytest.approx(-2.0)}
