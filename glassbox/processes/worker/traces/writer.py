"""Writes traces into the run directory, on a worker's export thread.

Owns when a trace is written and which files of the worker are removed. The format is `store/trace_record.py`, the
memory `active.py`.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from glassbox.config.load import RequestsConfig
from glassbox.core.logs import get_logger
from glassbox.processes.worker.traces.active import ActiveTrace, TraceHost
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import TraceFiles, traces_path
from glassbox.store.trace_record import trace_name, trace_prefix, write_trace

logger = get_logger(__name__)

# Share of a core that writing running requests again may take. It is taken from the steps: they wait for Python's lock.
RUNNING_SHARE: Final = 0.005


class TraceWriter:
    """Writes the traces of one worker.

    Args:
        run_dir: of the server.
        host: the worker.
        tracker: its requests.
        clock, cpu_clock: seconds, monotonic, and those that this thread has computed.
    """

    def __init__(
        self,
        run_dir: Path,
        host: TraceHost,
        tracker: RequestTracker,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._run_dir, self._directory = run_dir, traces_path(run_dir)
        self._files = TraceFiles(self._directory, trace_prefix(host.engine, host.rank))
        self._host, self._tracker = host, tracker
        self._clock, self._cpu_clock = clock, cpu_clock
        # When running requests may be written again.
        self._running_due = clock()
        # Version of each running request's trace that lies in the directory, by internal id.
        self._written: dict[str, int] = {}
        self._tokenizer_told = False

    def write(self, config: RequestsConfig, *, running: bool = True) -> int:
        """Write what has changed: ended requests once, running ones again and again. Ended ones are released.

        Many or long running ones take their time, and then wait until it is `RUNNING_SHARE` of what has passed.

        Args:
            running: whether these are written at all.

        Returns:
            Number of files written.

        Raises:
            OSError: something can't be written; ended requests are released all the same, so that a full disk does
                not fill the memory.
        """
        active = self._tracker.active()
        ended = self._tracker.ended()
        written, running_s = 0, 0.0
        failure: OSError | None = None
        again = running and self._clock() >= self._running_due
        if (active or ended) and config.include_text:
            try:
                self._tell_tokenizer()
            except OSError as error:
                failure = error
        for trace in dict.fromkeys((*ended, *active)):  # one may have ended between the two calls
            runs = trace.status == "active"
            if runs and not (again and self._written.get(trace.internal_id) != trace.version):
                continue
            before = self._cpu_clock()
            try:
                self._write(trace)
                written += 1
            except OSError as error:
                failure = error
            if runs:
                running_s += self._cpu_clock() - before
        if again:
            self._running_due = self._clock() + running_s / RUNNING_SHARE
        for trace in ended:
            self._tracker.release(trace)
        still = {trace.internal_id for trace in active}
        self._written = {internal_id: v for internal_id, v in self._written.items() if internal_id in still}
        if written:
            self._prune(config, active)
        if failure is not None:
            raise failure
        return written

    @property
    def dropped(self) -> int:
        """Files of traces that were removed because the file system was full."""
        return self._files.dropped

    def before_traces(self, write: Callable[[], object]) -> None:
        """Write what matters more than traces: on a full file system the oldest of these go until there is room.

        Raises:
            OSError: it can't be written.
        """
        self._files.with_room(write)

    def _tell_tokenizer(self) -> None:
        """For whoever makes texts of these traces' tokens."""
        if self._host.tokenizer and not self._tokenizer_told:
            write_source(self._run_dir, self._host.tokenizer, self._host.tokenizer_revision)
            self._tokenizer_told = True

    def _write(self, trace: ActiveTrace) -> None:
        version = trace.version
        record = trace.record()
        path = self._files.with_room(lambda: write_trace(self._directory, record), trace.nbytes)
        self._files.wrote(path.name, path.stat().st_size)
        self._written[trace.internal_id] = version
        logger.debug("Trace written: %s", path.name)

    def _prune(self, config: RequestsConfig, active: Sequence[ActiveTrace]) -> None:
        host = self._host
        names = {trace_name(host.engine, host.rank, host.instance, one.client, one.internal_id) for one in active}
        removed = self._files.prune(
            keep=config.keep, keep_mb=config.keep_mb, per_client=config.per_client.keep, active=names
        )
        if removed:
            logger.debug("Removed %d old traces", len(removed))
