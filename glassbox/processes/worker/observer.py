"""What one worker measures: asks the samplers, hands the row list to the measurer, keeps the counters.

Owns what is decided in a step, and the worker's cumulative numbers; how a step begins and ends is `step.py`.
It does not patch vLLM (`hook.py`), compute statistics (`measure/*_measurer.py`, `kernels/`) or write files
(`worker.py`).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassbox.adapter.attention.layer_view import common_tables, forward_of, tables_of, view_of
from glassbox.adapter.attention.mla_forward import latent_forward
from glassbox.adapter.attention.mla_view import latent_view_of
from glassbox.adapter.attention.rehearsal import query_kinds, rehearse, rehearsed_tables
from glassbox.adapter.compile_monitor import unmonitored
from glassbox.adapter.internals import Feature, lacks
from glassbox.adapter.protocols import (
    AttentionLayer,
    AttentionMetadata,
    CommonMetadata,
    LatentLayer,
    ObservedImpl,
    ObservedLatentImpl,
    PreparedBatch,
    Runner,
)
from glassbox.adapter.row_mask import MaskError, RowMask, read_mask
from glassbox.adapter.runner import Batch, BatchMismatchError, check_batch, read_batch
from glassbox.adapter.scheduler import ScheduledStep
from glassbox.config.load import GlassboxConfig
from glassbox.core.counters import BYPASS_REASONS, DROP_REASONS, ENGINE_NUMBERS
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.core.rows import ROW_BATCH, ROW_PHASE, ROW_SLOT, ROW_UNCOUNTED
from glassbox.core.start_parts import StartParts
from glassbox.measure.contract import BatchTables, Measurer, StepLayers, StepTraces
from glassbox.measure.sampling import LayerTurns, RowSampler, StepSampler, TraceBudget, rate_of_steps
from glassbox.processes.worker.adapters import AdapterSlots
from glassbox.processes.worker.canary import Canary, StepCheck
from glassbox.processes.worker.progress import RequestProgress
from glassbox.processes.worker.step import Step
from glassbox.processes.worker.traces.tracker import RequestTracker, row_positions

logger = get_logger(__name__)


class RepeatedLayerError(ValueError):
    """A layer ran again in the same step."""


def _num_counted(rows: np.ndarray) -> int:
    """Rows of a row list that belong to the sample."""
    return int(np.count_nonzero((rows[:, ROW_PHASE] & ROW_UNCOUNTED) == 0))


def _counted_share(rows: np.ndarray, sampled: frozenset[int], traces: StepTraces | None) -> float:
    """Share of the sample in what a step measures, a row in each layer being one."""
    if traces is None:
        return 1.0
    counted = len(sampled) * _num_counted(rows)
    of_traces = sum(len(one.local_layers) * len(one.places) for one in traces.wanted)
    of_traces += sum(len(prompt.local_layers) * prompt.num_rows for prompt in traces.prompts)
    return counted / max(counted + of_traces, 1)


class Counters(SimpleNamespace):
    """What the steps of one worker count: an attribute for each counter of the table of engine numbers, from 0 on.

    Those that others count (errors, traced requests) stay 0 here.

    Attributes:
        finished_steps: whose rows are in the accumulators (CPU) or on their way there (GPU); no engine number.
    """

    def __init__(self) -> None:
        super().__init__(**{entry.name: entry.zero() for entry in ENGINE_NUMBERS if entry.kind == "counter"})
        self.finished_steps = 0

    def numbers(self) -> dict[str, Any]:
        """A copy, by name."""
        counted = ((entry, getattr(self, entry.name)) for entry in ENGINE_NUMBERS if entry.kind == "counter")
        return {entry.name: dict(value) if entry.labels else value for entry, value in counted}


class Observer:
    """The sampled observation of one worker.

    Args:
        measurer: for the worker's device.
        layers: global index of each observed layer, in the order of the accumulators.
        layer_names: vLLM's name of each.
        layer_heads: query heads of each, local to the worker.
        config: returns the configuration in force; called at every step.
        requests: which requests are traced.
        canary: which rows are checked, and which layers may be observed.
        adapters: in which slots of the accumulators the rows of LoRA adapters are counted.
        listen: told whether layers are to call `after_attention`: in warm-up, since graphs are captured there, and
            then in measured steps.
        start: is told what warm-up costs.
        exact: the runner computes all scheduled tokens; one that leaves out drafts computes fewer.
        written_s: returns the seconds that ended traces have taken beside the steps, so far.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        measurer: Measurer[Any],
        *,
        layers: tuple[int, ...],
        layer_names: tuple[str, ...],
        layer_heads: tuple[int, ...],
        config: Callable[[], GlassboxConfig],
        requests: RequestTracker,
        canary: Canary,
        adapters: AdapterSlots,
        listen: Callable[[bool], None],
        errors: ErrorCounter,
        start: StartParts | None = None,
        exact: bool = True,
        written_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.armed = False
        self._listen = listen
        listen(True)
        self.counters = Counters()
        self.measurer, self.requests, self._canary, self.adapters = measurer, requests, canary, adapters
        self._all_layers, self._layer_heads = layers, layer_heads
        self._locals = {name: local for local, name in enumerate(layer_names)}
        self._read_config, self._errors, self._clock = config, errors, clock
        self._start = StartParts() if start is None else start
        self._exact, self._progress = exact, RequestProgress()
        self._written_s, self._charged_s = written_s, 0.0
        self._step: Step | None = None
        self._tables: BatchTables | None = None  # of the metadata that was built last
        self._config = config()
        self._turns = LayerTurns()
        self._steps = StepSampler(self._rate(self._config), self._config.sampling.overhead_budget)
        self._trace_budget = TraceBudget(self._config.sampling.overhead_budget)
        self._apply(self._config)

    def arm(self, layers: Mapping[str, AttentionLayer | LatentLayer]) -> None:
        """Warm-up is over: count steps from now on.

        Args:
            layers: vLLM's observed ones, by name.
        """
        try:
            with self._start.timed("kernels"), unmonitored():
                self._rehearse(layers)
                self._refuse(self.measurer.end_warm_up())
        finally:
            self._listen(False)
        self.armed = True

    @torch.inference_mode()
    def _rehearse(self, layers: Mapping[str, AttentionLayer | LatentLayer]) -> None:
        """Compile what warm-up has not launched: in a served step it would take seconds.

        Each rank for itself: nothing here waits for another one.
        """
        tables = None
        for name, layer in layers.items():
            for kind in query_kinds(layer):
                with self._errors.guard("observe"):
                    if self.measurer.is_warm(name, kind) or not layer.kv_cache.numel():
                        continue
                    tables = tables or rehearsed_tables(layer.kv_cache.device)
                    view, forward = rehearse(layer, kind)
                    self.measurer.on_build([name], tables)
                    self.measurer.after_attention(view, forward, layer.kv_cache, tables)

    def _refuse(self, local_layers: frozenset[int]) -> None:
        """Layers whose kernel failed in warm-up."""
        for local in local_layers:
            self._canary.refuse(local, "kernel")
        if local_layers:
            logger.warning(
                "%d of %d layers are not observed: %s. The error is logged above; another --kv-cache-dtype or "
                "--attention-backend may help",
                len(local_layers),
                len(self._all_layers),
                BYPASS_REASONS["kernel"],
            )

    def disarm(self) -> None:
        """Count no more steps."""
        self.armed = False
        self._listen(False)

    @property
    def effective_sample_rate(self) -> float:
        """Share of steps in which a layer is measured, after the overhead budget; an edit shows before the next step
        takes it up."""
        config = self._read_config()
        num_layers = len(self.sampled_layers)
        share = config.sampling.layers_at_once(num_layers) / num_layers if num_layers else 1.0
        return math.ldexp(self._rate(config), -self._steps.level) * share

    @property
    def sampled_layers(self) -> tuple[int, ...]:
        """Global indices of the layers that `sampling.layers` chooses; an edit shows at once."""
        return self._read_config().sampling.layers.select(self._all_layers)

    def _places(self, layers: frozenset[int]) -> int:
        """Heads of these layers together: one row is as many in rows_total's unit."""
        return sum(self._layer_heads[local] for local in layers)

    def _rate(self, config: GlassboxConfig) -> float:
        """Share of steps to measure."""
        num_layers = len(config.sampling.layers.select(self._all_layers))
        rate = config.sample_rate if config.enabled else 0.0
        return rate_of_steps(rate, num_layers, config.sampling.layers_at_once(num_layers))

    def _turn(self) -> frozenset[int]:
        """Layers that a sampled step measures."""
        at_once = self._config.sampling.layers_at_once(len(self._layers))
        return self._turns.take(self._layers, at_once) if at_once < len(self._layers) else self._layers

    def _apply(self, config: GlassboxConfig) -> None:
        self._config = config
        sampling = config.sampling
        self._steps.set_rate(self._rate(config))
        self._steps.set_budget(sampling.overhead_budget)
        self._trace_budget.set_budget(sampling.overhead_budget)
        self._rows = RowSampler(
            min(sampling.max_rows_per_step, self.measurer.max_rows),
            sampling.prefill_rows_per_request,
            max_traced_rows=self.measurer.max_traced_rows,
        )
        selected = set(sampling.layers.select(self._all_layers))
        self._layers = frozenset(row for row, layer in enumerate(self._all_layers) if layer in selected)

    def idle_step(self, runner: Runner, scheduled: ScheduledStep) -> None:
        """A scheduler output without tokens: it only tells which requests are gone."""
        self._follow(scheduled)
        if lacks(Feature.TRACES):
            return
        try:
            self.requests.begin_step(runner, scheduled, self._config, self._layers, spent=self._trace_budget.refuses)
        except Exception as error:
            self._errors.count("requests", error)

    def start_step(self, runner: Runner, scheduled: ScheduledStep) -> None:
        """A real engine step starts; the runner has not seen its scheduler output yet."""
        step = self._step = Step(self.measurer, self._listen, self._errors, self._clock, runner, scheduled)
        self.counters.steps += 1
        self._follow(scheduled)
        try:
            config = self._read_config()
            if config is not self._config:
                self._apply(config)
            # Where no layer can be measured no step is.
            sampled = bool(self._all_layers) and self._steps.next_step()
            if sampled:
                self.counters.sampled_steps += 1
            step.has_traced = self._has_traced(runner, scheduled, config)
            step.skips_traced = step.has_traced and not self._trace_budget.next_step()
            if step.skips_traced:
                self._skip_traced(scheduled)
            step.start(
                sampled=sampled,
                traced=step.has_traced and not step.skips_traced,
                checked=config.enabled and self._canary.is_due(config.canary.interval_s, self._layers),
            )
        except Exception as error:
            step.fail("begin_step", error)
        step.overhead_s += self._clock() - step.started_s

    def _follow(self, scheduled: ScheduledStep) -> None:
        try:
            self.adapters.begin_step(scheduled)
        except Exception as error:
            self._errors.count("adapters", error)
        if lacks(Feature.PROGRESS) or lacks(Feature.TRACES):
            return
        try:
            self._progress.begin_step(scheduled)
        except Exception as error:
            self._errors.count("progress", error)

    def _has_traced(self, runner: Runner, scheduled: ScheduledStep, config: GlassboxConfig) -> bool:
        if lacks(Feature.TRACES):
            return False
        try:
            spent = self._trace_budget.refuses
            return self.requests.begin_step(runner, scheduled, config, self._layers, spent=spent)
        except Exception as error:  # the step may be sampled all the same
            self._errors.count("requests", error)
            return False

    def _skip_traced(self, scheduled: ScheduledStep) -> None:
        """The budget is spent: traces get nothing of this step, and say so."""
        self.counters.trace_skipped_steps += 1
        self.requests.skip(scheduled)
        if self.counters.trace_skipped_steps == 1:
            logger.warning(
                "sampling.overhead_budget is spent: traced requests lose rows (their traces say truncated) and further "
                "ones may be refused. Raise it, or let fewer requests be traced (requests.max_active, trace_rate, "
                "opt_in). Further ones are only counted (glassbox_trace_skipped_steps_total)."
            )

    def on_prepare(self, prepared: PreparedBatch) -> None:
        """The V2 runner has chosen and ordered the batch of the step that is under way; of a dummy there is none."""
        if self._step is not None:
            self._step.prepared = prepared

    def on_build(
        self, layer_names: list[str], common_attn_metadata: CommonMetadata, absorbed: int | None = None
    ) -> None:
        """vLLM built metadata; the first time in a sampled step the batch's order is final and rows are chosen."""
        if layer_names and layer_names[0] not in self._locals:
            return  # a drafter's, or one with virtual batches
        step = self._step
        started = self._clock()
        try:
            self._tables = common_tables(common_attn_metadata)
            self.measurer.on_build(layer_names, self._tables)
            if step is not None and step.measured and not step.rows_chosen:
                step.rows_chosen = True
                self._choose_rows(step, common_attn_metadata, absorbed)
            elif step is not None and step.measured:
                self._see_mask(step, common_attn_metadata)
        except Exception as error:
            stages = ((BatchMismatchError, "batch"), (MaskError, "mask"))
            stage = next((stage for kind, stage in stages if isinstance(error, kind)), "choose_rows")
            if step is None:
                self._errors.count(stage, error)
            else:
                step.fail(stage, error)
        if step is not None:
            step.overhead_s += self._clock() - started

    def on_block_table(self, layer_names: list[str], block_table: Tensor) -> None:
        """See seat.Listener."""
        try:
            if self._tables is not None and layer_names and layer_names[0] in self._locals:
                self.measurer.on_build(layer_names, self._tables._replace(block_table=block_table, group=object()))
        except Exception as error:
            self._errors.count("observe", error)

    def _choose_rows(self, step: Step, common_attn_metadata: CommonMetadata, absorbed: int | None) -> None:
        batch = read_batch(step.runner, step.prepared, common_attn_metadata)
        check_batch(batch, step.scheduled.scheduled, common_attn_metadata, self._exact)
        batch = self._progress.of_client(batch)
        num_drafts = self._num_drafts(step.scheduled, batch)
        traced, excluded = self.requests.marks(batch.req_ids)
        if step.skips_traced:
            traced = None
        new_from = self._progress.new_from(batch)
        rows, dropped = self._rows.select(
            batch.num_scheduled,
            batch.num_computed,
            batch.prompt_len,
            batch.query_start,
            new_from=new_from,
            num_drafts=num_drafts,
            traced=traced,
            excluded=excluded,
            sampled=step.sampled,
        )
        num_left_out = int(num_drafts.sum() if excluded is None else num_drafts[~excluded].sum()) if step.sampled else 0
        if step.sampled and (dropped or num_left_out or _num_counted(rows)):
            step.layers = self._turn()
        bits = self.adapters.bits(batch.req_ids)
        if bits is not None:
            rows[:, ROW_PHASE] |= bits[rows[:, ROW_BATCH]]
        mask = read_mask(batch, common_attn_metadata)
        if mask is not None:
            rows = self._without_others(step, batch, rows, mask)
        self._drop(step, "max_rows_per_step", dropped)
        self._drop(step, "draft", num_left_out)
        check = None
        if step.checked:
            rows, check = self._add_checked(batch, rows, excluded=excluded, mask=mask, tokens=absorbed)
            # One that was only looked at costs what any other step does.
            step.checked = check is not None
        traces = None
        if traced is not None:
            traces = self.requests.trace_rows(step.runner, batch, rows, num_drafts, new_from, mask)
        if len(rows) or traces is not None:
            assert rows[:, ROW_BATCH].max(initial=-1) < len(batch.prompt_len)
            sampled = step.layers & self._canary.allowed
            if traced is not None:
                step.traced = traces is not None
                of_prompts = sum(prompt.num_rows for prompt in traces.prompts) if traces is not None else 0
                step.whole_prompts = of_prompts > 0
                step.counted_share = _counted_share(rows, sampled, traces)
            if check is not None:
                # After those of the traced rows, which are told from others by having one.
                check.take_slots(rows, self.measurer.num_slots)
            # Of a step that isn't sampled only what its traces asked for.
            of_traces = (traces.local_layers if traces is not None else frozenset[int]()) & self._canary.allowed
            if sampled or of_traces or check is not None:
                step.batch, step.rows = batch, rows
                step.begin(rows, StepLayers(sampled, self._canary.allowed), traces, check)

    def _without_others(self, step: Step, batch: Batch, rows: np.ndarray, mask: RowMask) -> np.ndarray:
        """A row list without the rows that see other keys than causal ones; traced ones keep to the first slots."""
        others = mask.sees_others(rows[:, ROW_BATCH], row_positions(batch, rows))
        if others.any():
            self._drop(step, "mask", _num_counted(rows[others]))
            rows = rows[~others]
            traced = rows[:, ROW_SLOT] >= 0
            rows[traced, ROW_SLOT] = np.arange(np.count_nonzero(traced))
        return rows

    @staticmethod
    def _see_mask(step: Step, common_attn_metadata: CommonMetadata) -> None:
        """Other layers of a step may have another mask; then rows that it doesn't fit must not be measured."""
        if step.batch is None or step.rows is None:
            return
        mask = read_mask(step.batch, common_attn_metadata)
        if mask is not None and mask.sees_others(step.rows[:, ROW_BATCH], row_positions(step.batch, step.rows)).any():
            raise MaskError("the layers of a step must all see the keys of its rows alike; this step is not measured")

    @staticmethod
    def _num_drafts(scheduled: ScheduledStep, batch: Batch) -> np.ndarray:
        """[B] draft tokens of each request, the last ones of it in the step."""
        num_drafts = np.zeros(len(batch.req_ids), dtype=np.int64)
        drafts = {} if lacks(Feature.PROGRESS) else scheduled.drafts
        if drafts:
            for row, req_id in enumerate(batch.req_ids):
                # A runner may leave out some of them, never one of the others.
                certain = scheduled.scheduled[req_id] - len(drafts.get(req_id, ()))
                num_drafts[row] = max(batch.num_scheduled[row] - certain, 0)
        return num_drafts

    def _drop(self, step: Step, reason: str, rows: int) -> None:
        """Rows that are not measured, in rows_total's unit: one per layer of the step and head."""
        if not rows:
            return
        if not self.counters.dropped_rows[reason]:
            logger.info(
                "Rows of measured steps are left out of the histograms: %s. Further ones are only counted "
                "(glassbox_dropped_rows_total{reason='%s'}; docs/metrics.md)",
                DROP_REASONS[reason],
                reason,
            )
        self.counters.dropped_rows[reason] += rows * self._places(step.layers)

    def _add_checked(
        self,
        batch: Batch,
        rows: np.ndarray,
        *,
        excluded: np.ndarray | None,
        mask: RowMask | None,
        tokens: int | None,
    ) -> tuple[np.ndarray, StepCheck | None]:
        room, interval_s = self.measurer.max_rows - len(rows), self._config.canary.interval_s
        try:
            return self._canary.choose(batch, rows, interval_s, room=room, excluded=excluded, mask=mask, tokens=tokens)
        except Exception as error:  # the step may be measured all the same
            self._errors.count("canary", error)
            return rows, None

    def after_attention(
        self,
        impl: ObservedImpl,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: AttentionMetadata,
        output: object,
    ) -> None:
        """Called by every observed layer while it is listened to."""
        # A bypassed layer's impl is an observed one as well.
        if impl.glassbox_finder is not None and kv_cache.numel():
            with self._measuring(layer.layer_name) as wanted:
                if not wanted:
                    return
                forward = forward_of(impl, query, key, value, output)
                view = view_of(impl, layer, forward, kv_cache)
                # The metadata of chunks is of virtual requests.
                tables = None if view.params.chunk_size else tables_of(attn_metadata)
                self.measurer.after_attention(view, forward, kv_cache, tables)

    def after_latent_attention(
        self,
        impl: ObservedLatentImpl,
        layer: LatentLayer,
        kv_cache: Tensor,
        absorbed: Tensor | tuple[Tensor, Tensor] | None,
        output: object,
        plain: Tensor | None,
    ) -> None:
        """Likewise by layers with latent attention, whose metadata has no block table of all requests."""
        if impl.glassbox_finder is not None and kv_cache.numel():
            with self._measuring(layer.layer_name) as wanted:
                if not wanted:
                    return
                forward = latent_forward(layer, absorbed, output, plain)
                view = latent_view_of(impl, layer, forward, kv_cache)
                self.measurer.after_attention(view, forward, kv_cache, None)

    @contextmanager
    def _measuring(self, layer_name: str) -> Iterator[bool]:
        """Whether a layer is to be measured; one that fails does not keep the others, and it is the step's overhead."""
        step = self._step
        if step is None:  # vLLM warms up
            with self._start.timed("kernels"), self._errors.guard("observe"):
                yield True
            return
        started = self._clock()
        try:
            yield not self._repeats(step, layer_name)
        except Exception as error:
            self._errors.count("observe", error)
        step.overhead_s += self._clock() - started

    def _repeats(self, step: Step, name: str) -> bool:
        """Whether a layer runs again in a step; it is not observed any more, for its first keys are overwritten."""
        if not step.measured:
            return False
        if name not in step.ran:
            step.ran.add(name)
            return False
        local = self._locals.get(name)
        if local is not None and local in self._canary.allowed:
            self._canary.refuse(local, "repeated")
            logger.warning(
                "Layer %d (%s) runs several times in a step, so its rows can't be told apart: it is not observed",
                self._all_layers[local],
                name,
            )
            step.fail("repeated", RepeatedLayerError(f"{name} ran twice in a step; the step is not measured"))
        return True

    def stop_step(self) -> None:
        """The step's `execute_model` is about to return, or to raise."""
        step, self._step = self._step, None
        self._tables = None
        if step is None:
            return
        step.stop()
        self.counters.finished_steps += 1
        self.counters.overhead_seconds += step.overhead_s
        try:
            self._spend(step, self._clock() - step.started_s)
        except Exception as error:
            self._errors.count("end_step", error)

    def _spend(self, step: Step, step_s: float) -> None:
        """Tell the samplers what a step took, the sample and the traces apart."""
        written_s = self._written_s()
        self._trace_budget.charge(written_s - self._charged_s)
        self._charged_s = written_s
        if step.checked:  # a check is not repeated in the next sampled steps
            return
        own_s = step.overhead_s
        if step.traced:
            own_s = self._steps.own_cost(own_s, step.sampled, step.counted_share)
        traced_s = step.overhead_s - own_s
        self._steps.record(own_s, step_s, step.sampled, traced_s)
        self._trace_budget.record(traced_s, own_s, step_s, wanted=step.has_traced, dear=step.whole_prompts)
