"""The summary of a request's scores: right, of bounded size, and whatever fails is said."""

import json
import math
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from glassbox.core.signal_table import SIGNAL_NAMES
from glassbox.signals import registry
from glassbox.signals.probe import ProbeFeature, ProbeScore
from glassbox.signals.scores import MAX_MISSING, MAX_TEXT, MAX_VALUES, Scores, scores_of
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace
from tests import probe_samples
from tests.trace_samples import make_trace


class TestSummary:
    def test_of_places_and_of_the_request(self) -> None:
        """Mean, least, largest and where; NaN is no value, and of a value with both the request's number is told."""
        places = np.array([[1.0, 2.0], [np.nan, 9.0]], dtype=np.float32)
        values = SignalValues(
            by_place={"a": places, "b": places, "none": np.full((2, 2), np.nan, dtype=np.float32)},
            by_token={"t": np.stack([places, places + 1])},
            of_request={"b": 0.5, "odd": math.inf},
        )
        scores = Scores(signals={"focus": values}, places=((3, 7), (0, 5)))
        found = scores.summary()["signals"]["focus"]
        assert "refused" not in found
        assert {"mean": 4.0, "min": 1.0, "max": 9.0, "max_at": [7, 5]} == found["values"]["a"]
        assert {"mean": 4.5, "min": 1.0, "max": 10.0, "max_at": [7, 5]} == found["values"]["t"]
        assert (0.5, None, None) == tuple(found["values"][name] for name in ("b", "odd", "none"))

    def test_its_size_is_bounded(self) -> None:
        """Whatever names and reasons there are."""
        missing = tuple(f"answer_entropy_ratio_L{n}_H0" for n in range(5000))
        scored = {f"p{n}": ProbeScore(0.5, "x" * 64, 0.5, missing) for n in range(16)}
        signal = SignalValues(of_request={f"v{n}": 1.0 for n in range(500)}, refused="r" * 10_000)
        summary = Scores(scored, dict.fromkeys(SIGNAL_NAMES, signal), {"q": "e" * 10_000}).summary()
        assert MAX_MISSING == len(summary["probes"]["p0"]["missing_features"])
        assert 5000 == summary["probes"]["p0"]["missing"]
        assert MAX_VALUES == len(summary["signals"]["rauq"]["values"])
        assert MAX_TEXT == len(summary["signals"]["rauq"]["refused"]) == len(summary["probes"]["q"]["reason"])
        assert len(json.dumps(summary, allow_nan=False)) < 50_000


class TestScoring:
    def test_the_probes_own_formula(self) -> None:
        """Of several probes at once; each has its own threshold."""
        trace = make_trace()
        true = probe_samples.score_of(trace)
        probes = [probe_samples.make_probe("low", threshold=0.0), probe_samples.make_probe("high", threshold=1.0)]
        scores = scores_of(trace, probes)
        assert pytest.approx([true, true]) == [score.value for score in scores.probes.values()]
        assert ("low",) == scores.flagged

    def test_a_request_without_a_row(self) -> None:
        """No score, and why."""
        scores = scores_of(make_trace(positions=(), attention=False), [probe_samples.make_probe()], ["selfattn"])
        assert {"drift": "the request has no value of any of its features"} == scores.unscored
        assert scores.signals["selfattn"].refused

    def test_time_is_bounded(self) -> None:
        """No signal is begun after the budget, those on demand come last, and probes are scored all the same."""
        trace = make_trace()
        clock = count()
        probes = [probe_samples.make_probe()]
        scores = scores_of(trace, probes, ["tracker", "focus"], budget_s=1.5, clock=lambda: float(next(clock)))
        assert "" == scores.signals["focus"].refused
        assert "took too long" in scores.signals["tracker"].refused
        assert "drift" in scores.probes

    def test_a_signal_is_computed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For all probes that read it and whoever asked; its features are those of the trace."""
        asked: list[str] = []
        true = registry._compute

        def count_it(trace: RequestTrace, name: str, heads: object) -> SignalValues:
            asked.append(name)
            return true(trace, name, heads)  # type: ignore[arg-type]

        monkeypatch.setattr(registry, "_compute", count_it)
        feature = ProbeFeature("focus_mass_user_L3_H1", 0.0, 1.0, 1.0)
        probes = [probe_samples.make_probe(name, features=(feature,)) for name in ("a", "b")]
        trace = make_trace()
        scores = scores_of(trace, probes, ["focus"])
        assert ["focus"] == asked
        z = 0.2 + float(trace.span_mass[1, 1, 1, 1])
        assert (
            pytest.approx(1 / (1 + math.exp(-(1.25 * z - 0.1)))) == scores.probes["a"].value == scores.probes["b"].value
        )

    def test_only_what_was_asked_for_is_told(self) -> None:
        """A probe's own signals are its business."""
        probe = probe_samples.make_probe(features=(ProbeFeature("prompt_span.user_L0_H0", 0.5, 0.2, 1.0),))
        scores = scores_of(make_trace(), [replace(probe, label="x")])
        assert (["drift"], {}) == (list(scores.probes), scores.signals)
