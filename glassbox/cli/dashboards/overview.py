"""The dashboard Overview: is the model's attention as it was, and does glassbox work."""

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import (
    RATE_UNIT,
    SETTINGS,
    config_tile,
    layers_tile,
    overhead_tile,
    rows_tile,
    statistic_line,
)
from glassbox.cli.dashboards.layout import Page, Section
from glassbox.cli.dashboards.liveness_panels import liveness
from glassbox.cli.dashboards.output_panels import output_checks
from glassbox.cli.dashboards.panels import GREEN, RED, YELLOW, Levels, Query, lines, listing, tile

UID = "glassbox-overview"
_ALERTS = 'alertname=~"Glassbox.+", alertstate="firing"'
_NONFINITE = "glassbox_attention_nonfinite_rows_total"
_ROWS = "glassbox_attention_rows_total"
_WINDOW_MAX = "glassbox_attention_max_logit_window_max"
_PSI = "glassbox_attention_drift_psi"
_SHIFT = "glassbox_attention_drift_mean_shift"
_NO_BASELINE = "no baseline: set baseline.path in glassbox.yaml"
_ENGINE = ("instance", "engine")
_NAMED = "{{instance}} engine {{engine}}"


def _health() -> list[dashboard.Panel]:
    return [
        tile(
            "Alerts firing",
            "Alerts of glassbox that fire now. Needs the rules of deploy/prometheus/rules.yaml in Prometheus.",
            Query(f"count({promql.select('ALERTS', _ALERTS)})"),
            "none",
            levels=Levels(GREEN, ((1, RED),)),
            no_value="none",
        ),
        tile(
            "Non-finite rows",
            "Largest share of measured rows with a NaN or infinite score, in the time range. Above 0 is a fault.",
            Query(f"{promql.total(_NONFINITE)} / {promql.total(_ROWS)}"),
            "percentunit",
            levels=Levels(GREEN, ((1e-9, RED),)),
            reduce="max",
        ),
        config_tile(),
        tile(
            "Errors",
            "Errors of glassbox itself per second, the most in the time range; serving is not affected.",
            Query(promql.total("glassbox_errors_total")),
            RATE_UNIT,
            levels=Levels(GREEN, ((1e-9, YELLOW),)),
            reduce="max",
            no_value="none",
        ),
        layers_tile(
            "observed", "Share of the model's layers whose attention is observed; below 100 % some layers can't be."
        ),
        overhead_tile(),
    ]


def _attention() -> list[dashboard.Panel]:
    settings = SETTINGS
    return [
        tile(
            "Entropy",
            "Median entropy of the attention, all layers and phases. Normal depends on the model: watch changes.",
            Query(promql.quantile(0.5, "entropy_ratio")),
            "percentunit",
        ),
        tile(
            "Sink",
            "Mean share of the attention that goes to the first tokens of the sequence.",
            Query(promql.mean("sink_ratio")),
            "percentunit",
        ),
        tile(
            "Largest logit",
            f"Largest attention score in the time range. The alert's limit is {settings.logit_limit:g}.",
            Query(f"max({promql.select(_WINDOW_MAX)})"),
            "short",
            levels=Levels(GREEN, ((settings.logit_limit / 2, YELLOW), (settings.logit_limit, RED))),
            reduce="max",
            decimals=1,
        ),
        tile(
            "Saturated rows",
            f"Share of rows that give more than {settings.saturation_bound:g} of their attention to one key.",
            Query(promql.share_above("top1_ratio", settings.saturation_bound)),
            "percentunit",
        ),
        tile(
            "Lookback",
            "Mean attention per prompt key against attention per generated key, decode rows.",
            Query(promql.mean("lookback_ratio")),
            "percentunit",
        ),
        rows_tile("Rows measured"),
    ]


