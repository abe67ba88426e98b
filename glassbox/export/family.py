"""What a metric family is: one metric and its series, neutral to how it is exported.

Owns the form only; which families there are is `families.py`'s.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from glassbox.store.merge import Detail

Kind = Literal["counter", "gauge", "histogram"]
ENGINE_LABELS: Final = ("model_name", "engine")
DETAIL_LABELS: Final[dict[Detail, tuple[str, ...]]] = {
    "model": (),
    "layer": ("layer",),
    "head": ("layer", "head"),
}


class Series(NamedTuple):
    """One time series of a family.

    Attributes:
        labels: values, in the order of the family's `label_names`.
        value: of a counter or gauge; of a histogram the number of values.
        start_time_s: Unix time since when it is cumulative.
        buckets: of a histogram, values per bucket (not cumulative), the last one is +Inf.
        sum: of a histogram; None if its values may be negative.
    """

    labels: tuple[str, ...]
    value: float
    start_time_s: float
    buckets: tuple[int, ...] = ()
    sum: float | None = None


@dataclass(frozen=True, eq=False)
class SeriesTable(Sequence[Series]):
    """N series of a family as columns: at detail head there are some hundred thousand, and objects of all of them would
    take a second and 200 MB at every snapshot. One is made when it is looked at.

    Attributes:
        labels: values of each, as in Series; tables of other families may share the list.
        values: [N], start_time_s: of all of them, as in Series.
        buckets: int64 [N, B]; None if it is no histogram.
        sums: float64 [N]; None if it is no histogram, or its values may be negative.
    """

    labels: Sequence[tuple[str, ...]]
    values: npt.NDArray[Any]
    start_time_s: float
    buckets: npt.NDArray[np.int64] | None = None
    sums: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Series]:
        count, start_s = len(self), self.start_time_s
        buckets = [()] * count if self.buckets is None else map(tuple, self.buckets.tolist())
        sums = [None] * count if self.sums is None else self.sums.tolist()
        for labels, value, of_one, total in zip(self.labels, self.values.tolist(), buckets, sums, strict=True):
            yield Series(labels, value, start_s, of_one, total)

    @overload
    def __getitem__(self, at: int) -> Series: ...

    @overload
    def __getitem__(self, at: slice) -> "SeriesTable": ...

    def __getitem__(self, at: int | slice) -> "Series | SeriesTable":
        if isinstance(at, slice):
            buckets = None if self.buckets is None else self.buckets[at]
            sums = None if self.sums is None else self.sums[at]
            return SeriesTable(self.labels[at], self.values[at], self.start_time_s, buckets, sums)
        at = range(len(self))[at]
        return next(iter(self[at : at + 1]))


class JoinedSeries(Sequence[Series]):
    """The series of several sequences, one after the other.

    Attributes:
        parts: those that have any.
    """

    def __init__(self, parts: Iterable[Sequence[Series]]) -> None:
        self.parts = tuple(part for part in parts if len(part))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Series]:
        return chain.from_iterable(self.parts)

    def __eq__(self, other: object) -> bool:
        """Whether it has the same series, however they lie."""
        return isinstance(other, JoinedSeries) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list: nobody needs one of so many

    @overload
    def __getitem__(self, at: int) -> Series: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Series]: ...

    def __getitem__(self, at: int | slice) -> Series | Sequence[Series]:
        if isinstance(at, slice):
            return tuple(self)[at]
        at = range(len(self))[at]
        for part in self.parts:
            if at < len(part):
                return part[at]
            at -= len(part)
        raise AssertionError("an index within the length is in one of the parts")


@dataclass(frozen=True)
class Family:
    """One metric and its series.

    Attributes:
        name: in Prometheus, with `_total` if it is a counter.
        otel_name: in OpenTelemetry.
        unit: OpenTelemetry unit (UCUM).
        label_names: in the order of the series' labels.
        detail_labels: those of the detail that it gets at the end, as far as the detail has them.
        bounds: of a histogram, the finite upper bounds.
    """

    name: str
    otel_name: str
    kind: Kind
    help: str
    unit: str
    label_names: tuple[str, ...]
    detail_labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    series: Sequence[Series] = ()


def define(  # a table, one row per call
    name: str,
    otel_name: str,
    kind: Kind,
    unit: str,
    help: str,
    labels: tuple[str, ...] = (),
    detail_labels: tuple[str, ...] = (),
    bounds: tuple[float, ...] = (),
) -> Family:
    """A metric of glassbox without series; the labels of its engine come before its own."""
    all_labels = ENGINE_LABELS + labels
    return Family(f"glassbox_{name}", f"glassbox.{otel_name}", kind, help, unit, all_labels, detail_labels, bounds)


def at_detail(family: Family, detail: Detail, series: Sequence[Series]) -> Family:
    """A metric at a detail, with its series."""
    more = tuple(label for label in DETAIL_LABELS[detail] if label in family.detail_labels)
    return replace(family, label_names=family.label_names + more, series=series)


def from_to(indices: Sequence[int]) -> str:
    """First and last of ascending indices, as a label has them; empty if there are none."""
    return f"{indices[0]}-{indices[-1]}" if indices else ""
