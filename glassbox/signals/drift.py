"""Effect sizes: how far two histograms of the same statistic lie apart.

Pure numerics over bucket counts, for any number of places at once: the buckets are the last axis, all other axes
broadcast. Owns the formulas; which runs are compared and what is too much is their users' business.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import Statistic

# Jeffreys' prior of a multinomial: half a row in each bucket. An empty bucket would make the index infinite.
PSEUDO_COUNT: Final = 0.5


def population_stability_index(
    expected_counts: npt.ArrayLike, actual_counts: npt.ArrayLike, *, pseudo_count: float = PSEUDO_COUNT
) -> npt.NDArray[np.float64]:
    """Population stability index, sum of (a - e) ln(a / e) over the buckets, in nats; 0 if the shares are equal.

    e and a are the shares of the buckets, `pseudo_count` rows having been added to each. It is the symmetric
    Kullback-Leibler divergence (Jeffreys 1946). Rule of thumb (Siddiqi, Credit Risk Scorecards, 2006): below 0.1
    no change, 0.1 to 0.25 some, above 0.25 a lot. Few rows alone make it large: see `expected_index`.

    Args:
        expected_counts: [..., B], rows per bucket (not cumulative) of the run that is compared with.
        actual_counts: [..., B], of the other run.
        pseudo_count: rows added to each bucket, above 0.

    Returns:
        [...]; NaN where either side has no rows.

    Raises:
        ValueError: counts are negative or not finite, the numbers of buckets differ, or `pseudo_count` is not above 0.
    """
    if not pseudo_count > 0:
        raise ValueError(f"pseudo_count must be above 0, got {pseudo_count}; use {PSEUDO_COUNT}")
    expected, actual = _pair(expected_counts, actual_counts)
    e, a = (_shares(counts + pseudo_count) for counts in (expected, actual))
    index = np.sum((a - e) * np.log(a / e), axis=-1)
    return np.where(_has_rows(expected) & _has_rows(actual), index, np.nan)


def expected_index(
    expected_rows: npt.ArrayLike, actual_rows: npt.ArrayLike, num_buckets: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Index that two samples of the same distribution have on average: (B - 1)(1 / n + 1 / m).

    The asymptotic mean under no change (Yurdakul, Statistical Properties of Population Stability Index, 2018): an
    index of this size says nothing. For independent rows; those of one request resemble each other.

    Args:
        expected_rows: [...], n; actual_rows: [...], m.
        num_buckets: [...], B: how many buckets have rows on either side.

    Returns:
        [...]; infinite where either has none.
    """
    n, m = np.asarray(expected_rows, np.float64), np.asarray(actual_rows, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = 1.0 / n + 1.0 / m
        return np.where(np.isinf(noise), np.inf, (np.asarray(num_buckets, np.float64) - 1.0) * noise)


def standardised_mean_difference(
    expected_counts: npt.ArrayLike, actual_counts: npt.ArrayLike, midpoints: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Difference of the means in standard deviations: (mean_a - mean_e) / sqrt((var_a + var_e) / 2).

    Both variances weigh the same, however many rows each has (Austin 2009, Statistics in Medicine 28:3083). Each
    row counts as its bucket's midpoint, so what happens inside of a bucket is not seen. Cohen's rule of thumb: 0.2
    is small, 0.5 medium, 0.8 large.

    Args:
        expected_counts: [..., B], rows per bucket (not cumulative) of the run that is compared with.
        actual_counts: [..., B], of the other run.
        midpoints: [B], value that stands for each bucket, see `bucket_midpoints`.

    Returns:
        [...]; positive if the actual mean is larger, infinite if the means differ and nothing varies, NaN where
        either side has no rows.

    Raises:
        ValueError: counts are negative or not finite, or the numbers of buckets or midpoints differ.
    """
    expected, actual = _pair(expected_counts, actual_counts)
    values = np.asarray(midpoints, np.float64)
    if values.shape != expected.shape[-1:]:
        raise ValueError(f"midpoints must have the shape {expected.shape[-1:]}, one a bucket, got {values.shape}")
    (mean_e, var_e), (mean_a, var_a) = (_moments(counts, values) for counts in (expected, actual))
    difference, spread = mean_a - mean_e, np.sqrt((var_a + var_e) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / spread)


def bucket_midpoints(statistic: Statistic) -> npt.NDArray[np.float64]:
    """[B], the middle of each bucket of a statistic; where one has no end, its finite bound."""
    lower = statistic.buckets[0] if statistic.lower is None else statistic.lower
    upper = statistic.buckets[-1] if statistic.upper is None else statistic.upper
    edges = np.array([lower, *statistic.buckets, upper])
    return (edges[:-1] + edges[1:]) / 2


def _pair(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    pair = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if any(counts.ndim == 0 for counts in pair) or pair[0].shape[-1] != pair[1].shape[-1]:
        raise ValueError(f"both must have the same number of buckets, got shapes {pair[0].shape} and {pair[1].shape}")
    for counts in pair:
        if not np.all(np.isfinite(counts) & (counts >= 0)):
            raise ValueError("counts must be finite and not negative; give the rows of each bucket, not their change")
    return pair


def _has_rows(counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(counts.sum(axis=-1) > 0)


def _shares(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return counts / counts.sum(axis=-1, keepdims=True)


def _moments(counts: npt.NDArray[Any], values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mean and (population) variance of values of which `counts` fell on each; NaN without rows."""
    with np.errstate(invalid="ignore"):
        shares = _shares(counts)
    mean = np.sum(shares * values, axis=-1)
    return mean, np.sum(shares * (values - mean[..., None]) ** 2, axis=-1)
