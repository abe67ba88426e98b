"""The families as the text of a scrape, handed out as bytes.

Owns the writing of samples in Prometheus's text format and in OpenMetrics. `prometheus_client` writes the same from
`prometheus.py`'s metrics, with an object for each sample: some twenty times as slow, and a page at detail head has
millions. It is written piece by piece, because the whole of it takes hundreds of megabytes.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from glassbox.export.exemplars import NONE, Exemplar, Exemplars
from glassbox.export.family import Family, JoinedSeries, Series, SeriesTable
from glassbox.export.prometheus import bucket_names, to_metric
from glassbox.store.metrics_page import FORMATS, Format, PageIndex

EOF_LINE: Final = b"# EOF\n"
_SUFFIXES: Final = ("_bucket", "_count", "_sum")
# Series that are written together: a megabyte or two of histograms.
_PIECE: Final = 1024
# Bytes that are collected before they are sent.
_SENT_BYTES: Final = 1 << 18
_MOST_ENDS: Final = 1 << 14

_number = lru_cache(maxsize=1 << 16)(floatToGoString)


class _One(Collector):
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def render(families: Iterable[Family]) -> Iterator[bytes]:
    """A page of store/metrics_page.py in pieces, with a block for each family's head in either format and for each
    engine."""
    index, writer = PageIndex(), _Writer()
    for family in families:
        index.begin_family(sample_names(family))
        for format in FORMATS:
            yield index.note(_head(family, format), format=format)
        for engine, parts in _by_engine(family).items():
            for part in parts:
                for piece in writer.write(family, part):
                    yield index.note(piece, engine)
    yield index.end()


def text(
    shown: Iterable[tuple[Iterable[Family], Exemplars]], format: Format, names: Collection[str] = ()
) -> Iterator[bytes]:
    """The answer to a scrape, in pieces: what `prometheus_client` makes of the same families' metrics.

    Args:
        shown: families, and the exemplars of their buckets, which only OpenMetrics shows.
        format: of the answer.
        names: of samples whose families are shown; none is all of them.
    """
    waiting: list[bytes] = []
    size = 0
    for piece in _pieces(shown, format, frozenset(names)):
        waiting.append(piece)
        size += len(piece)
        if size >= _SENT_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join([*waiting, EOF_LINE if format == "openmetrics" else b""])


def _pieces(
    shown: Iterable[tuple[Iterable[Family], Exemplars]], format: Format, names: frozenset[str]
) -> Iterator[bytes]:
    for families, exemplars in shown:
        writer = _Writer(exemplars if format == "openmetrics" else NONE)
        for family in families:
            if names and names.isdisjoint(sample_names(family)):
                continue
            yield _head(family, format)
            for part in _parts(family):
                yield from writer.write(family, part)


def sample_names(family: Family) -> list[str]:
    """Names by which a scrape may ask for a family."""
    return [family.name, *(family.name + suffix for suffix in _SUFFIXES if family.kind == "histogram")]


def _head(family: Family, format: Format) -> bytes:
    empty = Family(family.name, family.otel_name, family.kind, family.help, family.unit, family.label_names)
    one = _One(to_metric(empty))
    return generate_latest(one) if format == "text" else openmetrics.generate_latest(one).removesuffix(EOF_LINE)


def _parts(family: Family) -> Sequence[Sequence[Series]]:
    return family.series.parts if isinstance(family.series, JoinedSeries) else (family.series,)


def _by_engine(family: Family) -> dict[str | None, list[Sequence[Series]]]:
    """Parts of the series of each engine; a table has those of one."""
    at = family.label_names.index("engine") if "engine" in family.label_names else None
    found: dict[str | None, list[Sequence[Series]]] = {}
    for part in _parts(family):
        if at is None:
            found.setdefault(None, []).append(part)
        elif isinstance(part, SeriesTable):
            found.setdefault(part.labels[0][at], []).append(part)
        else:
            for series in part:
                found.setdefault(series.labels[at], []).append((series,))
    return found


class _LabelText(NamedTuple):
    """The labels of a series as text.

    Attributes:
        before, after: those that stand before and after `le`, with the commas that they need there.
        braced: all of them without `le`, in braces if there are any.
    """

    before: str
    after: str
    braced: str


class _LabelTexts(dict[tuple[str, ...], _LabelText]):
    """Of series, by the values of their labels: many families have series of the same places.

    Args:
        names: of the labels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._order = sorted((name, at) for at, name in enumerate(names))
        self._num_before = sum(name < "le" for name in names)

    def __missing__(self, values: tuple[str, ...]) -> _LabelText:
        pairs = [f'{name}="{_escaped(values[at])}"' for name, at in self._order]
        before, after = pairs[: self._num_before], pairs[self._num_before :]
        braced = f"{{{','.join(pairs)}}}" if pairs else ""
        found = _LabelText("".join(f"{pair}," for pair in before), "".join(f",{pair}" for pair in after), braced)
        self[values] = found
        return found


