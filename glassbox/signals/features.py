"""Features of a request: numbers with names, the columns of a table of samples and what a probe reads.

Owns their names and which rows they are taken of. A feature of a layer and head is `{signal}_{value}_L{layer}_H{head}`
with global indices, one of the whole request `{signal}_{value}`:

answer_{statistic}: mean over the rows of the answer. prompt_{statistic}: of the last row of the prompt, with which the
    answer's first token was chosen. The statistics are those of `core/statistics.py`.
answer_span.{name}, prompt_span.{name}: attention to the positions of a named span, over the same rows.

The answer's rows are those of generated tokens. Where an answer was not generated but given, it stands in the prompt as
a span that is called `answer`: its rows are that span's, as far as they were measured, the prompt's last row is the one
before it, and there is no feature of the span itself. So a probe that was trained on given answers reads generated
ones. Only `lookback_ratio` is of generated tokens alone.

A feature without a finite value is left out.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import STATISTICS
from glassbox.core.trace_options import MAX_INDEX, MAX_SPAN_NAME
from glassbox.store.trace_record import RequestTrace

ANSWER: Final = "answer"
PROMPT: Final = "prompt"
# Begins the value of a feature that is the attention to a span.
SPAN: Final = "span."
MAX_FEATURE_NAME: Final = MAX_SPAN_NAME + 64
_NAME: Final = re.compile(
    rf"(?P<signal>{ANSWER}|{PROMPT})_(?P<value>[A-Za-z0-9_.-]+?)(?:_L(?P<layer>\d{{1,5}})_H(?P<head>\d{{1,5}}))?"
)
_STATISTIC_NAMES: Final = frozenset(statistic.name for statistic in STATISTICS)
Places = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Feature:
    """What a name says.

    Attributes:
        signal: whose value it is: `answer`, `prompt`, or a signal's name.
        value: of that signal.
        layer, head: global indices; None if it is of the whole request.
    """

    signal: str
    value: str
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        """As in the table of samples and in a probe's file."""
        place = "" if self.layer is None else f"_L{self.layer}_H{self.head}"
        return f"{self.signal}_{self.value}{place}"

    @property
    def group(self) -> str:
        """The name without layer and head."""
        return f"{self.signal}_{self.value}"

    @property
    def span(self) -> str | None:
        """Name of the span whose attention it is."""
        of_span = self.signal in {ANSWER, PROMPT} and self.value.startswith(SPAN)
        return self.value.removeprefix(SPAN) if of_span else None


def parse_feature(name: str) -> Feature:
    """What a feature's name says.

    Raises:
        ValueError: it is none of a feature.
    """
    match = _NAME.fullmatch(name) if len(name) <= MAX_FEATURE_NAME else None
    if match is None:
        raise ValueError(f"{name[:MAX_FEATURE_NAME]!r} is no name of a feature")
    place = None if match["layer"] is None else (int(match["layer"]), int(match["head"]))
    if place is not None and max(place) > MAX_INDEX:
        raise ValueError(f"{name!r} has a layer or head above {MAX_INDEX}")
    feature = Feature(match["signal"], match["value"], *(place or ()))
    known = feature.span is not None or feature.value in _STATISTIC_NAMES
    if place is None or not known:
        raise ValueError(f"{name!r} is no name of a feature")
    return feature


def features(trace: RequestTrace, wanted: Collection[str] | None = None) -> dict[str, float]:
    """The features of a request, as far as its rows go; for a running one of what there is so far.

    Args:
        trace: of the request.
        wanted: names; only what they need is computed. None is all that the trace has.

    Returns:
        by name, in the order of the trace's layers and heads; those without a value are missing.
    """
    named = None if wanted is None else {parse_feature(name).group for name in wanted}
    values = {
        feature.name: value
        for group, places in _by_place(trace, named)
        for feature, value in _each(group, places, trace)
    }
    return values if wanted is None else {name: values[name] for name in wanted if name in values}


def _each(group: Feature, places: Places, trace: RequestTrace) -> Iterator[tuple[Feature, float]]:
    """Feature and value of each place that has one."""
    for i, j in np.argwhere(np.isfinite(places)).tolist():
        yield Feature(group.signal, group.value, trace.layers[i], trace.heads[j]), float(places[i, j])


def _by_place(trace: RequestTrace, groups: Collection[str] | None) -> Iterator[tuple[Feature, Places]]:
    """The numbers [L, H] of statistics and spans, NaN where there is none, of the groups that are wanted."""
    answer, prompt = _rows(trace)
    columns = [(statistic.name, trace.stats[..., i]) for i, statistic in enumerate(STATISTICS)]
    spans = enumerate(trace.span_names)
    columns += [(SPAN + name, trace.span_mass[..., s]) for s, name in spans if name != ANSWER]
    for signal, rows in ((ANSWER, answer), (PROMPT, prompt)):
        for value, column in columns:
            group = Feature(signal, value)
            if rows.any() and (groups is None or group.group in groups):
                yield group, _mean(column[rows])


def _rows(trace: RequestTrace) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows [T] are the answer's, and which one is the prompt's last (none if it was not measured)."""
    if ANSWER not in trace.span_names:
        return trace.decode(), trace.positions == trace.prompt_len - 1
    start, end = trace.span_ranges[trace.span_names.index(ANSWER)].tolist()
    return (trace.positions >= start) & (trace.positions < end), trace.positions == start - 1


def _mean(values: npt.NDArray[np.float32]) -> Places:
    """Over the rows of values [T, L, H]; NaN where no row has one."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
