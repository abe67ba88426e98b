"""Everything the exporter process writes to, kept in line with the configuration.

Owns which sinks are open: own port, multiprocess files, OTLP, JSONL; those of traced requests are
`trace_sinks.py`. A sink that fails is counted and does not keep the others from working. When to do a round is
the process's business (`loop.py`).
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.export.exemplars import TraceExemplars
from glassbox.export.family_source import FamilySource, View
from glassbox.export.jsonl import JsonlSink
from glassbox.export.multiprocess import MultiprocessWriter
from glassbox.export.prometheus import PrometheusCollector
from glassbox.processes.exporter.launch import multiprocess_directory
from glassbox.processes.exporter.trace_sinks import TraceSinks
from glassbox.store.exporter_status import ExporterStatus, read_status, write_status

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from glassbox.export.otel import OtelSink
    from glassbox.processes.exporter.own_port import OwnPort
    from glassbox.web.doors import Door

logger = get_logger(__name__)

FLUSH_TIMEOUT_S: Final = 1.0


class Sinks:
    """The open sinks of one server.

    Attributes:
        errors: errors by stage: http, access and connections (of the own port), multiprocess, otel, jsonl, records and
            otel_traces (of traced requests), read (of the run directory), status (its file).

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
        environ: PROMETHEUS_MULTIPROC_DIR, GLASSBOX_HTTP_ADDR, OTEL_*; by default the process's.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config = config
        self._environ = os.environ if environ is None else environ
        self._clock = clock
        before = read_status(self._run_dir)
        self.errors = export_errors(logger, before.errors if before else None)
        self._takes_over = before is not None
        self._source = FamilySource(self._run_dir, config)
        self._registry = CollectorRegistry()
        # The id of another client's request is nothing that a client should learn, and /metrics may be open.
        exemplars = TraceExemplars(self._run_dir, names_requests=lambda: not config().requests.isolate)
        self._registry.register(PrometheusCollector(self._source, exemplars))
        self._own_port: OwnPort | None = None
        self._multiprocess: tuple[object, MultiprocessWriter] | None = None
        self._otel: tuple[object, OtelSink] | None = None
        self._jsonl: tuple[object, JsonlSink] | None = None
        self._traces = TraceSinks(self._run_dir, config, self.errors, self._environ, clock)

    @property
    def http_port(self) -> int | None:
        """The port that is served, None if none is."""
        return None if self._own_port is None else self._own_port.port

    def apply(self) -> None:
        """Open, change and close sinks so that they are what the configuration of the moment says."""
        config = self._config()
        self._apply_own_port(config)
        self._apply_otel(config)
        jsonl = config.export.jsonl
        wanted = (jsonl.expanded_path, jsonl.max_mb) if config.enabled and jsonl.expanded_path is not None else None
        if wanted is None:
            self._jsonl = None
        elif self._jsonl is None or self._jsonl[0] != wanted:
            # A sink opened by an edit reports from now on, like one that takes over from a dead exporter.
            self._jsonl = (wanted, JsonlSink(*wanted, skip_first=self._takes_over))
        self._traces.apply(skip_present=self._takes_over)
        self._takes_over = True

    def _apply_own_port(self, config: GlassboxConfig) -> None:
        if self._own_port is None and config.export.own_port is not None:
            # Not at the top: an exporter without a port of its own needs no web framework in its memory.
            from glassbox.processes.exporter.own_port import OwnPort

            self._own_port = OwnPort(self._app, self._config, self.errors, self._environ)
        if self._own_port is not None:
            self._own_port.apply()

    def _app(self, door: "Door", shows_text: Callable[[], bool]) -> "Starlette":
        from glassbox.web.app import make_app

        return make_app(
            self._source,
            metrics=self._registry,
            rules=lambda: door.rules,
            shows_text=shows_text,
            is_guarded=lambda: door.authenticates,
        )

    def _apply_otel(self, config: GlassboxConfig) -> None:
        otel = config.export.otel
        wanted = None
        if config.enabled and otel.enabled and otel.metrics:
            wanted = (otel.endpoint, otel.protocol, tuple(sorted(otel.headers.items())))
        if self._otel is not None and self._otel[0] != wanted:
            self._otel[1].close(FLUSH_TIMEOUT_S)
            self._otel = None
        if wanted is not None and self._otel is None:
            try:
                from glassbox.export.otel import OtelSink

                self._otel = (wanted, OtelSink(otel, self._run_dir, self.errors, self._environ))
            except Exception as error:  # the SDK raises what it likes about bad certificates and variables
                self.errors.count("otel", error)

    def round(self, last: bool = False) -> None:
        """Read the snapshots and hand them to every sink; then note in the status file what failed.

        Args:
            last: there will be no later round.
        """
        self.apply()
        view: View | None = None
        with self.errors.guard("read"):
            view = self._source.view()
        if view is not None:
            self._write_multiprocess(view)
            if self._otel is not None:
                self._otel[1].send(view.families)
            if self._jsonl is not None:
                with self.errors.guard("jsonl"):
                    self._jsonl[1].write(view.engines, view.detail)
        with self.errors.guard("traces"):
            self._traces.round(last)
        with self.errors.guard("status"):
            write_status(self._run_dir, ExporterStatus(os.getpid(), self._clock(), self.errors.counts()))

    def _write_multiprocess(self, view: View) -> None:
        directory = multiprocess_directory(self._environ)
        config = self._config()
        shown = config.enabled and config.export.prometheus.enabled
        if not directory or (not shown and self._multiprocess is None):
            return
        if self._multiprocess is None or self._multiprocess[0] != directory:
            self._multiprocess = (directory, MultiprocessWriter(Path(directory)))
        with self.errors.guard("multiprocess"):
            # Switched off: empty files, because removing one under a scrape would fail that scrape.
            self._multiprocess[1].write(view.families if shown else (), self._clock())

    def close(self) -> None:
        """Close all sinks; OTLP gets `FLUSH_TIMEOUT_S` seconds for what it still has to send."""
        if self._own_port is not None:
            self._own_port.close()
        if self._otel is not None:
            self._otel[1].close(FLUSH_TIMEOUT_S)
        if self._multiprocess is not None:
            self._multiprocess[1].close()
        self._traces.close()
        self._otel = self._multiprocess = self._jsonl = None
