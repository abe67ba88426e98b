"""Which ended traces a sink has had already, also after the exporter was started again."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from glassbox.store.trace_directory import TraceDirectory, TraceSummary
from glassbox.store.trusted_file import read_json, write_file

_PREFIX: Final = "delivered-"
_MAX_BYTES: Final = 1 << 26  # of 100,000 kept traces the ids, a client's may be long


def _key(trace: TraceSummary) -> str:
    return f"{trace.engine}/{trace.client or ''}/{trace.internal_id}"


class Delivered:
    """The ended traces of a run directory that one sink has had; kept in a file of that directory.

    Attributes:
        is_new: there was no such file.

    Args:
        run_dir: of the server.
        sink: name of the sink, for the file.
        skip_present: True for a sink that an edit has just opened: it gets what ends from now on.
    """

    def __init__(self, run_dir: Path, sink: str, skip_present: bool = False) -> None:
        self._path = Path(run_dir) / f"{_PREFIX}{sink}.json"
        self._known = self._read()
        self.is_new = self._known is None
        if self._known is None:
            present = _ended(TraceDirectory(run_dir).summaries()) if skip_present else []
            self._known = {_key(trace) for trace in present}
        self._written: set[str] | None = None

    def _read(self) -> set[str] | None:
        try:
            return {str(key) for key in read_json(self._path, _MAX_BYTES)}
        except (OSError, ValueError, TypeError):
            return None

    def fresh(self, traces: Sequence[TraceSummary]) -> list[TraceSummary]:
        """Those that have ended and that the sink has not had, oldest first."""
        known = self._known or set()
        return sorted(
            (trace for trace in _ended(traces) if _key(trace) not in known),
            key=lambda trace: (trace.end_time_s or trace.start_time_s, trace.internal_id),
        )

    def note(self, had: Iterable[TraceSummary], present: Sequence[TraceSummary]) -> None:
        """Remember what the sink has had now; what is no longer in the directory is forgotten.

        Raises:
            OSError: the file can't be written; this process remembers all the same.
        """
        there = {_key(trace) for trace in present}
        self._known = ((self._known or set()) | {_key(trace) for trace in had}) & there
        if self._known != self._written:
            write_file(self._path, json.dumps(sorted(self._known)).encode())
            self._written = set(self._known)

    def forget(self) -> None:
        """Remove the file: a sink that was switched off begins anew."""
        self._path.unlink(missing_ok=True)


def _ended(traces: Iterable[TraceSummary]) -> list[TraceSummary]:
    return [trace for trace in traces if trace.status != "active"]
