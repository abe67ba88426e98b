"""The contexts of vLLM's `llm_request` spans, handed from the API servers to the exporter.

Owns their small files in the run directory. vLLM ends an `llm_request` span in an API server when a request ends; the
worker's trace of that request reaches the exporter an export interval later. So the API server leaves the span's ids
here (`processes/api_server/llm_span_watcher.py`), and the exporter makes the child. Any number of API servers may
write.
"""

import contextlib
import json
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from glassbox.core.logs import get_logger
from glassbox.store.trusted_file import list_files, make_folder, read_json, write_file

logger = get_logger(__name__)

# A trace follows within seconds; what nobody fetched by then has no trace.
KEEP_S: Final = 600.0
MAX_FILES: Final = 4096
FOLDER: Final = "llm-spans"
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
    folder = Path(run_dir) / FOLDER
    make_folder(folder)
    write_file(folder / f"{span.trace_id}-{span.span_id}.json", json.dumps(asdict(span)).encode())


def prune(run_dir: Path, now_s: float) -> None:
    """Remove files older than `KEEP_S`, and the oldest beyond `MAX_FILES`.

    Raises:
        OSError: the folder may not be listed, or is not this user's.
    """
    folder = Path(run_dir) / FOLDER
    found = [(time_ns / 1e9, name) for name, (_, time_ns, _) in list_files(folder, "", "").items()]
    found.sort(reverse=True)
    for number, (time_s, name) in enumerate(found):
        if number >= MAX_FILES or now_s - time_s > KEEP_S:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


class LlmSpanReader:
    """The contexts that API servers have left; each file is read once."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._spans: dict[str, LlmSpan | None] = {}

    def refresh(self, now_s: float | None = None) -> None:
        """Read new files, forget removed ones, remove old ones."""
        prune(self._run_dir, time.time() if now_s is None else now_s)
        folder = self._run_dir / FOLDER
        names = [name for name in list_files(folder, "", ".json") if _NAME.fullmatch(name)]
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


def _decode(content: dict[str, Any]) -> LlmSpan:
    span = LlmSpan(**content)
    texts = (span.request_id, span.trace_id, span.span_id, span.endpoint or "")
    if not all(isinstance(text, str) for text in texts) or not isinstance(span.flags, int):
        raise TypeError("ids must be texts, and flags a number")
    return replace(span, end_time_s=float(span.end_time_s))


def _read(path: Path) -> LlmSpan | None:
    try:
        return _decode(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        logger.debug("%s: %s", path.name, error)
        return None
