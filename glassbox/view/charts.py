"""Charts of a run, by matplotlib (extra `plots`): heatmaps, profiles over layers, development over time.

Owns what a chart looks like. Figures are made without pyplot: no window system, no state that outlives them.
"""

import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from glassbox.core.statistics import PHASES, Phase, Statistic
from glassbox.view import heat
from glassbox.view.measured import Floats, Measured, ViewError, exported_statistics
from glassbox.view.text import format_count, format_seconds, phase_words, shape_words, title, unit

Value = Literal["mean", "p50", "p95", "rows"]
VALUES: Final[tuple[Value, ...]] = ("mean", "p50", "p95", "rows")
SUFFIXES: Final = (".png", ".svg")
_DPI: Final = 150
_PHASE_COLOURS: Final = {Phase.PREFILL: "#2c6fbb", Phase.DECODE: "#c8442e"}
_NOT_MEASURED: Final = "#d9d9d9"
STYLE: Final[Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.constrained_layout.use": True,
    # Text stays text: smaller, and it can be found and copied.
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Matrix:
    """One layer x head matrix, ready to be drawn."""

    values: Floats
    norm: Normalize
    unit: str


def heatmap(measured: Measured, statistic: Statistic, phase: Phase | None, value: Value = "mean") -> Figure:
    """Layers from left to right, heads from top to bottom, one statistic.

    Raises:
        ViewError: heads aren't told apart, or there are no rows.
    """
    matrix = _matrix(measured, statistic, phase, value)
    layers, heads = len(measured.layers), len(measured.heads)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_inches(layers, 7.5, 16.0), _inches(heads, 2.6, 11.0) + 1.3))
        axes = figure.add_subplot()
        draw_matrix(figure, axes, matrix, measured.layers, measured.heads)
        name = "Rows measured" if value == "rows" else title(statistic)
        what = (
            phase_words(phase)
            if value == "rows"
            else f"{_value_words(statistic, measured, value)} of {phase_words(phase)}"
        )
        axes.set_title(f"{name}: {what}", fontsize=13, pad=22)
        about = _about(measured, phase)
        axes.annotate(about, (0, 1), (0, 7), "axes fraction", "offset points", color="#555555", fontsize=8.5)
    return figure


def heatmaps(measured: Measured, phase: Phase | None, value: Value = "mean") -> Figure:
    """The same of every exported statistic, as small multiples.

    Raises:
        ViewError: heads aren't told apart, or there are no rows.
    """
    statistics = exported_statistics(phase)
    matrices = [_matrix(measured, statistic, phase, value) for statistic in statistics]
    layers, heads = len(measured.layers), len(measured.heads)
    across = 2 if layers >= heads else 4
    down = -(-len(statistics) // across)
    with matplotlib.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 9}):
        size = across * _inches(layers, 4.2, 8.0, 0.16), down * (_inches(heads, 1.7, 6.5, 0.16) + 0.75) + 0.6
        figure = Figure(figsize=size)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, statistic, matrix in zip(grid, statistics, matrices, strict=False):
            draw_matrix(figure, axes, matrix, measured.layers, measured.heads)
            axes.set_title(f"{title(statistic)}, {_value_words(statistic, measured, value)}")
        for axes in grid[len(statistics) :]:
            axes.set_axis_off()
        heading = f"Attention by layer and head: {phase_words(phase)}\n{_about(measured, phase)}"
        figure.suptitle(heading, x=0.012, ha="left", fontsize=11)
    return figure


def profile(measured: Measured, statistic: Statistic) -> Figure:
    """Layers from left to right: median of each phase, and between which values 90 % of its rows lie.

    At detail head the heads of a layer are added.
    """
    layers = measured.coarser("layer")
    at = np.array([layer if layer is not None else 0 for layer in layers.layers])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.3))
        axes = figure.add_subplot()
        for phase in PHASES:
            low, middle, high = (layers.quantile(statistic, phase, q)[:, 0] for q in (0.05, 0.5, 0.95))
            if not np.isnan(middle).all():
                _line(axes, at, low, middle, high, phase)
        _finish(axes, statistic, "by layer")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def development(windows: Sequence[Measured], statistic: Statistic) -> Figure:
    """Time from left to right, of all layers and heads together; otherwise as `profile`."""
    whole = [window.coarser("model") for window in windows]
    at = np.array([_middle(window) for window in whole], dtype="datetime64[ms]")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.3))
        axes = figure.add_subplot()
        for phase in PHASES:
            bands = [
                np.array([window.quantile(statistic, phase, q).item() for window in whole]) for q in (0.05, 0.5, 0.95)
            ]
            if not np.isnan(bands[1]).all():
                _line(axes, at, bands[0], bands[1], bands[2], phase)
        _finish(axes, statistic, "over time")
        # With more ticks at least, matplotlib finds none for some lengths (3 to 5 minutes or hours) and warns.
        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, by the suffix.

    Raises:
        ViewError: of another suffix.
        OSError: it can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ViewError(f"the picture's file must end with {' or '.join(SUFFIXES)}, got {path.name!r}")
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=_DPI)


