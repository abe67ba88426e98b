"""The dashboard Heads: a layer x head matrix of each statistic, and which heads drift from how they were before."""

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import SETTINGS, about, bounds, name_of, unit
from glassbox.cli.dashboards.layout import Page, Section, choice
from glassbox.cli.dashboards.panels import GREEN, NO_HEADS, RED, Levels, Query, listing, matrix, note, tile
from glassbox.core.statistics import STATISTICS

UID = "glassbox-heads"
_HEAD = ("layer", "head")
# Without it the panels would show one column of nothing at the details model and layer.
_MATCHERS = ('phase="$phase"', 'head!=""')
_DRIFT = ("entropy_ratio", "sink_ratio", "top1_ratio")
_DIVERGING = dashboard.FieldColorModeId.CONTINUOUS_BL_YL_RD
_EXPLANATION = """\
A cell is one head: rows are layers, columns are heads; *Phase* and *Compare with* are chosen above.

**If "Heads with series" is red, these panels stay empty**: they need a series per head. Set
`export.prometheus.detail: head` in `glassbox.yaml`; it takes effect within two seconds. If `max_series` doesn't allow
it, glassbox falls back to `layer` and logs that.
"""


def _top() -> list[dashboard.Panel]:
    heads = promql.reduce("count", _HEAD, promql.select("glassbox_attention_entropy_ratio_count", *_MATCHERS))
    return [
        tile(
            "Heads with series",
            "(layer, head) pairs with series. None: export.prometheus.detail is not head, or nothing was measured.",
            Query(f"count({heads})"),
            "none",
            levels=Levels(RED, ((1, GREEN),)),
            no_value="set detail: head",
            size=(6, 4),
        ),
        note("Read me", "What this dashboard needs, and how it is read.", _EXPLANATION, size=(18, 4)),
    ]


def _drift(name: str) -> str:
    """Mean of now minus mean of before, per head."""
    now, before = (promql.mean(name, *_MATCHERS, by=_HEAD, offset=offset) for offset in ("", "$baseline"))
    return f"{now} - {before}"


def _matrix(name: str) -> dashboard.Panel:
    row = promql.statistic(name)
    if row.signed:
        query = promql.quantile(0.99, name, *_MATCHERS, by=_HEAD)
        return matrix(f"{name_of(row)}: p99", about(name), Query(query), unit(row))
    query = promql.mean(name, *_MATCHERS, by=_HEAD)
    return matrix(f"{name_of(row)}: mean", about(name), Query(query), unit(row), bounds=bounds(row))


def _drift_section() -> list[dashboard.Panel]:
    lists = [
        listing(
            f"{name_of(promql.statistic(name))}: top drifting heads",
            f"The 20 heads whose mean moved most since the time of comparison, up or down. {about(name)}",
            Query(f"topk(20, abs({_drift(name)}))"),
            "percentunit",
            _HEAD,
            value="change",
            no_value="nothing to compare with",
            size=(8, 10),
        )
        for name in _DRIFT
    ]
    matrices = [
        matrix(
            f"{name_of(promql.statistic(name))}: change",
            f"Mean of now minus mean at the time of comparison; blue fell, red rose. {about(name)}",
            Query(_drift(name)),
            "percentunit",
            bounds=(-0.5, 0.5),
            colors=_DIVERGING,
        )
        for name in _DRIFT
    ]
    return [*lists, *matrices]


def _baseline_section() -> list[dashboard.Panel]:
    """Against the baseline's file, not against some time ago."""
    text = "Population stability index of the recent rows of each head against the baseline of a healthy run"
    needs = "Needs baseline.path in glassbox.yaml."

    def of(metric: str, name: str) -> str:
        return promql.reduce("max", _HEAD, promql.select(metric, *_MATCHERS, f'statistic="{name}"'))

    return [
        *(
            matrix(
                f"{name_of(promql.statistic(name))}: index",
                f"{text}. Above 0.25 is by convention a major change, above {SETTINGS.drift_psi:g} the alert fires. "
                f"{needs}",
                Query(of("glassbox_attention_drift_psi", name)),
                "short",
                bounds=(0.0, 2 * SETTINGS.drift_psi),
                colors=dashboard.FieldColorModeId.CONTINUOUS_REDS,
            )
            for name in SETTINGS.drift_statistics
        ),
        *(
            matrix(
                f"{name_of(promql.statistic(name))}: shift of the mean",
                f"Mean now minus that of the baseline, in standard deviations; blue fell, red rose. {needs}",
                Query(of("glassbox_attention_drift_mean_shift", name)),
                "short",
                bounds=(-1.0, 1.0),
                colors=_DIVERGING,
            )
            for name in SETTINGS.drift_statistics
        ),
    ]


def _numbers() -> list[dashboard.Panel]:
    window_max = promql.select("glassbox_attention_max_logit_window_max", *_MATCHERS)
    rows, nonfinite = (
        promql.total(f"glassbox_attention_{name}_total", *_MATCHERS, by=_HEAD) for name in ("rows", "nonfinite_rows")
    )
    return [
        matrix(
            "Largest logit",
            "Largest attention score of the current window, exact.",
            Query(promql.reduce("max", _HEAD, window_max)),
            "short",
        ),
        matrix(
            "Non-finite rows",
            "Share of a head's rows with a NaN or infinite score. One bad head points at a kernel or at the weights, "
            "all heads of all layers at the host.",
            Query(f"{nonfinite} / {rows}"),
            "percentunit",
            bounds=(0.0, 1.0),
            colors=dashboard.FieldColorModeId.CONTINUOUS_REDS,
        ),
    ]


def page() -> Page:
    """One matrix per statistic; the less used are folded, so that nothing is asked for them."""
    shown = "entropy_ratio"
    others = [row.name for row in STATISTICS if row.exported and row.name != shown]
    return Page(
        uid=UID,
        title="glassbox / Heads",
        description="Every head of one model: matrices of layers by heads, and the heads that changed. "
        f"Without series per head: {NO_HEADS[0].lower()}{NO_HEADS[1:]}.",
        sections=[
            Section("Heads of $model_name", _top()),
            Section(name_of(promql.statistic(shown)), [_matrix(shown)]),
            Section("Drift against $baseline ago", _drift_section(), folded=True),
            Section("Drift from the baseline's file", _baseline_section(), folded=True),
            *(Section(name_of(promql.statistic(name)), [_matrix(name)], folded=True) for name in others),
            Section("Largest logits and non-finite rows", _numbers(), folded=True),
        ],
        one_model=True,
        extra_variables=[
            choice("phase", "Phase", "Rows of prompts (prefill) or generated tokens (decode).", ("decode", "prefill")),
            choice("baseline", "Compare with", "How long ago the heads are compared with.", ("1d", "1h", "6h", "7d")),
        ],
    )
