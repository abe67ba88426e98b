"""Where metrics, spans and log records are sent by OTLP: the YAML, else the variables of OpenTelemetry's specification.

Owns the resolving, for all signals alike, and the SDK's exporters for what came out. What the YAML says wins; then
come the variables of the signal, then those of all signals, then the defaults of the specification but for these: the
protocol is gRPC, an export may take 5 seconds, and `host:port` without a scheme means no TLS unless `..._INSECURE`
says otherwise, as vLLM sends its own spans. Headers of the YAML are added to those of the variables.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from glassbox.config.load import OtelConfig

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace.export import SpanExporter

Signal = Literal["metrics", "traces", "logs"]
Protocol = Literal["grpc", "http"]

# An export may take this long, retries included.
EXPORT_TIMEOUT_S: Final = 5.0
# About 300 bytes each; gRPC receivers refuse messages above 4 MiB by default.
MAX_POINTS_PER_REQUEST: Final = 5000
_PREFIX: Final = "OTEL_EXPORTER_OTLP_"
_DISABLED: Final = "OTEL_SDK_DISABLED"
_EXPORTER: Final[dict[Signal, str]] = {
    "metrics": "OTEL_METRICS_EXPORTER",
    "traces": "OTEL_TRACES_EXPORTER",
    "logs": "OTEL_LOGS_EXPORTER",
}
_PROTOCOLS: Final[dict[str, Protocol]] = {"grpc": "grpc", "http/protobuf": "http"}
_DEFAULT: Final[dict[Protocol, str]] = {"grpc": "http://localhost:4317", "http": "http://localhost:4318"}
_COMPRESSIONS: Final[dict[Protocol, tuple[str, ...]]] = {"grpc": ("none", "gzip"), "http": ("none", "gzip", "deflate")}
# The specification counts milliseconds, OpenTelemetry's SDK for Python (thus vLLM) seconds: nobody means 10 ms.
_LEAST_MS: Final = 100.0


@dataclass(frozen=True)
class Target:
    """Where one signal goes.

    Attributes:
        signal, protocol: see above.
        endpoint: URL; of HTTP that of the signal, with its path.
        insecure: no TLS, of gRPC.
        headers: of each request, names in lower case, as gRPC wants them.
        timeout_s: of an export, retries included.
        compression: none, gzip or deflate.
        certificate, client_key, client_certificate: files, None if not named.
        named_by: who says where: a key of the YAML or a variable.
    """

    signal: Signal
    protocol: Protocol
    endpoint: str
    insecure: bool
    headers: tuple[tuple[str, str], ...] = field(repr=False)  # may hold an authorization
    timeout_s: float
    compression: str
    certificate: str | None
    client_key: str | None
    client_certificate: str | None
    named_by: str

    def __str__(self) -> str:
        parts = urlsplit(self.endpoint)
        place = parts.netloc.rpartition("@")[2]  # without a password
        return f"{place}{parts.path} ({self.protocol}, {self.named_by})"


class _Variables:
    """The variables of a signal: its own, else those of all."""

    def __init__(self, environ: Mapping[str, str], signal: Signal) -> None:
        self._environ, self._own = environ, f"{_PREFIX}{signal.upper()}_"

    def find(self, name: str) -> tuple[str, str] | None:
        """Name and text of a variable that is set; an empty one is not, as the specification has it."""
        for variable in (self._own + name, _PREFIX + name):
            if text := self._environ.get(variable, "").strip():
                return variable, text
        return None

    def text(self, name: str) -> str | None:
        found = self.find(name)
        return found[1] if found else None

    def is_own(self, variable: str) -> bool:
        return variable.startswith(self._own)


def switched_off_by(signal: Signal, environ: Mapping[str, str]) -> str | None:
    """The variable that switches a signal off, with its value; None if none does."""
    for name, off in ((_DISABLED, "true"), (_EXPORTER[signal], "none")):
        if environ.get(name, "").strip().lower() == off:
            return f"{name}={off}"
    return None


def resolve(
    config: OtelConfig, signal: Signal, environ: Mapping[str, str] | None = None, vllm_endpoint: str | None = None
) -> Target | None:
    """Where a signal goes; None if a variable switches it off.

    Args:
        config: export.otel.
        signal: metrics, traces or logs.
        environ: OTEL_*; by default the process's.
        vllm_endpoint: vLLM's --otlp-traces-endpoint, for want of another; used as it is, but for log records.

    Raises:
        ValueError: something can't be meant; the text says variable or key, rule, value and remedy.
    """
    environ = os.environ if environ is None else environ
    if switched_off_by(signal, environ) is not None:
        return None
    variables = _Variables(environ, signal)
    protocol = config.protocol or _protocol(variables)
    named_by, endpoint = _endpoint(config, signal, protocol, variables, vllm_endpoint)
    compression = variables.find("COMPRESSION")
    if compression is not None and compression[1].lower() not in _COMPRESSIONS[protocol]:
        choices = ", ".join(_COMPRESSIONS[protocol])
        raise ValueError(f"{compression[0]} must be one of {choices} for {protocol}, got {compression[1]!r}; unset it")
    insecure = variables.find("INSECURE")
    if "://" not in endpoint:
        secure = insecure is not None and insecure[1].lower() != "true"
        endpoint = f"{'https' if secure else 'http'}://{endpoint}"
    return Target(
        signal=signal,
        protocol=protocol,
        endpoint=endpoint,
        insecure=urlsplit(endpoint).scheme != "https",
        headers=tuple(sorted({**_headers(variables), **{k.lower(): v for k, v in config.headers.items()}}.items())),
        timeout_s=_timeout_s(variables),
        compression=compression[1].lower() if compression else "none",
        certificate=variables.text("CERTIFICATE"),
        client_key=variables.text("CLIENT_KEY"),
        client_certificate=variables.text("CLIENT_CERTIFICATE"),
        named_by=named_by,
    )


def _protocol(variables: _Variables) -> Protocol:
    found = variables.find("PROTOCOL")
    if found is None:
        return "grpc"
    if found[1] not in _PROTOCOLS:
        raise ValueError(
            f"{found[0]} must be grpc or http/protobuf, got {found[1]!r}; glassbox sends nothing else: set it to "
            "http/protobuf, for which the same port of the collector is right, or set export.otel.protocol"
        )
    return _PROTOCOLS[found[1]]


def _endpoint(
    config: OtelConfig, signal: Signal, protocol: Protocol, variables: _Variables, vllm_endpoint: str | None
) -> tuple[str, str]:
    """Who names the endpoint, and the endpoint of the signal."""
    if config.endpoint is not None:
        named_by, text, is_base = "export.otel.endpoint", config.endpoint, True
    elif (found := variables.find("ENDPOINT")) is not None:
        (named_by, text), is_base = found, not variables.is_own(found[0])
    elif vllm_endpoint is not None:
        named_by, text, is_base = "--otlp-traces-endpoint", vllm_endpoint, signal == "logs"
    else:
        named_by, text, is_base = "the default", _DEFAULT[protocol], True
    parts = urlsplit(text if "://" in text else f"//{text}")
    if not parts.hostname or parts.scheme not in {"", "http", "https"} or (protocol == "http" and not parts.scheme):
        kind = "an http or https URL" if protocol == "http" else "an http or https URL, or host:port"
        port = _DEFAULT[protocol].rpartition(":")[2]
        raise ValueError(f"{named_by} must be {kind} for {protocol}, got {text!r}; use http://collector:{port}")
    if protocol == "grpc":
        return named_by, text
    return named_by, urlunsplit(_below(parts, signal) if is_base else parts._replace(path=parts.path or "/"))


def _below(base: SplitResult, signal: Signal) -> SplitResult:
    """The signal's own path below that of a base; one that ends in a signal's path already is that signal's."""
    path = base.path.rstrip("/")
    for known in ("/v1/metrics", "/v1/traces", "/v1/logs"):
        path = path.removesuffix(known)
    return base._replace(path=f"{path}/v1/{signal}")


