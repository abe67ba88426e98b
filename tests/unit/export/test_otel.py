"""OTLP: a real receiver gets the numbers of Prometheus, by gRPC and by HTTP; one that is away delays nothing."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric

from glassbox.config.load import OtelConfig
from glassbox.core.errors import ErrorCounter, export_errors
from glassbox.core.logs import get_logger
from glassbox.export.families import build_families
from glassbox.export.family import Family
from glassbox.export.otel import OtelSink, make_resource, to_metrics_data, to_otel
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import merge
from tests.export_samples import logged, make_snapshot
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.ports import free_port
from tests.waiting import require_within, seconds_of, wait_for

PROTOCOLS = ["grpc", "http"]


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def families(detail: Any = "layer") -> list[Family]:
    return build_families(merge([make_snapshot(), make_snapshot(seed=5, engine="1")]), detail)


def config(endpoint: str | None, protocol: Any, **changes: Any) -> OtelConfig:
    return OtelConfig(enabled=True, protocol=protocol, endpoint=endpoint, **changes)


def fresh_errors() -> ErrorCounter:
    """Of an exporter that has just begun."""
    return export_errors(get_logger("glassbox.tests"))


def send_once(config: OtelConfig, run_dir: Path, families: list[Family]) -> ErrorCounter:
    errors = fresh_errors()
    sink = OtelSink(config, run_dir, errors)
    sink.send(families)
    sink.close(timeout_s=60)
    return errors


def as_prometheus(metric: Metric, family: Family) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A received metric as the samples that Prometheus would have."""
    back = {"gen_ai.request.model": "model_name", "host.name": "host"}
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for point in getattr(metric, str(metric.WhichOneof("data"))).data_points:
        labels = {back.get(k, k.removeprefix("glassbox.")): str(v) for k, v in attributes(point.attributes).items()}
        if family.kind != "histogram":
            value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
            found[family.name, frozenset(labels.items())] = value
            continue
        below = 0
        for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):
            below += count
            le = "+Inf" if bound == float("inf") else repr(bound)
            found[f"{family.name}_bucket", frozenset({**labels, "le": le}.items())] = below
        if point.HasField("sum"):  # Prometheus has the one only with the other
            found[f"{family.name}_count", frozenset(labels.items())] = point.count
            found[f"{family.name}_sum", frozenset(labels.items())] = point.sum
    return found


