"""What glassbox runs in a vLLM worker: the observer over its layers, and one thread that writes snapshot files.

Owns the worker's identity and the export thread's life. The thread starts when vLLM's
warm-up is over and ends with the worker; whatever it does, an error is counted and serving goes on.
"""

import atexit
import threading
import time
import uuid
import weakref
from typing import Any

import torch

from glassbox import __version__
from glassbox.adapter.layers import attention_layers, find_layers, server_info, unobservable_reason
from glassbox.adapter.release import vllm_version
from glassbox.adapter.runner import is_piecewise_forward, max_spec_tokens
from glassbox.adapter.seat import SEAT
from glassbox.config.settings import Settings
from glassbox.core.affinity import leave_workers_cores
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.for_device import make_measurer
from glassbox.processes.exporter.launch import ExporterProcess
from glassbox.processes.worker.observer import Observer
from glassbox.processes.worker.traces.active import TraceHost
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.processes.worker.traces.writer import TraceWriter
from glassbox.store import rundir
from glassbox.store.snapshot import Snapshot, write_snapshot

logger = get_logger(__name__)


class Worker:
    """Observation of one vLLM worker.

    Args:
        vllm_worker: vLLM's worker object, its model loaded and its KV cache allocated.
        settings: of this process.
        errors: counts what goes wrong in every part.
    """

    def __init__(self, vllm_worker: Any, settings: Settings, errors: ErrorCounter) -> None:
        self.vllm_worker = weakref.ref(vllm_worker)
        self._settings, self._errors = settings, errors
        self._instance = uuid.uuid4().hex[:12]
        self._start_time_s = time.time()
        vllm_config = vllm_worker.vllm_config
        self._info = server_info(vllm_config)
        model_layers = attention_layers(vllm_config)
        self._unobservable = unobservable_reason(vllm_config)
        self._layers = find_layers(model_layers, self._unobservable)
        self._backend = _backend_names([model_layers[name] for name in self._layers.names])
        config = settings.config
        device = _device_of(vllm_worker)
        self._accumulators = Accumulators(len(self._layers.names), self._layers.num_heads, device)
        self._deferred = DeferredActions(errors)
        measurer = make_measurer(
            self._accumulators,
            {name: row for row, name in enumerate(self._layers.names)},
            sink_tokens=config.statistics.sink_tokens,
            local_window=config.statistics.local_window,
            max_rows=config.sampling.max_rows_per_step,
            head_size=self._layers.head_size,
            query_dtype=vllm_config.model_config.dtype,
            deferred=self._deferred,
            is_piecewise=is_piecewise_forward,
            errors=errors,
        )
        host = TraceHost(
            engine=self._info.engine,
            rank=self._info.rank,
            model_name=self._info.model_name,
            instance=self._instance,
            layers=self._layers.indices,
            head_offset=self._info.rank * self._layers.num_heads,
            num_heads=self._layers.num_heads,
            num_heads_total=self._info.num_heads,
            max_model_len=vllm_config.model_config.max_model_len,
            tokenizer=str(vllm_config.model_config.tokenizer or ""),
            tokenizer_revision=vllm_config.model_config.tokenizer_revision,
        )
        self._requests = RequestTracker(host, self._deferred)
        self._traces = TraceWriter(rundir.run_dir(), host, self._requests)
        self.observer = Observer(
            measurer,
            layers=self._layers.indices,
            layer_names=self._layers.names,
            num_layers_total=self._info.num_layers,
            num_heads=self._layers.num_heads,
            config=lambda: settings.config,
            requests=self._requests,
            listen=SEAT.listening.listen,
            errors=errors,
            max_spec_tokens=max_spec_tokens(vllm_config),
        )
        self._exporter = ExporterProcess(settings.path)
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._unsubscribe = settings.subscribe(self._wake.set)
        self._last_written: tuple[Any, ...] | None = None

    def start(self) -> None:
        """Count steps from now on; start the snapshot thread and follow the YAML."""
        rundir.create()
        rundir.purge_dead()
        self._log_coverage()
        self._settings.watch()
        self._thread = threading.Thread(target=self._run, name="glassbox-snapshots", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self.observer.arm()

    def close(self) -> None:
        """Write the last snapshot and stop; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self.observer.disarm()
        self._requests.close()
        self._unsubscribe()
        atexit.unregister(self.close)
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._exporter.stop()

    def _run(self) -> None:
        leave_workers_cores(0)
        while True:
            with self._errors.guard("snapshot"):
                self.write_if_changed()
            with self._errors.guard("traces"):
                self._deferred.finish()
                self._traces.write(self._settings.config.requests)
            with self._errors.guard("exporter"):
                self._exporter.ensure(self._settings.config)
            if self._closing:
                return
            self._wake.wait(self._settings.config.export.interval_s)
            self._wake.clear()

    def write_if_changed(self) -> None:
        """Write a snapshot unless the last one says the same."""
        counters, status = self.observer.counters, self._settings.status
        state = (
            counters.steps,
            # A snapshot taken within a step lacks its rows: the next one has them even if no step follows.
            counters.finished_steps,
            self.observer.effective_sample_rate,
            status.successful,
            status.timestamp_s,
            len(self._requests.active()),
            self._requests.counts(),
            # Window maxima fade while nothing is served.
            int(time.monotonic() // 15),
            tuple(sorted(self._errors.counts().items())),
        )
        if state != self._last_written:
            write_snapshot(rundir.run_dir(), self.snapshot())
            self._last_written = state
            logger.debug("Snapshot written: %d steps, %d of them measured", counters.steps, counters.sampled_steps)

    def snapshot(self) -> Snapshot:
        """All numbers of this worker as they stand now."""
        arrays = self.observer.measurer.copy(time.monotonic())
        counters, status = self.observer.counters, self._settings.status
        refused, traced = self._requests.counts()
        return Snapshot(
            instance=self._instance,
            time_s=time.time(),
            start_time_s=self._start_time_s,
            model_name=self._info.model_name,
            engine=self._info.engine,
            rank=self._info.rank,
            layers=self._layers.indices,
            head_offset=self._info.rank * self._layers.num_heads,
            num_heads_total=self._info.num_heads,
            num_layers_total=self._info.num_layers,
            steps=counters.steps,
            sampled_steps=counters.sampled_steps,
            dropped_rows=dict(counters.dropped_rows),
            errors=self._errors.counts(),
            overhead_seconds=counters.overhead_s,
            sample_rate=self.observer.effective_sample_rate,
            layers_observed=len(self._layers.names),
            layers_bypassed=len(self._layers.bypassed),
            reload_successful=status.successful,
            reload_timestamp_s=status.timestamp_s,
            build={
                "version": __version__,
                "vllm_version": vllm_version() or "",
                "backend": self._backend,
            },
            counts=arrays.counts,
            sums=arrays.sums,
            rows=arrays.rows,
            nonfinite=arrays.nonfinite,
            window_max=arrays.window_max,
            trace_refused=refused,
            traced_requests=traced,
            traced_requests_active=len(self._requests.active()),
        )

    def _log_coverage(self) -> None:
        found, config = self._layers, self._settings.config
        logger.info(
            "Observing %d of %d attention layers (%s) of %s at sample_rate %g, configured by %s",
            len(found.names),
            len(found.names) + len(found.bypassed),
            self._backend or "none",
            self._info.model_name,
            config.sample_rate,
            self._settings.path,
        )
        if found.bypassed:
            logger.warning(
                "%d attention layers bypass glassbox and are not measured (%s): %s",
                len(found.bypassed),
                self._unobservable or "their backend is not one that glassbox wraps",
                ", ".join(found.bypassed),
            )


def _backend_names(layers: list[Any]) -> str:
    return ",".join(sorted({layer.attn_backend.get_name() for layer in layers}))


def _device_of(vllm_worker: Any) -> torch.device:
    device: torch.device = vllm_worker.device
    return device
