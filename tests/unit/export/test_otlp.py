"""Where OTLP goes: the YAML, the variables of the specification, and a real receiver that gets both signals."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig, OtelConfig
from glassbox.core.errors import ErrorCounter, export_errors
from glassbox.core.logs import get_logger
from glassbox.export.attention_spans import AttentionSpans
from glassbox.export.families import build_families
from glassbox.export.otel import OtelSink
from glassbox.export.otlp import EXPORT_TIMEOUT_S, Signal, Target, resolve, switched_off_by
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.exporter_status import read_status
from glassbox.store.merge import merge
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import logged, make_snapshot
from tests.otlp_receiver import OtlpReceiver
from tests.trace_samples import make_trace

HTTP = {"PROTOCOL": "http/protobuf"}


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def target(signal: Signal, config: dict[str, Any], environ: dict[str, str], vllm_endpoint: str | None = None) -> Target:
    """Of a configuration and of variables without their prefix."""
    variables = {f"OTEL_EXPORTER_OTLP_{name}": text for name, text in environ.items()}
    found = resolve(OtelConfig(**config), signal, variables, vllm_endpoint)
    assert found is not None
    return found


class TestEndpoint:
    @pytest.mark.parametrize(
        ("config", "environ", "metrics", "traces"),
        [
            # Nobody says anything: the defaults of the specification.
            ({}, {}, "grpc http://localhost:4317", "grpc http://localhost:4317"),
            ({}, HTTP, "http http://localhost:4318/v1/metrics", "http http://localhost:4318/v1/traces"),
            # A base: the signals' paths come below its own.
            (
                {},
                {**HTTP, "ENDPOINT": "http://c:4318"},
                "http http://c:4318/v1/metrics",
                "http http://c:4318/v1/traces",
            ),
            (
                {},
                {**HTTP, "ENDPOINT": "https://c/a/b/"},
                "http https://c/a/b/v1/metrics",
                "http https://c/a/b/v1/traces",
            ),
            ({}, {"ENDPOINT": "http://c:4317"}, "grpc http://c:4317", "grpc http://c:4317"),
            # A signal's own: as it is, and it wins.
            (
                {},
                {**HTTP, "ENDPOINT": "http://c:4318", "METRICS_ENDPOINT": "http://m:1/in"},
                "http http://m:1/in",
                "http http://c:4318/v1/traces",
            ),
            (
                {},
                {**HTTP, "TRACES_ENDPOINT": "http://t:1"},
                "http http://localhost:4318/v1/metrics",
                "http http://t:1/",
            ),
            # A signal's own protocol.
            (
                {},
                {"TRACES_PROTOCOL": "http/protobuf", "ENDPOINT": "http://c:1"},
                "grpc http://c:1",
                "http http://c:1/v1/traces",
            ),
            # An empty variable is as good as none.
            (
                {},
                {"ENDPOINT": "http://c:1", "METRICS_ENDPOINT": "", "PROTOCOL": " "},
                "grpc http://c:1",
                "grpc http://c:1",
            ),
            # The YAML wins, over those of a signal, too.
            (
                {"endpoint": "http://y:4318", "protocol": "http"},
                {"PROTOCOL": "grpc", "ENDPOINT": "http://c:1", "TRACES_ENDPOINT": "http://t:1"},
                "http http://y:4318/v1/metrics",
                "http http://y:4318/v1/traces",
            ),
            ({"protocol": "grpc"}, {**HTTP, "ENDPOINT": "http://c:1"}, "grpc http://c:1", "grpc http://c:1"),
            ({"endpoint": "http://y:1/x"}, HTTP, "http http://y:1/x/v1/metrics", "http http://y:1/x/v1/traces"),
            # The YAML has one endpoint for both: one that was written for a signal is right for the other.
            (
                {"endpoint": "https://y/otlp/v1/metrics?k=1", "protocol": "http"},
                {},
                "http https://y/otlp/v1/metrics?k=1",
                "http https://y/otlp/v1/traces?k=1",
            ),
            # gRPC without a scheme: no TLS, unless somebody wants it.
            ({"endpoint": "y:4317"}, {}, "grpc http://y:4317", "grpc http://y:4317"),
            ({}, {"ENDPOINT": "[::1]:4317"}, "grpc http://[::1]:4317", "grpc http://[::1]:4317"),
            ({"endpoint": "y:4317"}, {"INSECURE": "false"}, "grpc https://y:4317", "grpc https://y:4317"),
            ({"endpoint": "y:4317"}, {"TRACES_INSECURE": "False"}, "grpc http://y:4317", "grpc https://y:4317"),
            ({"endpoint": "https://y:4317"}, {"INSECURE": "true"}, "grpc https://y:4317", "grpc https://y:4317"),
        ],
    )
    def test_of_both_signals(self, config: dict[str, Any], environ: dict[str, str], metrics: str, traces: str) -> None:
        """Protocol and URL."""
        found = [target(signal, config, environ) for signal in ("metrics", "traces")]
        assert [f"{one.protocol} {one.endpoint}" for one in found] == [metrics, traces]
        assert [one.insecure for one in found] == [not one.endpoint.startswith("https") for one in found]

    def test_vllms_own_is_the_last_resort_of_spans(self) -> None:
        """As vLLM uses it: it is the signal's, not a base."""
        assert target("traces", {}, HTTP, "http://v:4318/v1/traces").endpoint == "http://v:4318/v1/traces"
        assert target("traces", {}, {"ENDPOINT": "http://c:1"}, "http://v:1").endpoint == "http://c:1"
        assert target("traces", {"endpoint": "http://y:1"}, {}, "http://v:1").endpoint == "http://y:1"

    @pytest.mark.parametrize(
        ("config", "environ", "expected"),
        [
            ({"endpoint": "http://u:p@y:1"}, {}, "y:1 (grpc, export.otel.endpoint)"),
            ({}, {**HTTP, "ENDPOINT": "http://c:1"}, "c:1/v1/metrics (http, OTEL_EXPORTER_OTLP_ENDPOINT)"),
            ({}, {"METRICS_ENDPOINT": "http://c:1"}, "c:1 (grpc, OTEL_EXPORTER_OTLP_METRICS_ENDPOINT)"),
            ({}, {}, "localhost:4317 (grpc, the default)"),
        ],
    )
    def test_who_named_it_is_told(self, config: dict[str, Any], environ: dict[str, str], expected: str) -> None:
        """In the log, without passwords."""
        assert str(target("metrics", config, environ)) == expected