def _logits() -> list[dashboard.Panel]:
    settings = SETTINGS
    largest = promql.reduce("max", (promql.BAND_LABEL,), promql.banded(promql.select(_WINDOW_MAX)))
    share = f"{promql.total(_NONFINITE, by=('phase',))} / {promql.total(_ROWS, by=('phase',))}"
    saturated = promql.share_above("top1_ratio", settings.saturation_bound, by=("phase",))
    return [
        *statistic_line("max_logit"),
        lines(
            "Largest logit by layers",
            "Largest attention score of the current window, per band of ten layers; exact, unlike the quantiles.",
            [Query(largest, "layers {{layers}}")],
            "short",
            limit=settings.logit_limit,
        ),
        lines(
            "Non-finite rows by phase",
            "Share of measured rows with a NaN or infinite score: bad hosts, bad kernels, bad quantisation.",
            [Query(share, "{{phase}}")],
            "percentunit",
            bounds=(0.0, None),
        ),
        lines(
            "Saturated rows by phase",
            f"Share of rows that give more than {settings.saturation_bound:g} of their attention to one key.",
            [Query(saturated, "{{phase}}")],
            "percentunit",
            bounds=(0.0, 1.0),
        ),
        *statistic_line("top1_ratio"),
    ]


def _where() -> list[dashboard.Panel]:
    labels = ("model_name", "engine", "phase", "layer")
    nonfinite = f"topk(20, {promql.total(_NONFINITE, by=labels)} > 0)"
    return [
        listing(
            "Layers with non-finite rows",
            "The 20 layers with the most NaN or infinite rows per second; start here when the tile above is red.",
            Query(nonfinite),
            RATE_UNIT,
            labels,
            value="rows per second",
        ),
        listing(
            "Layers with the largest logits",
            "The 20 layers with the largest attention score of the current window.",
            Query(f"topk(20, {promql.reduce('max', labels, promql.select(_WINDOW_MAX))})"),
            "short",
            labels,
            value="largest logit",
            no_value="no rows",
        ),
    ]


def _drift() -> list[dashboard.Panel]:
    """Against the baseline of a healthy run."""
    settings = SETTINGS
    labels = ("model_name", "engine", "phase", "layer", "statistic")
    index = "Population stability index of the recent rows against the baseline"
    psi, shift = promql.select(_PSI), promql.select(_SHIFT)
    return [
        lines(
            "Drift by statistic",
            f"{index}, of the worst head. By convention below 0.1 is no change and above 0.25 a major one; the alert "
            f"fires above {settings.drift_psi:g} for {', '.join(settings.drift_statistics)}.",
            [Query(promql.reduce("max", ("statistic",), psi), "{{statistic}}")],
            "short",
            bounds=(0.0, None),
            limit=settings.drift_psi,
        ),
        lines(
            "Drift by layers",
            f"{index}, of the worst head and statistic, per band of ten layers.",
            [Query(promql.reduce("max", (promql.BAND_LABEL,), promql.banded(psi)), "layers {{layers}}")],
            "short",
            bounds=(0.0, None),
            limit=settings.drift_psi,
        ),
        lines(
            "Shift of the mean",
            "Mean of the recent rows minus that of the baseline, in standard deviations, of the heads that rose and "
            "fell most. 0.2 is small, 0.8 is large.",
            [
                Query(promql.reduce("max", ("statistic",), f"{shift} > 0"), "{{statistic}} up"),
                Query(promql.reduce("min", ("statistic",), f"{shift} < 0"), "{{statistic}} down"),
            ],
            "short",
        ),
        listing(
            "Layers farthest from the baseline",
            f"{index}: the 20 largest, by layer and statistic.",
            Query(f"topk(20, {promql.reduce('max', labels, psi)})"),
            "short",
            labels,
            value="index",
            no_value=_NO_BASELINE,
            size=(12, 8),
        ),
        listing(
            "Means farthest from the baseline",
            "Standardised shift of the mean, up or down: the 20 largest, by layer and statistic.",
            Query(f"topk(20, {promql.reduce('max', labels, f'abs({shift})')})"),
            "short",
            labels,
            value="standard deviations",
            no_value=_NO_BASELINE,
            size=(12, 8),
        ),
    ]


