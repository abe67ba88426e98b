"""OpenTelemetry: a `glassbox.attention` span for each traced request, in the client's trace.

Owns the span's attributes and events, whose child it is, and the sending. The parent is vLLM's `llm_request` span if an
API server has told its ids (`store/llm_spans.py`), else the client's span, else none. Import this module only if spans
are to be sent: the SDK and gRPC double the exporter's memory.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.util.types import AttributeValue

from glassbox import __version__
from glassbox.config.load import OtelConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.statistics import STATISTICS
from glassbox.export.otel import EXPORT_TIMEOUT_S, make_resource
from glassbox.export.trace_document import flat_signals, mean
from glassbox.signals import request_signals
from glassbox.store.llm_spans import LlmSpan
from glassbox.store.trace_record import RequestTrace

SPAN_NAME: Final = "glassbox.attention"
EVENT_NAME: Final = "glassbox.tokens"
STAGE: Final = "otel_traces"
# A trace backend pays for each of them.
MAX_SIGNALS: Final = 48
MAX_EVENTS: Final = 32
MIN_TOKENS_PER_EVENT: Final = 32
_DELAY_MS: Final = 500
_NS_PER_S: Final = 1_000_000_000
_TIMEOUT_ENV: Final = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_INSECURE_ENV: Final = ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE")
_PROTOCOL_ENV: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACES_ENDPOINT_ENV: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_ENDPOINT_ENV: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"


def attributes(trace: RequestTrace) -> dict[str, AttributeValue]:
    """The span's attributes: bounded in number, all scalar.

    Signals are `glassbox.<name>`. Of a signal with a value for each layer (or anything else of which there are more
    than fit) only the mean, least and largest are given.
    """
    found: dict[str, AttributeValue] = {
        "gen_ai.request.id": trace.request_id,
        "gen_ai.request.model": trace.requested_model,
        "glassbox.engine": trace.engine,
        "glassbox.why": trace.why,
        "glassbox.status": trace.status,
        "glassbox.truncated": trace.truncated,
        "glassbox.prompt_tokens": trace.prompt_len,
        "glassbox.generated_tokens": trace.num_generated,
        "glassbox.rows": len(trace.positions),
        "glassbox.layers": len(trace.layers),
        "glassbox.heads": len(trace.heads),
    }
    if trace.adapter is not None:
        found["glassbox.adapter"] = trace.adapter
    return found | {f"glassbox.{name}": value for name, value in _signals(trace)}


def _signals(trace: RequestTrace) -> Iterator[tuple[str, float]]:
    left = MAX_SIGNALS
    for name, value in request_signals(trace).items():
        flat = flat_signals({name: value})
        known = {key: number for key, number in flat.items() if number is not None}
        if len(known) > min(left, 16):
            numbers = list(known.values())
            known = {
                f"{name}.mean": float(np.mean(numbers)),
                f"{name}.min": min(numbers),
                f"{name}.max": max(numbers),
            }
        yield from list(known.items())[:left]
        left = max(left - len(known), 0)


def end_of(trace: RequestTrace, llm_span: LlmSpan | None) -> float:
    """Unix time at which the span ends: the worker may hear of a request's end long after it, with its next step."""
    ends = [end for end in (trace.end_time_s, llm_span.end_time_s if llm_span else None) if end]
    return max(min(ends, default=trace.start_time_s), trace.start_time_s)


