"""OpenTelemetry: the families as OTLP metrics, by gRPC or HTTP.

Owns the translation into the SDK's data model and the sending thread; where they are sent is `otlp.py`'s. The SDK's
instruments are not used: they would count a second time what the snapshots hold already, and lose it when the exporter
restarts. Import this module only if OTLP is enabled; the SDK and gRPC double the exporter's memory.
"""

import logging
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import HOST_NAME, SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from glassbox import __version__
from glassbox.config.load import OtelConfig
from glassbox.core.errors import ErrorCounter
from glassbox.export.family import Family, Series
from glassbox.export.otlp import metric_exporter, resolve

DEFAULT_SERVICE_NAME: Final = "vllm"
# Semantic conventions where they have a name for it, the project's own prefix elsewhere.
_ATTRIBUTES: Final = {"model_name": "gen_ai.request.model", "host": "host.name"}
_NUMBERS: Final = frozenset({"layer", "head", "rank"})
_NS_PER_S: Final = 1_000_000_000


def _attributes(family: Family, series: Series) -> dict[str, str | int]:
    return {
        _ATTRIBUTES.get(name, f"glassbox.{name}"): int(label) if name in _NUMBERS else label
        for name, label in zip(family.label_names, series.labels, strict=True)
    }


def to_otel(family: Family, time_s: float) -> Metric:
    """A family as a metric of the SDK: counters and histograms are cumulative since the workers' start.

    Histograms have neither minimum nor maximum, which are not known, and no sum if values may be negative.

    Args:
        family: with its series.
        time_s: Unix time at which the values hold: that of sending, because an idle worker writes no new
            snapshot and a backend drops points that bring no new time.
    """

    time_ns = int(time_s * _NS_PER_S)
    points: list[Any]
    data: Histogram | Sum | Gauge
    if family.kind == "histogram":
        points = [
            HistogramDataPoint(
                attributes=_attributes(family, series),
                start_time_unix_nano=int(series.start_time_s * _NS_PER_S),
                time_unix_nano=time_ns,
                count=int(series.value),
                sum=series.sum,  # type: ignore[arg-type]  # None leaves the optional protobuf field unset
                bucket_counts=series.buckets,
                explicit_bounds=family.bounds,
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
            )
            for series in family.series
        ]
        data = Histogram(data_points=points, aggregation_temporality=AggregationTemporality.CUMULATIVE)
    else:
        points = [
            NumberDataPoint(
                attributes=_attributes(family, series),
                start_time_unix_nano=int(series.start_time_s * _NS_PER_S),
                time_unix_nano=time_ns,
                value=series.value,
            )
            for series in family.series
        ]
        if family.kind == "counter":
            data = Sum(points, aggregation_temporality=AggregationTemporality.CUMULATIVE, is_monotonic=True)
        else:
            data = Gauge(points)
    return Metric(name=family.otel_name, description=family.help, unit=family.unit, data=data)


def to_metrics_data(families: Sequence[Family], resource: Resource, time_s: float) -> MetricsData:
    """All families as one export of the SDK."""
    scope = InstrumentationScope("glassbox", __version__)
    metrics = [to_otel(family, time_s) for family in families]
    scopes = [ScopeMetrics(scope=scope, metrics=metrics, schema_url="")]
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=scopes, schema_url="")])


def make_resource(run_dir: Path) -> Resource:
    """Resource of a server on one node: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the defaults.

    The instance id stays the same when the exporter is restarted, and differs between the nodes of a server.
    """
    host = socket.gethostname()
    server = f"{host}:{Path(run_dir).absolute()}"
    defaults = {
        HOST_NAME: host,
        SERVICE_NAME: DEFAULT_SERVICE_NAME,
        SERVICE_INSTANCE_ID: str(uuid.uuid5(uuid.NAMESPACE_URL, server)),
    }
    # `Resource.create` alone would give an instance id of its own to each process, and a made-up service name.
    environment = OTELResourceDetector().detect()
    return Resource.create().merge(Resource(defaults)).merge(environment)


class OtelSink:
    """Sends families from a thread of its own, so that a collector that is away delays nothing.

    Only the newest families wait; those that a slow collector had no time for are dropped, which loses
    nothing because all numbers are cumulative. Failures are counted as stage `otel`.

    Attributes:
        last_success_s: Unix time at which the collector last accepted an export; 0 if it hasn't yet.

    Args:
        config: export.otel.
        run_dir: of the server.
        errors: told of failures.
        environ: OTEL_*; by default the process's.

    Raises:
        ValueError: as `resolve`, or a variable switches metrics off.
        Exception: as `metric_exporter`.
    """

    def __init__(
        self, config: OtelConfig, run_dir: Path, errors: ErrorCounter, environ: Mapping[str, str] | None = None
    ) -> None:
        # The SDK logs every failed export; here it is logged once, by ErrorCounter.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self.last_success_s = 0.0
        self._errors = errors
        self._resource = make_resource(run_dir)
        target = resolve(config, "metrics", environ)
        if target is None:
            raise ValueError("metrics are switched off by the OTEL_* variables; unset them to send any")
        self._exporter = metric_exporter(target)
        self._target = str(target)
        self._condition = threading.Condition()
        self._next: list[Family] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="glassbox-otel", daemon=True)
        self._thread.start()

    def send(self, families: Sequence[Family]) -> None:
        """Hand families over to be sent; returns at once."""
        with self._condition:
            self._next = list(families)
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._next is not None or self._closing)
                families, self._next = self._next, None
            if families is None:
                return
            if families:
                self._export(families)

    def _export(self, families: Sequence[Family]) -> None:
        try:
            result = self._exporter.export(to_metrics_data(families, self._resource, time.time()))
        except Exception as error:
            self._errors.count("otel", error)
            return
        if result is MetricExportResult.SUCCESS:
            self._errors.worked("otel")
            self.last_success_s = time.time()
        else:
            self._errors.count("otel", f"{self._target} did not accept the metrics")

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread, after the families that still wait were sent or `timeout_s` seconds have passed."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        # Breaks off what is still under way: retries, and with gRPC the call itself.
        self._exporter.shutdown()
        self._thread.join(timeout_s / 2)
