"""What a process shows of its server to whoever scrapes it or asks its routes, made when somebody does.

Owns the collector in prometheus_client's registry, behind vLLM's own /metrics, the page in front of that in an API
server, where the collector shows nothing since bytes are added (`metrics_front.py`), and with several API servers what
is shown beside the files of the exporter. Every process of a server registers it, for none can know whether it will be
asked, and most never are: what reads and translates is imported at the first scrape, and prometheus_client is waited
for, not imported.

API servers may share a run directory: vLLM's data-parallel supervisor starts one for each engine of a node. Each shows
the engines that it serves, as vLLM's own metrics do; else every engine would count as often as there are servers.
"""

import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.server import EngineLabels
from glassbox.config.load import GlassboxConfig

if TYPE_CHECKING:
    from glassbox.export.family_source import FamilySource
    from glassbox.export.prometheus import LivenessCollector, PrometheusCollector

# True in a request whose answer gets glassbox's part as bytes.
HANDED_OUT: Final[ContextVar[bool]] = ContextVar("glassbox_metrics_handed_out", default=False)


class ShownMetrics:
    """The families of this process's server, and a collector of them (it has the methods of prometheus_client's).

    Args:
        config: returns the configuration of the moment; edits are noticed at the next scrape.
        run_dir: of the server; it need not exist yet.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir
        self._engines: EngineLabels = lambda: None
        self._lock = threading.Lock()
        self._source: FamilySource | None = None
        self._collector: PrometheusCollector | None = None
        self._liveness: LivenessCollector | None = None

    def limit_to(self, engines: EngineLabels) -> None:
        """Show these engines (their labels; None is all) and no others."""
        self._engines = engines

    def _served(self) -> frozenset[str] | None:
        return self._engines()

    @property
    def source(self) -> "FamilySource":
        """Of the families; the same for all who ask."""
        with self._lock:
            if self._source is None:
                from glassbox.export.family_source import FamilySource

                self._source = FamilySource(self._run_dir, self._config, engines=self._served)
            return self._source

    def describe(self) -> Iterable[Any]:
        """Nothing: registering must not read files, and the names are known only with the first snapshot."""
        return []

    def collect(self) -> Iterable[Any]:
        """The metrics of this moment; none where they are handed out otherwise, or not wanted at vLLM's port."""
        if HANDED_OUT.get() or not self._config().export.prometheus.on_vllm_port:
            return []
        source = self.source
        with self._lock:
            if self._collector is None:
                from glassbox.export.prometheus import PrometheusCollector

                self._collector = PrometheusCollector(source)
            collector = self._collector
        return [*collector.collect(), *self.collect_liveness()]

    def collect_liveness(self) -> Iterable[Any]:
        """Of these the metrics that only the process which answers can make (`export/liveness.py`)."""
        return self._liveness_collector().collect()

    def _liveness_collector(self) -> "LivenessCollector":
        source = self.source
        with self._lock:
            if self._liveness is None:
                from glassbox.export.liveness import Liveness
                from glassbox.export.prometheus import LivenessCollector
                from glassbox.processes.exporter.launch import is_needed

                run_dir = self._run_dir
                liveness = Liveness(
                    run_dir,
                    self._config,
                    lambda: source.merged().engines,
                    lambda config: is_needed(config, run_dir=run_dir),
                )
                self._liveness = LivenessCollector(liveness, self._is_shown)
            return self._liveness

    def _is_shown(self) -> bool:
        config = self._config()
        return config.enabled and config.export.prometheus.shown_at_vllm

    def show_beside(self, collector: Any) -> Callable[[], None]:
        """Have a class of collectors show the liveness as well, and nothing that OpenMetrics hasn't; returns the undo.

        Args:
            collector: prometheus_client's MultiProcessCollector: what it shows lies in files, which stay as they are
                when whoever writes them has stopped.
        """
        original = collector.collect

        def collect(of_files: Any) -> list[Any]:
            from glassbox.export.multiprocess import without_lone_counts

            beside = () if HANDED_OUT.get() else self.collect_liveness()
            return [*without_lone_counts(original(of_files)), *beside]

        collector.collect = collect

        def undo() -> None:
            if collector.collect is collect:
                collector.collect = original

        return undo

    def show_at(self, app: Any) -> None:
        """Add the page of metrics to what an application of vLLM's answers at /metrics."""
        from glassbox.processes.api_server.metrics_front import MetricsFront
        from glassbox.processes.api_server.served_page import ServedPage

        page = ServedPage(self.source, self._run_dir, lambda: self._liveness_collector().families())
        app.add_middleware(MetricsFront, page=page, engines=self._served)

    def show_in(self, registry: Any) -> Callable[[], None]:
        """Register in a registry; returns the undo, which may come twice."""
        registry.register(self)

        def undo() -> None:
            # Not if somebody else has taken it out, or has cleared the registry.
            if self in registry._collector_to_names:
                registry.unregister(self)

        return undo


def install(shown: ShownMetrics) -> Callable[[], None]:
    """Show them in the registry behind vLLM's own /metrics, now or once this process imports prometheus_client.

    Returns:
        The undo.
    """

    def apply(prometheus_client: ModuleType) -> Callable[[], None]:
        return shown.show_in(prometheus_client.REGISTRY)

    patches = LatePatches()
    patches.add("prometheus_client", apply)
    patches.add("prometheus_client.multiprocess", lambda module: shown.show_beside(module.MultiProcessCollector))
    return patches.remove