def events(trace: RequestTrace, end_s: float) -> Iterator[tuple[dict[str, AttributeValue], float]]:
    """Attributes and Unix time of the span's events: means over runs of generated tokens.

    The times of single tokens are not known; they are spread evenly over the request's time.
    """
    rows = np.flatnonzero(trace.decode())
    step = max(MIN_TOKENS_PER_EVENT, -(-len(rows) // MAX_EVENTS))
    seconds = end_s - trace.start_time_s
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        averaged = mean(trace.stats[part], axis=(0, 1, 2))
        found: dict[str, AttributeValue] = {
            "glassbox.first_position": int(trace.positions[part[0]]),
            "glassbox.last_position": int(trace.positions[part[-1]]),
        }
        for s, statistic in enumerate(STATISTICS):
            if np.isfinite(averaged[s]):
                found[f"glassbox.{statistic.name}"] = float(averaged[s])
        yield found, trace.start_time_s + seconds * (begin + len(part)) / len(rows)


def parent_of(trace: RequestTrace, llm_span: LlmSpan | None) -> SpanContext | None:
    """The parent of a request's span; None if it starts a trace of its own."""
    if llm_span is not None:
        ids, flags = (llm_span.trace_id, llm_span.span_id), llm_span.flags
    elif trace.traceparent is not None:
        _, trace_id, span_id, hex_flags = trace.traceparent.split("-")
        ids, flags = (trace_id, span_id), int(hex_flags, 16)
    else:
        return None
    return SpanContext(int(ids[0], 16), int(ids[1], 16), is_remote=True, trace_flags=TraceFlags(flags))


def make_exporter(config: OtelConfig, vllm_endpoint: str | None, environ: Mapping[str, str]) -> SpanExporter:
    """The SDK's exporter: to `export.otel.endpoint`, else to that of the OTEL_* variables, else to vLLM's own.

    Raises:
        Exception: whatever the SDK finds wrong with the endpoint, a certificate or an OTEL_* variable.
    """
    protocol: str = config.protocol
    endpoint = config.endpoint
    if endpoint is None:
        named = next((environ[name] for name in _PROTOCOL_ENV if environ.get(name)), protocol)
        protocol = "http" if named.startswith("http") else "grpc"
        endpoint = environ.get(_TRACES_ENDPOINT_ENV) or (None if environ.get(_ENDPOINT_ENV) else vllm_endpoint)
    elif protocol == "http":
        parts = urlsplit(endpoint)
        endpoint = urlunsplit(parts._replace(path="/v1/traces")) if parts.path in {"", "/"} else endpoint
    timeout = None if any(environ.get(name) for name in _TIMEOUT_ENV) else EXPORT_TIMEOUT_S
    headers = {name.lower(): value for name, value in config.headers.items()} or None
    if protocol == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=endpoint, headers=headers, timeout=timeout)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    if endpoint is not None and "://" not in endpoint and not any(name in environ for name in _INSECURE_ENV):
        endpoint = f"http://{endpoint}"  # no TLS, as vLLM sends its own spans
    return GrpcExporter(endpoint=endpoint, headers=headers, timeout=timeout)


class _Counted(SpanExporter):
    """An exporter whose failures are glassbox's errors of stage `otel_traces`."""

    def __init__(self, exporter: SpanExporter, errors: ErrorCounter) -> None:
        self._exporter = exporter
        self._errors = errors

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self._errors.count(STAGE, error)
            return SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._errors.worked(STAGE)
        else:
            self._errors.count(STAGE, f"the collector did not accept {len(spans)} spans")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class AttentionSpans:
    """Makes and sends the spans, from a thread of the SDK's.

    Args:
        config: export.otel.
        run_dir: of the server.
        errors: told of failures.
        vllm_endpoint: where vLLM sends its spans, for want of another endpoint.
        environ: OTEL_*; by default the process's.

    Raises:
        Exception: as `make_exporter`.
    """

    def __init__(
        self,
        config: OtelConfig,
        run_dir: Path,
        errors: ErrorCounter,
        vllm_endpoint: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # The SDK logs every failed export; here it is logged once, by ErrorCounter.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = make_exporter(config, vllm_endpoint, os.environ if environ is None else environ)
        self._provider = TracerProvider(resource=make_resource(run_dir), shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(_Counted(self._exporter, errors), schedule_delay_millis=_DELAY_MS)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("glassbox", __version__)

    def send(self, trace: RequestTrace, llm_span: LlmSpan | None) -> None:
        """Hand over the span of an ended request; nothing is sent if its trace was not sampled by the client."""
        parent = parent_of(trace, llm_span)
        context = None if parent is None else set_span_in_context(NonRecordingSpan(parent))
        span = self._tracer.start_span(
            SPAN_NAME,
            context=context,
            kind=SpanKind.INTERNAL,
            attributes=attributes(trace),
            start_time=int(trace.start_time_s * _NS_PER_S),
        )
        end_s = end_of(trace, llm_span)
        for found, time_s in events(trace, end_s):
            span.add_event(EVENT_NAME, found, int(time_s * _NS_PER_S))
        span.end(int(end_s * _NS_PER_S))

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits, within `timeout_s` seconds."""
        thread = threading.Thread(target=self._processor.shutdown, name="glassbox-otel-traces-end", daemon=True)
        thread.start()
        thread.join(timeout_s)
        self._exporter.shutdown()  # breaks off retries
        thread.join(timeout_s / 2)
