"""Everything the exporter process writes to, kept in line with the configuration.

Owns which sinks there are: own port, vLLM's port (`page_writer.py`), multiprocess files, OTLP, JSONL; those of traced
requests are `trace_sinks.py`. That one which fails or hangs doesn't keep the others from working is `sink.py`'s. When
to do a round is the process's business (`loop.py`).
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.export.exemplars import TraceExemplars
from glassbox.export.family_source import FamilySource, View
from glassbox.export.jsonl import JsonlSink
from glassbox.export.liveness import Liveness
from glassbox.export.multiprocess import MultiprocessWriter
from glassbox.export.prometheus import LivenessCollector, PrometheusCollector
from glassbox.processes.exporter import page_writer
from glassbox.processes.exporter.launch import wants_actions
from glassbox.processes.exporter.page_writer import PageWriter
from glassbox.processes.exporter.sink import Sink
from glassbox.processes.exporter.trace_sinks import TraceSinks, otlp_target
from glassbox.signals.probe_files import ProbeFiles
from glassbox.signals.scores import Scores
from glassbox.store import multiprocess_files
from glassbox.store.exporter_status import ExporterStatus, read_status, write_status
from glassbox.store.metrics_page import has_front
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from glassbox.export.otel import OtelSink
    from glassbox.processes.exporter.action_watch import ActionWatch
    from glassbox.processes.exporter.own_port import OwnPort
    from glassbox.web.doors import Door

logger = get_logger(__name__)

FLUSH_TIMEOUT_S: Final = 1.0
# Of a sink that fails: where it is configured, and what to do there.
_ADVICE: Final = {
    "http": ("export.http.port", "free the port, or choose another"),
    "multiprocess": (multiprocess_files.DIRECTORY_ENV, "it must be a directory with room that this user may write to"),
    "otel": ("export.otel.endpoint", "the collector must listen there, by that protocol"),
    "otel_traces": ("export.otel.endpoint", "the collector must listen there, by that protocol"),
    "jsonl": ("export.jsonl.path", "name a file, in a folder with room that this user may write to"),
    "audit": ("actions.audit.path", "name a file, in a folder with room that this user may write to"),
    "scores": ("probes", "each must be a file of glassbox train that this user may read"),
    "records": ("requests.records.path", "name a place with room that this user may write to"),
}


class Sinks:
    """The open sinks of one server.

    Attributes:
        errors: errors by stage: http, access and connections (of the own port), page, multiprocess, otel, jsonl,
            scores, records and otel_traces (of traced requests), read (of the run directory), status (its file).

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        environ: PROMETHEUS_MULTIPROC_DIR, GLASSBOX_HTTP_ADDR, OTEL_*; by default the process's.
        clock: Unix time in seconds.
        monotonic: seconds, for the time between attempts to open a sink.
        beat: is called between sinks: each may take some seconds, and whoever watches must not take that for silence.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self._run_dir = Path(run_dir)
        self._config = config
        self._environ = os.environ if environ is None else environ
        self._clock = clock
        before = read_status(self._run_dir)
        self.errors = export_errors(logger, before.errors if before else None, self._advice)
        self._takes_over = before is not None
        # From where an exporter that died was.
        self._goes_on = before is not None and not before.ended
        self._restarts = before.restarts + (not before.ended) if before is not None else 0
        self._source = FamilySource(self._run_dir, config)
        # The id of another client's request is nothing that a client should learn, and /metrics may be open.
        exemplars = TraceExemplars(self._run_dir, names_requests=lambda: not config().requests.isolate)
        self._liveness = Liveness(self._run_dir, config, lambda: self._source.merged().engines, clock=clock)
        self._shown = PrometheusCollector(self._source, exemplars), LivenessCollector(self._liveness, lambda: True)
        succeeded = before.sinks if before is not None else {}

        def sink(name: str, **how: Any) -> Sink[Any]:
            last = succeeded.get(name, 0.0)
            return Sink(name, self.errors, last_success_s=last, clock=monotonic, unix=clock, **how)

        self._http: Sink[OwnPort] = sink(
            "http",
            wants=_wants_http,
            opens=self._open_http,
            closes=lambda own_port, _: own_port.close(),
            works=lambda own_port: own_port.is_alive,
            adapts=True,
        )
        self._page: Sink[PageWriter] = sink(
            "page",
            wants=lambda config: page_writer.is_wanted(config, self._run_dir) or None,
            opens=lambda _: PageWriter(self._run_dir),
            closes=lambda page, _: page.close(),
        )
        self._multiprocess: Sink[MultiprocessWriter] = sink(
            "multiprocess",
            wants=self._wants_multiprocess,
            opens=self._open_multiprocess,
            closes=lambda writer, _: writer.close(),
        )
        self._otel: Sink[OtelSink] = sink(
            "otel",
            wants=self._wants_otel,
            opens=self._open_otel,
            closes=lambda otel, _: otel.close(FLUSH_TIMEOUT_S),
            sends_later=lambda otel: otel.last_success_s,
        )
        self._jsonl: Sink[JsonlSink] = sink("jsonl", wants=_wants_jsonl, opens=self._open_jsonl)
        self._traces = TraceSinks(
            self._run_dir, config, self.errors, self._environ, clock, succeeded, on_scored=self._act_on
        )
        self._action_counts = before.actions if before is not None else {}
        self._actions: Sink[ActionWatch] = sink(
            "actions",
            wants=lambda config: wants_actions(config) or None,
            opens=self._open_actions,
            closes=lambda watch, _: watch.close(),
            works=lambda watch: watch.is_alive,
        )
        self._all: tuple[Sink[Any], ...] = (
            self._http,
            self._page,
            self._multiprocess,
            self._otel,
            self._jsonl,
            self._actions,
            self._traces.scores,
            self._traces.records,
            self._traces.spans,
        )

    @property
    def http_port(self) -> int | None:
        """The port that is served, None if none is."""
        return self._http.value.port if self._http.value else None

    def apply(self) -> None:
        """Open, change and close sinks so that they are what the configuration of the moment says."""
        config = self._config()
        for sink in (self._http, self._page, self._multiprocess, self._otel, self._jsonl, self._actions):
            sink.apply(config)
            self._beat()
        self._traces.apply(skip_present=self._takes_over)
        # A sink opened by an edit reports from now on, like one that takes over from a dead exporter.
        self._takes_over = True
        self._goes_on = False

    def _open_http(self, config: GlassboxConfig) -> "OwnPort":
        # Not at the top: an exporter without a port of its own needs no web framework in its memory.
        from glassbox.processes.exporter.own_port import OwnPort

        own_port = OwnPort(self._app, self._config, self.errors, self._environ)
        own_port.apply()
        return own_port

    def _app(self, door: "Door", shows_text: Callable[[], bool]) -> "Starlette":
        from glassbox.web.app import make_app

        return make_app(
            self._source,
            metrics=self._shown,
            rules=lambda: door.rules,
            shows_text=shows_text,
            is_guarded=lambda: door.authenticates,
        )

    def _shows_multiprocess(self, config: GlassboxConfig) -> bool:
        # Where an API server hands out the page, vLLM would merge these files in its own process only to show it twice.
        return config.enabled and config.export.prometheus.shown_at_vllm and not has_front(self._run_dir)

    def _wants_multiprocess(self, config: GlassboxConfig) -> object:
        # Switched off it goes on with empty files: removing one under a scrape would fail that scrape.
        is_there = self._shows_multiprocess(config) or self._multiprocess.value is not None
        return multiprocess_files.directory(self._environ) if is_there else None

    def _open_multiprocess(self, config: GlassboxConfig) -> MultiprocessWriter:
        directory = multiprocess_files.directory(self._environ)
        assert directory is not None
        return MultiprocessWriter(directory, multiprocess_files.owner_of(self._run_dir))

    def _wants_otel(self, config: GlassboxConfig) -> object:
        otel = config.export.otel
        asked = config.enabled and otel.enabled and otel.metrics
        return otlp_target(config, "metrics", self._environ) if asked else None

    def _open_otel(self, config: GlassboxConfig) -> "OtelSink":
        from glassbox.export.otel import OtelSink

        return OtelSink(config.export.otel, self._run_dir, self.errors, self._environ)

    def _open_jsonl(self, config: GlassboxConfig) -> JsonlSink:
        jsonl = config.export.jsonl
        assert jsonl.expanded_path is not None
        return JsonlSink(jsonl.expanded_path, jsonl.max_mb, skip_first=self._takes_over)

    def _open_actions(self, _config: GlassboxConfig) -> "ActionWatch":
        # Not at the top: without rules an exporter needs no client of HTTP in its memory.
        from glassbox.processes.exporter.action_watch import ActionWatch

        probes = ProbeFiles(self._config, lambda error: self.errors.count("actions", error))
        watch = ActionWatch(
            self._run_dir,
            self._config,
            probes.current,
            self.errors,
            self._action_counts,
            goes_on=self._goes_on,
            clock=self._clock,
        )
        watch.start()
        return watch

    def _act_on(self, trace: RequestTrace, scores: Scores) -> None:
        watch = self._actions.value
        if watch is not None:
            watch.ended(trace, scores)

    def _advice(self, stage: str) -> str:
        """What to look at when a sink fails: the key, what it says, and what to do."""
        if stage not in _ADVICE:
            return ""
        key, remedy = _ADVICE[stage]
        value: Any = self._config()
        for part in key.split("."):
            value = getattr(value, part, None)
        return f"look at {key}{'' if value is None else f' ({value})'}: {remedy}; the other sinks go on"

    def round(self, last: bool = False) -> None:
        """Read the snapshots and hand them to every sink; then note in the status file what failed.

        Args:
            last: there will be no later round.
        """
        self._beat()
        self.apply()
        view: View | None = None
        looked_s = self._clock()
        with self.errors.guard("read"):
            view = self._source.view()
        if view is not None:
            self._give(view, looked_s)
        self._beat()
        self._traces.round(last)
        self._actions.give()
        if (watch := self._actions.value) is not None:
            self._action_counts = watch.counts()
        with self.errors.guard("status"):
            sinks = {sink.name: sink.last_success_s for sink in self._all if sink.is_wanted}
            errors = self.errors.counts()
            write_status(
                self._run_dir,
                ExporterStatus(
                    os.getpid(), self._clock(), errors, sinks, self._restarts, last, dict(self._action_counts)
                ),
            )

    def look(self) -> None:
        """Between two rounds: vLLM's page follows what the workers have written meanwhile."""
        looked_s = self._clock()
        with self.errors.guard("read"):
            view = self._source.view()
            self._page.give(lambda page: page.write(view, looked_s))

    def _give(self, view: View, looked_s: float) -> None:
        config = self._config()
        self._http.give(lambda own_port: own_port.apply())
        self._page.give(lambda page: page.write(view, looked_s))
        shown = view.families if self._shows_multiprocess(config) else ()
        self._multiprocess.give(lambda writer: writer.write(shown, self._clock()))
        # Not into the files: their readers make it themselves.
        self._otel.give(lambda otel: otel.send([*view.families, *self._liveness.families()]))
        self._jsonl.give(lambda jsonl: jsonl.write(view.engines, view.detail))

    def close(self) -> None:
        """Close all sinks; OTLP gets `FLUSH_TIMEOUT_S` seconds for what it still has to send."""
        for sink in (self._http, self._otel, self._page, self._multiprocess, self._jsonl):
            sink.close()
        self._traces.close()
        self._actions.close()


def _wants_http(config: GlassboxConfig) -> object:
    port = config.export.own_port if config.enabled else None
    return None if port is None else (port, config.export.http, config.requests.include_text)


def _wants_jsonl(config: GlassboxConfig) -> object:
    jsonl = config.export.jsonl
    path = jsonl.expanded_path if config.enabled else None
    return None if path is None else (path, jsonl.max_mb)
