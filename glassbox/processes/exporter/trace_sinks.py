"""Where ended traces go from the exporter process: scores first, then records and OpenTelemetry spans.

Owns which of them are open and that each ended trace reaches each of them once. What they write is `scorer.py`,
`export/records.py` and `export/attention_spans.py`.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.export.otlp import Signal, Target, resolve, switched_off_by
from glassbox.export.records import Records, open_records
from glassbox.export.token_text import TokenTexts
from glassbox.export.trace_document import document
from glassbox.export.trace_scores import TraceScores
from glassbox.processes.exporter.launch import may_trace, wants_records, wants_scores, wants_spans
from glassbox.processes.exporter.scorer import OnScored, Scorer
from glassbox.processes.exporter.sink import Sink
from glassbox.signals.chosen_heads import ChosenHeads
from glassbox.signals.probe_files import ProbeFiles
from glassbox.store.delivered import Delivered
from glassbox.store.llm_spans import LlmSpan, LlmSpanReader
from glassbox.store.trace_directory import TraceDirectory, TraceKey, TraceSummary
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    from glassbox.export.attention_spans import AttentionSpans

logger = get_logger(__name__)

# vLLM ends its span before the worker hears of the request's end; this is for a busy API server.
WAIT_FOR_LLM_SPAN_S: Final = 3.0
# Signals on demand may take a while; then a record or a span goes out without scores.
WAIT_FOR_SCORES_S: Final = 30.0
# Scoring takes milliseconds as a rule, and then what follows has the scores in the same round.
_SCORING_PATIENCE_S: Final = 0.5
_LAST_SCORING_PATIENCE_S: Final = 3.0
# For what still has to be sent in the end.
_FLUSH_TIMEOUT_S: Final = 1.0


def otlp_target(
    config: GlassboxConfig, signal: Signal, environ: Mapping[str, str], vllm_endpoint: str | None = None
) -> Target | None:
    """Where a signal that the configuration asks for goes; None, said once, if a variable switches it off.

    Raises:
        ValueError: as `resolve`.
    """
    if (variable := switched_off_by(signal, environ)) is not None:
        told = "export.otel is enabled, but no %s are sent because of %s; unset it, or say `enabled: false`"
        log_once(logger, logging.WARNING, f"{signal} off", told, signal, variable)
    return resolve(config.export.otel, signal, environ, vllm_endpoint)


@dataclass(frozen=True)
class _Records:
    """What is written to, what it has had, and where that is read: a directory of its own, because sinks work in
    threads of their own. And since when, Unix time, each request is there whose scores are waited for."""

    sink: Records
    delivered: Delivered
    directory: TraceDirectory
    scores: TraceScores
    since_s: dict[TraceKey, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Spans:
    """As _Records."""

    sink: "AttentionSpans"
    delivered: Delivered
    directory: TraceDirectory
    scores: TraceScores
    since_s: dict[TraceKey, float] = field(default_factory=dict)


class TraceSinks:
    """The sinks of ended traces of one server.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        errors: told of errors, as stages `scores`, `records` and `otel_traces`.
        environ: OTEL_*.
        clock: Unix time in seconds.
        last_success_s: of the sinks of an exporter before, Unix time by name.
        on_scored: told of each scored trace, from the scoring thread.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        errors: ErrorCounter,
        environ: Mapping[str, str],
        clock: Callable[[], float],
        last_success_s: Mapping[str, float] | None = None,
        on_scored: OnScored = lambda _trace, _scores: None,
    ) -> None:
        self._on_scored = on_scored
        self._run_dir = Path(run_dir)
        self._config = config
        self._errors = errors
        self._environ = environ
        self._clock = clock
        self._texts = TokenTexts(self._run_dir)
        self._directory = TraceDirectory(self._run_dir, clock)
        self._llm_spans = LlmSpanReader(self._run_dir)
        self._vllm_endpoint: str | None = None
        self._used: set[str] = set()
        self._skip_present = False
        # By sink, and kept while one is closed for another: that goes on where the first one ended.
        self._delivered: dict[str, Delivered] = {}
        succeeded = last_success_s or {}
        self.scores: Sink[Scorer] = Sink(
            "scores",
            errors,
            wants=self._wanted_scores,
            opens=self._open_scores,
            closes=self._close_scores,
            sends_later=lambda scorer: scorer.last_success_s,
            last_success_s=succeeded.get("scores", 0.0),
            unix=clock,
        )
        self.records: Sink[_Records] = Sink(
            "records",
            errors,
            wants=self._wanted_records,
            opens=self._open_records,
            closes=self._close_records,
            last_success_s=succeeded.get("records", 0.0),
            unix=clock,
        )
        self.spans: Sink[_Spans] = Sink(
            "otel_traces",
            errors,
            wants=self._wanted_spans,
            opens=self._open_spans,
            closes=self._close_spans,
            sends_later=lambda _: None,
            last_success_s=succeeded.get("otel_traces", 0.0),
            unix=clock,
        )

    def apply(self, skip_present: bool) -> None:
        """Open, change and close the sinks so that they are what the configuration of the moment says.

        Args:
            skip_present: a sink that opens now gets only what ends from now on.
        """
        self._skip_present = skip_present
        config = self._config()
        self.scores.apply(config)
        self.records.apply(config)
        self.spans.apply(config)

    def _noted(self, name: str) -> Delivered:
        if name not in self._delivered:
            self._delivered[name] = Delivered(self._run_dir, name, self._skip_present)
        return self._delivered[name]

    def _let_go(self, name: str, still_wanted: bool) -> None:
        if not still_wanted:
            self._delivered.pop(name).forget()

    def _wanted_scores(self, config: GlassboxConfig) -> object:
        # Also of clients that ask for signals, from the first one on. Which probes those are is followed while open.
        if not may_trace(config) or self.scores.is_wanted:
            return may_trace(config) or None
        return wants_scores(config) or any(summary.signals for summary in self._directory.summaries()) or None

    def _open_scores(self, _config: GlassboxConfig) -> Scorer:

        def tell(error: str) -> None:
            self._errors.count("scores", error)

        return Scorer(
            self._run_dir,
            ProbeFiles(self._config, tell),
            self._errors,
            focus_heads=ChosenHeads(self._config, tell).current,
            skip_present=self._skip_present,
            on_scored=self._on_scored,
            clock=self._clock,
        )

    def _close_scores(self, opened: Scorer, still_wanted: bool) -> None:
        opened.close()
        if not still_wanted:
            opened.forget()

    def _wanted_records(self, config: GlassboxConfig) -> object:
        records = config.requests.records
        return (records.expanded_path, records.format, records.max_mb) if wants_records(config) else None

    def _open_records(self, config: GlassboxConfig) -> "_Records":
        records = config.requests.records
        assert records.expanded_path is not None
        sink = open_records(records.expanded_path, records.format, records.max_mb)
        return _Records(sink, self._noted("records"), TraceDirectory(self._run_dir, self._clock), self._trace_scores())

    def _close_records(self, opened: "_Records", still_wanted: bool) -> None:
        try:
            opened.sink.flush(force=True)
        finally:
            self._let_go("records", still_wanted)

    def _wanted_spans(self, config: GlassboxConfig) -> object:
        if not wants_spans(config):
            return None
        if not self.spans.busy:
            self._llm_spans.refresh(self._clock())
        # The files that told it are removed once they were fetched.
        self._vllm_endpoint = self._llm_spans.endpoint or self._vllm_endpoint
        target = otlp_target(config, "traces", self._environ, self._vllm_endpoint)
        return None if target is None else (target, config.export.otel.logs)

    def _open_spans(self, config: GlassboxConfig) -> "_Spans":
        from glassbox.export.attention_spans import AttentionSpans

        sink = AttentionSpans(config.export.otel, self._run_dir, self._errors, self._vllm_endpoint, self._environ)
        return _Spans(sink, self._noted("spans"), TraceDirectory(self._run_dir, self._clock), self._trace_scores())

    def _trace_scores(self) -> TraceScores:
        return TraceScores(self._run_dir, self._config)

    def _close_spans(self, opened: "_Spans", still_wanted: bool) -> None:
        opened.sink.close(_FLUSH_TIMEOUT_S)
        self._let_go("spans", still_wanted)

    def round(self, last: bool = False) -> None:
        """Give every sink the traces that have ended since.

        Args:
            last: nothing will come later: don't wait for anything.
        """
        patience_s = _LAST_SCORING_PATIENCE_S if last else _SCORING_PATIENCE_S
        self.scores.give(lambda scorer: scorer.look(patience_s, last=last))
        texts = self._texts if self._config().requests.include_text else None
        self.records.give(lambda opened: self._write_records(opened, texts, last))
        self.spans.give(lambda opened: self._send_spans(opened, last))

    def _write_records(self, opened: "_Records", texts: TokenTexts | None, last: bool) -> None:
        present = opened.directory.summaries(last=last)

        def write(summary: TraceSummary, trace: RequestTrace) -> None:
            opened.sink.write([document(trace, texts, opened.scores.document(trace, summary.key))])

        self._deliver(opened, self._scored(opened, present, last), present, "records", write)
        opened.sink.flush(force=last)

    def _send_spans(self, opened: "_Spans", last: bool) -> None:
        self._llm_spans.refresh(self._clock())
        present = opened.directory.summaries(last=last)
        ready: dict[str, LlmSpan | None] = {}
        scored = self._scored(opened, present, last)
        for summary in scored:
            llm_span = self._llm_span(summary)
            young = self._clock() - (summary.end_time_s or 0.0) < WAIT_FOR_LLM_SPAN_S
            if llm_span is not None or last or not young or summary.status != "finished":
                ready[summary.internal_id] = llm_span

        def send(summary: TraceSummary, trace: RequestTrace) -> None:
            scores = opened.scores.document(trace, summary.key)
            opened.sink.send(trace, ready[summary.internal_id], scores)

        fresh = [summary for summary in scored if summary.internal_id in ready]
        self._deliver(opened, fresh, present, "otel_traces", send)

    def _scored(self, opened: "_Records | _Spans", present: list[TraceSummary], last: bool) -> list[TraceSummary]:
        """Those that a sink has not had and that have their scores, will have none or have waited for long enough."""
        fresh = opened.delivered.fresh(present)
        if last or not self.scores.is_wanted:
            return fresh
        has_probes = bool(self._config().probes)
        due = [summary for summary in fresh if has_probes or summary.signals]
        stored = opened.scores.stored([summary.key for summary in due]) if due else {}
        # Not since its end: with a long export.interval_s, or a rank that was waited for, that may be long ago.
        now_s = self._clock()
        since_s = {summary.key: opened.since_s.get(summary.key, now_s) for summary in due if summary.key not in stored}
        opened.since_s.clear()
        opened.since_s.update(since_s)
        late = {key for key, began_s in since_s.items() if now_s - began_s < WAIT_FOR_SCORES_S}
        return [summary for summary in fresh if summary.key not in late]

    def _deliver(
        self,
        opened: "_Records | _Spans",
        fresh: list[TraceSummary],
        present: list[TraceSummary],
        stage: str,
        give: Callable[[TraceSummary, RequestTrace], None],
    ) -> None:
        """Give traces to a sink, each once; a trace that can't be made into what the sink takes is left out."""
        had = []
        try:
            for summary in fresh:
                trace = opened.directory.load(summary)
                if trace is not None:
                    try:
                        give(summary, trace)
                    except OSError:
                        raise  # the sink's: this trace comes again
                    except Exception as error:
                        self._errors.count(stage, error)
                had.append(summary)
        finally:
            if had:
                opened.delivered.note(had, present)

    def _llm_span(self, summary: TraceSummary) -> LlmSpan | None:
        """The request's `llm_request` span: of those with its id, which another client may send too, the one that ended
        nearest to it. The samples of one request take different ones."""
        spans = self._llm_spans.of(summary.request_id)
        free = [span for span in spans if span.span_id not in self._used]
        end_s = summary.end_time_s or 0.0
        chosen = min(free or spans, key=lambda span: abs(span.end_time_s - end_s), default=None)
        if chosen is not None:
            self._used.add(chosen.span_id)
            if len(self._used) > 2 * len(self._llm_spans):
                self._used &= self._llm_spans.span_ids()
        return chosen

    def close(self) -> None:
        """Write and send what waits, and close the sinks."""
        self.scores.close()
        self.records.close()
        self.spans.close()
