"""The panels of probes and signals: scores, how many requests a probe flags, and what could not be scored."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import RATE_UNIT
from glassbox.cli.dashboards.panels import Query, lines

_REQUESTS: Final = "glassbox_probe_requests_total"
_SIGNALS: Final = "glassbox_signal_requests_total"
_BY: Final = ("probe",)
_LEGEND: Final = "{{probe}}"
_OUTCOME: Final = 'outcome=~"{}"'
_ONLY: Final = "There is something to see with `probes` in glassbox.yaml, of traced requests."


def scores() -> list[dashboard.Panel]:
    """A section: scores and flagged requests by probe, then what has no score, and what scoring costs."""
    return [
        lines(
            "Score by probe",
            "Median score of each probe: the probability of what it looks for. A median that moves means other "
            f"requests, or a model that pays attention to something else. {_ONLY}",
            [Query(_quantile(0.5), _LEGEND, exemplar=True)],
            "percentunit",
            bounds=(0.0, 1.0),
        ),
        lines(
            "Highest scores by probe",
            "95th percentile of the scores of each probe.",
            [Query(_quantile(0.95), _LEGEND, exemplar=True)],
            "percentunit",
            bounds=(0.0, 1.0),
        ),
        lines(
            "Requests above a probe's threshold",
            "Share of the scored requests whose score has reached the probe's threshold.",
            [
                Query(
                    f"{promql.total(_REQUESTS, _OUTCOME.format('above'), by=_BY)} / "
                    f"{promql.total(_REQUESTS, _OUTCOME.format('above|below'), by=_BY)}",
                    _LEGEND,
                )
            ],
            "percentunit",
            bounds=(0.0, None),
        ),
        lines(
            "Requests without a score",
            "Traced requests per second of which a probe had nothing to read (no_value) or failed, and features per "
            "second whose means stood for them: measure what the probe needs (glassbox check tells it).",
            [
                Query(
                    promql.total(_REQUESTS, _OUTCOME.format("no_value|failed"), by=("probe", "outcome")),
                    "{{probe}} {{outcome}}",
                ),
                Query(promql.total("glassbox_probe_missing_features_total", by=_BY), "{{probe}} missing features"),
            ],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        lines(
            "Signals by outcome",
            "Traced requests per second that asked for a signal; refused in whole or in part where rows are missing or "
            "a bound was reached.",
            [Query(promql.total(_SIGNALS, by=("signal", "outcome")), "{{signal}} {{outcome}}")],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        lines(
            "Time of scoring",
            "Seconds per second that the exporter spends on scores; serving waits for none of them.",
            [Query(promql.total("glassbox_scoring_seconds_total", by=("engine",)), "engine {{engine}}")],
            "percentunit",
            bounds=(0.0, None),
        ),
    ]


def _quantile(q: float) -> str:
    buckets = promql.reduce("sum", ("le", *_BY), promql.rate("glassbox_probe_score_bucket"))
    return f"histogram_quantile({q:g}, {buckets})"
