"""Area under the receiver operating characteristic of many features at once, with its intervals, in numpy.

Owns the formulas. For a feature with values v and labels 0 and 1 it is the share of pairs (a positive, a negative) in
which the positive has the larger value, equal ones counting half: 0.5 tells nothing, 0 as much as 1. NaN is "no value"
and left out of its feature.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]
# Numbers of a block of permutations x features: 64 MB.
_BLOCK: Final = 1 << 23
# Of an interval.
LEVEL: Final = 0.95


def midranks(values: npt.NDArray[np.float32]) -> Doubles:
    """Ranks from 1 on of each column of values [n, F], equal ones at their mean; 0 where there is no value."""
    ranks = np.zeros(values.shape)
    for f in range(values.shape[1]):
        known = np.isfinite(values[:, f])
        _, which, counts = np.unique(values[known, f], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks[known, f] = (last - (counts - 1) / 2)[which]
    return ranks


def auroc(values: npt.NDArray[np.float32], labels: Labels) -> Doubles:
    """Of each of the F columns of values [n, F]; NaN where one kind of label has no value."""
    ranks = midranks(values)
    return _of_ranks(ranks, (labels == 1)[None].astype(np.float64))[0]


def _of_ranks(ranks: Doubles, positive: Doubles) -> Doubles:
    """[B, F] of midranks [n, F] and B labellings [B, n] of 0 and 1."""
    pairs, positives = _pairs(ranks, positive)
    wins = positive @ ranks - positives * (positives + 1) / 2
    return np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def _pairs(ranks: Doubles, positive: Doubles) -> tuple[Doubles, Doubles]:
    known = (ranks > 0).astype(np.float64)
    positives = positive @ known
    return positives * (known.sum(axis=0) - positives), positives


def within_strata(values: npt.NDArray[np.float32], labels: Labels, strata: npt.NDArray[np.intp]) -> Doubles:
    """The same over pairs of one stratum only; NaN where no stratum has any."""
    wins, pairs = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for stratum in np.unique(strata):
        chosen = strata == stratum
        positive = (labels[chosen] == 1)[None].astype(np.float64)
        ranks = midranks(values[chosen])
        of_stratum = _pairs(ranks, positive)[0][0]
        wins += np.nan_to_num(_of_ranks(ranks, positive)[0]) * of_stratum
        pairs += of_stratum
    return np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def length_strata(lengths: npt.NDArray[np.int64], count: int = 5) -> npt.NDArray[np.intp]:
    """Which of `count` strata of about equal size each length falls into; equal lengths into the same."""
    bounds = np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(bounds, lengths, side="left")


def bootstrap_weights(
    labels: Labels, groups: Sequence[str] | None, count: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """How often each of n samples is drawn in each of `count` resamplings, [count, n].

    Positives and negatives are drawn apart, so that their numbers stay; with groups whole groups are drawn.
    """
    n = len(labels)
    if groups is not None:
        _, which = np.unique(np.array(groups), return_inverse=True)
        number = int(which.max()) + 1
        drawn = rng.multinomial(number, np.full(number, 1 / number), size=count)
        return drawn[:, which].astype(np.float32)
    weights = np.zeros((count, n), dtype=np.float32)
    for label in (0, 1):
        (of_label,) = np.nonzero(labels == label)
        weights[:, of_label] = rng.multinomial(len(of_label), np.full(len(of_label), 1 / len(of_label)), size=count)
    return weights


def bootstrap_interval(
    values: npt.NDArray[np.float32], labels: Labels, weights: npt.NDArray[np.float32], level: float = LEVEL
) -> Doubles:
    """Percentile interval of each column's area, [F, 2].

    NaN where fewer than two positives or two negatives have a value: one sample, drawn again, is always itself.
    """
    found = np.full((values.shape[1], 2), np.nan)
    for f in range(values.shape[1]):
        known = labels[np.isfinite(values[:, f])]
        if min((known == 1).sum(), (known == 0).sum()) < 2:
            continue
        found[f] = _interval(*_resampled(values[:, f], labels, weights), level)
    return found


def interval_within_strata(
    values: npt.NDArray[np.float32],
    labels: Labels,
    strata: npt.NDArray[np.intp],
    weights: npt.NDArray[np.float32],
    level: float = LEVEL,
) -> Doubles:
    """The same of one feature [n] over pairs of one stratum only, [2]."""
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        rows = strata == stratum
        of_stratum = _resampled(values[rows], labels[rows], weights[:, rows])
        wins += of_stratum[0]
        pairs += of_stratum[1]
    return _interval(wins, pairs, level)


def _interval(wins: Doubles, pairs: Doubles, level: float) -> Doubles:
    areas = wins[pairs > 0] / pairs[pairs > 0]
    if not len(areas):
        return np.full(2, np.nan)
    return np.quantile(areas, [(1 - level) / 2, (1 + level) / 2]).astype(np.float64)


def _resampled(
    values: npt.NDArray[np.float32], labels: Labels, weights: npt.NDArray[np.float32]
) -> tuple[Doubles, Doubles]:
    """Won pairs and pairs, [B] each, of one feature [n] with weights [B, n] of its samples."""
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    ordered, positive = values[order], labels[order] == 1
    drawn = weights[:, order].astype(np.float64)
    # Weight of the negatives up to each place, with a 0 before the first.
    below = np.zeros((len(weights), len(order) + 1))
    np.cumsum(drawn * ~positive, axis=1, out=below[:, 1:])
    first = np.searchsorted(ordered, ordered[positive], side="left")
    last = np.searchsorted(ordered, ordered[positive], side="right")
    wins = (drawn[:, positive] * (below[:, first] + below[:, last])).sum(axis=1) / 2
    return wins, drawn[:, positive].sum(axis=1) * below[:, -1]


def permuted_labels(labels: Labels, groups: Sequence[str] | None, count: int, rng: np.random.Generator) -> Doubles:
    """Labels as chance might have given them, [count, n] of 0 and 1.

    Without groups any order is as likely. Labels that differ within groups are exchanged within them; where none do,
    they are exchanged between whole groups.
    """
    n = len(labels)
    if groups is None:
        return rng.permuted(np.tile(labels == 1, (count, 1)), axis=1).astype(np.float64)
    names, which = np.unique(np.array(groups), return_inverse=True)
    members = [np.flatnonzero(which == g) for g in range(len(names))]
    mixed = [rows for rows in members if len(set(labels[rows])) > 1]
    if not mixed:
        of_groups = np.array([labels[rows[0]] == 1 for rows in members])
        return rng.permuted(np.tile(of_groups, (count, 1)), axis=1)[:, which].astype(np.float64)
    permuted = np.tile((labels == 1).astype(np.float64), (count, 1))
    for rows in mixed:
        permuted[:, rows] = rng.permuted(permuted[:, rows], axis=1)
    assert permuted.shape == (count, n)
    return permuted


def corrected_p(values: npt.NDArray[np.float32], labels: Labels, permuted: Doubles) -> Doubles:
    """For each column how often chance makes any column as telling as it is (Westfall and Young's max statistic).

    Features are compared by their area's distance from 0.5 over the standard deviation that it has by chance. So many
    heads as there are, and alike as they are, the chance that any of them has a p below 0.05 without telling anything
    is 0.05.
    """
    ranks = midranks(values)
    observed = np.abs(_standardised(ranks, (labels == 1)[None].astype(np.float64))[0])
    highest = np.zeros(len(permuted))
    step = max(1, _BLOCK // len(permuted))
    for start in range(0, values.shape[1], step):
        by_chance = np.abs(_standardised(ranks[:, start : start + step], permuted))
        highest = np.fmax(highest, np.nan_to_num(by_chance).max(axis=1))
    above = (highest[:, None] >= observed[None] - 1e-12).sum(axis=0)
    return np.where(np.isnan(observed), np.nan, (1 + above) / (1 + len(permuted)))


def _standardised(ranks: Doubles, positive: Doubles) -> Doubles:
    """[B, F] distances from 0.5, in standard deviations of the area by chance."""
    pairs, _ = _pairs(ranks, positive)
    known = (ranks > 0).sum(axis=0)
    deviation = np.sqrt(np.divide(known + 1, 12 * pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0))
    distances: Doubles = (_of_ranks(ranks, positive) - 0.5) / deviation
    return distances
