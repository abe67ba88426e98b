"""Numbers of an engine as matrices, layer x head, over all its time or over a part of it.

Owns the arithmetic: what was measured between two moments, means, and what of them is sent. Pure numpy; which numbers
somebody wants is `selection.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.core.counters import ENGINE_NUMBERS, EngineNumber
from glassbox.core.histograms import quantiles
from glassbox.core.statistics import INDEX, PHASES, Phase, Statistic
from glassbox.store.merge import MergedEngine

QUANTILES: Final = {"p50": 0.5, "p95": 0.95}
# Quantiles are interpolated in a dozen buckets: more digits would be noise, and bytes on each frame.
SIGNIFICANT_DIGITS: Final = 5

Floats = npt.NDArray[np.float64]


def between(old: MergedEngine | None, new: MergedEngine) -> MergedEngine:
    """What was measured after `old` and up to `new`, as an engine that began to count at `old.time_s`.

    Where the two can't be subtracted (there is no old one, other layers or heads, or counters that fell because the
    run directory was emptied) that is everything `new` holds.
    """
    if (
        old is None
        or (old.model_name, old.engine, old.layers, old.num_heads)
        != (new.model_name, new.engine, new.layers, new.num_heads)
        or bool((new.rows < old.rows).any())
        or bool((new.counts < old.counts).any())
    ):
        return new
    return replace(
        new,
        start_time_s=old.time_s,
        numbers={
            entry.name: _gained(entry, old.numbers[entry.name], new.numbers[entry.name]) for entry in ENGINE_NUMBERS
        },
        **{name: getattr(new, name) - getattr(old, name) for name in CUMULATIVE_ARRAYS},
    )


def _gained(entry: EngineNumber, old: Any, new: Any) -> Any:
    """Of a counter what came since `old`, never below 0; anything else as it is now."""
    if entry.kind != "counter":
        return new
    if entry.labels:
        return {value: max(0, count - old.get(value, 0)) for value, count in new.items()}
    return max(entry.zero(), new - old)


def means(engine: MergedEngine, statistic: Statistic, phase: Phase) -> Floats:
    """Mean over the rows with finite scores, float64 [L, H]; NaN where there is none."""
    s, p = INDEX[statistic.name], PHASES.index(phase)
    rows = engine.counts[:, :, p, s].sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rows > 0, engine.sums[:, :, p, s] / rows, np.nan)


def rounded(values: Floats) -> Floats:
    """The same numbers with `SIGNIFICANT_DIGITS` significant decimal digits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.floor(np.log10(np.abs(values)))
    digits = SIGNIFICANT_DIGITS - 1 - np.where(np.isfinite(magnitude), magnitude, 0)
    # Powers of ten are exact as floats, their inverses are not: divide by the one or by the other.
    up, down = 10.0 ** np.maximum(digits, 0), 10.0 ** np.maximum(-digits, 0)
    return np.round(values * up / down) / up * down


def listed(values: Floats) -> list[Any]:
    """Nested lists for JSON, rounded; None for what is NaN or infinite."""
    finite = np.isfinite(values)
    cells = rounded(np.where(finite, values, 0.0)).astype(object)
    cells[~finite] = None
    return list(cells.tolist())


def number(value: float) -> float | None:
    """The value, or None if JSON can't say it."""
    return value if math.isfinite(value) else None


def phase_answer(engine: MergedEngine, statistics: Sequence[Statistic], phase: Phase) -> dict[str, Any]:
    """Matrices of one phase for JSON: outer lists are layers, inner ones heads.

    `rows` and `nonfinite` are counts; per statistic `mean` and quantiles in its unit, None where there is no row.
    """
    p = PHASES.index(phase)
    found: dict[str, Any] = {}
    for statistic in statistics:
        if statistic.decode_only and phase is not Phase.DECODE:
            continue
        counts = engine.counts[:, :, p, INDEX[statistic.name]]
        matrices = {"mean": listed(means(engine, statistic, phase))}
        for name, share in QUANTILES.items():
            matrices[name] = listed(quantiles(statistic, counts, share))
        if statistic.name == "max_logit":
            matrices["window_max"] = listed(engine.window_max[:, :, p].astype(np.float64))
        found[statistic.name] = matrices
    return {
        "rows": engine.rows[:, :, p].tolist(),
        "nonfinite": engine.nonfinite[:, :, p].tolist(),
        "statistics": found,
    }


def head_answer(engine: MergedEngine, statistics: Sequence[Statistic], phase: Phase, at: int, head: int) -> Any:
    """Histograms of one head for JSON: rows per bucket (the last one is what lies above all bounds) and the sum.

    Args:
        at: index of the layer among `engine.layers`.
        head: global index.
    """
    p = PHASES.index(phase)
    histograms = {}
    for statistic in statistics:
        if statistic.decode_only and phase is not Phase.DECODE:
            continue
        s = INDEX[statistic.name]
        histograms[statistic.name] = {
            "bounds": list(statistic.buckets),
            "counts": engine.counts[at, head, p, s].tolist(),
            "sum": number(float(engine.sums[at, head, p, s])),
        }
    return {
        "rows": int(engine.rows[at, head, p]),
        "nonfinite": int(engine.nonfinite[at, head, p]),
        "histograms": histograms,
    }
