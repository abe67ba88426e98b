"""Probes' results as log records: events of OpenTelemetry, each with the span that it is about.

Owns making and sending them, from a thread of the SDK's. The conventions have `gen_ai.evaluation.result` as such an
event; without `export.otel.logs` it is an event of the span (`attention_spans.py`). Import this module only if log
records are to be sent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context
from opentelemetry.util.types import AttributeValue

from glassbox import __version__
from glassbox.core.errors import ErrorCounter
from glassbox.export.otel import make_resource
from glassbox.export.otlp import Target, log_exporter

_DELAY_MS: Final = 500
_NS_PER_S: Final = 1_000_000_000


class _Counted:
    """An exporter of log records whose failures are glassbox's errors of a stage."""

    def __init__(self, exporter: Any, errors: ErrorCounter, stage: str, target: str) -> None:
        self._exporter, self._errors, self._stage, self._target = exporter, errors, stage, target

    def export(self, batch: Sequence[Any]) -> Any:
        result = self._exporter.export(batch)
        if result.name == "SUCCESS":
            self._errors.worked(self._stage)
        else:
            self._errors.count(self._stage, f"{self._target} did not accept {len(batch)} log records")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 10_000) -> bool:
        return True


class ResultLog:
    """Sends events.

    Args:
        target: where log records go.
        run_dir: of the server.
        errors: told of failures.
        stage: of these.

    Raises:
        Exception: as `log_exporter`.
    """

    def __init__(self, target: Target, run_dir: Path, errors: ErrorCounter, stage: str) -> None:
        self._provider = LoggerProvider(resource=make_resource(run_dir), shutdown_on_exit=False)
        exporter: Any = _Counted(log_exporter(target), errors, stage, str(target))
        self._provider.add_log_record_processor(BatchLogRecordProcessor(exporter, schedule_delay_millis=_DELAY_MS))
        self._logger = self._provider.get_logger("glassbox", __version__)

    def send(self, name: str, attributes: Mapping[str, AttributeValue], about: SpanContext, time_s: float) -> None:
        """Hand over an event.

        Args:
            about: the span that it belongs to.
            time_s: Unix time at which it is.
        """
        self._logger.emit(
            LogRecord(
                timestamp=int(time_s * _NS_PER_S),
                context=set_span_in_context(NonRecordingSpan(about)),
                severity_number=SeverityNumber.INFO,
                attributes=dict(attributes),
                event_name=name,
            )
        )

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()
