"""Writes traces into the run directory, on a worker's export thread.

Owns when a trace is written and which files of the worker are removed. The format is `store/trace_record.py`, the
memory `active.py`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from glassbox.config.load import RequestsConfig
from glassbox.core.logs import get_logger, log_once
from glassbox.processes.worker.traces.active import ActiveTrace, TraceHost
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import TraceFiles, traces_path
from glassbox.store.trace_record import trace_name, trace_prefix, write_trace

logger = get_logger(__name__)

# Share of a core that writing running requests again may take. It is taken from the steps: they wait for Python's lock.
RUNNING_SHARE: Final = 0.005
# The same while rules watch running requests, and how often these are then written: rules apply within a second.
WATCHED_SHARE: Final = 0.05
WATCHED_INTERVAL_S: Final = 0.25
# What of it may be saved up.
_MOST_SAVED_S: Final = WATCHED_SHARE * WATCHED_INTERVAL_S
# A watched trace that is older than this is said to be late.
_LATE_S: Final = 1.0


class TraceWriter:
    """Writes the traces of one worker.

    Attributes:
        ended_s: seconds that this thread has computed for ended requests, so far: what their sums need (singular values
            of 1,000 heads take seconds) costs more than most of their rows, so it is paid from the same budget.
        watched_delay_s: seconds that the oldest written trace of a running request lags behind, as far as rules watch
            these; 0 if none do.

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
        # Of watched requests: seconds that writing them may still take, since when that is known, and when each was
        # last seen to be as it is written, by internal id.
        self._saved_s, self._saved_at_s = _MOST_SAVED_S, clock()
        self._fresh_s: dict[str, float] = {}
        self.ended_s = self.watched_delay_s = 0.0

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
            took_s = self._cpu_clock() - before
            if runs:
                running_s += took_s
            else:
                self.ended_s += took_s
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

    def write_watched(self, config: RequestsConfig) -> int:
        """Write running requests that have changed, for rules that watch them: those first that were written longest
        ago, until `WATCHED_SHARE` of the time since the last call is used up.

        Returns:
            Number of files written.

        Raises:
            OSError: one can't be written.
        """
        now_s = self._clock()
        self._saved_s = min(self._saved_s + WATCHED_SHARE * (now_s - self._saved_at_s), _MOST_SAVED_S)
        self._saved_at_s = now_s
        active = self._tracker.active()
        stale = [trace for trace in active if self._written.get(trace.internal_id) != trace.version]
        waiting = {trace.internal_id for trace in stale}
        self._fresh_s = {
            one.internal_id: self._fresh_s.get(one.internal_id, now_s) if one.internal_id in waiting else now_s
            for one in active
        }
        written = 0
        for trace in sorted(stale, key=lambda trace: self._fresh_s[trace.internal_id]):
            if self._saved_s <= 0:
                break
            before = self._cpu_clock()
            self._write(trace)
            self._saved_s -= self._cpu_clock() - before
            self._fresh_s[trace.internal_id] = now_s
            written += 1
        if written:
            self._prune(config, active)
        self.watched_delay_s = now_s - min(self._fresh_s.values(), default=now_s)
        if self.watched_delay_s > _LATE_S:
            log_once(
                logger,
                logging.WARNING,
                "watched",
                "Running requests are written %.1f s late for the rules of `actions`, so these apply late: so many or "
                "so long ones are traced that writing them would take more than %.0f %% of a core "
                "(glassbox_watched_requests_delay_seconds). Trace fewer at a time (requests.max_active), or fewer "
                "layers and heads",
                self.watched_delay_s,
                100 * WATCHED_SHARE,
            )
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
