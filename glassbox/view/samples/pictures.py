"""Pictures of an analysis, by matplotlib: maps of layers and heads, the best of each layer, and distributions.

Owns what they look like, in the style of `view/charts.py`.
"""

from typing import Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glassbox.view.charts import STYLE
from glassbox.view.samples.analysis import Analysis, Telling

_POSITIVE, _NEGATIVE = "#c8442e", "#2c6fbb"
_NO_VALUE: Final = "#d9d9d9"
_SIZE: Final = (5.2, 2.7)
_MOST_POINTS: Final = 2000


def by_layer(analysis: Analysis) -> Figure:
    """Layers from left to right: the area of the most telling feature of each, with its interval."""
    best = analysis.best_of_layers()
    at = [one.feature.layer or 0 for one in best if one.feature is not None]
    # An area of 0.1 tells as much as one of 0.9: all are turned the same way.
    areas = np.array([[one.auroc, one.low, one.high] for one in best])
    turned = areas[:, 0] < 0.5
    areas[turned] = 1 - areas[turned][:, [0, 2, 1]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_subplot()
        axes.axhline(0.5, color="#999999", linewidth=0.8)
        axes.errorbar(
            at,
            areas[:, 0],
            np.abs(areas[:, 1:].T - areas[:, 0]),
            fmt="o",
            markersize=3,
            linewidth=1,
            color=_POSITIVE,
        )
        axes.set_title("Most telling head of each layer")
        axes.set_xlabel("layer")
        axes.set_ylabel("AUROC (or 1 less it)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def area_map(analysis: Analysis, group: str) -> Figure:
    """Layers from left to right, heads from top to bottom: the area of one signal's value."""
    found = [one for one in analysis.features if one.feature is not None and one.feature.group == group]
    places = [(one.feature.layer or 0, one.feature.head or 0) for one in found if one.feature is not None]
    layers, heads = sorted({layer for layer, _ in places}), sorted({head for _, head in places})
    values = np.full((len(heads), len(layers)), np.nan)
    for one, (layer, head) in zip(found, places, strict=True):
        values[heads.index(head), layers.index(layer)] = one.auroc
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_SIZE[0], min(max(1.4 + 0.14 * len(heads), 2.0), 8.0)))
        axes = figure.add_subplot()
        axes.set_facecolor(_NO_VALUE)
        image = axes.imshow(
            np.ma.masked_invalid(values), cmap="RdBu_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        for axis, names in ((axes.xaxis, layers), (axes.yaxis, heads)):
            step = -(-len(names) // 12)
            axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        axes.set_title(group.replace("_", " "))
        axes.set_xlabel("layer")
        axes.set_ylabel("head")
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, pad=0.02).set_label("AUROC")
    return figure


def distribution(analysis: Analysis, telling: Telling) -> Figure:
    """Values of one feature, of positives and of negatives; beside them against the length."""
    table = analysis.table
    column = [feature.name for feature in table.features].index(telling.name)
    values, tokens = table.values[:, column], table.lengths.sum(axis=1)
    kinds = [(f"label {word}", table.labels == label, colour) for label, word, colour in _KINDS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.3))
        for at, (name, chosen, colour) in enumerate(kinds):
            known = np.flatnonzero(chosen & np.isfinite(values))
            _violin(left, at, values[known], colour)
            some = known[:: -(-len(known) // _MOST_POINTS)]
            right.scatter(tokens[some], values[some], s=6, alpha=0.6, linewidths=0, color=colour, label=name)
        left.set_xticks([0, 1], ["false", "true"])
        left.set_xlabel("label")
        feature = telling.feature
        place = "" if feature is None or feature.layer is None else f", layer {feature.layer}, head {feature.head}"
        group = telling.name if feature is None else feature.group
        figure.suptitle(f"{group.replace('_', ' ')}{place}: AUROC {telling.auroc:.3f}", x=0.02, ha="left", fontsize=9)
        right.set_xlabel("tokens of prompt and answer")
        right.legend(frameon=False, fontsize=7)
    return figure


_KINDS: Final = ((0, "false", _NEGATIVE), (1, "true", _POSITIVE))


def _violin(axes: Axes, at: int, values: "np.ndarray[tuple[int], np.dtype[np.float32]]", colour: str) -> None:
    if len(values) > 1 and values.min() < values.max():
        parts = axes.violinplot(values, [at], widths=0.8, showextrema=False)
        for body in parts["bodies"]:  # type: ignore[attr-defined]
            body.set(facecolor=colour, alpha=0.35)
    rng = np.random.default_rng(0)  # where a dot lies beside its violin's axis says nothing
    some = values[:: -(-len(values) // 200)] if len(values) else values
    axes.scatter(at + rng.uniform(-0.12, 0.12, len(some)), some, s=4, color=colour, alpha=0.6, linewidths=0)
