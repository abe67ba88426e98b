"""The demo's tables: a `Summary` as `rich` renderables. Owns wording, columns and number formats."""

import math
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glassbox.demo.summary import Distribution, Summary, exported_statistics
from glassbox.statistics import PHASES, Phase, Statistic

_QUANTILE: Final = 0.95


def format_value(value: float) -> str:
    """Three decimals below 1, fewer above, none from 100; `~0` for what would look like 0; `-` for no value."""
    if math.isnan(value):
        return "-"
    magnitude = abs(value)
    if 0 < magnitude < 0.0005:
        return "~0"
    if magnitude < 10:
        return f"{value:.3f}" if magnitude < 1 else f"{value:.2f}"
    return f"{value:.1f}" if magnitude < 100 else f"{value:,.0f}"


def typical(statistic: Statistic, distribution: Distribution) -> float:
    """The mean; for a statistic that may be negative (no sum is exported) the median."""
    if statistic.signed:
        return distribution.quantile(0.5, statistic.lower, statistic.upper)
    return distribution.mean


def layer_table(summary: Summary, phase: Phase) -> Table:
    """One line per layer: rows, and the typical value of each statistic."""
    statistics = [s for s in exported_statistics() if not (s.decode_only and phase != Phase.DECODE)]
    table = Table(
        title=f"{phase} rows, by layer: mean over rows and heads (max_logit: median)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("layer", justify="right", style="bold")
    table.add_column("rows", justify="right", style="dim")
    for statistic in statistics:
        table.add_column(statistic.name.replace("_", "\n", 1), justify="right")
    for layer in summary.layers:
        cells = [
            format_value(typical(s, summary.histograms.get((s.name, phase, layer), Distribution()))) for s in statistics
        ]
        table.add_row("all" if layer is None else str(layer), f"{summary.rows.get((phase, layer), 0):,.0f}", *cells)
    return table


def totals_table(summary: Summary) -> Table:
    """One line per statistic and phase, over all layers: rows, mean, median, 95th percentile."""
    table = Table(
        title="All layers (p50 and p95 interpolated in the buckets)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("statistic", style="bold")
    table.add_column("phase")
    for name in ("rows", "mean", "p50", "p95"):
        table.add_column(name, justify="right")
    for statistic in exported_statistics():
        for phase in PHASES:
            if statistic.decode_only and phase != Phase.DECODE:
                continue
            distribution = summary.over_layers(statistic, phase)
            ends = statistic.lower, statistic.upper
            quantiles = [distribution.quantile(share, *ends) for share in (0.5, _QUANTILE)]
            cells = [format_value(value) for value in (distribution.mean, *quantiles)]
            rows = f"{distribution.count:,.0f}" if distribution.count else Text("none", style="bold red")
            table.add_row(statistic.name, str(phase), rows, *cells)
    return table


def totals_line(summary: Summary) -> str:
    """Steps, rows, layers and cost in one line."""
    get = summary.scalars.get
    sampled, steps = get("glassbox_sampled_steps_total", 0), get("glassbox_steps_total", 0)
    return (
        f"{sampled:,.0f} of {steps:,.0f} steps measured, "
        f"{summary.total_rows:,.0f} rows (a token in one layer and head), "
        f"{get('glassbox_layers_observed', 0):.0f} layers observed, "
        f"{summary.nonfinite_rows:,.0f} rows with NaN or Inf"
    )


def missing_samples(summary: Summary) -> list[str]:
    """`statistic (phase)` of every exported statistic that had no samples; empty if all had."""
    return [
        f"{statistic.name} ({phase})"
        for statistic in exported_statistics()
        for phase in summary.phases_without_samples(statistic)
    ]


def report(summary: Summary) -> RenderableType:
    """Everything the demo prints about one scrape."""
    missing = missing_samples(summary)
    number = len(exported_statistics())
    verdict = (
        Text(f"No samples for {', '.join(missing)}.", style="bold red")
        if missing
        else Text(f"All {number} exported statistics had samples.", style="green")
    )
    layers = [layer_table(summary, phase) for phase in PHASES]
    return Group(*layers, totals_table(summary), Text(totals_line(summary)), verdict)