def _headers(variables: _Variables) -> dict[str, str]:
    found = variables.find("HEADERS")
    headers: dict[str, str] = {}
    for item in found[1].split(",") if found else ():
        name, equals, text = item.partition("=")
        if item.strip() and not (equals and name.strip()):
            assert found is not None
            # Without the item: it may be the half of a password.
            raise ValueError(f"{found[0]} must be name=value pairs joined by commas; write , in a value as %2C")
        if item.strip():
            headers[unquote(name.strip()).lower()] = unquote(text.strip())
    return headers


def _timeout_s(variables: _Variables) -> float:
    found = variables.find("TIMEOUT")
    if found is None:
        return EXPORT_TIMEOUT_S
    try:
        milliseconds = float(found[1])
    except ValueError:
        milliseconds = -1.0
    if not 0 < milliseconds < 1e9:
        raise ValueError(f"{found[0]} must be a number of milliseconds above 0, got {found[1]!r}; use 10000")
    return milliseconds / 1000 if milliseconds >= _LEAST_MS else milliseconds


def metric_exporter(target: Target) -> "MetricExporter":
    """The SDK's exporter of metrics.

    Raises:
        OSError: a certificate's file can't be read.
        Exception: whatever else the SDK finds wrong.
    """
    if target.protocol == "http":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

        return HttpExporter(**_for_http(target))
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

    return GrpcExporter(**_for_grpc(target), max_export_batch_size=MAX_POINTS_PER_REQUEST)


def span_exporter(target: Target) -> "SpanExporter":
    """The SDK's exporter of spans.

    Raises:
        OSError: a certificate's file can't be read.
        Exception: whatever else the SDK finds wrong.
    """
    if target.protocol == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(**_for_http(target))
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(**_for_grpc(target))


def log_exporter(target: Target) -> Any:
    """The SDK's exporter of log records.

    Raises:
        OSError: a certificate's file can't be read.
        Exception: whatever else the SDK finds wrong.
    """
    if target.protocol == "http":
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpExporter

        return HttpExporter(**_for_http(target))
    from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcExporter

    return GrpcExporter(**_for_grpc(target))


def _for_http(target: Target) -> dict[str, Any]:
    from opentelemetry.exporter.otlp.proto.http import Compression

    for name in (target.certificate, target.client_key, target.client_certificate):
        if name is not None:
            Path(name).read_bytes()  # the SDK would say so only once it sends, and not what is missing
    return {
        "endpoint": target.endpoint,
        "headers": dict(target.headers),
        "timeout": target.timeout_s,
        "compression": Compression(target.compression),
        "certificate_file": target.certificate,
        "client_key_file": target.client_key,
        "client_certificate_file": target.client_certificate,
    }


def _for_grpc(target: Target) -> dict[str, Any]:
    import grpc  # type: ignore[import-untyped]

    def content(name: str | None) -> bytes | None:
        return None if name is None else Path(name).read_bytes()

    credentials = None
    if not target.insecure:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=content(target.certificate),
            private_key=content(target.client_key),
            certificate_chain=content(target.client_certificate),
        )
    return {
        "endpoint": target.endpoint,
        "insecure": target.insecure,
        "credentials": credentials,
        "headers": dict(target.headers),
        "timeout": target.timeout_s,
        "compression": grpc.Compression.Gzip if target.compression == "gzip" else grpc.Compression.NoCompression,
    }