def _work() -> list[dashboard.Panel]:
    """What glassbox does and costs."""
    return [
        lines(
            "Rows measured by phase",
            "Attention rows measured per second, over all layers and heads.",
            [Query(promql.total(_ROWS, by=("phase",)), "{{phase}}")],
            RATE_UNIT,
            bounds=(0.0, None),
            stacked=True,
        ),
        lines(
            "Steps and sampled steps",
            "Engine steps per second, and those of which rows were measured.",
            [
                Query(promql.total("glassbox_steps_total"), "steps"),
                Query(promql.total("glassbox_sampled_steps_total"), "sampled steps"),
            ],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        lines(
            "Sample rate",
            "Share of steps that are measured; it falls by itself when the overhead budget would be exceeded.",
            [Query(promql.reduce("max", _ENGINE, promql.select("glassbox_sample_rate")), _NAMED)],
            "percentunit",
            bounds=(0.0, None),
            steps=True,
        ),
        lines(
            "Overhead",
            "Time spent on measuring, as a share of time, of the slowest rank.",
            [Query(promql.reduce("max", _ENGINE, promql.rate("glassbox_overhead_seconds_total")), _NAMED)],
            "percentunit",
            bounds=(0.0, None),
            limit=SETTINGS.overhead_budget,
        ),
        lines(
            "Dropped rows by reason",
            "Rows of measured steps that were left out, per second, e.g. above max_rows_per_step.",
            [Query(promql.total("glassbox_dropped_rows_total", by=("reason",)), "{{reason}}")],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        lines(
            "Errors by stage",
            "Errors of glassbox itself per second; serving is not affected.",
            [Query(promql.total("glassbox_errors_total", by=("stage",)), "{{stage}}")],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
    ]


def _setup() -> list[dashboard.Panel]:
    """What glassbox runs with."""
    return [
        lines(
            "Layers",
            "Layers of the model whose attention is observed, and those where it can't be.",
            [
                Query(promql.reduce("sum", _ENGINE, promql.select("glassbox_layers_observed")), f"{_NAMED} observed"),
                Query(promql.reduce("sum", _ENGINE, promql.select("glassbox_layers_bypassed")), f"{_NAMED} bypassed"),
            ],
            "none",
            bounds=(0.0, None),
            steps=True,
        ),
        lines(
            "Configuration reloads",
            "1 where the last (re)load of glassbox.yaml succeeded, 0 where the last good one is in force.",
            [Query(promql.reduce("min", _ENGINE, promql.select("glassbox_config_last_reload_successful")), _NAMED)],
            "none",
            bounds=(0.0, 1.0),
            steps=True,
        ),
        tile(
            "Last reload",
            "When the configuration was last (re)loaded.",
            Query(f"max({promql.select('glassbox_config_last_reload_timestamp_seconds')}) * 1000"),
            "dateTimeFromNow",
            no_value="no glassbox",
            size=(8, 8),
        ),
        listing(
            "Versions",
            "Versions of glassbox and vLLM, and the observed attention backend, of every engine.",
            Query(promql.select("glassbox_build_info")),
            "none",
            ("job", "instance", "model_name", "engine", "version", "vllm_version", "backend"),
            sort=False,
            value=None,
            no_value="no glassbox",
            size=(24, 6),
        ),
        listing(
            "Workers",
            "Which ranks are exported where: of an engine over several nodes each node shows its own.",
            Query(promql.select("glassbox_worker_info")),
            "none",
            ("job", "instance", "model_name", "engine", "host", "rank", "layers", "heads"),
            sort=False,
            value=None,
            no_value="no glassbox",
            size=(24, 6),
        ),
    ]


def page() -> Page:
    """Its sections, most important first."""
    return Page(
        uid=UID,
        title="glassbox / Overview",
        description="The attention of the models that vLLM serves: health first, then each statistic by phase, "
        "by band of layers and as a distribution; at the end glassbox itself.",
        sections=[
            Section("Health: red needs a look", _health()),
            Section("Is it right?", output_checks()),
            Section("Attention now", _attention()),
            Section("Entropy and sink", [*statistic_line("entropy_ratio"), *statistic_line("sink_ratio")]),
            Section("Logits and saturation", _logits()),
            Section("Where", _where()),
            Section("Drift from the baseline", _drift()),
            Section(
                "Reach: keys, distance, locality, lookback",
                [
                    panel
                    for name in ("effective_keys", "distance_tokens", "local_ratio", "lookback_ratio")
                    for panel in statistic_line(name)
                ],
                folded=True,
            ),
            Section("glassbox itself", [*_work(), *liveness(), *_setup()]),
        ],
    )
