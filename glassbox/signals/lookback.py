"""`lookback`: the features of Lookback Lens (Chuang et al. 2024, arXiv 2407.07071), the look-back ratios over spans.

The ratio of a generated token's row is the statistic lookback_ratio; it falls where an answer leaves its context.

Values: `mean` over the answer, `mean_NAME` over the answer's tokens in the request's span NAME, `lowest` and `highest`
mean over WINDOW consecutive rows of the answer; by token `window`, the mean over the WINDOW rows of the answer that end
there, as their sliding window is. Cost: streaming, from lookback_ratio.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, SignalValues, statistic
from glassbox.store.trace_record import RequestTrace

WINDOW: Final = 8


def window_means(ratios: Doubles, count: int = WINDOW) -> Doubles:
    """Mean over the `count` rows that end at each row, [T, ...]; NaN where there are fewer, or one has no value."""
    means = np.full(ratios.shape, np.nan)
    if len(ratios) >= count:
        windows = np.lib.stride_tricks.sliding_window_view(ratios, count, axis=0)
        means[count - 1 :] = windows.mean(axis=-1)
    return means


def mean_known(values: Doubles) -> Floats:
    """Mean over the first axis of what has a value; NaN if nothing has."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    decode = trace.decode()
    if not decode.any():
        return SignalValues(refused="no row of a generated token was measured; ask for an answer of two tokens or more")
    ratios, positions = statistic(trace, "lookback_ratio")[decode], trace.positions[decode]
    values = {"mean": mean_known(ratios)}
    for name, (start, end) in zip(trace.span_names, trace.span_ranges.tolist(), strict=True):
        within = (start <= positions) & (positions < end)
        if within.any():
            values[f"mean_{name}"] = mean_known(ratios[within])
    windows = window_means(ratios)
    finite = np.isfinite(windows)
    some = finite.any(axis=0)
    values["lowest"] = np.where(some, np.where(finite, windows, np.inf).min(axis=0), np.nan).astype(np.float32)
    values["highest"] = np.where(some, np.where(finite, windows, -np.inf).max(axis=0), np.nan).astype(np.float32)
    along = np.full(trace.stats.shape[:-1], np.nan, dtype=np.float32)
    along[decode] = windows
    return SignalValues(by_place=values, by_token={"window": along})
