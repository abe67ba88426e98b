"""The demo's tables: what was measured as `rich` renderables. Owns wording and columns."""

from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glassbox.core.statistics import PHASES, Phase
from glassbox.view.measured import Measured, exported_statistics
from glassbox.view.text import format_value

_QUANTILE: Final = 0.95


def layer_table(measured: Measured, phase: Phase) -> Table:
    """One line per layer: rows, and the typical value of each statistic."""
    statistics = exported_statistics(phase)
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
    if measured.detail == "head":
        measured = measured.coarser("layer")
    rows = measured.rows_of(phase)
    values = [measured.typical(statistic, phase) for statistic in statistics]
    for i, layer in enumerate(measured.layers):
        cells = [format_value(column[i, 0]) for column in values]
        table.add_row("all" if layer is None else str(layer), f"{rows[i, 0]:,.0f}", *cells)
    return table


def totals_table(measured: Measured) -> Table:
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
    whole = measured.coarser("model")
    for statistic in exported_statistics():
        for phase in PHASES:
            if statistic not in exported_statistics(phase):
                continue
            count = whole.counts_of(statistic, phase).sum()
            numbers = [whole.mean(statistic, phase)]
            numbers += [whole.quantile(statistic, phase, q) for q in (0.5, _QUANTILE)]
            rows = f"{count:,.0f}" if count else Text("none", style="bold red")
            table.add_row(statistic.name, str(phase), rows, *(format_value(number.item()) for number in numbers))
    return table


def totals_line(measured: Measured) -> str:
    """Steps, rows, layers and cost in one line."""
    engines = measured.engines
    return (
        f"{engines.sampled_steps:,.0f} of {engines.steps:,.0f} steps measured, "
        f"{measured.rows.sum():,.0f} rows (a token in one layer and head), "
        f"{engines.layers_observed or 0:.0f} layers observed, "
        f"{measured.nonfinite.sum():,.0f} rows with NaN or Inf"
    )


def missing_samples(measured: Measured) -> list[str]:
    """`statistic (phase)` of every exported statistic that had no samples; empty if all had."""
    return [
        f"{statistic.name} ({phase})"
        for statistic in exported_statistics()
        for phase in PHASES
        if statistic in exported_statistics(phase) and not measured.counts_of(statistic, phase).any()
    ]


def report(measured: Measured) -> RenderableType:
    """Everything the demo prints about one scrape."""
    missing = missing_samples(measured)
    number = len(exported_statistics())
    verdict = (
        Text(f"No samples for {', '.join(missing)}.", style="bold red")
        if missing
        else Text(f"All {number} exported statistics had samples.", style="green")
    )
    layers = [layer_table(measured, phase) for phase in PHASES]
    return Group(*layers, totals_table(measured), Text(totals_line(measured)), verdict)
