"""The families as the text of a scrape, made once and handed out as bytes.

Owns the writing of samples in Prometheus's text format and in OpenMetrics. `prometheus_client` writes the same from
`prometheus.py`'s metrics, with an object for each sample: ten times as slow, and a page at detail head has a million.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from glassbox.export.family import Family, Series
from glassbox.export.prometheus import bucket_names, to_metric
from glassbox.store.metrics_page import PageBuilder

EOF_LINE: Final = b"# EOF\n"
_SUFFIXES: Final = ("_bucket", "_count", "_sum")

_number = lru_cache(maxsize=1 << 16)(floatToGoString)


class _One(Collector):
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def render(families: Iterable[Family]) -> bytes:
    """A page of store/metrics_page.py, with a block for each family's head in either format and for each engine."""
    page = PageBuilder()
    for family in families:
        one = _One(to_metric(_without_series(family)))
        is_histogram = family.kind == "histogram"
        page.begin_family([family.name, *(family.name + suffix for suffix in _SUFFIXES if is_histogram)])
        page.add(generate_latest(one), format="text")
        page.add(openmetrics.generate_latest(one).removesuffix(EOF_LINE), format="openmetrics")
        for engine, series in _by_engine(family).items():
            page.add(_histogram(family, series) if is_histogram else _numbers(family, series), engine)
    return page.finish()


def _without_series(family: Family) -> Family:
    return Family(family.name, family.otel_name, family.kind, family.help, family.unit, family.label_names)


def _by_engine(family: Family) -> dict[str | None, list[Series]]:
    at = family.label_names.index("engine") if "engine" in family.label_names else None
    found: dict[str | None, list[Series]] = {}
    for series in family.series:
        found.setdefault(None if at is None else series.labels[at], []).append(series)
    return found


def _labels(names: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """Sorted, the values escaped."""
    pairs = sorted(zip(names, values, strict=True))
    return [(name, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")) for name, value in pairs]


def _in_braces(parts: Iterable[str]) -> str:
    inner = ",".join(parts)
    return f"{{{inner}}}" if inner else ""


def _numbers(family: Family, series: Sequence[Series]) -> bytes:
    lines = []
    for one in series:
        labels = _in_braces(f'{name}="{value}"' for name, value in _labels(family.label_names, one.labels))
        lines.append(f"{family.name}{labels} {_number(one.value)}\n")
    return "".join(lines).encode()


def _histogram(family: Family, series: Sequence[Series]) -> bytes:
    """The samples of a histogram; there is no `_count` where there is no `_sum`."""
    lines: list[str] = []
    add, name = lines.append, family.name
    bounds = bucket_names(family.bounds)
    for one in series:
        labels = _labels(family.label_names, one.labels)
        before = "".join(f'{label}="{value}",' for label, value in labels if label < "le")
        after = "".join(f',{label}="{value}"' for label, value in labels if label > "le")
        start, below = f'{name}_bucket{{{before}le="', 0
        for le, count in zip(bounds, one.buckets, strict=True):
            below += count
            add(f'{start}{le}"{after}}} {_number(below)}\n')
        whole = _in_braces(f'{label}="{value}"' for label, value in labels)
        if one.sum is not None:
            add(f"{name}_count{whole} {_number(below)}\n")
            add(f"{name}_sum{whole} {_number(one.sum)}\n")
    return "".join(lines).encode()
