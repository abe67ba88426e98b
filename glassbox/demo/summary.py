"""What a scrape of `/metrics` says about attention: means and quantiles per layer, phase and statistic.

Pure: takes metric families, gives numbers. `table` makes them readable.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric

from glassbox.statistics import PHASES, STATISTICS, Phase, Statistic

_INF = math.inf


@dataclass
class Distribution:
    """A histogram as Prometheus shows it, possibly the sum of several series.

    Attributes:
        cumulative: upper bound of a bucket -> rows at or below it; +Inf is among them.
        total: sum of the values; NaN if the metric has none (values may be negative).
    """

    cumulative: dict[float, float] = field(default_factory=dict)
    total: float = math.nan

    @property
    def count(self) -> float:
        """Number of rows."""
        return self.cumulative.get(_INF, 0.0)

    @property
    def mean(self) -> float:
        """Mean value; NaN without rows or without a sum."""
        return self.total / self.count if self.count else math.nan

    def add(self, other: "Distribution") -> None:
        """Add another histogram with the same bounds."""
        for bound, rows in other.cumulative.items():
            self.cumulative[bound] = self.cumulative.get(bound, 0.0) + rows
        self.total = other.total if math.isnan(self.total) else self.total + other.total

    def quantile(self, share: float, lower: float | None = None, upper: float | None = None) -> float:
        """Value below which `share` (0..1) of the rows lie, interpolated inside its bucket.

        The first bucket begins at `lower`, the last one ends at `upper`. Where the range has no such end, that
        bucket's finite bound is the answer, as with Prometheus's `histogram_quantile`.

        Returns:
            NaN without rows.
        """
        if not self.count:
            return math.nan
        wanted = share * self.count
        below, begin = 0.0, lower
        for bound, rows in sorted(self.cumulative.items()):
            if rows >= wanted and rows > below:
                end = upper if bound == _INF else bound
                if begin is None or end is None:
                    return next((known for known in (begin, end) if known is not None), math.nan)
                return begin + (end - begin) * (wanted - below) / (rows - below)
            below, begin = rows, bound
        raise ValueError(f"bucket counts must not fall, got {self.cumulative}")


@dataclass
class Summary:
    """All of one scrape.

    Attributes:
        histograms: (statistic, phase, layer) -> distribution; the layer is None at detail `model`.
        rows: (phase, layer) -> rows measured, counted once per head.
        nonfinite_rows: of them, rows whose scores held NaN or infinities.
        scalars: the metrics without phase and layer, by sample name, summed over engines.
    """

    histograms: dict[tuple[str, Phase, int | None], Distribution] = field(default_factory=dict)
    rows: dict[tuple[Phase, int | None], float] = field(default_factory=dict)
    nonfinite_rows: float = 0.0
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[int | None]:
        """Layers that have rows, ascending."""
        return sorted({layer for _, layer in self.rows}, key=lambda layer: -1 if layer is None else layer)

    @property
    def total_rows(self) -> float:
        """Rows of all layers and phases."""
        return sum(self.rows.values())

    def over_layers(self, statistic: Statistic, phase: Phase) -> Distribution:
        """The distribution of one statistic over all layers."""
        merged = Distribution()
        for (name, of_phase, _), distribution in self.histograms.items():
            if name == statistic.name and of_phase == phase:
                merged.add(distribution)
        return merged

    def phases_without_samples(self, statistic: Statistic) -> list[Phase]:
        """Phases in which the statistic should have had rows and has none."""
        expected = (Phase.DECODE,) if statistic.decode_only else PHASES
        return [phase for phase in expected if not self.over_layers(statistic, phase).count]


def exported_statistics() -> list[Statistic]:
    """The statistics that have a histogram metric, in the order of the table of statistics."""
    return [statistic for statistic in STATISTICS if statistic.exported]


def summarise(families: Iterable[Metric]) -> Summary:
    """Read glassbox's metrics out of a scrape; all others are ignored. Series of several heads are added."""
    names = {statistic.metric: statistic.name for statistic in exported_statistics()}
    # Keyed by all labels first: a series is one histogram, and only whole histograms can be added.
    series: defaultdict[tuple[str, Phase, int | None, str], Distribution] = defaultdict(Distribution)
    summary = Summary()
    for family in families:
        if not family.name.startswith("glassbox_"):
            continue
        for sample in family.samples:
            if family.name in names:
                phase, layer = _place(sample.labels)
                rest = repr(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
                distribution = series[names[family.name], phase, layer, rest]
                if sample.name.endswith("_bucket"):
                    distribution.cumulative[float(sample.labels["le"])] = sample.value
                elif sample.name.endswith("_sum"):
                    distribution.total = sample.value
            else:
                _add_scalar(summary, sample.name, sample.labels, sample.value)
    for (name, phase, layer, _), distribution in series.items():
        summary.histograms.setdefault((name, phase, layer), Distribution()).add(distribution)
    return summary


def _add_scalar(summary: Summary, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "glassbox_attention_rows_total":
        key = _place(labels)
        summary.rows[key] = summary.rows.get(key, 0.0) + value
    elif name == "glassbox_attention_nonfinite_rows_total":
        summary.nonfinite_rows += value
    elif "phase" not in labels:
        summary.scalars[name] = summary.scalars.get(name, 0.0) + value


def _place(labels: Mapping[str, str]) -> tuple[Phase, int | None]:
    layer = labels.get("layer")
    return Phase(labels["phase"]), None if layer is None else int(layer)
