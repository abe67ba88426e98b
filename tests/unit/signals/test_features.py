"""Features of a request, against numbers written out by hand; real attention is in tests/integration/test_traces.py."""

from dataclasses import replace

import numpy as np
import pytest

from glassbox.core.signal_table import SIGNALS
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.signals.features import Feature, features, parse_feature
from glassbox.signals.registry import signal_values
from glassbox.store.trace_record import RequestTrace, Span, TraceOptions
from tests.trace_samples import make_trace, with_arrays

POSITIONS = (3, 5, 6, 7, 8)  # a prompt of 6 tokens, two of its rows and three generated ones
LAYERS, HEADS = (0, 3), (1, 2, 7)


def with_stats(*spans: Span, **columns: list[float]) -> RequestTrace:
    """A trace whose statistics are the given ones of each row, 10 layer + head added to tell places apart."""
    place = np.array([[10 * layer + head for head in HEADS] for layer in LAYERS])
    stats = np.full((len(POSITIONS), 2, 3, NUM_STATISTICS + 1), np.nan, dtype=np.float32)
    for name, values in columns.items():
        stats[..., INDEX[name]] = np.array(values)[:, None, None] + place
    return make_trace(positions=POSITIONS, layers=LAYERS, heads=HEADS, stats=stats, spans=spans)


class TestRows:
    def test_of_the_answer_and_of_the_prompts_last_row(self) -> None:
        """Each layer and head by its global index; the first prompt row is neither."""
        found = features(with_stats(entropy_ratio=[100, 1, 2, 3, 7]))
        assert found["answer_entropy_ratio_L0_H1"] == pytest.approx(4 + 1)
        assert found["prompt_entropy_ratio_L0_H1"] == pytest.approx(1 + 1)
        assert found["answer_entropy_ratio_L3_H7"] == pytest.approx(4 + 37)
        assert len(found) == 2 * len(LAYERS) * len(HEADS)

    def test_spans(self) -> None:
        """The attention to a span's positions, over the same rows."""
        trace = with_stats(Span("needle", 1, 4))
        found = features(trace)
        assert found["answer_span.needle_L3_H2"] == pytest.approx(trace.span_mass[2:, 1, 1, 0].mean())
        assert found["prompt_span.needle_L3_H2"] == pytest.approx(trace.span_mass[1, 1, 1, 0])

    def test_a_given_answer_stands_in_the_prompt(self) -> None:
        """Its rows are the span's, the prompt's last one is before it, and the span itself is no feature."""
        trace = with_stats(Span("answer", 6, 9), max_logit=[100, 1, 2, 3, 7])
        given = replace(with_arrays(trace, phases=np.zeros(5, dtype=np.uint8)), prompt_len=9)
        assert features(trace) == features(given)
        assert given.decode().sum() == 0
        assert features(given)["answer_max_logit_L0_H2"] == pytest.approx(4 + 2)
        assert not [name for name in features(given) if "span." in name]

    def test_what_has_no_value_is_missing(self) -> None:
        """Neither NaN nor infinity; a row without a value leaves the others."""
        trace = with_stats(entropy_ratio=[0, np.nan, 2, np.nan, 4], max_logit=[0, 1, np.inf, np.inf, np.inf])
        found = features(trace)
        assert found["answer_entropy_ratio_L0_H1"] == pytest.approx(3 + 1)
        assert "prompt_entropy_ratio_L0_H1" not in found
        assert "answer_max_logit_L0_H1" not in found

    def test_nothing_generated_and_nothing_measured(self) -> None:
        """A prompt without an answer has the prompt's features, a request without rows none."""
        assert all(name.startswith("prompt_") for name in features(make_trace(positions=(2, 5))))
        assert {} == features(make_trace(positions=()))


class TestWanted:
    def test_is_a_part_of_all(self) -> None:
        """In the wanted order; what the trace lacks is left out."""
        trace = make_trace()
        every = features(trace)
        wanted = ["prompt_span.user_L3_H0", "answer_top1_ratio_L0_H2"]
        found = features(trace, ["answer_top1_ratio_L9_H2", *wanted, "prompt_span.no_L0_H0"])
        assert {name: every[name] for name in wanted} == found
        assert wanted == list(found)

    def test_every_name_can_be_read(self) -> None:
        """What `features` writes `parse_feature` reads, also with the oddest name of a span."""
        names = list(features(make_trace(spans=(Span("a_L1_H2", 0, 3), Span(".-_", 3, 6)))))
        assert names == [parse_feature(name).name for name in names]
        assert parse_feature("answer_span.a_L1_H2_L3_H4") == Feature("answer", "span.a_L1_H2", 3, 4)
        assert parse_feature("prompt_span.a_L3_H4").span == "a"

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "answer_entropy_ratio",
            "answer_entropy_L0_H0",
            "answer_entropy_ratio_L0",
            "answer_entropy_ratio_L0_H99999",
            "other_entropy_ratio_L0_H0",
            "answer_span._L0_H0\n",
            "prompt_span.a b_L0_H0",
            "prompt_span." + "a" * 200 + "_L0_H0",
            "spectral_sv1",
            "spectral_sv9_L0_H0",
            "rauq_score_L0_H0",
            "rauq_score_user",
        ],
    )
    def test_what_is_no_name(self, name: str) -> None:
        """It is refused, where a name is read and where it is wanted."""
        with pytest.raises(ValueError, match=r"is no name of a feature|layer or head above"):
            parse_feature(name)
        with pytest.raises(ValueError, match=r"is no name of a feature|layer or head above"):
            features(make_trace(), [name])


class TestSignals:
    def test_are_those_of_the_registry(self) -> None:
        """Of each layer and head, of the request, and by span; those that the request asked for, or that are wanted."""
        trace = make_trace(options=TraceOptions(signals=("focus", "lookback")), prompt_len=6)
        values = signal_values(trace, ("focus", "lookback"))
        found = features(trace)
        assert found["focus_mass_user_L3_H1"] == pytest.approx(values["focus"].by_place["mass_user"][1, 1])
        assert found["focus_mass_user"] == pytest.approx(values["focus"].of_request["mass_user"])
        assert found["lookback_mean_L0_H2"] == pytest.approx(values["lookback"].by_place["mean"][0, 2])
        assert list(found) == [parse_feature(name).name for name in found]
        unasked = make_trace(prompt_len=6)
        assert not [name for name in features(unasked) if name.startswith(("focus", "lookback"))]
        wanted = ["focus_mass_user", "lookback_mean_L0_H2"]
        assert {name: found[name] for name in wanted} == features(unasked, wanted)

    def test_a_refused_one_has_no_features(self) -> None:
        """It needs what the trace lacks."""
        assert {} == features(make_trace(), ["spectral_sv1_L0_H0"])

    def test_every_value_of_the_table_has_a_name(self) -> None:
        """With a place or without one, never both, but for values by span."""
        for signal in SIGNALS:
            for value in signal.values:
                of_request = value in signal.of_request
                place = (None, None) if of_request else (0, 1)
                feature = Feature(signal.name, value, *place)
                assert parse_feature(feature.name) == feature
            for value in signal.by_span:
                feature = Feature(signal.name, f"{value}_system", 0, 1)
                assert (feature, "system") == (parse_feature(feature.name), parse_feature(feature.name).span)
