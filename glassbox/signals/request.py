"""Request-level signals, computed from a trace in numpy.

Owns the formulas. With rows t (kept positions), layers l, heads h, and the statistics of `glassbox/core/statistics.py`;
decode rows are those of generated tokens. A value that was not measured or not finite is left out of every mean.

entropy_mean, lookback_mean: mean over decode rows, layers and heads of entropy_ratio and lookback_ratio.
entropy_trend, lookback_trend: slope, by least squares, of the rows' means over layers and heads against the position,
    per 100 tokens. The look-back ratio is that of Lookback Lens (Chuang et al. 2024, arXiv 2407.07071): it falls where
    an answer leaves its context behind.
saturated_ratio: share of decode rows, layers and heads whose top1_ratio is above SATURATED_ABOVE.
focus: of each named span, the attention of the last prompt token to the span's positions, mean over the chosen heads:
    the focus score of Attention Tracker (Hung et al. 2024, arXiv 2411.00348), there over the instruction and over
    "important heads" found beforehand; all kept heads unless others are named.
llm_check: of each layer, mean over heads and decode rows of ln p of the row's own key (self_logprob): the attention
    score of LLM-Check (Sriramanan et al., NeurIPS 2024), the log-determinant of the lower-triangular attention matrix
    over its size. There it is summed over heads; the mean keeps models comparable.
"""

from collections.abc import Collection
from typing import Final, TypedDict

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import INDEX
from glassbox.signals import focus
from glassbox.signals.values import finite_mean
from glassbox.store.trace_record import RequestTrace

SATURATED_ABOVE: Final = 0.95
_TREND_TOKENS: Final = 100


class Signals(TypedDict):
    """Of one request; None where there is no row to compute it from. Units as in the module's docstring."""

    decode_rows: int
    entropy_mean: float | None
    entropy_trend: float | None
    lookback_mean: float | None
    lookback_trend: float | None
    saturated_ratio: float | None
    focus: dict[str, float]
    llm_check: dict[int, float]


def request_signals(trace: RequestTrace, focus_heads: Collection[tuple[int, int]] | None = None) -> Signals:
    """Signals of a traced request, as far as its rows go; for a running one of what there is so far.

    Args:
        trace: of the request.
        focus_heads: (layer, head), global indices, over which `focus` is taken; None is all that the trace has, and
            those that it lacks are left out.

    Returns:
        `focus` by span name, of spans whose row was measured; `llm_check` by global layer index.
    """
    decode = trace.decode()
    stats, positions = trace.stats[decode], trace.positions[decode]
    entropy, lookback = stats[..., INDEX["entropy_ratio"]], stats[..., INDEX["lookback_ratio"]]
    top1 = stats[..., INDEX["top1_ratio"]]
    own = stats[..., INDEX["self_logprob"]]
    known = ~np.isnan(top1)
    llm_check = {layer: _mean(own[:, i]) for i, layer in enumerate(trace.layers)}
    return Signals(
        decode_rows=len(positions),
        entropy_mean=_mean(entropy),
        entropy_trend=_trend(positions, entropy),
        lookback_mean=_mean(lookback),
        lookback_trend=_trend(positions, lookback),
        saturated_ratio=float((top1[known] > SATURATED_ABOVE).mean()) if known.any() else None,
        focus=_focus(trace, focus_heads),
        llm_check={layer: value for layer, value in llm_check.items() if value is not None},
    )


def _mean(values: npt.NDArray[np.float32]) -> float | None:
    mean = finite_mean(values)
    return None if np.isnan(mean) else mean


def _trend(positions: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> float | None:
    """Slope per 100 tokens of the means of values [T, L, H]; None with fewer than two rows that have one."""
    means = [_mean(row) for row in values]
    points = [(float(x), y) for x, y in zip(positions, means, strict=True) if y is not None]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    x -= x.mean()
    return float(_TREND_TOKENS * (x @ (y - y.mean())) / (x @ x))


def _focus(trace: RequestTrace, heads: Collection[tuple[int, int]] | None) -> dict[str, float]:
    means = focus.compute(trace, heads).of_request
    found = {name: means.get(f"mass_{name}", np.nan) for name in trace.span_names}
    return {name: mean for name, mean in found.items() if not np.isnan(mean)}
