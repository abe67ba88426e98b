"""Two runs or two models place by place: how much each statistic differs.

Owns which places are compared and how the differences are ordered; the effect sizes are `signals/drift.py`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from glassbox.core.statistics import PHASES, STATISTICS, Phase, Statistic
from glassbox.signals.drift import (
    bucket_midpoints,
    expected_index,
    population_stability_index,
    standardised_mean_difference,
)
from glassbox.view.measured import Measured, ViewError
from glassbox.view.text import shape_words

# With 300 rows on both sides chance alone exceeds its mean by 0.25 in one of a million comparisons (chi-square with 11
# degrees of freedom beyond 11 + 0.25 * 150), with 200 in one of 6,000; a run has thousands of comparisons.
MIN_ROWS: Final = 300


@dataclass(frozen=True)
class Difference:
    """One statistic in one phase at one place.

    Attributes:
        rows: measured in the first and in the second.
        values: mean (max_logit: median) of the first and of the second.
        index: population stability index.
        chance: index that so few rows have on average without any difference.
        shift: standardised mean difference, positive if the second has the larger mean.
    """

    statistic: Statistic
    phase: Phase
    layer: int | None
    head: int | None
    rows: tuple[float, float]
    values: tuple[float, float]
    index: float
    chance: float
    shift: float

    @property
    def excess(self) -> float:
        """What of the index isn't chance; by it differences are ordered and judged."""
        return self.index - self.chance

    def as_json(self) -> dict[str, Any]:
        """The same under the names that `glassbox diff --json` has."""
        return {
            "statistic": self.statistic.name,
            "phase": self.phase.value,
            "layer": self.layer,
            "head": self.head,
            "rows": [int(rows) for rows in self.rows],
            "values": [_finite(value) for value in self.values],
            "psi": self.index,
            "psi_by_chance": self.chance,
            "psi_excess": self.excess,
            "standardised_mean_difference": _finite(self.shift),
        }


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        differences: the largest first.
        skipped: of the places and statistics with rows, those with too few in one of the runs.
    """

    first: Measured
    second: Measured
    differences: tuple[Difference, ...]
    skipped: int

    def above(self, limit: float) -> list[Difference]:
        """Those whose index exceeds chance by more than the limit."""
        return [difference for difference in self.differences if difference.excess > limit]


def compare(
    first: Measured,
    second: Measured,
    statistics: Sequence[Statistic] = STATISTICS,
    phases: Sequence[Phase] = PHASES,
    min_rows: int = MIN_ROWS,
) -> Comparison:
    """Compare place by place.

    Args:
        first: what is compared with; second: what is judged.
        min_rows: a place with fewer of them in either is left out.

    Raises:
        ViewError: shapes differ, or no place has enough rows.
    """
    _check_shapes(first, second)
    differences: list[Difference] = []
    skipped = 0
    for statistic in statistics:
        for phase in phases:
            found, left_out = _compare(first, second, statistic, phase, min_rows)
            differences += found
            skipped += left_out
    if not differences:
        raise ViewError(
            f"no place has {min_rows} rows in both {first.source} and {second.source}; "
            "measure longer, or use --detail layer or a smaller --min-rows"
        )
    return Comparison(first, second, tuple(sorted(differences, key=lambda one: -one.excess)), skipped)


def _compare(
    first: Measured, second: Measured, statistic: Statistic, phase: Phase, min_rows: int
) -> tuple[list[Difference], int]:
    expected, actual = first.counts_of(statistic, phase), second.counts_of(statistic, phase)
    pair = expected, actual
    rows = expected.sum(axis=-1), actual.sum(axis=-1)
    enough = (rows[0] >= min_rows) & (rows[1] >= min_rows)
    values = [run.typical(statistic, phase) for run in (first, second)]
    # At the same size the half row that is added to each bucket weighs the same on both sides.
    size = np.minimum(rows[0], rows[1])[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = [np.nan_to_num(counts * (size / total[..., None])) for counts, total in zip(pair, rows, strict=True)]
    index = population_stability_index(scaled[0], scaled[1])
    chance = expected_index(rows[0], rows[1], (expected + actual > 0).sum(axis=-1))
    shift = standardised_mean_difference(expected, actual, bucket_midpoints(statistic))
    found = [
        Difference(
            statistic=statistic,
            phase=phase,
            layer=first.layers[i],
            head=first.heads[j],
            rows=(float(rows[0][i, j]), float(rows[1][i, j])),
            values=(float(values[0][i, j]), float(values[1][i, j])),
            index=float(index[i, j]),
            chance=float(chance[i, j]),
            shift=float(shift[i, j]),
        )
        for i, j in _positions(enough)
    ]
    return found, int((((rows[0] + rows[1]) > 0) & ~enough).sum())


def _positions(mask: Any) -> Iterator[tuple[int, int]]:
    return ((int(i), int(j)) for i, j in np.argwhere(mask))


def _check_shapes(first: Measured, second: Measured) -> None:
    if first.detail != second.detail:
        coarser = min(first.detail, second.detail, key=("model", "layer", "head").index)
        raise ViewError(
            f"details differ: {first.source} has {first.detail}, {second.source} has {second.detail}; "
            f"compare both with --detail {coarser}"
        )
    if (first.layers, first.heads) == (second.layers, second.heads):
        return
    shapes = " and ".join(f"{run.source} has {_indices(run)}" for run in (first, second))
    raise ViewError(
        f"shapes differ: {shapes}; only the same layers and heads can be compared one by one, "
        "as a whole two models can with --detail model"
    )


def _indices(run: Measured) -> str:
    """The shape; also which layers, if they aren't all from 0."""
    if run.detail == "model" or run.layers == tuple(range(len(run.layers))):
        return shape_words(run)
    named = ", ".join(str(layer) for layer in run.layers[:6]) + (", ..." if len(run.layers) > 6 else "")
    return f"{shape_words(run)} ({named})"


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
