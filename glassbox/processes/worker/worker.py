"""What glassbox runs in a vLLM worker: the observer over its layers, and one thread that writes snapshot files.

Owns the worker's identity and the export thread's life. The thread starts when vLLM's warm-up is over and ends with the
worker; whatever it does, an error is counted and serving goes on.
"""

import atexit
import socket
import threading
import time
import uuid
import weakref
from collections import Counter
from typing import Any

from glassbox import __version__
from glassbox.adapter.coverage import Line, coverage_lines, other_stages, selection_lines, turn_lines, untraceable
from glassbox.adapter.internals import Feature, lacks, switched_off
from glassbox.adapter.layers import global_heads
from glassbox.adapter.protocols import VllmWorker
from glassbox.adapter.release import Standing, installed
from glassbox.adapter.runner import is_piecewise_forward
from glassbox.adapter.seat import SEAT
from glassbox.adapter.vllm_worker import layers_of, read_worker
from glassbox.config.model import LayerSelection
from glassbox.config.settings import Settings
from glassbox.core.adapter_slots import num_slots
from glassbox.core.affinity import leave_workers_cores
from glassbox.core.counters import EngineValue
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import DeviceNeeds, MeasuredLayers
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.for_device import make_measurer
from glassbox.processes.exporter.launch import ExporterProcess
from glassbox.processes.worker.adapters import AdapterSlots
from glassbox.processes.worker.canary import Canary, WorkerPlace
from glassbox.processes.worker.nonfinite import NonfiniteWatch
from glassbox.processes.worker.observer import Observer
from glassbox.processes.worker.traces.active import TraceHost
from glassbox.processes.worker.traces.refusals import PAUSE_S, RefusalNotes
from glassbox.processes.worker.traces.sampled import STAGE, SampledOptions
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.processes.worker.traces.writer import WATCHED_INTERVAL_S, TraceWriter
from glassbox.processes.worker.unread import UnreadWatch
from glassbox.store import process_name, rundir
from glassbox.store.snapshot import Snapshot, write_snapshot
from glassbox.store.trace_refusals import Refusal

logger = get_logger(__name__)

# Between two looks at the exporter, however long the interval of the snapshots.
_LOOK_S = 30.0


