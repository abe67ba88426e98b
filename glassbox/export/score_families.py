"""Metric families of probes and signals: how traced requests were scored.

Owns their names, labels and values. They exist for the probes that are in force, from the start, and for the signals
that were asked for. The numbers are those of the exporter (`store/score_totals.py`), whoever shows them.
"""

from collections.abc import Iterator
from typing import Final

from glassbox.core.signal_table import SIGNAL_NAMES
from glassbox.export.family import Family, Series, define
from glassbox.store.merge import MergedEngine
from glassbox.store.score_totals import (
    PROBE_OUTCOMES,
    SCORE_BOUNDS,
    SIGNAL_OUTCOMES,
    EngineTotals,
    ProbeTotals,
    ScoreTotals,
)

_SCORE: Final = define(
    "probe_score",
    "probe.score",
    "histogram",
    "1",
    "Scores of traced requests by a probe: the probability of what it looks for.",
    ("probe",),
    bounds=SCORE_BOUNDS,
)
_REQUESTS: Final = define(
    "probe_requests_total",
    "probe.requests",
    "counter",
    "{request}",
    "Traced requests that a probe had to score: above or below its threshold, no_value (none of its features had one), "
    "failed.",
    ("probe", "outcome"),
)
_MISSING: Final = define(
    "probe_missing_features_total",
    "probe.missing_features",
    "counter",
    "{feature}",
    "Features of scored requests that had no value; the mean of the data that the probe was trained on stood for each.",
    ("probe",),
)
_SIGNALS: Final = define(
    "signal_requests_total",
    "signal.requests",
    "counter",
    "{request}",
    "Traced requests that asked for a signal: computed, or refused in whole or in part (a bound, missing rows).",
    ("signal", "outcome"),
)
_SECONDS: Final = define(
    "scoring_seconds_total",
    "scoring.time",
    "counter",
    "s",
    "Seconds that the exporter has spent on scoring traced requests; serving waits for none of them.",
)
SCORE_METRICS: Final = (_SCORE, _REQUESTS, _MISSING, _SIGNALS, _SECONDS)


def score_series(engine: MergedEngine, totals: ScoreTotals) -> Iterator[tuple[Family, Series]]:
    """The series of one engine, by family."""
    found = totals.engines.get((engine.model_name, engine.engine), EngineTotals())
    labels, start_s = (engine.model_name, engine.engine), totals.start_time_s
    for name in totals.names:
        probe = found.probes.get(name, ProbeTotals())
        yield _SCORE, Series((*labels, name), sum(probe.buckets), start_s, tuple(probe.buckets), probe.total)
        for outcome in PROBE_OUTCOMES:
            yield _REQUESTS, Series((*labels, name, outcome), probe.outcomes[outcome], start_s)
        yield _MISSING, Series((*labels, name), probe.missing, start_s)
    for name, outcomes in sorted(found.signals.items()):
        for outcome in SIGNAL_OUTCOMES:
            yield _SIGNALS, Series((*labels, name, outcome), outcomes[outcome], start_s)
    if totals.names or found.signals:
        yield _SECONDS, Series(labels, found.seconds, start_s)


def score_series_count(num_probes: int) -> int:
    """Prometheus samples of one engine, once every signal was asked for."""
    of_a_probe = len(SCORE_BOUNDS) + 3 + len(PROBE_OUTCOMES) + 1
    return num_probes * of_a_probe + len(SIGNAL_NAMES) * len(SIGNAL_OUTCOMES) + 1
