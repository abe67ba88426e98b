"""Judges traced requests by the rules of `actions`: running ones several times a second, others once they have ended.

Owns the thread of the exporter's process that looks at running traces and hears what came of actions. It takes a
bounded share of a core: with more or larger running traces than that allows, each is looked at less often, and the log
says so. What rules do is `acting.py`'s.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from glassbox.config.load import GlassboxConfig, RuleConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.processes.exporter.acting import STAGE, Acting, Counts
from glassbox.signals.chosen_heads import ChosenHeads
from glassbox.signals.probe import Probe
from glassbox.signals.rule_book import RuleBook, value_of
from glassbox.signals.scores import Scores, scores_of
from glassbox.store.trace_directory import TraceDirectory, TraceKey, TraceSummary
from glassbox.store.trace_record import RequestTrace

logger = get_logger(__name__)

LOOK_S: Final = 0.15
# While no rule watches requests that run, only answers are waited for.
_IDLE_S: Final = 0.5
# Of a core, that looking at running requests may take: it is a process of its own, and of low priority.
SHARE: Final = 0.5
# Between two looks: beyond it a rule may apply later than a second after its number said so.
LATE_S: Final = 0.7


class ActionWatch:
    """The rules of one server at work.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        probes: returns the probes in force; called by one thread of this object's own.
        errors: told of errors, as stages `actions` and `audit`.
        counts: to go on from.
        goes_on: the rules in force were already, so that requests which have ended since are judged by them, too.
        clock: Unix time in seconds.
        acting: what does it; made of `run_dir`, `errors` and `counts` unless given.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        probes: Callable[[], Sequence[Probe]],
        errors: ErrorCounter,
        counts: Mapping[str, int] | None = None,
        goes_on: bool = False,
        clock: Callable[[], float] = time.time,
        acting: Acting | None = None,
    ) -> None:
        self._config, self._probes, self._errors, self._clock = config, probes, errors, clock
        self._directory = TraceDirectory(run_dir, clock)
        self._acting = Acting(run_dir, errors, counts, clock) if acting is None else acting
        self._book, self._heads = RuleBook(), ChosenHeads(config)
        # Held while rules are judged and done: running requests are judged in one thread, ended ones in another.
        self._lock = threading.Lock()
        # Unix time since which each rule is in force: what had ended before is not judged by it.
        self._since_s = dict.fromkeys(config().actions.rules, 0.0 if goes_on else clock())
        # Generated tokens and rows of each running trace when it was last judged.
        self._judged: dict[TraceKey, tuple[int, int]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glassbox-actions", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it looks."""
        return self._thread.is_alive()

    def counts(self) -> Counts:
        """How often each action of each rule had each outcome."""
        return self._acting.counts()

    def close(self, timeout_s: float = 2.0) -> None:
        """End; what waits is sent and written."""
        self._ending.set()
        self._thread.join(timeout_s)
        with self._lock:
            self._acting.close(self._config().actions)

    def ended(self, trace: RequestTrace, scores: Scores) -> None:
        """A request has ended, and this is what is said of it; from any thread."""
        config = self._config()
        if config.enabled and config.actions.rules:
            self._judge(trace, scores, config.actions.rules)

    def _run(self) -> None:
        while not self._ending.is_set():
            began_s, cpu_s = time.monotonic(), time.thread_time()
            config = self._config()
            with self._errors.guard(STAGE):
                self.look(config)
            with self._lock:
                self._acting.collect(config.actions)
            used_s, took_s = time.thread_time() - cpu_s, time.monotonic() - began_s
            pause_s = max(LOOK_S if _watched(config) else _IDLE_S, used_s / SHARE - took_s)
            if _watched(config) and took_s + pause_s > LATE_S:
                log_once(
                    logger,
                    logging.WARNING,
                    "late",
                    "Rules look at running requests every %.1f s only, so they may apply late: so many or so long ones "
                    "are traced. Trace fewer at a time (requests.max_active), or fewer layers and heads",
                    took_s + pause_s,
                )
            self._ending.wait(pause_s)

    def look(self, config: GlassboxConfig) -> None:
        """Judge the running requests of which there is more than at the last look.

        Raises:
            OSError: the traces can't be listed.
        """
        rules = _watched(config)
        summaries = self._directory.summaries() if config.enabled and config.actions.rules else []
        keys = {summary.key for summary in summaries}
        self._judged = {key: at for key, at in self._judged.items() if key in keys}
        with self._lock:
            self._follow(config.actions.rules)
            self._book.keep(keys, {rule.name for rule in config.actions.rules})
        if not rules:
            return
        probes = [probe for probe in self._probes() if any(rule.probe == probe.name for rule in rules)]
        signals = {rule.signal.partition(".")[0] for rule in rules if rule.signal is not None}
        for summary in summaries:
            at = (summary.num_generated, summary.num_rows)
            # What has ended is judged once it is whole.
            if not summary.runs or self._judged.get(summary.key) == at:
                continue
            self._judged[summary.key] = at
            trace = self._directory.load(summary)
            if trace is not None and trace.status == "active":
                self._judge_running(summary, trace, rules, probes, signals)

    def _follow(self, rules: Sequence[RuleConfig]) -> None:
        """Note since when rules are in force."""
        now_s = self._clock()
        self._since_s = {rule: self._since_s.get(rule, now_s) for rule in rules}

    def _judge_running(
        self,
        summary: TraceSummary,
        trace: RequestTrace,
        rules: Sequence[RuleConfig],
        probes: Sequence[Probe],
        signals: set[str],
    ) -> None:
        try:
            asked = [name for name in trace.options.signals if name in signals]
            scores = scores_of(trace, probes, asked, focus_heads=self._heads.current())
        except Exception as error:  # this trace's, whatever it holds: the others are judged all the same
            self._errors.count(STAGE, error)
            return
        for name in scores.failed:
            self._errors.count(STAGE, f"probe {name}: {scores.unscored[name]}")
        self._judge(trace, scores, rules)

    def _judge(self, trace: RequestTrace, scores: Scores, rules: Sequence[RuleConfig]) -> None:
        values = {rule.name: value_of(rule, scores) for rule in rules}
        key: TraceKey = (trace.engine, trace.internal_id, trace.client)
        ended = trace.status != "active"
        with self._lock:
            now_s = self._clock()
            self._follow(self._config().actions.rules)
            if ended:  # probes that an edit brings score what had ended before, too
                end_s = trace.end_time_s or now_s
                rules = [rule for rule in rules if self._since_s.get(rule, now_s) <= end_s]
            for match in self._book.judge(rules, key, values, trace.num_generated, ended=ended):
                self._acting.perform(match, trace, scores.summary())
            if ended:  # its record and its span follow at once
                self._acting.note_acts()


def _watched(config: GlassboxConfig) -> tuple[RuleConfig, ...]:
    """The rules that look at requests that run."""
    return tuple(rule for rule in config.actions.rules if rule.watches_running) if config.enabled else ()
