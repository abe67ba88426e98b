"""Prometheus: collectors that show the families in a `prometheus_client` registry.

Owns the translation into `prometheus_client` metrics, and what is shown when the families can't be had. What there is
to show comes from `family_source.FamilySource`; where nobody needs a registry, `page.py` writes it ten times as fast.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as PrometheusExemplar
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from glassbox.core.logs import get_logger, log_once
from glassbox.export.exemplars import NONE, Exemplar, Exemplars, TraceExemplars
from glassbox.export.family import Family
from glassbox.export.family_source import FamilySource
from glassbox.export.liveness import Liveness

logger = get_logger(__name__)

_INF: Final = float("inf")
_NOTHING: Final[tuple[Sequence[Family], Exemplars]] = ((), NONE)


def bucket_names(bounds: Iterable[float]) -> list[str]:
    """Values of the label `le`, +Inf included, as `prometheus_client` writes them."""
    return [floatToGoString(bound) for bound in (*bounds, _INF)]


def to_metric(family: Family, exemplars: Exemplars = NONE) -> Metric:
    """A family as a `prometheus_client` metric, with the exemplars of its buckets (which only OpenMetrics shows).

    A histogram whose values may be negative has `_bucket` alone: its `_sum` would not be a counter, and OpenMetrics has
    `_count` only beside it; the bucket +Inf says the same. A counter or sum that is not a number is left out.
    """
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    metric = Metric(name, family.help, family.kind)
    add = metric.samples.append
    if family.kind != "histogram":
        for series in family.series:
            if family.kind == "gauge" or not math.isnan(series.value):
                add(Sample(family.name, dict(zip(family.label_names, series.labels, strict=True)), series.value))
        return metric
    names = bucket_names(family.bounds)
    for series in family.series:
        labels = dict(zip(family.label_names, series.labels, strict=True))
        below = 0
        shown = exemplars.get((name, series.labels), (None,) * len(names))
        for le, count, exemplar in zip(names, series.buckets, shown, strict=True):
            below += count
            add(Sample(f"{name}_bucket", {**labels, "le": le}, below, None, _exemplar(exemplar)))
        if series.sum is not None and not math.isnan(series.sum):
            add(Sample(f"{name}_count", labels, below))
            add(Sample(f"{name}_sum", labels, series.sum))
    return metric


def _exemplar(exemplar: Exemplar | None) -> PrometheusExemplar | None:
    if exemplar is None:
        return None
    return PrometheusExemplar(dict(exemplar.labels), exemplar.value, round(exemplar.time_s, 3))


class Shown(Protocol):
    """What is shown at a scrape."""

    def shown(self) -> tuple[Sequence[Family], Exemplars]:
        """The families of this moment and the exemplars of their buckets; never raises."""


class LivenessCollector(Collector):
    """Shows in a registry whether what else is shown there is alive; never raises into it.

    Args:
        liveness: of the server.
        shown: whether glassbox's metrics are shown at the moment.
    """

    def __init__(self, liveness: Liveness, shown: Callable[[], bool]) -> None:
        self._liveness, self._shown = liveness, shown

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read files."""
        return []

    def collect(self) -> list[Metric]:
        """The metrics of this moment."""
        return [to_metric(family) for family in self.families()]

    def shown(self) -> tuple[Sequence[Family], Exemplars]:
        """See Shown."""
        return self.families(), NONE

    def families(self) -> list[Family]:
        """The same as families."""
        try:
            return self._liveness.families() if self._shown() else []
        except Exception as error:  # a scrape also carries vLLM's own metrics: never break it
            log_once(
                logger,
                logging.WARNING,
                "liveness",
                "glassbox can't tell how old its metrics are: %s: %s",
                type(error).__name__,
                error,
            )
            return []


class PrometheusCollector(Collector):
    """Shows a server's families in a registry; reads the run directory on each scrape, never raises into it.

    An error is counted (`glassbox_errors_total{stage="prometheus"}`), logged once, and the last good metrics
    are shown.

    Args:
        source: of the families.
        exemplars: of the traced requests; None where reading traces would hold up others (vLLM's event loop).
    """

    def __init__(self, source: FamilySource, exemplars: TraceExemplars | None = None) -> None:
        self._source = source
        self._exemplars = exemplars
        self._lock = threading.Lock()
        self._last = _NOTHING
        self._metrics_of: tuple[Sequence[Family], Exemplars] | None = None
        self._metrics: list[Metric] = []
        self._failing = False

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read files, and the names are known only with the first snapshot."""
        return []

    def shown(self) -> tuple[Sequence[Family], Exemplars]:
        """See Shown; nothing if `export.prometheus.enabled` is false."""
        with self._lock:
            return self._look()

    def _look(self) -> tuple[Sequence[Family], Exemplars]:
        try:
            if not self._source.config.export.prometheus.enabled:
                return _NOTHING
            view = self._source.view()
            exemplars = NONE if self._exemplars is None else self._exemplars.current(view.detail)
            if view.families is not self._last[0] or exemplars is not self._last[1]:
                self._last = view.families, exemplars
            self._failing = False
        except Exception as error:  # a scrape also carries vLLM's own metrics: never break it
            self._source.count_error("prometheus")
            if not self._failing:
                logger.warning("glassbox shows its last good metrics: %s: %s", type(error).__name__, error)
            self._failing = True
        return self._last

    def collect(self) -> list[Metric]:
        """The same as metrics."""
        with self._lock:
            shown = self._look()
            if shown is not self._metrics_of:
                families, exemplars = shown
                self._metrics, self._metrics_of = [to_metric(family, exemplars) for family in families], shown
            return self._metrics
