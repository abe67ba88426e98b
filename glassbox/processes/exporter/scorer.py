"""Scores ended traces, each once, in a thread of its own: no signal, however long it takes, holds up the exporter.
Those on demand come from another process (`signal_process.py`).

Owns which traces are scored, with what, and the counts; what a score is made of is `signals/scores.py`'s, where it is
left `store/score_files.py`'s. Other sinks wait for a trace's scores for a while (`trace_sinks.py`), and go on without.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from glassbox.core.errors import ErrorCounter
from glassbox.core.signal_table import is_on_demand
from glassbox.export.trace_document import plain
from glassbox.processes.exporter.signal_process import SignalProcess
from glassbox.signals.probe import Probe
from glassbox.signals.probe_files import ProbeFiles
from glassbox.signals.scores import Scores, scores_of, wanted
from glassbox.store.delivered import Delivered
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.score_totals import ScoreTotals, read_totals, write_totals
from glassbox.store.trace_directory import TraceDirectory, TraceKey, TraceSummary
from glassbox.store.trace_record import RequestTrace

STAGE: Final = "scores"
# After so many seconds what has ended meanwhile is looked at, too: many dear ones must not hold up the cheap ones.
ROUND_S: Final = 20.0
# Told of each scored trace, from the scoring thread.
OnScored = Callable[[RequestTrace, Scores], None]


class Scorer:
    """The scoring of a server's traces.

    Attributes:
        last_success_s: Unix time at which all that had ended was last scored without an error; 0 if it never was.

    Args:
        run_dir: of the server.
        probes: those in force.
        focus_heads: returns the heads of the signal `focus`, None for all.
        errors: told of failures, as stage `scores`.
        skip_present: leave out what has ended by now, unless it asked for signals: an edit has brought probes.
        on_scored: told of each scored trace.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        probes: ProbeFiles,
        errors: ErrorCounter,
        *,
        skip_present: bool = False,
        focus_heads: Callable[[], Collection[tuple[int, int]] | None] = lambda: None,
        on_scored: OnScored = lambda _trace, _scores: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.last_success_s = 0.0
        self._run_dir, self._probes, self._errors = run_dir, probes, errors
        self._focus_heads, self._on_scored, self._clock = focus_heads, on_scored, clock
        self._directory, self._files = TraceDirectory(run_dir, clock), ScoreFiles(run_dir)
        self._delivered = Delivered(run_dir, "scores")
        self._passed: set[TraceKey] = set()
        if skip_present and self._delivered.is_new:
            self._due(self._directory.summaries(), has_probes=False)
        self._totals = read_totals(run_dir) or ScoreTotals(clock())
        self._on_demand = SignalProcess()
        self._thread: threading.Thread | None = None
        self._closing = False

    def look(self, patience_s: float, *, last: bool = False) -> None:
        """Score what has ended since; returns when that is done, after `patience_s` seconds at the latest.

        Args:
            last: nothing will come later, of other ranks either.

        Raises:
            OSError: the run directory can't be read, or not written to.
        """
        if self._thread is None or not self._thread.is_alive():
            probes = self._probes.current()
            present = self._directory.summaries(last=last)
            self._tell_names(tuple(probe.name for probe in probes))
            self._files.keep([summary.key for summary in present])
            due = self._due(present, bool(probes))
            if not due:
                self._on_demand.close()
                self.last_success_s = self._clock()
                return
            work = partial(self._score_all, due, present, probes)
            self._thread = threading.Thread(target=work, name="glassbox-scoring", daemon=True)
            self._thread.start()
        self._thread.join(patience_s)

    def forget(self) -> None:
        """Whoever scores next begins anew."""
        self._delivered.forget()

    def close(self, timeout_s: float = 1.0) -> None:
        """End after the trace that is being scored; waits for that at most `timeout_s` seconds."""
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._on_demand.kill()

    def _tell_names(self, names: tuple[str, ...]) -> None:
        """Probes in force have series from the start."""
        if names != self._totals.names:
            self._totals.names = names
            write_totals(self._run_dir, self._totals)

    def _score_all(self, due: Sequence[TraceSummary], present: Sequence[TraceSummary], probes: Sequence[Probe]) -> None:
        """The work of the thread: the cheap ones first, and of the dear ones each client's in turn."""
        end_s = time.monotonic() + ROUND_S
        had: list[TraceSummary] = []
        failures = self._errors.counts().get(STAGE, 0)
        try:
            try:
                for summary in _in_turn(due):
                    if self._closing or (had and time.monotonic() > end_s):
                        break
                    if (trace := self._directory.load(summary)) is not None and not self._score(summary, trace, probes):
                        break
                    had.append(summary)
            finally:
                if had:
                    self._delivered.note(had, present)
                    write_totals(self._run_dir, self._totals)
        except Exception as error:  # of a disk: what is left comes again
            self._errors.count(STAGE, error)
        if self._errors.counts().get(STAGE, 0) == failures:
            self._errors.worked(STAGE)
            if len(had) == len(due):
                self.last_success_s = self._clock()

    def _due(self, present: Sequence[TraceSummary], has_probes: bool) -> list[TraceSummary]:
        """Those that have ended since and of which there is something to score; the others are passed for good, so
        that a probe that comes with an edit scores what ends from then on."""
        fresh = [summary for summary in self._delivered.fresh(present) if summary.key not in self._passed]
        due = [summary for summary in fresh if has_probes or summary.signals]
        self._passed = (self._passed & {summary.key for summary in present}) | (
            {summary.key for summary in fresh} - {summary.key for summary in due}
        )
        return due

    def _score(self, summary: TraceSummary, trace: RequestTrace, probes: Sequence[Probe]) -> bool:
        """Returns False if this was ended amid it: whoever scores next begins it anew."""
        began_s = time.monotonic()
        names = [name for name in wanted(probes, summary.signals) if is_on_demand(name)]
        known = self._on_demand.values(trace, names) if names else {}
        if self._closing and known:
            return False
        scores = scores_of(trace, probes, summary.signals, focus_heads=self._focus_heads(), known=known)
        seconds = time.monotonic() - began_s
        try:
            self._files.write(summary.key, StoredScores(scores.summary(), _places(scores), round(seconds, 6)))
        except ValueError as error:
            self._errors.count(STAGE, error)
        # After the file, without which the trace comes again: it counts once.
        self._count(trace, scores, seconds)
        try:
            # First: records and spans wait for the scores, and say what was done about them.
            self._on_scored(trace, scores)
        except Exception as error:  # whoever acts on scores must not end the scoring
            self._errors.count(STAGE, error)
        self._files.write(summary.key, StoredScores(scores.summary(), _places(scores), round(seconds, 6)))
        return True

    def _count(self, trace: RequestTrace, scores: Scores, seconds: float) -> None:
        engine = self._totals.engine((trace.model_name, trace.engine))
        engine.seconds += seconds
        for name, score in scores.probes.items():
            totals = engine.probe(name)
            totals.add(score.value)
            totals.outcomes["above" if score.above else "below"] += 1
            totals.missing += len(score.missing)
        for name, reason in scores.unscored.items():
            engine.probe(name).outcomes["failed" if name in scores.failed else "no_value"] += 1
            if name in scores.failed:
                self._errors.count(STAGE, f"probe {name}: {reason}")
        for name, values in scores.signals.items():
            engine.signal(name)["refused" if values.refused else "computed"] += 1


def _in_turn(due: Sequence[TraceSummary]) -> list[TraceSummary]:
    """Requests without signals on demand first; of the others the first one of each client, then the second ones."""
    turns: Counter[str | None] = Counter()
    places = []
    for summary in due:
        dear = _is_dear(summary)
        places.append((dear, turns[summary.client] if dear else 0))
        turns[summary.client] += dear
    order = sorted(range(len(due)), key=lambda number: places[number])
    return [due[number] for number in order]


def _is_dear(summary: TraceSummary) -> bool:
    return any(map(is_on_demand, summary.signals))


def _places(scores: Scores) -> dict[str, dict[str, list[object]]]:
    """Numbers by layer and head of the signals that nobody wants to compute twice."""
    on_demand = {name: one for name, one in scores.signals.items() if is_on_demand(name)}
    return {name: {value: plain(array) for value, array in one.by_place.items()} for name, one in on_demand.items()}
