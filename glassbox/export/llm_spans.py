"""The contexts of vLLM's `llm_request` spans, handed from the API servers to the exporter.

Owns their small files in the run directory. vLLM ends an `llm_request` span in an API server when a request ends; the
worker's trace of that request reaches the exporter an export interval later. So the API server leaves the span's ids
here, and the exporter makes the child. Any number of API servers may write. It needs no OpenTelemetry.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from glassbox.export.snapshot import write_atomically
from glassbox.logs import get_logger

logger = get_logger(__name__)

SPAN_NAME: Final = "llm_request"
REQUEST_ID: Final = "gen_ai.request.id"
# A trace follows within seconds; what nobody fetched by then has no trace.
KEEP_S: Final = 600.0
MAX_FILES: Final = 4096
_PRUNE_EVERY: Final = 256
_FOLDER: Final = "llm-spans"
_NAME: Final = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class LlmSpan:
    """What a child of an `llm_request` span has to know of it.

    Attributes:
        request_id: external id of the request.
        trace_id, span_id: lower-case hex, 32 and 16 digits.
        flags: W3C trace flags.
        end_time_s: Unix seconds.
        endpoint: vLLM's --otlp-traces-endpoint.
    """

    request_id: str
    trace_id: str
    span_id: str
    flags: int
    end_time_s: float
    endpoint: str | None = None


def write(run_dir: Path, span: LlmSpan) -> None:
    """Leave a span's context for the exporter.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(run_dir) / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(folder / f"{span.trace_id}-{span.span_id}.json", json.dumps(asdict(span)).encode())


def prune(run_dir: Path, now_s: float) -> None:
    """Remove files older than `KEEP_S`, and the oldest beyond `MAX_FILES`."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(Path(run_dir) / _FOLDER) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry.path))
    found.sort(reverse=True)
    for number, (time_s, path) in enumerate(found):
        if number >= MAX_FILES or now_s - time_s > KEEP_S:
            with contextlib.suppress(OSError):
                os.unlink(path)


class LlmSpanReader:
    """The contexts that API servers have left; each file is read once."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._spans: dict[str, LlmSpan | None] = {}

    def refresh(self, now_s: float | None = None) -> None:
        """Read new files, forget removed ones, remove old ones."""
        prune(self._run_dir, time.time() if now_s is None else now_s)
        folder = self._run_dir / _FOLDER
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = [name for name in os.listdir(folder) if _NAME.fullmatch(name)]
        self._spans = {name: self._spans[name] if name in self._spans else _read(folder / name) for name in names}

    def of(self, request_id: str) -> list[LlmSpan]:
        """The spans of an external request id, in the order of their ends; one per sample with n > 1."""
        found = [span for span in self._spans.values() if span is not None and span.request_id == request_id]
        return sorted(found, key=lambda span: (span.end_time_s, span.span_id))

    def span_ids(self) -> set[str]:
        """Ids of all spans that are known."""
        return {span.span_id for span in self._spans.values() if span is not None}

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def endpoint(self) -> str | None:
        """Where vLLM sends its spans, as far as an API server has told."""
        return next((span.endpoint for span in self._spans.values() if span is not None and span.endpoint), None)


def _read(path: Path) -> LlmSpan | None:
    try:
        return LlmSpan(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        logger.debug("%s: %s", path.name, error)
        return None


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