class TestNumbers:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_receiver_gets_what_prometheus_shows(
        self, receiver: OtlpReceiver, tmp_path: Path, protocol: str, detail: str
    ) -> None:
        """Every sample of the Prometheus exposition, and no other."""
        sent = families(detail)
        errors = send_once(config(receiver.endpoint(protocol), protocol), tmp_path, sent)
        assert errors.counts() == {}
        received = receiver.wait_for_metrics()
        assert set(received) == {family.otel_name for family in sent}
        for family in sent:
            expected = {(s.name, frozenset(s.labels.items())): s.value for s in to_metric(family).samples}
            assert as_prometheus(received[family.otel_name], family) == expected, family.name

    def test_names_units_and_kinds(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Dots instead of underscores, the unit in its field, counters are monotonic cumulative sums."""
        send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, families())
        received = receiver.wait_for_metrics()
        assert {(name, metric.unit, metric.WhichOneof("data")) for name, metric in received.items()} == {
            ("glassbox.attention.entropy_ratio", "1", "histogram"),
            ("glassbox.attention.effective_keys", "{key}", "histogram"),
            ("glassbox.attention.max_logit", "1", "histogram"),
            ("glassbox.attention.top1_ratio", "1", "histogram"),
            ("glassbox.attention.sink_ratio", "1", "histogram"),
            ("glassbox.attention.local_ratio", "1", "histogram"),
            ("glassbox.attention.distance_tokens", "{token}", "histogram"),
            ("glassbox.attention.lookback_ratio", "1", "histogram"),
            ("glassbox.attention.max_logit_window_max", "1", "gauge"),
            ("glassbox.attention.rows", "{row}", "sum"),
            ("glassbox.attention.nonfinite_rows", "{row}", "sum"),
            ("glassbox.steps", "{step}", "sum"),
            ("glassbox.sampled_steps", "{step}", "sum"),
            ("glassbox.dropped_rows", "{row}", "sum"),
            ("glassbox.errors", "{error}", "sum"),
            ("glassbox.overhead", "s", "sum"),
            ("glassbox.sample_rate", "1", "gauge"),
            ("glassbox.layers_observed", "{layer}", "gauge"),
            ("glassbox.layers_bypassed", "{layer}", "gauge"),
            ("glassbox.layers_certified", "{layer}", "gauge"),
            ("glassbox.canary_rows", "{row}", "sum"),
            ("glassbox.attention.output_error_ratio", "1", "histogram"),
            ("glassbox.attention.output_error_worst_ratio", "1", "gauge"),
            ("glassbox.kv_cache.quantization_error_ratio", "1", "gauge"),
            ("glassbox.kv_cache.saturated_ratio", "1", "gauge"),
            ("glassbox.watched_requests.delay", "s", "gauge"),
            ("glassbox.traced_requests_active", "{request}", "gauge"),
            ("glassbox.traced_requests", "{request}", "sum"),
            ("glassbox.trace_refused", "{request}", "sum"),
            ("glassbox.traces_dropped", "{file}", "sum"),
            ("glassbox.trace_skipped_steps", "{step}", "sum"),
            ("glassbox.start", "s", "gauge"),
            ("glassbox.build_info", "1", "gauge"),
            ("glassbox.config.last_reload_successful", "1", "gauge"),
            ("glassbox.config.last_reload_timestamp", "s", "gauge"),
            ("glassbox.worker_info", "1", "gauge"),
        }
        steps = received["glassbox.steps"].sum
        assert (steps.is_monotonic, steps.aggregation_temporality) == (True, AGGREGATION_TEMPORALITY_CUMULATIVE)
        entropy = received["glassbox.attention.entropy_ratio"].histogram
        assert entropy.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE

    def test_times_and_attributes_of_a_point(self) -> None:
        """Cumulative since the worker's start, up to the moment of sending; layer and head are numbers."""
        family = next(family for family in families("head") if family.name == "glassbox_attention_rows_total")
        point = to_otel(family, time_s=1_700_000_200.0).data.data_points[0]
        assert point.start_time_unix_nano == 1_700_000_000 * 10**9
        assert point.time_unix_nano == 1_700_000_200 * 10**9
        assert point.attributes == {
            "gen_ai.request.model": "tiny/model",
            "glassbox.engine": "0",
            "glassbox.phase": "prefill",
            "glassbox.layer": 0,
            "glassbox.head": 0,
        }

    def test_histograms_claim_no_extremes(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Minimum and maximum are not known; the sum of logits is none."""
        send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, families())
        received = receiver.wait_for_metrics()
        point = received["glassbox.attention.max_logit"].histogram.data_points[0]
        assert [point.HasField(name) for name in ("min", "max", "sum")] == [False, False, False]
        assert received["glassbox.attention.sink_ratio"].histogram.data_points[0].HasField("sum")

    def test_a_large_export_is_split(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """gRPC receivers refuse messages above 4 MiB: all points come, in several requests."""
        large = build_families(merge([make_snapshot(layers=tuple(range(40)), heads=12)]), "head")
        assert send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, large).counts() == {}
        points = 0
        for request in receiver.requests:
            assert request.message.ByteSize() < 4 * 2**20
            for metric in request.message.resource_metrics[0].scope_metrics[0].metrics:
                points += len(getattr(metric, str(metric.WhichOneof("data"))).data_points)
        assert len(receiver.requests) > 1
        assert points == sum(len(family.series) for family in large)


class TestEndpoint:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_without_endpoint_the_variables_decide(
        self, receiver: OtlpReceiver, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`endpoint: null` follows OTEL_EXPORTER_OTLP_ENDPOINT and its headers."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint(protocol))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-from=environment")
        send_once(config(None, protocol), tmp_path, families())
        receiver.wait_for_metrics()
        assert receiver.requests[0].headers["x-from"] == "environment"

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_headers_of_the_file_are_sent(self, receiver: OtlpReceiver, tmp_path: Path, protocol: str) -> None:
        """An authorization reaches the collector, however its name is written."""
        sent = config(receiver.endpoint(protocol), protocol, headers={"Authorization": "Bearer x"})
        send_once(sent, tmp_path, families())
        receiver.wait_for_metrics()
        assert receiver.requests[0].headers["authorization"] == "Bearer x"


class TestResource:
    def test_defaults(self, tmp_path: Path) -> None:
        """The service is vllm; its instance is the run directory on this host, also after a restart of the exporter."""
        first, second = make_resource(tmp_path).attributes, make_resource(tmp_path).attributes
        assert (first["service.name"], first["host.name"]) == ("vllm", socket.gethostname())
        assert first["service.instance.id"] == second["service.instance.id"]
        assert first["service.instance.id"] != make_resource(tmp_path / "other").attributes["service.instance.id"]

    def test_the_environment_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are respected."""
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=a,deployment.environment.name=test")
        found = make_resource(tmp_path).attributes
        assert found["service.name"] == "chat"
        assert found["service.instance.id"] == "a"
        assert found["deployment.environment.name"] == "test"

    def test_it_is_sent(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """The receiver sees resource and scope."""
        send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, families())
        receiver.wait_for_metrics()
        (resource,) = receiver.requests[0].message.resource_metrics
        assert attributes(resource.resource.attributes)["service.name"] == "vllm"
        assert resource.scope_metrics[0].scope.name == "glassbox"


class TestMissingCollector:
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_nobody_listens(self, tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
        """Handing over returns at once; the failure is counted and logged once; closing takes a second at most."""
        errors = fresh_errors()
        sent, closed = families(), []

        def hand_over_and_close() -> float:
            sink = OtelSink(config(f"http://127.0.0.1:{free_port()}", protocol), tmp_path, errors)
            require_within(0.1, lambda: seconds_of(lambda: sink.send(sent)), attempts=20)
            took_s = seconds_of(lambda: sink.close(timeout_s=0.3))
            closed.append(sink)
            # Of what is broken off the sending thread tells when it gets to it.
            wait_for(lambda: errors.counts() == {"otel": len(closed)}, what="the failure")
            return took_s

        require_within(2.0, hand_over_and_close)
        assert [message.split(" failed")[0] for message in logged(caplog.records)] == ["glassbox export to otel"]

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_collector_that_never_answers(self, tmp_path: Path, protocol: str) -> None:
        """A connection that is accepted and then silent holds up neither `send` nor `close`."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address, sent = f"http://127.0.0.1:{silent.getsockname()[1]}", families()

            def hand_over_and_close() -> float:
                sink = OtelSink(config(address, protocol), tmp_path, fresh_errors())
                began_s = time.monotonic()
                for _ in range(3):
                    sink.send(sent)
                sink.close(timeout_s=0.3)
                return time.monotonic() - began_s

            require_within(1.5, hand_over_and_close)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_collector_that_comes_back(self, tmp_path: Path, protocol: str) -> None:
        """After an outage the next export arrives, and the stage counts as working again."""
        errors = fresh_errors()
        with OtlpReceiver() as receiver:
            sink = OtelSink(config(receiver.endpoint(protocol), protocol), tmp_path, errors)
            errors.count("otel", "an outage")
            sink.send(families())
            receiver.wait_for_metrics()
            sink.close(timeout_s=60)
        assert errors.counts() == {"otel": 1}

    def test_a_slow_collector_gets_the_newest(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """What it had no time for is dropped, the last one is sent: nothing piles up."""
        receiver.delay_s, began_s = 0.2, time.monotonic()
        sink = OtelSink(config(receiver.grpc_endpoint, "grpc"), tmp_path, fresh_errors())
        for steps in range(20):
            sink.send(build_families(merge([make_snapshot(steps=steps)]), "model"))
            time.sleep(0.01)
        sink.close(timeout_s=60)
        assert len(receiver.requests) <= 1 + (time.monotonic() - began_s) / receiver.delay_s
        assert receiver.metrics()["glassbox.steps"].sum.data_points[0].as_int == 19

    def test_closing_leaves_no_thread(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """The sending thread ends with the sink."""
        send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, families())
        threads = lambda: [thread for thread in threading.enumerate() if thread.name == "glassbox-otel"]  # noqa: E731
        wait_for(lambda: not threads(), what="the thread to end")


def test_no_families_are_no_request(receiver: OtlpReceiver, tmp_path: Path) -> None:
    """Before the first snapshot nothing is sent."""
    assert send_once(config(receiver.grpc_endpoint, "grpc"), tmp_path, []).counts() == {}
    assert receiver.requests == []
    assert to_metrics_data([], make_resource(tmp_path), 1.0).resource_metrics[0].scope_metrics[0].metrics == []
