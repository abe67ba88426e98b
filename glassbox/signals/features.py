"""Features of a request: numbers with names, the columns of a table of samples and what a probe reads.

Owns their names and which rows they are taken of. A feature of a layer and head is `{signal}_{value}_L{layer}_H{head}`
with global indices, one of the whole request `{signal}_{value}`:

answer_{statistic}: mean over the rows of the answer. prompt_{statistic}: of the last row of the prompt, with which the
    answer's first token was chosen. The statistics are those of `core/statistics.py`.
answer_span.{name}, prompt_span.{name}: attention to the positions of a named span, over the same rows.
{signal}_{value}: of the signals in `core/signal_table.py` that the request asked for, or that are wanted by name.

The answer's rows are those of generated tokens. Where an answer was not generated but given, it stands in the prompt as
a span that is called `answer`: its rows are that span's, as far as they were measured, the prompt's last row is the one
before it, and there is no feature of the span itself. So a probe that was trained on given answers reads generated
ones. Only `lookback_ratio` is of generated tokens alone.

A feature without a finite value is left out.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.signal_table import SIGNAL_NAMES, signal_row
from glassbox.core.statistics import STATISTICS
from glassbox.core.trace_options import MAX_INDEX, MAX_SPAN_NAME
from glassbox.signals.registry import signal_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

ANSWER: Final = "answer"
PROMPT: Final = "prompt"
# Begins the value of a feature that is the attention to a span.
SPAN: Final = "span."
MAX_FEATURE_NAME: Final = MAX_SPAN_NAME + 64
_SIGNALS: Final = "|".join((ANSWER, PROMPT, *SIGNAL_NAMES))
_NAME: Final = re.compile(
    rf"(?P<signal>{_SIGNALS})_(?P<value>[A-Za-z0-9_.-]+?)(?:_L(?P<layer>\d{{1,5}})_H(?P<head>\d{{1,5}}))?"
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
        by_span = (SPAN,) if self.signal in {ANSWER, PROMPT} else _by_span(self.signal)
        found = [prefix for prefix in by_span if self.value.startswith(prefix) and self.value != prefix]
        return self.value.removeprefix(found[0]) if found else None


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
    if not _is_known(feature):
        raise ValueError(f"{name!r} is no name of a feature")
    return feature


def _is_known(feature: Feature) -> bool:
    placed = feature.layer is not None
    if feature.signal in {ANSWER, PROMPT}:
        return placed and (feature.span is not None or feature.value in _STATISTIC_NAMES)
    signal = signal_row(feature.signal)
    if feature.value in signal.of_request:
        return not placed
    # Of a span, and of the first one, there may be a value of the request beside those of layers and heads.
    return feature.span is not None or (feature.value in signal.values and (placed or feature.value in signal.by_span))


def _by_span(signal: str) -> tuple[str, ...]:
    """How the values of named spans begin."""
    return tuple(f"{value}_" for value in signal_row(signal).by_span)


def features(
    trace: RequestTrace, wanted: Collection[str] | None = None, computed: Mapping[str, SignalValues] | None = None
) -> dict[str, float]:
    """The features of a request, as far as its rows go; for a running one of what there is so far.

    Args:
        trace: of the request.
        wanted: names; only what they need is computed. None is all that the trace has.
        computed: signals of the trace that are not computed again.

    Returns:
        by name, in the order of the trace's layers and heads; those without a value are missing.
    """
    parsed = None if wanted is None else [parse_feature(name) for name in wanted]
    named = None if parsed is None else {feature.group for feature in parsed}
    values = {
        feature.name: value
        for group, places in _by_place(trace, named)
        for feature, value in _each(group, places, trace)
    }
    asked = trace.options.signals if parsed is None else {feature.signal for feature in parsed} - {ANSWER, PROMPT}
    known = {signal: one for signal, one in (computed or {}).items() if signal in asked}
    for signal, found in {**known, **signal_values(trace, [one for one in asked if one not in known])}.items():
        for name, places in found.by_place.items():
            values |= {feature.name: value for feature, value in _each(Feature(signal, name), places, trace)}
        of_request = {Feature(signal, name).name: float(value) for name, value in found.of_request.items()}
        values |= {name: value for name, value in of_request.items() if np.isfinite(value)}
    return values if wanted is None else {name: values[name] for name in wanted if name in values}


def _each(group: Feature, places: npt.NDArray[Any], trace: RequestTrace) -> Iterator[tuple[Feature, float]]:
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