def inline_svg(figure: Figure, salt: str) -> str:
    """The `<svg>` element, to stand in a page.

    Args:
        salt: another for each figure of a page, so that no two have the same ids.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    # matplotlib numbers its groups (`axes_1`) anew in each figure.
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    return text[text.index("<svg") :]


def _inches(cells: int, least: float, most: float, each: float = 0.3) -> float:
    return min(max(cells * each, least), most)


def _matrix(measured: Measured, statistic: Statistic, phase: Phase | None, value: Value) -> Matrix:
    if measured.detail != "head":
        measured.coarser("head")  # says what to do
    if statistic.decode_only and phase == Phase.PREFILL and value != "rows":
        raise ViewError(f"{statistic.name} has decode rows only; use --phase decode")
    if not measured.rows_of(phase).any():
        raise ViewError(
            f"{measured.source} has no {phase_words(phase)} yet; send the server requests, or use --phase all"
        )
    if value == "rows":
        rows = measured.rows_of(phase)
        values, words = (rows / measured.window_s, "rows a second") if measured.window_s else (rows, "rows")
        return Matrix(np.where(rows > 0, values, np.nan), Normalize(0, float(values.max())), words)
    if not measured.counts_of(statistic, phase).any():
        raise ViewError(f"{measured.source} has no values of {statistic.name} in {phase_words(phase)}")
    return matrix_of(_values(measured, statistic, phase, value), statistic)


def matrix_of(values: Floats, statistic: Statistic) -> Matrix:
    """Values [layers, heads] of a statistic, on its scale."""
    low, high = heat.limits(statistic, values)
    return Matrix(values, (LogNorm if heat.logarithmic(statistic) else Normalize)(low, high), unit(statistic))


def _values(measured: Measured, statistic: Statistic, phase: Phase | None, value: Value) -> Floats:
    if value == "mean" and _has_mean(measured, statistic):
        return measured.mean(statistic, phase)
    return measured.quantile(statistic, phase, 0.95 if value == "p95" else 0.5)


def _has_mean(measured: Measured, statistic: Statistic) -> bool:
    """A page has no sum of what may be negative; there the median stands for the mean."""
    return not np.isnan(measured.mean(statistic, None)).all()


def _value_words(statistic: Statistic, measured: Measured, value: Value) -> str:
    words = {"mean": "mean", "p50": "median", "p95": "95th percentile", "rows": "rows"}
    return words["p50"] if value == "mean" and not _has_mean(measured, statistic) else words[value]


def _about(measured: Measured, phase: Phase | None) -> str:
    rows = format_count(measured.rows_of(phase).sum())
    covers = f"in {format_seconds(measured.window_s)}" if measured.window_s else "since the server's start"
    # Between dollars matplotlib reads formulas.
    name = measured.model_name.replace("$", r"\$")
    return f"{name}, {shape_words(measured)}, {rows} rows {covers}"


def draw_matrix(
    figure: Figure, axes: Axes, matrix: Matrix, layers: Sequence[int | None], heads: Sequence[int | None]
) -> None:
    """A matrix with its colour bar, layers from left to right."""
    values = matrix.values.T  # heads x layers
    axes.set_facecolor(_NOT_MEASURED)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colormap(), norm=matrix.norm, aspect="auto", interpolation="nearest"
    )
    for axis, names in ((axes.xaxis, layers), (axes.yaxis, heads)):
        step = next(
            step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 10_000) if len(names) / step <= 16 or len(names) < 12
        )
        axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    # Lines between the cells, as long as the cells are large against them.
    if values.size <= 1500:
        axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)
    bar.set_label(matrix.unit)
    if isinstance(matrix.norm, LogNorm):
        # 20, 50, 100, not 2 x 10^1.
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.yaxis.set_minor_formatter("")
    if np.isnan(values).any():
        axes.text(1, -0.02, "grey: not measured", transform=axes.transAxes, ha="right", va="top", fontsize=7)


def colormap() -> Colormap:
    """Of every map; see heat.py."""
    stops = [heat.hexadecimal(share) for share in np.linspace(0, 1, 33)]
    return LinearSegmentedColormap.from_list("glassbox", stops)


def _line(axes: Axes, at: Any, low: Floats, middle: Floats, high: Floats, phase: Phase) -> None:
    colour = _PHASE_COLOURS[phase]
    axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    few = len(at) < 40
    axes.plot(at, middle, color=colour, linewidth=1.4, marker="o" if few else None, markersize=2.5, label=phase.value)


def _finish(axes: Axes, statistic: Statistic, how: str) -> None:
    axes.set_title(f"{title(statistic)} {how}")
    axes.set_ylabel(unit(statistic))
    if heat.logarithmic(statistic):
        axes.set_yscale("symlog", linthresh=1)
    elif (statistic.lower, statistic.upper) == (0.0, 1.0):
        axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="best", ncols=2)


def _middle(window: Measured) -> np.datetime64:
    seconds = window.time_s - (window.window_s or 0.0) / 2
    # matplotlib's dates have no zone: local time, as on the clock of who reads.
    return np.datetime64(int((seconds + time.localtime(seconds).tm_gmtoff) * 1000), "ms")
