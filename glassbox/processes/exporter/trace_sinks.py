"""Where ended traces go from the exporter process: records and OpenTelemetry spans.

Owns which of the two are open and that each ended trace reaches each of them once. What they write is
`export/records.py` and `export/attention_spans.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.export.records import Records, open_records
from glassbox.export.token_text import TokenTexts
from glassbox.export.trace_document import document
from glassbox.processes.exporter.launch import wants_records, wants_spans
from glassbox.store.delivered import Delivered
from glassbox.store.llm_spans import LlmSpan, LlmSpanReader
from glassbox.store.trace_directory import TraceDirectory, TraceSummary
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    from glassbox.export.attention_spans import AttentionSpans

# vLLM ends its span before the worker hears of the request's end; this is for a busy API server.
WAIT_FOR_LLM_SPAN_S: Final = 3.0


class TraceSinks:
    """The sinks of ended traces of one server.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        errors: told of errors, as stages `records` and `otel_traces`.
        environ: OTEL_*.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        errors: ErrorCounter,
        environ: Mapping[str, str],
        clock: Callable[[], float],
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config = config
        self._errors = errors
        self._environ = environ
        self._clock = clock
        self._directory = TraceDirectory(self._run_dir)
        self._texts = TokenTexts(self._run_dir)
        self._llm_spans = LlmSpanReader(self._run_dir)
        self._used: set[str] = set()
        self._records: tuple[object, Records, Delivered] | None = None
        self._spans: tuple[object, AttentionSpans, Delivered] | None = None

    def apply(self, skip_present: bool) -> None:
        """Open, change and close the sinks so that they are what the configuration of the moment says.

        Args:
            skip_present: a sink that opens now gets only what ends from now on.
        """
        config = self._config()
        self._apply_records(config, skip_present)
        self._apply_spans(config, skip_present)

    def _apply_records(self, config: GlassboxConfig, skip_present: bool) -> None:
        records = config.requests.records
        path = records.expanded_path
        wanted = (path, records.format, records.max_mb) if wants_records(config) else None
        delivered: Delivered | None = None
        if self._records is not None and self._records[0] != wanted:
            delivered = self._records[2]  # another file goes on where this one ends
            with self._errors.guard("records"):
                self._records[1].flush(force=True)
            if wanted is None:
                delivered.forget()
            self._records = None
        if wanted is not None and self._records is None and path is not None:
            with self._errors.guard("records"):
                sink = open_records(path, records.format, records.max_mb)
                delivered = delivered or Delivered(self._run_dir, "records", skip_present)
                self._records = (wanted, sink, delivered)

    def _apply_spans(self, config: GlassboxConfig, skip_present: bool) -> None:
        otel = config.export.otel
        wanted: object = None
        if wants_spans(config):
            self._llm_spans.refresh(self._clock())
            vllm_endpoint = self._llm_spans.endpoint if otel.endpoint is None else None
            wanted = (otel.endpoint, otel.protocol, tuple(sorted(otel.headers.items())), vllm_endpoint)
            if vllm_endpoint is None and otel.endpoint is None and self._spans is not None:
                wanted = self._spans[0]  # the files that told it were fetched and removed since
        delivered: Delivered | None = None
        if self._spans is not None and self._spans[0] != wanted:
            delivered = self._spans[2]
            self._spans[1].close()
            if wanted is None:
                delivered.forget()
            self._spans = None
        if wanted is not None and self._spans is None:
            try:
                from glassbox.export.attention_spans import AttentionSpans

                sink = AttentionSpans(otel, self._run_dir, self._errors, self._llm_spans.endpoint, self._environ)
                delivered = delivered or Delivered(self._run_dir, "spans", skip_present)
                self._spans = (wanted, sink, delivered)
            except Exception as error:  # the SDK raises what it likes about bad certificates and variables
                self._errors.count("otel_traces", error)

    def round(self, last: bool = False) -> None:
        """Give every sink the traces that have ended since.

        Args:
            last: nothing will come later: don't wait for anything.
        """
        if self._records is None and self._spans is None:
            return
        summaries = self._directory.summaries()
        if self._records is not None:
            with self._errors.guard("records"):
                self._write_records(self._records[1], self._records[2], summaries, last)
        if self._spans is not None:
            self._llm_spans.refresh(self._clock())
            try:
                self._send_spans(self._spans[1], self._spans[2], summaries, last)
            except Exception as error:
                self._errors.count("otel_traces", error)

    def _write_records(self, sink: Records, delivered: Delivered, present: list[TraceSummary], last: bool) -> None:
        texts = self._texts if self._config().requests.include_text else None

        def write(summary: TraceSummary, trace: RequestTrace) -> None:
            sink.write([document(trace, texts)])

        self._deliver(delivered.fresh(present), present, delivered, "records", write)
        sink.flush(force=last)

    def _send_spans(
        self, sink: "AttentionSpans", delivered: Delivered, present: list[TraceSummary], last: bool
    ) -> None:
        ready: dict[str, LlmSpan | None] = {}
        for summary in delivered.fresh(present):
            llm_span = self._llm_span(summary)
            young = self._clock() - (summary.end_time_s or 0.0) < WAIT_FOR_LLM_SPAN_S
            if llm_span is not None or last or not young or summary.status != "finished":
                ready[summary.internal_id] = llm_span

        def send(summary: TraceSummary, trace: RequestTrace) -> None:
            sink.send(trace, ready[summary.internal_id])

        fresh = [summary for summary in delivered.fresh(present) if summary.internal_id in ready]
        self._deliver(fresh, present, delivered, "otel_traces", send)

    def _deliver(
        self,
        fresh: list[TraceSummary],
        present: list[TraceSummary],
        delivered: Delivered,
        stage: str,
        give: Callable[[TraceSummary, RequestTrace], None],
    ) -> None:
        """Give traces to a sink, each once; a trace that can't be made into what the sink takes is left out."""
        had = []
        try:
            for summary in fresh:
                trace = self._directory.load(summary)
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
                delivered.note(had, present)

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
        if self._records is not None:
            with self._errors.guard("records"):
                self._records[1].flush(force=True)
        if self._spans is not None:
            self._spans[1].close()
        self._records = self._spans = None
