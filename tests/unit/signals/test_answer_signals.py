"""rauq, lookback, focus and heavy_hitters, against sums and loops written out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from glassbox.core.statistics import INDEX
from glassbox.signals.registry import signal_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace, Span
from tests.signal_truth import make_heads, measured_trace
from tests.trace_samples import make_trace, with_arrays

PROMPT = 4


def of(trace: RequestTrace, name: str) -> SignalValues:
    return signal_values(trace, [name])[name]


class TestRauq:
    def trace(self, tokens: int = 10, **changes: Any) -> RequestTrace:
        q, k = make_heads(tokens, layers=3, size=2)
        logprobs = -np.random.default_rng(0).random(tokens - PROMPT + 1).astype(np.float32)
        return measured_trace(q, k, prompt_len=PROMPT, **{"logprobs": logprobs, **changes})

    def test_against_the_recurrence(self) -> None:
        """Token by token: the last generated token has no row, so it is of those before."""
        trace = self.trace()
        answer = 6
        scores = []
        for layer in range(3):
            mean = [np.mean([trace.previous_mass[PROMPT + i, layer, h] for i in range(1, answer)]) for h in range(4)]
            head = int(np.argmax(mean))
            c = [math.exp(trace.logprobs[0])]
            for i in range(1, answer):
                a = float(trace.previous_mass[PROMPT + i, layer, head])
                c.append(0.2 * math.exp(trace.logprobs[i]) + 0.8 * a * c[-1])
            scores.append((-np.mean(np.log(c)), head))
        values = of(trace, "rauq")
        assert values.refused == ""
        assert values.of_request == {"score": pytest.approx(max(scores)[0]), "tokens": answer}
        expected = np.full((3, 4), np.nan)
        for layer, (score, head) in enumerate(scores):
            expected[layer, head] = score
        np.testing.assert_allclose(values.by_place["layer_score"], expected, rtol=1e-6)

    def test_numbers(self) -> None:
        """p = 0.5, 0.5, a = 0.25 of head 1: c = 0.5, 0.1 + 0.8 * 0.25 * 0.5 = 0.2."""
        trace = self.trace(6)
        previous = np.full((6, 3, 4), 0.125, dtype=np.float32)
        previous[5, :, 1] = 0.25
        logprobs = np.log(np.array([0.5, 0.5, 0.1], dtype=np.float32))
        values = of(with_arrays(trace, previous_mass=previous, logprobs=logprobs), "rauq")
        assert values.of_request["score"] == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)
        assert np.isfinite(values.by_place["layer_score"]).tolist() == [[False, True, False, False]] * 3

    def test_one_token(self) -> None:
        """Its probability is all that there is: no head is chosen."""
        values = of(self.trace(PROMPT), "rauq")
        assert values.of_request["score"] == pytest.approx(-float(self.trace(PROMPT).logprobs[0]))
        assert values.of_request["tokens"] == 1
        assert np.isnan(values.by_place["layer_score"]).all()

    def test_a_layer_without_attention(self) -> None:
        """Leaves the others; a head with a hole is not chosen."""
        trace = self.trace()
        previous = trace.previous_mass.copy()
        previous[:, 0], previous[6, 1, 2] = np.nan, np.nan
        values = of(with_arrays(trace, previous_mass=previous), "rauq")
        assert np.isfinite(values.by_place["layer_score"]).sum(axis=1).tolist() == [0, 1, 1]
        assert np.isnan(values.by_place["layer_score"][1, 2])
        assert values.of_request["score"] == pytest.approx(np.nanmax(values.by_place["layer_score"]))

    def test_no_probability_at_all(self) -> None:
        """An answer of probability 0 that attends nowhere has no logarithm, and no warning."""
        trace = self.trace()
        nothing = np.zeros_like(trace.previous_mass)
        values = of(with_arrays(trace, previous_mass=nothing, logprobs=np.full(7, -1e4, dtype=np.float32)), "rauq")
        assert math.isnan(values.of_request["score"])

    def test_refused(self) -> None:
        """Log-probabilities or rows that are missing."""
        trace = self.trace()
        logprobs = trace.logprobs.copy()
        logprobs[2] = np.nan
        assert (
            "the log-probability of 1 of 6 answer tokens is not known"
            in of(with_arrays(trace, logprobs=logprobs), "rauq").refused
        )
        positions = trace.positions.copy()
        positions[-1] += 3
        assert "rows of 3 of 9 answer tokens are missing" in of(with_arrays(trace, positions=positions), "rauq").refused
        assert "nothing was generated" in of(self.trace(num_generated=0, logprobs=trace.logprobs[:0]), "rauq").refused


class TestLookback:
    def trace(self, ratios: list[float], spans: tuple[Span, ...] = ()) -> RequestTrace:
        """Ratios of the answer's rows, the same at all places but the last, which has none."""
        trace = make_trace(prompt_len=PROMPT, positions=tuple(range(2, PROMPT + len(ratios))), spans=spans)
        stats = trace.stats.copy()
        stats[..., INDEX["lookback_ratio"]] = np.nan
        stats[2:, ..., INDEX["lookback_ratio"]] = np.array(ratios)[:, None, None]
        stats[:, -1, -1, INDEX["lookback_ratio"]] = np.nan
        return with_arrays(trace, stats=stats)

    def test_means(self) -> None:
        """Over the answer, over what a span has of it, over any eight rows; a row without a value is left out."""
        ratios = [0.9] * 8 + [0.1] * 8 + [math.nan, 0.4]
        spans = (Span("prompt", 0, 3), Span("late", PROMPT + 8, PROMPT + 10), Span("both", 2, PROMPT + 1))
        trace = self.trace(ratios, spans)
        values = of(trace, "lookback")
        found = {name: float(value[0, 0]) for name, value in values.by_place.items()}
        assert found == pytest.approx(
            {
                "mean": np.nanmean(ratios),
                "mean_late": 0.1,
                "mean_both": 0.9,
                "lowest": 0.1,
                "highest": 0.9,
            }
        )
        assert all(np.isnan(value[-1, -1]) for value in values.by_place.values())
        window = values.by_token["window"][:, 0, 0]
        assert window[2 + 7 : 2 + 16].tolist() == pytest.approx([0.9 - 0.1 * i for i in range(9)])
        assert np.isnan(window[: 2 + 7]).all()
        assert np.isnan(window[2 + 16 :]).all()

    def test_short_answers(self) -> None:
        """Of less than eight rows there is a mean and no window; without a row there is nothing."""
        values = of(self.trace([0.5, 0.7]), "lookback")
        assert values.by_place["mean"][0, 0] == pytest.approx(0.6)
        assert np.isnan(values.by_place["lowest"]).all()
        assert "no row of a generated token" in of(self.trace([]), "lookback").refused


