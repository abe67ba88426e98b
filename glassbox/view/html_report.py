"""A run as one HTML page that needs nothing else: numbers, findings, and charts inside of it.

Owns what the page says; how it looks is `report.html.j2`, the charts are `charts`, the findings `notable`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from glassbox import __version__
from glassbox.core.statistics import PHASES, STATISTICS, Phase, Statistic
from glassbox.view import charts, heat
from glassbox.view.measured import Measured, exported_statistics
from glassbox.view.notable import find_notable
from glassbox.view.text import format_count, format_seconds, format_value, shape_words, title, unit
from glassbox.view.windows import Run


@dataclass(frozen=True)
class _Figure:
    label: str
    svg: str


def render(run: Run, sources: Sequence[Path]) -> str:
    """The page.

    Args:
        run: from `windows.read_run`.
        sources: files it was read from, of which the page shows the names.
    """
    total = run.total
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glassbox.view", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    begin_s = total.time_s - (total.window_s or 0.0)
    return environment.get_template("report.html.j2").render(
        model=total.model_name,
        version=__version__,
        begin=_moment(begin_s),
        end=_moment(total.time_s),
        sources=[path.name for path in sources],
        facts=_facts(run),
        warnings=_warnings(run),
        totals=_totals(total),
        findings=find_notable(total, run.stages),
        layer_tables=[_layer_table(total, phase) for phase in PHASES if total.rows_of(phase).any()],
        statistics=[_section(run, statistic) for statistic in STATISTICS if total.counts_of(statistic, None).any()],
    )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _facts(run: Run) -> list[tuple[str, str]]:
    total, engines = run.total, run.total.engines
    rates = sorted({window.engines.sample_rate for window in run.windows if window.engines.sample_rate is not None})
    between = f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else f"{rates[0]:g}" if rates else "?"
    return [
        ("model", total.model_name),
        ("engines", ", ".join(total.engine_names)),
        ("covers", format_seconds(total.window_s or 0.0)),
        ("windows", f"{run.lines - run.coarser:,}"),
        ("shape", shape_words(total)),
        ("steps measured", f"{engines.sampled_steps:,.0f} of {engines.steps:,.0f}"),
        ("sample rate", between),
        *((f"{phase} rows", f"{total.rows_of(phase).sum():,.0f}") for phase in PHASES),
        ("rows with NaN or Inf", f"{total.nonfinite.sum():,.0f}"),
    ]


def _warnings(run: Run) -> list[str]:
    found = []
    if run.total.detail != "head":
        found.append(
            f"The files have detail {run.total.detail}, so there are no heatmaps; "
            "with export.prometheus.detail: head in the server's YAML there would be."
        )
    if run.unreadable:
        found.append(f"{run.unreadable:,} lines couldn't be read and are left out.")
    if run.coarser:
        found.append(f"{run.coarser:,} windows of a coarser detail are left out.")
    if run.total.nonfinite.any():
        found.append(f"{run.total.nonfinite.sum():,.0f} rows had NaN or infinite scores; see below where.")
    return found


def _totals(total: Measured) -> list[list[str]]:
    whole = total.coarser("model")
    lines = []
    for statistic in STATISTICS:
        for phase in PHASES:
            rows = whole.counts_of(statistic, phase).sum()
            if rows:
                numbers = [
                    whole.mean(statistic, phase),
                    *(whole.quantile(statistic, phase, q) for q in (0.05, 0.5, 0.95)),
                ]
                lines.append(
                    [statistic.name, phase.value, format_count(rows), *(format_value(n.item()) for n in numbers)]
                )
    return lines


def _layer_table(total: Measured, phase: Phase) -> tuple[str, list[str], list[list[tuple[str, str, str]]]]:
    """Phase, headings, and a line for each layer: text, background and colour of each cell."""
    layers = total.coarser("model" if total.detail == "model" else "layer")
    statistics = [s for s in exported_statistics(phase) if layers.counts_of(s, phase).any()]
    values = [layers.mean(statistic, phase)[:, 0] for statistic in statistics]
    shares = [heat.shares(statistic, column) for statistic, column in zip(statistics, values, strict=True)]
    lines = []
    for i, layer in enumerate(layers.layers):
        line = [("all" if layer is None else str(layer), "", ""), (format_count(layers.rows_of(phase)[i, 0]), "", "")]
        for column, share in zip(values, shares, strict=True):
            known = not np.isnan(share[i])
            colours = (heat.hexadecimal(share[i]), heat.text_colour(share[i])) if known else ("", "")
            line.append((format_value(column[i]), *colours))
        lines.append(line)
    return phase.value, [statistic.name.replace("_", " ") for statistic in statistics], lines


def _section(run: Run, statistic: Statistic) -> dict[str, Any]:
    total = run.total
    pair = []
    if total.detail != "model":
        pair.append(_Figure("by layer", charts.inline_svg(charts.profile(total, statistic), f"{statistic.name}-layer")))
    if len(run.windows) > 1:
        figure = charts.development(run.windows, statistic)
        pair.append(_Figure("over time", charts.inline_svg(figure, f"{statistic.name}-time")))
    heatmaps = []
    if total.detail == "head":
        for phase in reversed(PHASES):
            if total.counts_of(statistic, phase).any():
                figure = charts.heatmap(total, statistic, phase)
                heatmaps.append(_Figure(f"of {phase} rows", charts.inline_svg(figure, f"{statistic.name}-{phase}")))
    return {
        "name": statistic.name,
        "title": title(statistic),
        "meaning": statistic.meaning,
        "unit": unit(statistic),
        "metric": statistic.metric if statistic.exported else "in no metric",
        "pair": pair,
        "heatmaps": heatmaps,
    }
