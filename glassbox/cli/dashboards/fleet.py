"""The dashboard Fleet: of hundreds of servers, which are not as the others are.

Asks for recorded series alone where a statistic is concerned: the panels of Overview add up the histograms of all
chosen servers, which Prometheus refuses from some hundreds of servers on (docs/performance.md, "A fleet").
"""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import SETTINGS, about, bounds, name_of, overhead_tile, unit
from glassbox.cli.dashboards.layout import Page, Section
from glassbox.cli.dashboards.panels import GREEN, RED, YELLOW, Levels, Query, lines, listing, tile
from glassbox.cli.dashboards.rule_model import LAYER_LABELS, MODEL_LABELS, Recording
from glassbox.cli.dashboards.rules import window_recordings

UID: Final = "glassbox-fleet"
# What this dashboard can't do without, for the panels that would be empty.
NO_RULES: Final = "no rules: load deploy/prometheus/rules.yaml"
_ALERTS: Final = 'alertname=~"Glassbox.+", alertstate="firing"'
_WINDOWS: Final = window_recordings(SETTINGS)
_SERVER: Final = ("instance", "model_name", "engine")
_SERVER_PHASE: Final = (*_SERVER, "phase")
_MODEL_PHASE: Final = ("model_name", "phase")


def _others(window: Recording, operator: str) -> str:
    """A window's record against the mean of the chosen servers of its model, in the same layer if it has layers."""
    labels = ", ".join((*MODEL_LABELS, "layer") if window.labels == LAYER_LABELS else MODEL_LABELS)
    record = promql.select(window.record)
    return f"{record} {operator} on ({labels}) group_left () avg by ({labels}) ({record})"


def _health() -> list[dashboard.Panel]:
    engines = promql.reduce("count", (), promql.select("glassbox_sample_rate"))
    measured = promql.reduce("count", ("job", *_SERVER), promql.select(_WINDOWS["entropy"].record))
    return [
        tile("Engines", "Engines that glassbox is in.", Query(engines), "none", no_value="no glassbox"),
        tile(
            "Engines with enough rows",
            f"Engines of which a layer had {SETTINGS.min_rows} rows in the last {SETTINGS.window}: the others are "
            "compared with nothing.",
            Query(f"count({measured})"),
            "none",
            no_value=NO_RULES,
        ),
        tile(
            "Engines with an alert",
            "Engines of which at least one alert of glassbox fires now.",
            Query(f"count({promql.reduce('count', ('job', *_SERVER), promql.select('ALERTS', _ALERTS))})"),
            "none",
            levels=Levels(GREEN, ((1, RED),)),
            no_value="none",
        ),
        tile(
            "Engines with an old configuration",
            "Engines whose configuration file was edited but is not valid.",
            Query(f"count({promql.select('glassbox_config_last_reload_successful')} == 0)"),
            "none",
            levels=Levels(GREEN, ((1, YELLOW),)),
            no_value="none",
        ),
        tile(
            "Layers not observed",
            "Layers whose attention is not observed, over all engines.",
            Query(promql.reduce("sum", (), promql.select("glassbox_layers_bypassed"))),
            "none",
            levels=Levels(GREEN, ((1, YELLOW),)),
            no_value="no glassbox",
        ),
        overhead_tile(),
    ]


def _farthest(name: str, statistic: str, title: str) -> dashboard.Panel:
    """The servers that have least of what the others of their model have."""
    least = promql.reduce("min", _SERVER_PHASE, _others(_WINDOWS[name], "/"))
    return listing(
        title,
        "The 20 engines with the smallest share of what the chosen servers of their model have on average, in the "
        f"layer that is farthest from it. {about(statistic)}",
        Query(f"bottomk(20, {least})"),
        "percentunit",
        _SERVER_PHASE,
        sort=False,
        value="of the others' mean",
        no_value=NO_RULES,
    )


def _odd() -> list[dashboard.Panel]:
    saturated = promql.reduce("max", _SERVER_PHASE, _others(_WINDOWS["saturated"], "-"))
    logits = promql.reduce("max", _SERVER_PHASE, promql.select(_WINDOWS["max"].record))
    overhead = promql.reduce("max", _SERVER, promql.rate("glassbox_overhead_seconds_total"))
    age = promql.reduce("max", (*_SERVER, "rank", "host"), promql.select("glassbox_snapshot_age_seconds"))
    return [
        listing(
            "Alerts",
            "Alerts of glassbox that fire now, and where.",
            Query(promql.select("ALERTS", _ALERTS)),
            "none",
            ("alertname", "severity", *_SERVER_PHASE),
            sort=False,
            value=None,
        ),
        _farthest("entropy", "entropy_ratio", "Least entropy against the others"),
        _farthest("sink", "sink_ratio", "Least sink against the others"),
        _farthest("lookback", "lookback_ratio", "Least lookback against the others"),
        listing(
            "Most saturated against the others",
            f"Share of rows with more than {SETTINGS.saturation_bound:g} of their attention on one key, above the mean "
            "of the chosen servers of the model: the 20 engines with the most, in their worst layer.",
            Query(f"topk(20, {saturated})"),
            "percentunit",
            _SERVER_PHASE,
            value="above the others' mean",
            no_value=NO_RULES,
        ),
        listing(
            "Largest logits",
            f"The 20 engines with the largest attention score of the last {SETTINGS.window}.",
            Query(f"topk(20, {logits})"),
            "short",
            _SERVER_PHASE,
            value="largest logit",
            no_value=NO_RULES,
        ),
        listing(
            "Largest overhead",
            "The 20 engines that spend the largest share of their time on measuring.",
            Query(f"topk(20, {overhead})"),
            "percentunit",
            _SERVER,
            value="share of time",
            no_value="no glassbox",
        ),
        listing(
            "Oldest numbers",
            "The 20 workers that wrote what they measure longest ago; all that is shown of them is as old.",
            Query(f"topk(20, {age})"),
            "s",
            (*_SERVER, "rank", "host"),
            value="age",
            no_value="no glassbox",
        ),
    ]


def _mean(name: str, statistic: str) -> dashboard.Panel:
    row = promql.statistic(statistic)
    query = Query(promql.reduce("avg", _MODEL_PHASE, promql.select(_WINDOWS[name].record)), "{{model_name}} {{phase}}")
    text = f"Mean over the chosen servers of each model, of the last {SETTINGS.window}. {about(statistic)}"
    return lines(f"{name_of(row)} by model", text, [query], unit(row), bounds=bounds(row))


def page() -> Page:
    """Its sections, most important first."""
    return Page(
        uid=UID,
        title="glassbox / Fleet",
        description="Many servers: which of them are not as the others of their model are, and how the models are. "
        "Made of the recording rules, so that it can be asked for hundreds of servers at once.",
        sections=[
            Section("Health: red needs a look", _health()),
            Section("Servers that are not as the others", _odd()),
            Section(
                "Models",
                [_mean("entropy", "entropy_ratio"), _mean("sink", "sink_ratio"), _mean("lookback", "lookback_ratio")],
            ),
        ],
    )