class TestFocus:
    SPANS = (Span("instruction", 0, 2), Span("data", 2, 6))

    def test_by_place_and_heads(self) -> None:
        """Of the last prompt token to each span; of the request over the heads that were found."""
        trace = make_trace(spans=self.SPANS, layers=(4, 9), heads=(2, 3, 5))
        values = signal_values(trace, ["focus"], focus_heads={(9, 3), (4, 5), (7, 7)})["focus"]
        np.testing.assert_array_equal(trace.span_mass[1, :, :, 1], values.by_place["mass_data"])
        np.testing.assert_array_equal(values.by_place["mass"], values.by_place["mass_instruction"])
        expected = (trace.span_mass[1, 1, 1, 0] + trace.span_mass[1, 0, 2, 0]) / 2
        assert values.of_request["mass_instruction"] == values.of_request["mass"] == pytest.approx(expected)
        of_all = of(trace, "focus").of_request
        assert of_all["mass_data"] == pytest.approx(trace.span_mass[1, :, :, 1].mean())

    def test_refused(self) -> None:
        """Without a span, without the row, without a head; what each head has is there in the last case."""
        assert "named no span" in of(make_trace(spans=()), "focus").refused
        assert "row of the last prompt token" in of(make_trace(positions=(6, 7)), "focus").refused
        values = signal_values(make_trace(), ["focus"], focus_heads=())["focus"]
        assert "none of the chosen heads was traced" in values.refused
        assert math.isnan(values.of_request["mass"])
        assert np.isfinite(values.by_place["mass"]).all()


class TestHeavyHitters:
    def test_order_and_share(self) -> None:
        """By falling attention, the earlier of equal ones first."""
        trace = measured_trace(*make_heads(14))
        received = np.tile(np.array([5, 1, 3, 3, 0.5] + [0.1] * 9, dtype=np.float32), (2, 4, 1))
        values = of(with_arrays(trace, received=received), "heavy_hitters")
        assert [values.by_place[f"position_{i}"][1, 1] for i in range(10)] == [0, 2, 3, 1, 4, 5, 6, 7, 8, 9]
        received_ = [values.by_place[f"received_{i}"][1, 1] for i in range(10)]
        assert received_ == pytest.approx([5, 3, 3, 1, 0.5] + [0.1] * 5)
        assert values.by_place["top10_share"][1, 1] == pytest.approx(13.0 / 13.4)
        assert values.of_request == {"rows_ratio": 1.0}

    def test_few_positions_and_rows(self) -> None:
        """What isn't there has no value; sums over a part of the rows say of how large a part."""
        trace = measured_trace(*make_heads(4))
        trace = with_arrays(
            trace, received=np.pad(trace.received, ((0, 0), (0, 0), (0, 4))), keys=np.tile(trace.keys, (2, 1, 1, 1))
        )
        values = of(trace, "heavy_hitters")
        assert values.of_request == {"rows_ratio": 0.5}
        assert np.isnan(values.by_place["position_8"]).all()
        assert np.isnan(values.by_place["received_8"]).all()
        assert values.by_place["top10_share"] == pytest.approx(1)

    def test_a_head_without_a_value(self) -> None:
        """And one that received nothing."""
        trace = measured_trace(*make_heads(4))
        received = trace.received.copy()
        received[0, 1, 2], received[1, 0] = np.nan, 0
        values = of(with_arrays(trace, received=received), "heavy_hitters")
        assert np.isnan(values.by_place["position_0"][0, 1])
        assert np.isnan(values.by_place["top10_share"][0, 1])
        assert np.isnan(values.by_place["top10_share"][1, 0])
        assert np.isnan(values.by_place["top10_share"]).sum() == 2