class Worker:
    """Observation of one vLLM worker.

    Args:
        vllm_worker: vLLM's worker object, its model loaded and its KV cache allocated.
        settings: of this process.
        errors: counts what goes wrong in every part.
    """

    def __init__(self, vllm_worker: VllmWorker, settings: Settings, errors: ErrorCounter) -> None:
        self.vllm_worker = weakref.ref(vllm_worker)
        self._settings, self._errors = settings, errors
        self._instance = f"{process_name.own_name()}-{uuid.uuid4().hex[:8]}"
        self._start_time_s = time.time()
        facts = self._facts = read_worker(vllm_worker)
        self._vllm = installed()
        self._build = {"version": __version__, "vllm_version": self._vllm.version or "", "backend": facts.backend}
        server, layers = facts.server, facts.layers
        config = settings.config
        self._deferred = DeferredActions(errors)
        heads = self._heads = global_heads(server, layers.heads)
        adapters = AdapterSlots(_adapter_limit(config.adapters.max))
        measured = MeasuredLayers(
            accumulators=Accumulators(
                len(layers.names),
                layers.num_heads,
                # Where nothing is observed no kernel has to be made.
                facts.device if layers.names else "cpu",
                num_adapters=num_slots(adapters.limit),
                adapter_layers=[n for n, offset in enumerate(heads.offsets) if offset or not server.rank],
            ),
            local_layers={name: local for local, name in enumerate(layers.names)},
            sink_tokens=config.statistics.sink_tokens,
            local_window=config.statistics.local_window,
        )
        needs = DeviceNeeds(
            max_rows=config.sampling.max_rows_per_step,
            head_size=layers.head_size,
            num_kv_heads=layers.num_kv_heads,
            query_dtype=facts.query_dtype,
            deferred=self._deferred,
            is_piecewise=is_piecewise_forward,
            start=SEAT.start,
            activation_bytes=facts.activation_bytes,
        )
        with SEAT.start.timed("kernels"):
            measurer = make_measurer(measured, needs, errors)
        host = TraceHost(
            engine=server.engine,
            rank=server.rank,
            model_name=server.model_name,
            instance=self._instance,
            layers=layers.indices,
            head_offset=max(heads.offsets, default=0),
            num_heads=layers.num_heads,
            num_heads_total=heads.total,
            max_model_len=facts.max_model_len,
            head_size=layers.head_size,
            knows_positions=not (facts.drafts and facts.schedules_ahead),
            tokenizer=facts.tokenizer,
            tokenizer_revision=facts.tokenizer_revision,
            unobserved=untraceable(facts),
        )
        self._sampled = SampledOptions(lambda: settings.config, host, errors, other_stages(facts))
        self._refusals = RefusalNotes(rundir.run_dir(), host)
        self._requests = RequestTracker(
            host,
            self._deferred,
            on_awaited=self._write_awaited,
            on_refused=self._tell_refused,
            sampled=lambda: self._sampled.options,
        )
        place = WorkerPlace(
            layers=layers.indices,
            names=layers.names,
            head_offsets=heads.offsets,
            rank=server.rank,
            host=socket.gethostname(),
            vllm=self._build["vllm_version"],
        )
        self._place, self._nonfinite = place, NonfiniteWatch(layers.indices)
        self._canary = Canary(
            place,
            measurer.check_limits,
            decode_only=layers.latent,
            probation=self._vllm.standing is Standing.NEWER,
            count=self._count_checked,
        )
        self._traces = TraceWriter(rundir.run_dir(), host, self._requests)
        self.observer = Observer(
            measurer,
            layers=layers.indices,
            layer_names=layers.names,
            layer_heads=layers.heads,
            config=lambda: settings.config,
            requests=self._requests,
            canary=self._canary,
            adapters=adapters,
            listen=SEAT.listening.listen,
            errors=errors,
            start=SEAT.start,
            exact=not facts.drafts,
            written_s=lambda: self._traces.ended_s,
        )
        self._exporter = ExporterProcess(settings.path)
        self._unread = UnreadWatch(rundir.run_dir())
        # `_wake` says that there is something to do, `_due` that it is all of it.
        self._wake, self._due = threading.Event(), threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._unsubscribe = settings.subscribe(self._wake_for_all)
        self._last_written: tuple[Any, ...] | None = None
        self._said: LayerSelection | None = None
        self._said_turns: list[Line] = []

    def _count_checked(self, result: str, rows: int) -> None:
        self.observer.counters.canary_rows[result] += rows

    def start(self) -> None:
        """Count steps from now on; start the snapshot thread and follow the YAML."""
        with SEAT.start.timed("arm"):
            # First, whatever the disk says: what was made for warm-up ends with it.
            vllm_worker = self.vllm_worker()
            self.observer.arm({} if vllm_worker is None else layers_of(vllm_worker, self._facts.layers.names))
            rundir.create()
            rundir.purge_dead()
            for line in switched_off(self._vllm.version):
                logger.warning("%s", line)
            for level, text in coverage_lines(self._facts, self._settings.config, self._settings.path):
                logger.log(level, "%s", text)
            self._say_selection()
            with self._errors.guard(STAGE):
                self._sampled.refresh()
            self._settings.watch()
        logger.info("%s", SEAT.start.line())
        self._thread = threading.Thread(target=self._run, name="glassbox-snapshots", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Write the last snapshot and stop; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        self.observer.disarm()
        self._requests.close()
        self._unsubscribe()
        atexit.unregister(self.close)
        self._wake_for_all()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._exporter.stop()

    def _run(self) -> None:
        leave_workers_cores(0)
        with self._errors.guard("snapshot"):
            self.observer.measurer.enter_thread()
        while True:
            with self._errors.guard("snapshot"):
                self.write_if_changed()
            self._write_traces()
            self._say_selection()
            with self._errors.guard(STAGE):
                self._sampled.refresh()
            self._look_at_exporter()
            if self._closing:
                return
            self._wait()

    def _write_traces(self, *, running: bool = True) -> None:
        with self._errors.guard("traces"):
            self._deferred.finish()
            self._traces.write(self._settings.config.requests, running=running)
        self._write_refusals()

    def _write_refusals(self) -> None:
        with self._errors.guard("traces"):
            self._refusals.write()

    def _wake_for_all(self) -> None:
        self._due.set()
        self._wake.set()

    def _write_awaited(self) -> None:
        """An answer waits for a trace that has ended: it is written now, and what runs later."""
        self._wake.set()

    def _tell_refused(self, refusal: Refusal) -> None:
        """An answer waits for a trace that won't come."""
        self._refusals.add(refusal)
        self._wake.set()

    def _look_at_exporter(self) -> None:
        with self._errors.guard("exporter"):
            self._exporter.ensure(self._settings.config)
            self._unread.look(self._settings.config)

    def _wait(self) -> None:
        """Until the next snapshot, an edit or the end; an exporter that died or hangs isn't left until then, nor are
        running requests that rules watch."""
        config = self._settings.config
        watched = config.enabled and config.actions.watches_running
        now_s = time.monotonic()
        end_s, look_s = now_s + config.export.interval_s, now_s + _LOOK_S
        while (left_s := end_s - time.monotonic()) > 0:
            pause_s = PAUSE_S if self._refusals.wait else WATCHED_INTERVAL_S if watched else _LOOK_S
            if self._wake.wait(min(left_s, pause_s)):
                self._wake.clear()
                if self._due.is_set():
                    self._due.clear()
                    return
                self._write_traces(running=False)
            self._write_refusals()
            if watched:
                with self._errors.guard("traces"):
                    self._deferred.run()
                    self._traces.write_watched(config.requests)
            if time.monotonic() >= look_s:
                look_s = time.monotonic() + _LOOK_S
                self._look_at_exporter()

    def write_if_changed(self) -> None:
        """Write a snapshot unless the last one says the same."""
        numbers = self._numbers()
        state = (
            numbers,
            # A snapshot taken within a step lacks its rows: the next one has them even if no step follows.
            self.observer.counters.finished_steps,
            # Window maxima fade while nothing is served.
            int(time.monotonic() // 15),
        )
        if state != self._last_written:
            self._traces.before_traces(lambda: write_snapshot(rundir.run_dir(), self.snapshot()))
            self._last_written = state
            steps, sampled_steps = numbers["steps"], numbers["sampled_steps"]
            logger.debug("Snapshot written: %d steps, %d of them measured", steps, sampled_steps)

    def snapshot(self) -> Snapshot:
        """All numbers of this worker as they stand now."""
        now_s = time.monotonic()
        arrays = self.observer.measurer.copy(now_s)
        return Snapshot(
            instance=self._instance,
            time_s=time.time(),
            start_time_s=self._start_time_s,
            model_name=self._facts.server.model_name,
            engine=self._facts.server.engine,
            rank=self._facts.server.rank,
            layers=self._facts.layers.indices,
            layer_heads=self._facts.layers.heads,
            head_offsets=self._heads.offsets,
            sampled_layers=self.observer.sampled_layers,
            num_heads_total=self._heads.total,
            # A layer that runs several times has more numbers than one.
            num_layers_total=max(self._facts.server.num_layers, 1 + max(self._facts.layers.indices, default=0)),
            numbers=self._numbers(),
            host=self._place.host,
            interval_s=self._settings.config.export.interval_s,
            first_nonfinite_layer=self._nonfinite.first(arrays.nonfinite, arrays.rows, now_s),
            checks=self._canary.checks(),
            # After the arrays: rows have come of no other adapter.
            adapters=self.observer.adapters.names,
            **vars(arrays),
        )

    def _numbers(self) -> dict[str, EngineValue]:
        """The numbers of the table of engine numbers: what the observer's steps count, and what others know."""
        status = self._settings.status
        refused, traced = self._requests.counts()
        not_observed = self._canary.not_observed()
        bypassed = Counter(bypass.slug for bypass in self._facts.layers.bypassed.values())
        return {
            **self.observer.counters.numbers(),
            "errors": self._errors.counts(),
            "sample_rate": self.observer.effective_sample_rate,
            "layers_observed": len(self._facts.layers.names) - sum(not_observed.values()),
            "layers_bypassed": {**bypassed, **not_observed},
            "reload_successful": status.successful,
            "reload_timestamp_s": status.timestamp_s,
            "start_seconds": SEAT.start.seconds(),
            "build": self._build,
            "trace_refused": refused,
            "traces_dropped": self._traces.dropped,
            "watched_delay_seconds": self._traces.watched_delay_s,
            "traced_requests": traced,
            "traced_requests_active": len(self._requests.active()),
        }

    def _say_selection(self) -> None:
        """Warn of a choice of layers that chooses nothing, or what isn't there, and tell what it means that layers take
        turns; once for each choice."""
        config = self._settings.config
        selection = config.sampling.layers
        if selection != self._said:
            self._said = selection
            for level, text in selection_lines(self._facts.layers, selection, other_stages(self._facts)):
                logger.log(level, "%s", text)
        turns = list(turn_lines(len(selection.select(self._facts.layers.indices)), config)) if config.enabled else []
        if turns != self._said_turns:
            self._said_turns = turns
            for level, text in turns:
                logger.log(level, "%s", text)


def _adapter_limit(wanted: int) -> int:
    """How many LoRA adapters are told apart; says so if it is none because vLLM lacks what that needs."""
    if wanted and (lacks(Feature.ADAPTERS) or lacks(Feature.TRACES)):
        logger.warning("adapters.max is %d, but this vLLM does not tell: there are no statistics by adapter", wanted)
        return 0
    return wanted
