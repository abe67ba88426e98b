"""Which places of a run stand out, and why. Pure; `report` shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Final

import numpy as np

from glassbox.core.statistics import INDEX, STATISTICS, Phase
from glassbox.signals.drift import bucket_midpoints, standardised_mean_difference
from glassbox.view.measured import Floats, Measured
from glassbox.view.text import format_count, format_value, place_words

_MOST: Final = 8
# A place with fewer rows than this in a half of the run says nothing about change.
_MIN_ROWS: Final = 50
_SINK: Final = 0.8
_SATURATED: Final = 0.2
_CHANGE: Final = 0.2


@dataclass(frozen=True)
class Finding:
    """Places that stand out in one way.

    Attributes:
        title: in which way; meaning: what it tells and from where on it is listed.
        headings: of the columns after place and phase.
        lines: place, phase and numbers as text, the most notable first.
        others: how many more there are.
    """

    title: str
    meaning: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    others: int


def find_notable(total: Measured, stages: Sequence[Measured]) -> list[Finding]:
    """All kinds of findings, also those without a line.

    Args:
        total: the whole run; stages: its parts in the order of time.
    """
    return [_nonfinite(total), _changed(stages), _sinks(total), _saturated(total), _largest(total)]


def _finding(
    total: Measured,
    title: str,
    meaning: str,
    headings: tuple[str, ...],
    score: dict[Phase, Floats],
    least: float,
    columns: Mapping[Phase, tuple[list[str], ...]] | None = None,
) -> Finding:
    """The places with the highest scores, [L, H] a phase; `columns` are texts in the order of the flattened places."""
    found = []
    for phase, values in score.items():
        flat = values.ravel()
        found += [(float(flat[k]), phase, int(k)) for k in np.flatnonzero(np.nan_to_num(flat, nan=-np.inf) > least)]
    found.sort(key=lambda entry: -entry[0])
    lines = []
    for value, phase, k in found[:_MOST]:
        layer, head = divmod(k, len(total.heads))
        texts = [format_value(value)] if columns is None else [column[k] for column in columns[phase]]
        lines.append((place_words(total.layers[layer], total.heads[head]), phase.value, *texts))
    return Finding(title, meaning, headings, tuple(lines), max(len(found) - _MOST, 0))


def _nonfinite(total: Measured) -> Finding:
    score = {phase: total.nonfinite[:, :, p] for p, phase in enumerate((Phase.PREFILL, Phase.DECODE))}
    columns = {
        phase: ([format_count(n) for n in values.ravel()], [format_count(n) for n in total.rows_of(phase).ravel()])
        for phase, values in score.items()
    }
    meaning = "Rows with NaN or infinite scores: a bad host, kernel, quantisation or checkpoint."
    return _finding(total, "Not finite", meaning, ("such rows", "all rows"), score, 0, columns)


def _changed(stages: Sequence[Measured]) -> Finding:
    statistic = STATISTICS[INDEX["entropy_ratio"]]
    title = "Changed in the course of the run"
    meaning = (
        "Entropy ratio of the second half against the first, in standard deviations (standardised mean difference); "
        f"listed from {_CHANGE} on. Other prompts change it too."
    )
    headings = ("change", "first half", "second half")
    if len(stages) < 2:
        return Finding(title, f"{meaning} The run has one window only, so nothing to compare.", headings, (), 0)
    whole = reduce(Measured.plus, stages)
    middle = len(stages) // 2
    # Placed at the whole run's layers and heads, whichever a half has seen.
    halves = [whole.only(reduce(Measured.plus, part)) for part in (stages[:middle], stages[middle:])]
    score, columns = {}, {}
    for phase in (Phase.PREFILL, Phase.DECODE):
        before, after = (half.counts_of(statistic, phase) for half in halves)
        shift = standardised_mean_difference(before, after, bucket_midpoints(statistic))
        enough = (before.sum(axis=-1) >= _MIN_ROWS) & (after.sum(axis=-1) >= _MIN_ROWS)
        score[phase] = np.where(enough, np.abs(shift), np.nan)
        values = [[format_value(v) for v in half.mean(statistic, phase).ravel()] for half in halves]
        columns[phase] = ([f"{value:+.2f}" for value in shift.ravel()], *values)
    return _finding(whole, title, meaning, headings, score, _CHANGE, columns)


def _sinks(total: Measured) -> Finding:
    statistic = STATISTICS[INDEX["sink_ratio"]]
    score = {phase: total.mean(statistic, phase) for phase in (Phase.PREFILL, Phase.DECODE)}
    meaning = (
        f"Mean sink ratio above {_SINK}: nearly all attention rests on the first tokens, as that of an idle head does."
    )
    return _finding(total, "Attention sinks", meaning, ("sink ratio",), score, _SINK)


def _saturated(total: Measured) -> Finding:
    statistic = STATISTICS[INDEX["top1_ratio"]]
    score = {}
    for phase in (Phase.PREFILL, Phase.DECODE):
        counts = total.counts_of(statistic, phase)
        with np.errstate(invalid="ignore"):
            score[phase] = counts[..., -1] / counts.sum(axis=-1)
    mass = f"{statistic.buckets[-1]:g}"
    meaning = f"More than {_SATURATED:.0%} of the rows give one key over {mass} of the mass: one-hot attention."
    return _finding(total, "Saturated", meaning, ("share of rows",), score, _SATURATED)


def _largest(total: Measured) -> Finding:
    score = {
        phase: np.where(np.isfinite(total.window_max[:, :, p]), total.window_max[:, :, p], np.nan)
        for p, phase in enumerate((Phase.PREFILL, Phase.DECODE))
    }
    meaning = (
        "Largest score before softmax; growth over versions or time comes before overflow. QK-clip acts from 100 on."
    )
    # Every place has one, so how many others there are tells nothing.
    return replace(_finding(total, "Largest logits", meaning, ("largest score",), score, -np.inf), others=0)
