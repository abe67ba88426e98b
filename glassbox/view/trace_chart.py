"""Charts of one traced request, by matplotlib (extra `tables`).

Owns what they show: tokens against tokens where the whole attention was kept, else a statistic by layer and head. How
charts look is `charts.py`'s.
"""

from collections.abc import Mapping
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.export.trace_document import mean
from glassbox.store.trace_record import RequestTrace
from glassbox.view.charts import STYLE, colormap, draw_matrix, matrix_of
from glassbox.view.measured import ViewError
from glassbox.view.text import title

# Of the picture: more tokens have no room for their names, and many more none at all.
_MOST_NAMES: Final = 160
_MOST_INCHES: Final = 40.0
_TEXT_LENGTH: Final = 16


def trace_chart(
    trace: RequestTrace, statistic: str = "entropy_ratio", words: Mapping[int, str] | None = None
) -> Figure:
    """The attention of the generated tokens; of a request that generated one alone, that of the measured prompt.

    Args:
        trace: of the request.
        statistic: of the chart that a trace without whole attention has.
        words: texts of tokens by position, as far as they are known.

    Raises:
        ViewError: there is no such statistic, or no row.
    """
    rows = np.flatnonzero(trace.decode())
    rows = rows if rows.size else np.arange(len(trace.positions))
    if not rows.size or not trace.layers or not trace.heads:
        raise ViewError(f"the trace of {trace.request_id} has no rows of these layers and heads; choose others")
    if trace.has_attention:
        return _tokens(trace, rows, words or {})
    return _places(trace, rows, statistic)


def _tokens(trace: RequestTrace, rows: np.ndarray[Any, Any], words: Mapping[int, str]) -> Figure:
    """Each row's attention to the tokens before it, mean over layers and heads; the first token, a sink, left out."""
    positions = trace.positions[rows]
    shares = np.full((len(rows), int(positions.max()) + 1), np.nan)
    for line, row in enumerate(rows.tolist()):
        found = mean(trace.attention(row), axis=(0, 1))
        start = int(trace.attention_starts[row])
        shares[line, start : start + len(found)] = found
    first = 1 if shares.shape[1] > 1 else 0
    shown = shares[:, first:]
    width, height = (min(3 + each * n, _MOST_INCHES) for each, n in ((0.2, shown.shape[1]), (0.22, len(rows))))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(width, 5.0), max(height - 1, 2.5)))
        axes = figure.add_subplot()
        image = axes.imshow(np.ma.masked_invalid(shown), cmap=colormap(), aspect="auto", interpolation="nearest")
        _name(axes.xaxis, range(first, shares.shape[1]), words, rotation=90)
        _name(axes.yaxis, positions.tolist(), words)
        if trace.prompt_len > first:
            axes.axvline(trace.prompt_len - first - 0.5, color="tab:blue", linewidth=1)
        axes.set_xlabel("token attended to" + (" (the first one, a sink, left out)" if first else ""))
        axes.set_ylabel("token")
        axes.set_title(f"Attention of {_plain(trace.request_id)}, mean over layers and heads")
        figure.colorbar(image, ax=axes, pad=0.01).set_label("share, 0 to 1")
    return figure


def _places(trace: RequestTrace, rows: np.ndarray[Any, Any], name: str) -> Figure:
    statistic = next((one for one in STATISTICS if one.name == name), None)
    if statistic is None:
        raise ViewError(f"statistic must be one of {', '.join(one.name for one in STATISTICS)}, got {name!r}")
    values = mean(trace.stats[rows][..., INDEX[name]], axis=0)
    if np.isnan(values).all():
        raise ViewError(f"the trace of {trace.request_id} has no values of {name}; choose another statistic")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(max(len(trace.layers) * 0.3, 7.5), 16.0), min(1.3 + len(trace.heads) * 0.3, 12.0)))
        axes = figure.add_subplot()
        draw_matrix(figure, axes, matrix_of(values, statistic), trace.layers, trace.heads)
        axes.set_title(f"{title(statistic)} of {_plain(trace.request_id)}, mean over {len(rows)} tokens")
    return figure


def _name(axis: Any, positions: Any, words: Mapping[int, str], **text: Any) -> None:
    """Each token's text, or its position, as far as there is room."""
    step = -(-len(positions) // _MOST_NAMES)
    names = [_plain(words.get(at, str(at))) for at in positions]
    axis.set_ticks(range(0, len(positions), step), names[::step], fontsize=7, **text)


def _plain(text: str) -> str:
    """On one line; between dollars matplotlib would read formulas."""
    shown = "".join(letter if letter.isprintable() else "\u00b7" for letter in text)
    return (shown if len(shown) <= 64 else f"{shown[:_TEXT_LENGTH]}...").replace("$", r"\$")
