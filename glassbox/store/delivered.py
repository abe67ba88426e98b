"""Which ended traces a sink has had already, also after the exporter was started again."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from glassbox.store.snapshot import EngineWorker, EngineWorkers
from glassbox.store.trace_directory import TraceDirectory, TraceSummary
from glassbox.store.trusted_file import read_json, write_file

_PREFIX: Final = "delivered-"
# Each rank writes its part when its own interval is over; one that has refused the request never does.
WAIT_FOR_RANKS_S: Final = 30.0
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
        clock: Unix time in seconds.
    """

    def __init__(
        self, run_dir: Path, sink: str, skip_present: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._workers, self._clock = EngineWorkers(run_dir), clock
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

    def fresh(self, traces: Sequence[TraceSummary], *, last: bool = False) -> list[TraceSummary]:
        """Those that have ended and that the sink has not had, oldest first.

        Args:
            last: nothing will come later: also those of which some ranks' part is still to come.

        Raises:
            OSError: the run directory can't be read.
        """
        known = self._known or set()
        found = [trace for trace in _ended(traces) if _key(trace) not in known]
        since_s = math.inf if last else self._clock() - WAIT_FOR_RANKS_S
        young = [trace for trace in found if (trace.end_time_s or 0.0) >= since_s]
        workers = {engine: self._workers.of(engine) for engine in {trace.engine for trace in young}}
        waits = {_key(trace) for trace in young if _lacks_ranks(trace, workers[trace.engine])}
        return sorted(
            (trace for trace in found if _key(trace) not in waits),
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


def _lacks_ranks(trace: TraceSummary, workers: Sequence[EngineWorker]) -> bool:
    tracing = {one.instance for one in workers if one.traces(trace.chosen_layers)}
    # Of workers that were there before a restart nobody knows how many there were.
    return bool(tracing & trace.instances) and not tracing <= trace.instances


def _ended(traces: Iterable[TraceSummary]) -> list[TraceSummary]:
    return [trace for trace in traces if trace.status != "active"]