class _Ends(dict[int, str]):
    """What follows the labels before `le` in the lines of a bucket, by its count: most counts come again and again."""

    def __init__(self, start: str) -> None:
        self._start = start

    def __missing__(self, count: int) -> str:
        if len(self) >= _MOST_ENDS:
            self.clear()
        end = self[count] = f"{self._start}{_number(count)}\n"
        return end


class _Writer:
    """Writes the samples of families, one after the other.

    Args:
        exemplars: of the buckets.
    """

    def __init__(self, exemplars: Exemplars = NONE) -> None:
        self._exemplars = exemplars
        self._texts: dict[tuple[str, ...], _LabelTexts] = {}

    def write(self, family: Family, series: Sequence[Series]) -> Iterator[bytes]:
        """The samples of some series of a family, in pieces."""
        names = family.label_names
        texts = self._texts.setdefault(names, _LabelTexts(names))
        if family.kind != "histogram":
            for some in _cut(series):
                yield _numbers(family, some, texts).encode()
            return
        # By the labels after `le`, in which few series differ: of each bucket.
        ends: dict[str, list[_Ends]] = {}
        for some in _cut(series):
            yield self._histograms(family, some, texts, ends).encode()

    def _histograms(
        self, family: Family, series: Sequence[Series], texts: _LabelTexts, all_ends: dict[str, list[_Ends]]
    ) -> str:
        """Of each series its buckets, and count and sum if it has them."""
        name, lines = family.name, []
        for values, below, total in _cumulative(series):
            labels = texts[values]
            ends = all_ends.get(labels.after)
            if ends is None:
                ends = [_Ends(f'le="{le}"{labels.after}}} ') for le in bucket_names(family.bounds)]
                all_ends[labels.after] = ends
            start = f"{name}_bucket{{{labels.before}"
            of_buckets = [end[count] for end, count in zip(ends, below, strict=True)]
            if (shown := self._exemplars.get((name, values))) is not None:
                of_buckets = list(map(_with_exemplar, of_buckets, shown))
            lines.append(start + start.join(of_buckets))
            if total is not None and not math.isnan(total):
                lines.append(f"{name}_count{labels.braced} {_number(below[-1])}\n")
                lines.append(f"{name}_sum{labels.braced} {_number(total)}\n")
        return "".join(lines)


def _cut(series: Sequence[Series]) -> Iterator[Sequence[Series]]:
    return (series[start : start + _PIECE] for start in range(0, len(series), _PIECE))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _numbers(family: Family, series: Sequence[Series], texts: _LabelTexts) -> str:
    found: Iterable[tuple[tuple[str, ...], float]]
    if isinstance(series, SeriesTable):
        found = zip(series.labels, series.values.tolist(), strict=True)
    else:
        found = ((one.labels, one.value) for one in series)
    # A counter that is not a number is left out.
    shown = (one for one in found if family.kind == "gauge" or not math.isnan(one[1]))
    return "".join(f"{family.name}{texts[labels].braced} {_number(value)}\n" for labels, value in shown)


def _cumulative(series: Sequence[Series]) -> Iterator[tuple[tuple[str, ...], list[int], float | None]]:
    """Of each histogram its labels, how many values are in each bucket or below it, and the sum."""
    if isinstance(series, SeriesTable) and series.buckets is not None:
        below = np.cumsum(series.buckets, axis=1).tolist()
        sums = [None] * len(series) if series.sums is None else series.sums.tolist()
        yield from zip(series.labels, below, sums, strict=True)
    else:
        for one in series:
            yield one.labels, list(accumulate(one.buckets)), one.sum


def _with_exemplar(line: str, exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return line
    labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(exemplar.labels.items()))
    return f"{line[:-1]} # {{{labels}}} {_number(exemplar.value)} {round(exemplar.time_s, 3)}\n"
