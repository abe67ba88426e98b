"""What a metric family is: one metric and its series, neutral to how it is exported.

Owns the form only; which families there are is `families.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

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
    series: tuple[Series, ...] = ()


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


def at_detail(family: Family, detail: Detail, series: tuple[Series, ...]) -> Family:
    """A metric at a detail, with its series."""
    more = tuple(label for label in DETAIL_LABELS[detail] if label in family.detail_labels)
    return replace(family, label_names=family.label_names + more, series=series)


def from_to(indices: Sequence[int]) -> str:
    """First and last of ascending indices, as a label has them; empty if there are none."""
    return f"{indices[0]}-{indices[-1]}" if indices else ""
