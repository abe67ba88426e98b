"""Everything the exporter process writes to, kept in line with the configuration.

Owns which sinks are open: own port, vLLM's port (`page_writer.py`), multiprocess files, OTLP, JSONL; those of traced
requests are `trace_sinks.py`. A sink that fails is counted and does not keep the others from working. When to do a
round is the process's business (`loop.py`).
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
from glassbox.processes.exporter.http import HttpServer, bind_address
from glassbox.processes.exporter.launch import multiprocess_directory
from glassbox.processes.exporter.page_writer import PageWriter, is_wanted
from glassbox.processes.exporter.trace_sinks import TraceSinks
from glassbox.store.exporter_status import ExporterStatus, read_status, write_status
from glassbox.store.metrics_page import has_front

if TYPE_CHECKING:
    from glassbox.export.otel import OtelSink

logger = get_logger(__name__)

FLUSH_TIMEOUT_S: Final = 1.0


class Sinks:
    """The open sinks of one server.

    Attributes:
        errors: errors by stage: http, page, multiprocess, otel, jsonl, records and otel_traces (of traced requests),
            read (of the run directory), status (its file).

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
        self._registry.register(PrometheusCollector(self._source, TraceExemplars(self._run_dir)))
        self._http: tuple[object, HttpServer] | None = None
        self._page: PageWriter | None = None
        self._multiprocess: tuple[object, MultiprocessWriter] | None = None
        self._otel: tuple[object, OtelSink] | None = None
        self._jsonl: tuple[object, JsonlSink] | None = None
        self._traces = TraceSinks(self._run_dir, config, self.errors, self._environ, clock)

    @property
    def http_port(self) -> int | None:
        """The port that is served, None if none is."""
        return self._http[1].port if self._http else None

    def apply(self) -> None:
        """Open, change and close sinks so that they are what the configuration of the moment says."""
        config = self._config()
        self._apply_http(config)
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

    def _apply_http(self, config: GlassboxConfig) -> None:
        prometheus = config.export.prometheus
        wanted = None
        if config.enabled and prometheus.enabled and prometheus.port is not None:
            wanted = (bind_address(self._environ), prometheus.port)
        if self._http is not None and self._http[0] != wanted:
            self._http[1].close()
            self._http = None
        if wanted is not None and self._http is None:
            with self.errors.guard("http"):  # tried again each round: whoever holds the port may let go of it
                self._http = (wanted, self._serve(*wanted))

    def _serve(self, address: str, port: int) -> HttpServer:
        # Not at the top: an exporter without a port of its own needs no web framework in its memory.
        from glassbox.web.app import make_app

        return HttpServer(port, make_app(self._source, metrics=self._registry), address)

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
        looked_s = self._clock()
        with self.errors.guard("read"):
            view = self._source.view()
        if view is not None:
            self._write_page(view, looked_s)
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

    def _write_page(self, view: View, looked_s: float) -> None:
        if not is_wanted(self._config(), self._run_dir):
            self._close_page()
            return
        self._page = self._page or PageWriter(self._run_dir)
        with self.errors.guard("page"):
            self._page.write(view, looked_s)

    def _close_page(self) -> None:
        if self._page is not None:
            with self.errors.guard("page"):
                self._page.close()
        self._page = None

    def _write_multiprocess(self, view: View) -> None:
        directory = multiprocess_directory(self._environ)
        config = self._config()
        prometheus = config.export.prometheus
        # Where an API server hands out the page, vLLM would merge these files in its own process only to show it twice.
        shown = config.enabled and prometheus.enabled and prometheus.on_vllm_port and not has_front(self._run_dir)
        if not directory or (not shown and self._multiprocess is None):
            return
        if self._multiprocess is None or self._multiprocess[0] != directory:
            self._multiprocess = (directory, MultiprocessWriter(Path(directory)))
        with self.errors.guard("multiprocess"):
            # Switched off: empty files, because removing one under a scrape would fail that scrape.
            self._multiprocess[1].write(view.families if shown else (), self._clock())

    def close(self) -> None:
        """Close all sinks; OTLP gets `FLUSH_TIMEOUT_S` seconds for what it still has to send."""
        if self._http is not None:
            self._http[1].close()
        if self._otel is not None:
            self._otel[1].close(FLUSH_TIMEOUT_S)
        self._close_page()
        if self._multiprocess is not None:
            self._multiprocess[1].close()
        self._traces.close()
        self._http = self._otel = self._multiprocess = self._jsonl = None
