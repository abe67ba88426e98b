"""Notes the contexts of vLLM's `llm_request` spans as they end, for the exporter.

Owns the span processor that is added to vLLM's tracer provider in the API servers. The notes are
`store/llm_spans.py`'s. It needs no OpenTelemetry.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from glassbox.core.logs import get_logger
from glassbox.store.llm_spans import LlmSpan, prune, write

logger = get_logger(__name__)

SPAN_NAME: Final = "llm_request"
REQUEST_ID: Final = "gen_ai.request.id"
_PRUNE_EVERY: Final = 256


class LlmSpanWatcher:
    """A span processor for vLLM's tracer provider that leaves the context of each wanted `llm_request` span.

    It has the methods of OpenTelemetry's SpanProcessor without being one, so that no process needs the SDK for it.

    Args:
        run_dir: of the server.
        wants: whether the request of an external id is traced.
        endpoint: vLLM's --otlp-traces-endpoint.
    """

    def __init__(self, run_dir: Path, wants: Callable[[str], bool], endpoint: str | None) -> None:
        self._run_dir = Path(run_dir)
        self._wants = wants
        self._endpoint = endpoint
        self._written = 0
        self._failing = False
        self.closed = False

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing."""

    def _on_ending(self, span: Any) -> None:
        """Nothing."""

    def on_end(self, span: Any) -> None:
        """Write the file; called in the API server's event loop, so only for traced requests."""
        if self.closed or span.name != SPAN_NAME:
            return
        try:
            request_id = (span.attributes or {}).get(REQUEST_ID)
            if isinstance(request_id, str) and self._wants(request_id):
                self._write(span, request_id)
                self._failing = False
        except Exception as error:  # vLLM's own span must not suffer
            if not self._failing:
                logger.warning("glassbox can't note an llm_request span: %s: %s", type(error).__name__, error)
            self._failing = True

    def _write(self, span: Any, request_id: str) -> None:
        context = span.context
        write(
            self._run_dir,
            LlmSpan(
                request_id=request_id,
                trace_id=f"{context.trace_id:032x}",
                span_id=f"{context.span_id:016x}",
                flags=int(context.trace_flags),
                end_time_s=(span.end_time or 0) / 1e9,
                endpoint=self._endpoint,
            ),
        )
        self._written += 1
        if self._written % _PRUNE_EVERY == 0:
            prune(self._run_dir, time.time())

    def shutdown(self) -> None:
        """Note nothing more."""
        self.closed = True

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing waits."""
        return True


def watch(provider: Any, watcher: LlmSpanWatcher) -> Callable[[], None]:
    """Add a watcher to an SDK's TracerProvider; the returned function takes it out again.

    Raises:
        AttributeError: the provider is not the SDK's.
    """
    provider.add_span_processor(watcher)

    def undo() -> None:
        watcher.closed = True
        # The SDK has no method for it; if this field goes, the closed watcher stays and does nothing.
        processors: Any = getattr(provider, "_active_span_processor", None)
        known = getattr(processors, "_span_processors", None)
        if isinstance(known, tuple):
            processors._span_processors = tuple(one for one in known if one is not watcher)

    return undo
