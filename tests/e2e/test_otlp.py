"""OTLP and glassbox's own port show what vLLM's /metrics shows, switched on while the server runs."""

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from glassbox.export.families import METRICS
from tests.e2e.samples import OF_THE_MOMENT, Key, glassbox_samples
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.ports import free_port
from tests.serving import GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMETHEUS_NAMES = {family.otel_name: family.name for family in METRICS}


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def as_samples(metrics: dict[str, Metric]) -> dict[Key, float]:
    """What was received, in the words of Prometheus."""
    found: dict[Key, float] = {}
    names = {"gen_ai.request.model": "model_name", "host.name": "host"}
    for metric in metrics.values():
        name = PROMETHEUS_NAMES[metric.name]
        if name in OF_THE_MOMENT:
            continue
        for point in getattr(metric, metric.WhichOneof("data")).data_points:
            labels = {
                names.get(key, key.removeprefix("glassbox.")): str(value)
                for key, value in attributes(point.attributes).items()
            }
            if metric.WhichOneof("data") != "histogram":
                value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
                found[name, frozenset(labels.items())] = float(value)
                continue
            below = 0
            for bound, count in zip([*point.explicit_bounds, math.inf], point.bucket_counts, strict=True):
                below += count
                le = "+Inf" if bound == math.inf else str(bound)
                found[f"{name}_bucket", frozenset({**labels, "le": le}.items())] = float(below)
            if point.HasField("sum"):  # Prometheus has the one only with the other
                found[f"{name}_count", frozenset(labels.items())] = float(point.count)
                found[f"{name}_sum", frozenset(labels.items())] = point.sum
    return found


def differences(shown: dict[Key, float], other: dict[Key, float]) -> dict[Key, tuple[float | None, float | None]]:
    """Samples that aren't in both with the same value; empty if all is the same."""
    return {
        key: (shown.get(key), other.get(key)) for key in shown.keys() | other.keys() if shown.get(key) != other.get(key)
    }


def common(samples: dict[Key, float]) -> dict[Key, float]:
    """Samples but for the errors of showing them, which only the process that shows them has met."""
    own = {"baseline", "http", "prometheus"}
    return {
        (name, labels): value
        for (name, labels), value in samples.items()
        if name != "glassbox_errors_total" or dict(labels)["stage"] not in own
    }


def serve_some(server: GlassboxServer) -> None:
    """Requests of both phases, and then rest."""
    server.complete("The lighthouse keeper", max_tokens=12)
    server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=6)
    server.settled_rows()


class TestOtlp:
    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_a_receiver_gets_the_numbers_of_metrics(
        self, server: GlassboxServer, receiver: OtlpReceiver, protocol: str
    ) -> None:
        """Every sample of /metrics, no other, with equal values, by the protocol the YAML asks for."""
        otel = {"enabled": True, "endpoint": receiver.endpoint(protocol), "protocol": protocol}
        server.edit_config(export={"interval_s": 1, "otel": otel})
        receiver.wait_for_metrics(timeout_s=90.0)
        serve_some(server)
        wait_for(
            lambda: differences(common(glassbox_samples(server.metrics())), common(as_samples(receiver.metrics()))),
            lambda found: not found,
            timeout_s=90.0,
            what="the receiver's numbers to be those of /metrics",
        )
        assert {request.protocol for request in receiver.requests} == {protocol}
        assert server.metric("glassbox_attention_rows_total", phase="decode")

    def test_a_protocol_is_changed_while_the_server_runs(self, server: GlassboxServer, receiver: OtlpReceiver) -> None:
        """grpc, then http: the edit is enough, and nothing comes by the old one any more."""
        for protocol in ("grpc", "http"):
            otel = {"enabled": True, "endpoint": receiver.endpoint(protocol), "protocol": protocol}
            server.edit_config(export={"interval_s": 1, "otel": otel})
            receiver.wait_until(
                lambda got, protocol=protocol: any(request.protocol == protocol for request in got.requests), 90.0
            )
        number = len(receiver.requests)
        receiver.wait_until(lambda got: len(got.requests) >= number + 3, 90.0)
        assert {request.protocol for request in receiver.requests[number:]} == {"http"}

    def test_switching_it_off_ends_the_exporter_process(self, server: GlassboxServer, receiver: OtlpReceiver) -> None:
        """Nothing needs the exporter then; it ends within seconds of the edit."""

        def exporters() -> list[int]:
            return [process.pid for process in server.processes() if "glassbox.processes.exporter" in process.cmdline()]

        otel: dict[str, Any] = {"enabled": True, "endpoint": receiver.grpc_endpoint}
        alone = {"on_vllm_port": False}  # else the exporter writes the page of vLLM's port
        server.edit_config(export={"interval_s": 1, "otel": otel, "prometheus": alone})
        wait_for(exporters, lambda pids: len(pids) == 1, 90.0, "an exporter process")
        server.edit_config(export={"interval_s": 1, "prometheus": alone})
        wait_for(exporters, lambda pids: pids == [], 90.0, "the exporter process to end")


class TestOwnPort:
    def test_the_own_port_shows_the_numbers_of_metrics(self, server: GlassboxServer) -> None:
        """`export.http.port` opens a port with glassbox's samples and nothing else; without it, it closes."""
        port = free_port()
        url = f"http://127.0.0.1:{port}/metrics"
        server.edit_config(export={"interval_s": 1, "http": {"port": port}})
        serve_some(server)

        def text() -> str:
            try:
                return httpx.get(url, timeout=60.0).raise_for_status().text
            except httpx.TransportError:
                return ""

        wait_for(text, bool, 90.0, "the port to open")
        wait_for(
            lambda: differences(common(glassbox_samples(server.metrics())), common(glassbox_samples(text()))),
            lambda found: not found,
            timeout_s=60.0,
            what="the port's numbers to be those of /metrics",
        )
        assert all(
            line.startswith(("glassbox_", "# HELP glassbox_", "# TYPE glassbox_")) for line in text().splitlines()
        )
        server.restore_config()
        wait_for(text, lambda shown: shown == "", 90.0, "the port to close")
