"""What several dashboards share: how a statistic is shown, and the tiles of health."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.panels import GREEN, RED, YELLOW, Levels, Query, heat, lines, tile
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.core.statistics import Statistic

SETTINGS: Final = RuleSettings()
RATE_UNIT: Final = "cps"

# What the operator reads out of a statistic; that its values are it is said by the table's `meaning`.
READING: Final[dict[str, str]] = {
    "entropy_ratio": "A sudden fall goes with broken checkpoints, bad quantisation and instability.",
    "effective_keys": "Few effective keys leave room for sparse attention and for evicting KV cache.",
    "max_logit": "Growth without bound comes before overflow. The query shows bucket bounds; values may be negative.",
    "top1_ratio": "Near 1 a row looks at one key only; that is normal for some heads, but a rise is not.",
    "sink_ratio": "A sudden drop betrays a lost BOS token, a wrong chat template or wrong RoPE.",
    "local_ratio": "Near 1 heads are short-sighted; a rise with long prompts means broken long context.",
    "distance_tokens": "How far back the model looks; depends on the length of the sequences.",
    "lookback_ratio": "Falls when the model stops using its context. Depends on prompt and answer length.",
}


def unit(row: Statistic) -> str:
    """Grafana's unit of a statistic."""
    return "percentunit" if row.upper == 1.0 else "short"


def bounds(row: Statistic) -> tuple[float | None, float | None]:
    """Of an axis."""
    return (0.0, 1.0) if row.upper == 1.0 else (None, None)


def about(name: str) -> str:
    """Description of a panel that shows a statistic."""
    return f"{promql.statistic(name).meaning} {READING[name]}"


def name_of(row: Statistic) -> str:
    """`sink_ratio` as a heading: "Sink ratio"."""
    return row.name.replace("_", " ").capitalize()


def phase_quantiles(
    name: str, *matchers: str, size: tuple[int, int] = (8, 8), exemplars: bool = False
) -> dashboard.Panel:
    """p50, p95 and p99 of a statistic, per phase; with `exemplars` rows of traced requests as dots."""
    row = promql.statistic(name)
    queries = [
        # All quantiles are of the same buckets: one of them brings the exemplars.
        Query(promql.quantile(q, name, *matchers, by=("phase",)), f"{{{{phase}}}} p{q * 100:g}", exemplars and q == 0.5)
        for q in promql.QUANTILES
    ]
    text = f"{about(name)} A dot is a row of a traced request: click it." if exemplars else about(name)
    return lines(f"{name_of(row)}: quantiles", text, queries, unit(row), bounds=bounds(row), size=size)


def band_medians(name: str, *matchers: str, size: tuple[int, int] = (8, 8)) -> dashboard.Panel:
    """The median of a statistic per band of ten layers."""
    row = promql.statistic(name)
    query = Query(promql.quantile(0.5, name, *matchers, by=(promql.BAND_LABEL,)), "layers {{layers}}")
    text = f"Median per band of ten layers: shows where in the model a change is. {row.meaning}"
    return lines(f"{name_of(row)}: median by layers", text, [query], unit(row), bounds=bounds(row), size=size)


def distribution(name: str, *matchers: str, size: tuple[int, int] = (8, 8)) -> dashboard.Panel:
    """A heatmap of a statistic."""
    row = promql.statistic(name)
    text = f"Rows per second in each bucket, all phases and layers chosen above. {row.meaning}"
    return heat(
        f"{name_of(row)}: distribution", text, Query(promql.buckets(name, *matchers), "{{le}}"), unit(row), size=size
    )


def statistic_line(name: str, *matchers: str, exemplars: bool = False) -> list[dashboard.Panel]:
    """A line of three panels: when (with `exemplars`: and by whom), where in the model, and how it is spread."""
    return [
        phase_quantiles(name, *matchers, exemplars=exemplars),
        band_medians(name, *matchers),
        distribution(name, *matchers),
    ]


def config_tile() -> dashboard.Panel:
    return tile(
        "Configuration",
        "Whether the last (re)load of glassbox.yaml succeeded in all workers; FAILED: the last good one is in force.",
        Query(f"min({promql.select('glassbox_config_last_reload_successful')})"),
        "none",
        names={"1": ("OK", GREEN), "0": ("FAILED", RED)},
        no_value="no glassbox",
    )


def layers_tile(kind: str, description: str) -> dashboard.Panel:
    """Share of the model's layers that are of a kind, "observed" or "certified"."""
    of_kind, observed, bypassed = (promql.select(f"glassbox_layers_{of}") for of in (kind, "observed", "bypassed"))
    return tile(
        f"Layers {kind}",
        description,
        Query(f"sum({of_kind}) / (sum({observed}) + sum({bypassed}))"),
        "percentunit",
        levels=Levels(RED, ((1e-9, YELLOW), (1.0, GREEN))),
        no_value="no glassbox",
    )


def sample_rate_tile() -> dashboard.Panel:
    return tile(
        "Sample rate",
        "Share of engine steps in which a layer is measured, after the overhead budget; the largest of the engines "
        "chosen.",
        Query(f"max({promql.select('glassbox_sample_rate')})"),
        "percentunit",
        no_value="no glassbox",
    )


def overhead_tile() -> dashboard.Panel:
    budget = SETTINGS.overhead_budget
    return tile(
        "Overhead",
        f"Time spent on measuring, as a share of time, of the busiest engine. The alert's budget is {budget:.0%}.",
        Query(f"max({promql.rate('glassbox_overhead_seconds_total')})"),
        "percentunit",
        levels=Levels(GREEN, ((budget / 2, YELLOW), (budget, RED))),
        decimals=2,
        no_value="no glassbox",
    )


def rows_tile(title: str, *matchers: str) -> dashboard.Panel:
    return tile(
        title,
        "Attention rows measured per second, over all layers and heads. 0: no traffic, or nothing is sampled.",
        Query(promql.total("glassbox_attention_rows_total", *matchers)),
        RATE_UNIT,
        no_value="no glassbox",
    )