class TestTheRest:
    def test_each_has_its_own_and_a_common_variable(self) -> None:
        """The signal's wins; names of headers in lower case, percent signs resolved, the YAML's on top."""
        environ = {
            "HEADERS": "Authorization=Basic%20Zm9v,x-team=a",
            "METRICS_HEADERS": "X-Team = b%2Cc ,",
            "TIMEOUT": "20000",
            "METRICS_TIMEOUT": "1500",
            "COMPRESSION": "gzip",
            "METRICS_COMPRESSION": "none",
            "CERTIFICATE": "/ca",
            "METRICS_CLIENT_KEY": "/key",
            "METRICS_CLIENT_CERTIFICATE": "/cert",
        }
        metrics, traces = (target(signal, {"headers": {"X-Own": "1"}}, environ) for signal in ("metrics", "traces"))
        assert metrics.headers == (("x-own", "1"), ("x-team", "b,c"))
        assert traces.headers == (("authorization", "Basic Zm9v"), ("x-own", "1"), ("x-team", "a"))
        assert (metrics.timeout_s, traces.timeout_s) == (1.5, 20.0)
        assert (metrics.compression, traces.compression) == ("none", "gzip")
        assert (metrics.certificate, metrics.client_key, metrics.client_certificate) == ("/ca", "/key", "/cert")
        assert (traces.certificate, traces.client_key, traces.client_certificate) == ("/ca", None, None)
        assert "Basic" not in repr(traces)

    @pytest.mark.parametrize(("text", "seconds"), [("10", 10.0), ("99.5", 99.5), ("100", 0.1), ("10000", 10.0)])
    def test_a_timeout_that_means_seconds(self, text: str, seconds: float) -> None:
        """The specification counts milliseconds, vLLM's SDK seconds: below 100 nobody means milliseconds."""
        assert target("traces", {}, {"TIMEOUT": text}).timeout_s == seconds
        assert target("traces", {}, {}).timeout_s == EXPORT_TIMEOUT_S

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            (
                {"PROTOCOL": "http/json"},
                "_PROTOCOL must be grpc or http/protobuf, got 'http/json'.*set it to",
            ),
            ({"METRICS_PROTOCOL": "HTTP"}, "_METRICS_PROTOCOL must be grpc or http/protobuf, got 'HTTP'"),
            (
                {"ENDPOINT": "ftp://c"},
                "_ENDPOINT must be an http or https URL, or host:port for grpc, got 'ftp://c'",
            ),
            (
                {**HTTP, "ENDPOINT": "c:4318"},
                "_ENDPOINT must be an http or https URL for http, got 'c:4318'; use http://co",
            ),
            ({"COMPRESSION": "zip"}, "_COMPRESSION must be one of none, gzip for grpc, got 'zip'; unset it"),
            ({"TIMEOUT": "soon"}, "_TIMEOUT must be a number of milliseconds above 0, got 'soon'; use 10000"),
            ({"TIMEOUT": "-1"}, "_TIMEOUT must be"),
            ({"TIMEOUT": "nan"}, "_TIMEOUT must be"),
            ({"HEADERS": "secret"}, "_HEADERS must be name=value pairs joined by commas"),
        ],
    )
    def test_what_cannot_be_meant(self, environ: dict[str, str], message: str) -> None:
        """Names the variable, the rule and the remedy; no header's text."""
        with pytest.raises(ValueError, match=message) as error:
            target("metrics", {}, environ)
        assert "secret" not in str(error.value)

    @pytest.mark.parametrize(
        ("environ", "metrics", "traces"),
        [
            ({"OTEL_SDK_DISABLED": "true"}, "OTEL_SDK_DISABLED=true", "OTEL_SDK_DISABLED=true"),
            ({"OTEL_SDK_DISABLED": " TRUE "}, "OTEL_SDK_DISABLED=true", "OTEL_SDK_DISABLED=true"),
            ({"OTEL_SDK_DISABLED": "1"}, None, None),
            ({"OTEL_METRICS_EXPORTER": "none"}, "OTEL_METRICS_EXPORTER=none", None),
            ({"OTEL_TRACES_EXPORTER": "none"}, None, "OTEL_TRACES_EXPORTER=none"),
            ({"OTEL_TRACES_EXPORTER": "otlp"}, None, None),
        ],
    )
    def test_what_is_switched_off(self, environ: dict[str, str], metrics: str | None, traces: str | None) -> None:
        """True is the only word for it, as the specification has it; then there is no target."""
        for signal, expected in (("metrics", metrics), ("traces", traces)):
            assert switched_off_by(signal, environ) == expected
            assert (resolve(OtelConfig(), signal, environ) is None) == (expected is not None)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def send_both(run_dir: Path, config: OtelConfig) -> ErrorCounter:
    """One export of each signal."""
    errors = export_errors(get_logger("glassbox.tests"))
    metrics = OtelSink(config, run_dir, errors)
    metrics.send(build_families(merge([make_snapshot()]), "model"))
    spans = AttentionSpans(config, run_dir, errors)
    spans.send(make_trace(), None)
    for sink in (metrics, spans):
        sink.close(timeout_s=60)
    return errors


