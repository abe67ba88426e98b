"""Quantiles of values of which only the bucket counts are known.

Pure numerics, for any number of places at once: the buckets are the last axis.
"""

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import Statistic


def quantiles(statistic: Statistic, counts: npt.ArrayLike, q: float) -> npt.NDArray[np.float64]:
    """The q-quantile, linear within its bucket as Prometheus's `histogram_quantile`.

    The lowest bucket begins at the statistic's lower bound and the highest ends at its upper bound; where it
    has none, the bucket's own finite end is the answer.

    Args:
        counts: [..., B], values per bucket (not cumulative).
        q: 0 to 1.

    Returns:
        [...]; NaN without values.
    """
    values = np.asarray(counts, np.float64)
    below = np.cumsum(values, axis=-1)
    rank = q * below[..., -1]
    # The first bucket that has values and reaches the rank.
    bucket = np.argmax((values > 0) & (below >= rank[..., None]), axis=-1)[..., None]
    count = np.take_along_axis(values, bucket, -1)[..., 0]
    before = np.take_along_axis(below, bucket, -1)[..., 0] - count
    lower = np.array([_bound(statistic.lower), *statistic.buckets])[bucket[..., 0]]
    upper = np.array([*statistic.buckets, _bound(statistic.upper)])[bucket[..., 0]]
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = lower + (upper - lower) * np.maximum(rank - before, 0.0) / count
    known = np.where(np.isnan(lower), upper, np.where(np.isnan(upper), lower, inside))
    return np.where(below[..., -1] > 0, known, np.nan)


def _bound(value: float | None) -> float:
    return np.nan if value is None else value
