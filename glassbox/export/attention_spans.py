"""OpenTelemetry: a `glassbox.attention` span for each traced request, in the client's trace, and probes' results.

Owns the span's attributes and events, whose child it is, and the sending. The parent is vLLM's `llm_request` span if an
API server has told its ids (`store/llm_spans.py`), else the client's span, else none. Import this module only if spans
are to be sent: the SDK and gRPC double the exporter's memory.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.util.types import AttributeValue

from glassbox import __version__
from glassbox.config.load import OtelConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.statistics import STATISTICS
from glassbox.export.otel import make_resource
from glassbox.export.otlp import resolve, span_exporter
from glassbox.export.trace_document import flat_signals, mean
from glassbox.signals import request_signals
from glassbox.store.acts import tags_of
from glassbox.store.llm_spans import LlmSpan
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    from glassbox.export.result_log import ResultLog

SPAN_NAME: Final = "glassbox.attention"
EVENT_NAME: Final = "glassbox.tokens"
# Of the semantic conventions for generative AI, as all its attributes are.
RESULT_NAME: Final = "gen_ai.evaluation.result"
STAGE: Final = "otel_traces"
# A trace backend pays for each of them.
MAX_SIGNALS: Final = 48
MAX_EVENTS: Final = 32
MIN_TOKENS_PER_EVENT: Final = 32
_DELAY_MS: Final = 500
_NS_PER_S: Final = 1_000_000_000


def attributes(trace: RequestTrace, scores: Mapping[str, Any] | None = None) -> dict[str, AttributeValue]:
    """The span's attributes: bounded in number, all scalar but the names of the rules that tagged the request.

    Signals are `glassbox.<name>`. Of a signal with a value for each layer (or anything else of which there are more
    than fit) only the mean, least and largest are given. Probes are `glassbox.probe.<name>.score` and `.label`, signals
    that were asked for `glassbox.signal.<name>.<value>`.

    Args:
        scores: of `TraceScores.document`.
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
    found |= {f"glassbox.{name}": value for name, value in _signals(trace)}
    for name, score in _scored(scores):
        found |= {f"glassbox.probe.{name}.score": score["score"], f"glassbox.probe.{name}.label": _label(score)}
    if tags := tags_of((scores or {}).get("actions", ())):
        found["glassbox.rules"] = tags
    return found | dict(_asked_signals(scores))


def _scored(scores: Mapping[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Probes with a score."""
    for name, score in (scores or {}).get("probes", {}).items():
        if score["score"] is not None:
            yield name, score


def _label(score: Mapping[str, Any]) -> str:
    """What the probe says of the request: its label, or that it isn't."""
    return score["label"] if score["above"] else f"not {score['label']}"


def _asked_signals(scores: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for signal, one in (scores or {}).get("signals", {}).items():
        for value, number in one["values"].items():
            parts = number.items() if isinstance(number, Mapping) else [("", number)]
            found += [
                (".".join(filter(None, ("glassbox.signal", signal, value, part))), float(of_part))
                for part, of_part in parts
                if isinstance(of_part, int | float)
            ]
    yield from found[:MAX_SIGNALS]


def results(trace: RequestTrace, scores: Mapping[str, Any] | None) -> Iterator[dict[str, AttributeValue]]:
    """Attributes of an event `gen_ai.evaluation.result` for each probe; one without a score has `error.type`."""
    for name, score in (scores or {}).get("probes", {}).items():
        found: dict[str, AttributeValue] = {"gen_ai.evaluation.name": name, "gen_ai.response.id": trace.request_id}
        if score["score"] is None:
            yield found | {"error.type": "no_value", "gen_ai.evaluation.explanation": score["reason"]}
            continue
        explanation = f"probability of {score['label']!r} by attention; the threshold is {score['threshold']:g}"
        if score["missing"]:
            explanation += f"; {score['missing']} of its features had no value"
        yield found | {
            "gen_ai.evaluation.score.value": score["score"],
            "gen_ai.evaluation.score.label": _label(score),
            "gen_ai.evaluation.explanation": explanation,
        }


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


class _Counted(SpanExporter):
    """An exporter whose failures are glassbox's errors of stage `otel_traces`."""

    def __init__(self, exporter: SpanExporter, errors: ErrorCounter, target: str) -> None:
        self._exporter, self._target = exporter, target
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
            self._errors.count(STAGE, f"{self._target} did not accept {len(spans)} spans")
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
        ValueError: as `resolve`, or a variable switches spans off.
        Exception: as `span_exporter`.
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
        target = resolve(config, "traces", environ, vllm_endpoint)
        if target is None:
            raise ValueError("spans are switched off by the OTEL_* variables; unset them to send any")
        self._exporter = span_exporter(target)
        self._provider = TracerProvider(resource=make_resource(run_dir), shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(
            _Counted(self._exporter, errors, str(target)), schedule_delay_millis=_DELAY_MS
        )
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("glassbox", __version__)
        self._log = self._open_log(config, run_dir, errors, vllm_endpoint, environ) if config.logs else None

    @staticmethod
    def _open_log(
        config: OtelConfig,
        run_dir: Path,
        errors: ErrorCounter,
        vllm_endpoint: str | None,
        environ: Mapping[str, str] | None,
    ) -> "ResultLog | None":
        from glassbox.export.result_log import ResultLog

        target = resolve(config, "logs", environ, vllm_endpoint)
        return None if target is None else ResultLog(target, run_dir, errors, STAGE)

    def send(self, trace: RequestTrace, llm_span: LlmSpan | None, scores: Mapping[str, Any] | None = None) -> None:
        """Hand over the span of an ended request; nothing is sent if its trace was not sampled by the client.

        Args:
            scores: of `TraceScores.document`.
        """
        parent = parent_of(trace, llm_span)
        context = None if parent is None else set_span_in_context(NonRecordingSpan(parent))
        span = self._tracer.start_span(
            SPAN_NAME,
            context=context,
            kind=SpanKind.INTERNAL,
            attributes=attributes(trace, scores),
            start_time=int(trace.start_time_s * _NS_PER_S),
        )
        end_s = end_of(trace, llm_span)
        for found, time_s in events(trace, end_s):
            span.add_event(EVENT_NAME, found, int(time_s * _NS_PER_S))
        for found in results(trace, scores):
            if self._log is None:
                span.add_event(RESULT_NAME, found, int(end_s * _NS_PER_S))
            elif span.is_recording():
                # Of the operation that is evaluated, as far as it has a span.
                about = span.get_span_context() if llm_span is None or parent is None else parent
                self._log.send(RESULT_NAME, found, about, end_s)
        span.end(int(end_s * _NS_PER_S))

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits, within `timeout_s` seconds."""

        def shut_down() -> None:
            if self._log is not None:
                self._log.close()
            self._processor.shutdown()

        thread = threading.Thread(target=shut_down, name="glassbox-otel-traces-end", daemon=True)
        thread.start()
        thread.join(timeout_s)
        self._exporter.shutdown()  # breaks off retries
        thread.join(timeout_s / 2)
