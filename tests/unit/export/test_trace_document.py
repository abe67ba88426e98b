"""A trace as JSON: equal to numpy, without NaN, bounded, and only what was chosen."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.export import trace_document
from glassbox.export.trace_document import (
    MAX_TOKENS,
    Selection,
    SelectionError,
    detail,
    document,
    flat_signals,
    mean,
    plain,
)
from tests.trace_samples import make_trace, with_arrays


def close(found: Any, true: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float64), true, rtol=1e-5, atol=1e-12)


def with_nan(**fields: Any) -> Any:
    """A trace of which one place has no value in one row, and prefill rows no lookback."""
    trace = make_trace(**fields)
    stats = trace.stats.copy()
    stats[1, 0, 0, :] = np.nan
    stats[trace.phases == 0, ..., INDEX["lookback_ratio"]] = np.nan
    return with_arrays(trace, stats=stats)


class TestPlain:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(width=32), max_size=8))
    def test_six_digits(self, values: list[float]) -> None:
        """What is finite keeps six significant digits; the rest is null; it is JSON."""
        found = json.loads(json.dumps(plain(np.array(values, dtype=np.float32)), allow_nan=False))
        assert [v is None for v in found] == [not np.isfinite(v) for v in values]
        for value, true in zip(found, values, strict=True):
            if value is not None:
                assert value == pytest.approx(float(f"{true:.6g}"), rel=1e-5, abs=1e-44)

    def test_shapes(self) -> None:
        """Nested as the array is, empty axes included."""
        assert [[[], []]] == plain(np.zeros((1, 2, 0)))
        assert [[0.1, None]] == plain(np.array([[0.1, np.inf]]))


class TestMean:
    def test_against_numpy(self) -> None:
        """As nanmean, without its warning where there is no value."""
        values = np.array([[1.0, np.nan, np.inf], [3.0, np.nan, 5.0]])
        np.testing.assert_array_equal([2.0, np.nan, 5.0], mean(values, axis=0))


class TestDocument:
    def test_it_is_json(self) -> None:
        """NaN is null."""
        shown = json.loads(json.dumps(document(with_nan()), allow_nan=False))
        assert [None, None] == shown["tokens"]["statistics"]["lookback_ratio"][:2]

    def test_along_the_tokens(self) -> None:
        """Means over layers and heads; spans and top-k of the mean; positions and phases."""
        trace = with_nan()
        tokens = document(trace)["tokens"]
        assert [2, 5, 6, 7, 8] == tokens["position"]
        assert ["prefill", "prefill", "decode", "decode", "decode"] == tokens["phase"]
        assert 0 == tokens["left_out"]
        for s, statistic in enumerate(STATISTICS):
            if not statistic.decode_only:
                close(tokens["statistics"][statistic.name], np.nanmean(trace.stats[..., s], axis=(1, 2)))
        assert ["system", "user"] == list(tokens["spans"])
        close(tokens["spans"]["user"], trace.span_mass[..., 1].mean(axis=(1, 2)))
        assert trace.mean_topk_positions.tolist() == tokens["top_k"]["position"]
        close(tokens["top_k"]["mass"], trace.mean_topk_mass)

    def test_places(self) -> None:
        """Means over the rows of a phase, [layer][head]."""
        trace = with_nan()
        places = document(trace)["places"]
        for number, phase in enumerate(("prefill", "decode")):
            rows = trace.stats[trace.phases == number]
            close(places[phase]["top1_ratio"], np.nanmean(rows[..., INDEX["top1_ratio"]], axis=0))
        assert [[None] * 3] * 2 == places["prefill"]["lookback_ratio"]

    def test_text_only_if_asked_for(self) -> None:
        """Without `texts`, or without ids, no token and no id is in it."""
        trace = make_trace()
        shown = document(trace, lambda ids: [f"<{i}>" for i in ids])
        assert {"first_position": 0, "tokens": [f"<{i}>" for i in range(10)]} == shown["text"]
        for hidden in (document(trace), document(with_arrays(trace, token_ids=trace.token_ids[:0]), lambda _: ["x"])):
            assert not {"text", "token_ids"} & hidden.keys()

    def test_it_is_bounded(self) -> None:
        """Of a long request the newest rows are shown, and how many are not."""
        count = MAX_TOKENS + 3
        trace = make_trace(
            positions=tuple(range(2, count + 2)), layers=(0,), heads=(0,), top_k=0, spans=(), attention=False
        )
        tokens = document(trace)["tokens"]
        assert 3 == tokens["left_out"]
        assert list(range(5, count + 2)) == tokens["position"]

    def test_an_empty_trace(self) -> None:
        """A request that has just begun."""
        trace = make_trace(positions=(), status="active", end_time_s=None, num_generated=0)
        shown = document(trace)
        assert [] == shown["tokens"]["position"]
        json.dumps(shown, allow_nan=False)


class TestDetail:
    def test_a_choice(self) -> None:
        """Axes in the order of the choice, numbers of these places alone."""
        trace = with_nan()
        shown = detail(trace, Selection(layers=(3,), heads=(2, 0), tokens=(5, 8)))
        assert ([3], [2, 0], [5, 6, 7]) == (shown["layers"], shown["heads"], shown["position"])
        rows, places = [1, 2, 3], [2, 0]
        close(shown["statistics"]["sink_ratio"], trace.stats[rows][:, [1]][..., places, INDEX["sink_ratio"]])
        close(shown["spans"]["system"], trace.span_mass[rows][:, [1]][..., places, 0])
        assert trace.topk_positions[rows][:, [1]][:, :, places].tolist() == shown["top_k"]["position"]
        close(shown["rows"][0]["attention"], trace.attention(1)[np.ix_([1], places)])
        assert [6, 7, 8] == [len(row["attention"][0][0]) for row in shown["rows"]]

    def test_everything(self) -> None:
        """Without a choice of an axis all of it."""
        trace = make_trace()
        shown = detail(trace, Selection())
        close(shown["statistics"]["max_logit"], trace.stats[..., INDEX["max_logit"]])

    @pytest.mark.parametrize("chosen", [Selection(layers=(1,)), Selection(heads=(3,))])
    def test_what_is_not_there(self, chosen: Selection) -> None:
        """The error names what is."""
        with pytest.raises(SelectionError, match=r"must be among those of the trace \(0, "):
            detail(make_trace(), chosen)

    def test_it_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """5 tokens x 2 layers x 3 heads x (9 statistics + 1 + 2 spans + 2 x 2), and the rows: (3+6+7+8+9) x 6."""
        monkeypatch.setattr(trace_document, "MAX_NUMBERS", 5 * 6 * (len(STATISTICS) + 1 + 2 + 4) + 33 * 6)
        trace = make_trace()
        detail(trace, Selection())
        monkeypatch.setattr(trace_document, "MAX_NUMBERS", trace_document.MAX_NUMBERS - 1)
        with pytest.raises(SelectionError, match="choose fewer layers and heads"):
            detail(trace, Selection())
        detail(trace, Selection(layers=(0,)))


class TestFlatSignals:
    def test_names(self) -> None:
        """Nested names are joined; what is not finite is None."""
        assert {"a": 1.0, "b.c": None, "b.d.e": 2.0} == flat_signals({"a": 1, "b": {"c": np.nan, "d": {"e": 2.0}}})