class TestReceiver:
    """What comes out is what a collector gets."""

    @pytest.mark.parametrize(
        ("variables", "paths"),
        [
            ({"ENDPOINT": "{grpc}"}, {"grpc"}),
            ({"ENDPOINT": "{grpc}", "COMPRESSION": "gzip", "TIMEOUT": "8000"}, {"grpc"}),
            ({"ENDPOINT": "{http}", "PROTOCOL": "http/protobuf"}, {"/v1/metrics", "/v1/traces"}),
            (
                {"ENDPOINT": "{http}/tenant/a", "PROTOCOL": "http/protobuf", "COMPRESSION": "gzip"},
                {"/tenant/a/v1/metrics", "/tenant/a/v1/traces"},
            ),
            (
                {"ENDPOINT": "{grpc}", "TRACES_ENDPOINT": "{http}/in/v1/traces", "TRACES_PROTOCOL": "http/protobuf"},
                {"grpc", "/in/v1/traces"},
            ),
        ],
        ids=["grpc", "grpc gzip", "http", "http below a path", "a protocol for each"],
    )
    def test_both_signals_arrive(
        self,
        receiver: OtlpReceiver,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        variables: dict[str, str],
        paths: set[str],
    ) -> None:
        """With the headers of the variables and of the YAML, and the resource that the variables say."""
        for name, text in {**variables, "HEADERS": "x-from=variables"}.items():
            filled = text.format(grpc=receiver.grpc_endpoint, http=receiver.http_endpoint)
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", filled)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
        errors = send_both(tmp_path, OtelConfig(enabled=True, headers={"X-Yaml": "1"}))
        assert errors.counts() == {}
        assert {request.path or request.protocol for request in receiver.requests} == paths
        assert len(list(receiver.spans())) == 1
        assert "glassbox.steps" in receiver.metrics()
        for request in receiver.requests:
            assert (request.headers["x-from"], request.headers["x-yaml"]) == ("variables", "1")
            (resource,) = getattr(request.message, "resource_metrics", None) or request.message.resource_spans
            assert "chat" in {value.value.string_value for value in resource.resource.attributes}

    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_a_certificate_that_is_not_there_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Any
    ) -> None:
        """The file's name, when the sink opens."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/ca.pem")
        config = OtelConfig(endpoint="https://127.0.0.1:1", protocol=protocol)
        with pytest.raises(FileNotFoundError, match=r"/no/such/ca\.pem"):
            OtelSink(config, tmp_path, export_errors(get_logger("glassbox.tests")))

    def test_switched_off_is_said_once_and_is_no_sink(
        self, receiver: OtlpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The exporter goes on with its other sinks."""
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        write_snapshot(tmp_path, make_snapshot())
        otel = {"enabled": True, "endpoint": receiver.grpc_endpoint}
        config = GlassboxConfig.model_validate({"export": {"otel": otel}})
        sinks = Sinks(tmp_path, lambda: config)
        for _ in range(2):
            sinks.round()
        sinks.close()
        assert (
            sum("no metrics are sent because of OTEL_SDK_DISABLED=true" in line for line in logged(caplog.records)) == 1
        )
        status = read_status(tmp_path)
        assert status is not None
        assert (status.sinks, status.errors) == ({}, {})
        assert receiver.requests == []
