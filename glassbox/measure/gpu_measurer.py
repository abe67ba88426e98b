"""Measuring on a GPU: one kernel launch per layer, on the stream of the inner attention and after it; of few rows only
what outlasts the forward pass is kept there, and measured in one launch after it (`kept_rows.py`).

Owns the device's row list and control words, and the asynchronous copy for the exporter. The launch is part of vLLM's
CUDA graphs, which have a second executable without it for steps that are not measured (`graph_nodes.py`); which rows a
replay measures is decided by what the step hook wrote to the device before it, in stream order. No call here waits for
the GPU, except `copy`, which runs on the exporter's thread.

Not on a stream beside the attention: a graph with branches costs more to launch than the overlap saves, and so do the
launches after it (docs/performance.md).
"""

import threading
import time
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from glassbox.core.accumulator_arrays import MeasuredArrays
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_QUERY, ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.cached_layers import CachedLayers, ProbedLayers
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.paged_keys import MAX_HEAD_SIZE
from glassbox.kernels.probe_answers import ProbeAnswers
from glassbox.kernels.row_output import row_output
from glassbox.kernels.row_probe import row_probe
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, row_stats
from glassbox.measure.contract import (
    AskedRows,
    BatchTables,
    CheckedLayers,
    CheckLimits,
    DeviceNeeds,
    Forward,
    LatentForward,
    LayeredRows,
    MeasuredLayers,
    OutputCheck,
    StepLayers,
    StepTraces,
    StridedLayer,
)
from glassbox.measure.gpu_prompts import GpuPrompts, probed_vectors
from glassbox.measure.graph_nodes import GraphNodes
from glassbox.measure.kept_rows import KeptLayer, KeptRows
from glassbox.measure.row_lists import RowList, observed_only, row_lists

# Numbers and queries of the rows that one step may trace; never fewer than these rows.
_RING_BYTES: Final = 16 << 20
_LEAST_SLOTS: Final = 8
# Memory of the row lists of a step's layers, in lists of `max_rows`: three hold whatever is wanted, and four have room
# to tell apart what several traces want.
_LISTS: Final = 4
# Rows that a check takes, and the keys that they see. Each row has a slot of the rings, and 8 rows are enough to find
# scores that are 1 % off in bfloat16 (tests/unit/measure/test_verdict.py).
_CHECK_LIMITS: Final = CheckLimits(rows=8, keys=32768)
# Local layers, and what was found in them, on the device.
_Answers = tuple[list[int], ProbeAnswers[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class _Checked:
    """As contract.CheckedLayers, on the device."""

    local_layers: list[int]
    sums: torch.Tensor
    kv_sums: torch.Tensor | None
    head_size: int
    roundoff: float


class GpuMeasurer:
    """Measures rows with `kernels/row_stats.py`.

    Args:
        layers: what is measured, whose accumulators are on the GPU.
        needs: of the device.
        errors: counts what goes wrong with graphs and probes.
    """

    def __init__(self, layers: MeasuredLayers, needs: DeviceNeeds, errors: ErrorCounter) -> None:
        max_rows, head_size, query_dtype = needs.max_rows, needs.head_size, needs.query_dtype
        self._accumulators, self._local_layers = layers.accumulators, layers.local_layers
        self._sink_tokens, self._local_window = layers.sink_tokens, layers.local_window
        self.max_rows = max_rows
        device = self._device = self._accumulators.counts.device
        num_layers, num_heads = self._accumulators.num_layers, self._accumulators.num_heads
        # Where rows are kept, as many are read from the begin of a list, the last one's too, however many it has.
        room = self._room = _LISTS * max_rows
        self._row_list = torch.zeros(room + needs.few_rows, NUM_ROW_COLUMNS, dtype=torch.int32, device=device)
        self._first_rows = self._row_list[:max_rows]
        # Of this step in each layer: how many rows it has, where 0 lets a launch return at once, and where they begin.
        self._lists_at = torch.zeros(2, num_layers, dtype=torch.int32, device=device)
        self._num_rows, self._list_starts = self._lists_at
        self._workspace = RowStatsWorkspace(device, max_rows, num_heads)
        self._host = [t.new_empty(t.shape, device="cpu").pin_memory() for t in self._accumulators.exported()]
        # What is measured of traced rows, by slot; NaN is nothing.
        slot_bytes = num_layers * num_heads * (4 * (NUM_STATISTICS + 2) + head_size * query_dtype.itemsize)
        self.max_traced_rows = min(max(_RING_BYTES // max(slot_bytes, 1), _LEAST_SLOTS), max_rows)
        self.check_limits = _CHECK_LIMITS
        self.num_slots = self.max_traced_rows + _CHECK_LIMITS.rows
        place = (self.num_slots, num_layers, num_heads)
        self._ring = torch.zeros(*place, NUM_STATISTICS + 1, dtype=torch.float32, device=device)
        self._previous = torch.zeros(place, dtype=torch.float32, device=device)
        self._queries = torch.zeros(*place, head_size, dtype=query_dtype, device=device)
        # What was served, and K and V as computed, of the same rows.
        self._outputs = torch.zeros_like(self._queries)
        self._kept_kv = torch.zeros(
            self.num_slots, num_layers, 2, needs.num_kv_heads, head_size, dtype=query_dtype, device=device
        )
        self._few = KeptRows(self._accumulators, needs, self._workspace)
        # Layers of which rows can be kept, as warm-up has shown, and those of this step whose rows no graph has kept.
        self._can_keep: set[int] = set()
        self._few_layers: set[int] = set()
        self._prompts = GpuPrompts(
            device, self._sink_tokens, self._local_window, errors, activation_bytes=needs.activation_bytes
        )
        self._traced: StepTraces | None = None
        self._check: OutputCheck | None = None
        self._deferred, self._errors = needs.deferred, errors
        self._graphs = GraphNodes(errors, needs.is_piecewise, needs.start)
        self._graphs.watch()
        self._copy_stream = torch.cuda.Stream(device)
        self._step_done = torch.cuda.Event()
        self._copy_done = torch.cuda.Event()
        self._ring_read = torch.cuda.Event()
        self._seen: dict[str, StridedLayer] = {}
        self._built: dict[str, BatchTables] = {}
        # Rows of this step: all, and those of each layer that has any, by its index in the accumulators.
        self._rows = np.zeros((0, NUM_ROW_COLUMNS), dtype=np.int32)
        self._lists: dict[int, RowList] = {}
        # Whose numbers may be kept for traces.
        self._observed: frozenset[int] = frozenset()
        # Layers and kinds of queries that came in warm-up, and those of them whose launch has failed.
        self._warm: set[tuple[str, str]] = set()
        self._uncompiled: set[tuple[int, str]] = set()
        # Whose outputs are kept.
        self._kept: set[int] = set()
        self._active = False
        self._warming = True
        # Held while a copy or a step's first and last writes are queued, so that neither runs amid the other.
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        lists = self._row_list.nbytes + self._lists_at.nbytes
        rings = (self._ring, self._previous, self._queries, self._outputs, self._kept_kv)
        return (
            self._accumulators.nbytes
            + self._workspace.nbytes
            + self._few.nbytes
            + lists
            + sum(ring.nbytes for ring in rings)
        )

    def is_warm(self, layer_name: str, kind: str) -> bool:
        """See contract.Measurer."""
        return (layer_name, kind) in self._warm

    def end_warm_up(self) -> frozenset[int]:
        """See contract.Measurer."""
        self._warming = False
        self._graphs.unwatch()
        uncompiled = frozenset(local for local, _ in self._uncompiled)
        # A launch that failed has kept nothing to check.
        self._kept -= uncompiled
        with self._errors.guard("canary"):
            self._compile_check()
        with self._errors.guard("probe"):
            self._compile_probe(frozenset(self._local_layers.values()) - uncompiled)
        with self._errors.guard("prompt"):
            self._prompts.end_warm_up()
        return uncompiled

    def begin(self, rows: np.ndarray, layers: StepLayers, traced: StepTraces | None, check: OutputCheck | None) -> None:
        """See contract.Measurer. Queues two small copies on the current stream."""
        wanted = [] if traced is None else [*traced.wanted, *traced.prompt_rows]
        of_traces = observed_only(wanted, layers.observed)
        of_check = [] if check is None else [LayeredRows(check.local_layers, check.places)]
        lists = row_lists(rows, layers.sampled, of_traces + of_check, room=self._room)
        listed = np.concatenate([rows[:0], *(one.rows for one in lists)])
        lists_at, start = np.zeros(self._lists_at.shape, dtype=np.int32), 0
        for one in lists:
            lists_at[:, list(one.local_layers)] = [[len(one.rows)], [start]]
            start += len(one.rows)
        # Before anything is queued: whatever fails in here, `discard` takes it back.
        self._lists = {local: one for one in lists for local in one.local_layers}
        self._rows, self._observed, self._active = rows, layers.observed, True
        self._traced, self._check = traced, check
        self._prompts.begin(() if traced is None else traced.prompts)
        num_slots = int(rows[:, ROW_SLOT].max(initial=-1)) + 1
        kept = _span(frozenset().union(*(one.local_layers for one in of_traces + of_check)))
        with self._lock:
            torch.cuda.current_stream().wait_event(self._copy_done)
            self._accumulators.rotate(time.monotonic())
            # A fresh pinned tensor for each copy: the GPU may still read the one of the step before.
            if len(listed):  # a step may have whole prompts alone
                self._row_list[: len(listed)].copy_(torch.from_numpy(listed).pin_memory(), non_blocking=True)
            self._lists_at.copy_(torch.from_numpy(lists_at).pin_memory(), non_blocking=True)
            if num_slots:
                torch.cuda.current_stream().wait_event(self._ring_read)
                for ring in (self._ring, self._previous, self._queries):
                    ring[:num_slots, kept].fill_(torch.nan)
            if check is not None:
                # A layer that does not come leaves nothing to compare.
                self._outputs[:num_slots, kept].fill_(torch.nan)
                self._kept_kv[:num_slots, kept].zero_()
        self._few_layers.clear()
        self._graphs.kept.clear()
        self._graphs.measuring = True

    def on_build(self, layer_names: Sequence[str], tables: BatchTables) -> None:
        """Keep what FlashInfer's own metadata lacks: its block table and sequence lengths."""
        for name in layer_names:
            self._built[name] = tables

    def after_attention(
        self,
        layer: StridedLayer,
        forward: Forward | LatentForward,
        kv_cache: torch.Tensor,
        tables: BatchTables | None,
    ) -> None:
        """Queue this layer's launch.

        During warm-up it is queued too, with no rows, so that the kernel is compiled before a capture; during a
        capture always, since every replay will run it; but not if it failed before, for a kernel that is compiled and
        loaded amid a capture may end that, and vLLM with it.
        """
        local = self._local_layers.get(layer.name)
        if local is None:
            return
        capturing = torch.cuda.is_current_stream_capturing()
        whole = self._active and not capturing and self._prompts.wants(local)
        listed = self._warming or capturing or (self._active and local in self._lists)
        if not (whole or listed):
            return
        tables = tables or self._built[layer.name]
        self._seen[layer.name] = layer
        if whole:
            self._prompts.measure(local, layer, forward, kv_cache, tables)
        elif self._warming and not capturing:
            with self._errors.guard("prompt"):
                self._prompts.compile(layer, forward, kv_cache)
        if not listed:
            return
        launches = {(local, kind) for kind in forward.kinds} if self._warming or capturing else set()
        if capturing and launches & self._uncompiled:
            return
        if self._warming:
            self._warm |= {(layer.name, kind) for kind in forward.kinds}
            if not capturing:
                self._uncompiled |= launches  # until they were launched
        if isinstance(forward, LatentForward):
            self._launch_latent(local, layer, forward, kv_cache, tables)
        else:
            self._launch(local, layer, forward, kv_cache, tables)
        self._uncompiled -= launches

    def finish(self) -> None:
        """See contract.Measurer. Later replays find no rows."""
        self._graphs.measuring = False
        traced, self._traced = self._traced, None
        check, self._check = self._check, None
        with self._errors.guard("observe"):
            self._measure_few((self._few_layers | self._graphs.kept) & self._lists.keys())
        answers = [] if traced is None else self._probe(traced)
        if traced is not None and traced.prompts:
            with self._errors.guard("prompt"):
                self._measure_kept_prompts()
        checked = [] if check is None else self._reproduce(check)
        with self._lock:
            if self._active:
                self._num_rows.zero_()
                self._active = False
                self._lists = {}
            self._step_done.record()
            if traced is not None:
                self._collect(traced, answers)
            if check is not None:
                self._collect_checked(check, checked)

    def discard(self) -> None:
        """See contract.Measurer. What was queued of this step is still added; later replays find no rows."""
        self._graphs.measuring = self._active = False
        self._traced = self._check = None
        self._lists = {}
        self._prompts.begin(())
        with self._lock:
            self._num_rows.zero_()
            self._step_done.record()

    def _collect(self, traced: StepTraces, answers: list[_Answers]) -> None:
        """Queue the copies of what was measured of traced rows; it is kept when they are done."""
        # Whole prompts are waited for by a thread, which must not spin.
        done = torch.cuda.Event(blocking=bool(traced.prompts))
        local_layers = sorted(traced.local_layers & self._observed)
        of_traces = _span(local_layers)
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._step_done)
            ring = _to_host(self._ring[: traced.num_slots, of_traces])
            previous = _to_host(self._previous[: traced.num_slots, of_traces])
            self._ring_read.record()
            found = [of_layers.moved(_to_host) for _, of_layers in answers]
            done.record()
        copied = self._prompts.collect(traced, done) if traced.prompts else None

        def keep() -> None:
            if local_layers:
                among = [local - of_traces.start for local in local_layers]
                traced.set_stats(local_layers, ring.numpy()[:, among], previous.numpy()[:, among])
            # Also keeps the device's answers alive until they are copied.
            for (of_answer, _), answer in zip(answers, found, strict=True):
                traced.add_answers(of_answer, answer.moved(torch.Tensor.numpy))
            traced.commit()

        self._deferred.add(keep, copied or done)

    def _probe(self, traced: StepTraces) -> list[_Answers]:
        """Queue what requests asked beyond statistics, over the keys as this step has left them."""
        try:
            asked = traced.asked()
            if asked is None:
                return []
            return [self._probe_group(asked, names) for names in self._groups(asked.local_layers & self._observed)]
        except Exception as error:
            self._errors.count("probe", error)
            return []

    def _measure_kept_prompts(self) -> None:
        """Queue what prompts ask of layers that ran in a whole CUDA graph, from the queries that it has kept.

        By default vLLM replays one for batches of decode tokens alone, and for the end of a prompt that has no more
        tokens than these: its last one, which is always listed where prompts are traced.
        """
        names = {local: name for name, local in self._local_layers.items()}
        for number, asked, local_layers in self._prompts.missing():
            wanted = np.arange(asked.token, asked.token + asked.num_rows)
            for local in sorted(self._lists.keys() & set(local_layers)):
                listed = self._lists[local].rows
                slots = listed[np.isin(listed[:, ROW_QUERY], wanted), ROW_SLOT]
                if len(slots) < len(wanted) or (slots < 0).any():
                    continue
                layer, tables = self._seen.get(names[local]), self._built.get(names[local])
                if layer is None or tables is None:
                    continue
                # Slots are given out in order.
                kept = self._queries[slots[0] : slots[-1] + 1, local, : layer.num_heads, : layer.head_size]
                self._prompts.measure_kept(number, local, layer, kept.to(layer.query_dtype), tables)

    def _compile_check(self) -> None:
        """Compile what a check launches, on a row of nothing: in a served step it would take a second."""
        for names in self._groups(self._kept):
            nowhere = torch.zeros(1, NUM_ROW_COLUMNS, dtype=torch.int32, device=self._ring.device)
            self._reproduce_group(nowhere, names, nowhere[:, :2].contiguous())

    def _compile_probe(self, local_layers: frozenset[int]) -> None:
        """Likewise what traced rows are asked."""
        asked = AskedRows(
            rows=np.zeros((1, NUM_ROW_COLUMNS), dtype=np.int32),
            places=np.zeros(1, dtype=np.int64),
            positions=np.zeros(1, dtype=np.int32),
            top_k=1,
            spans=np.zeros((1, 0, 2), dtype=np.int32),
            chosen=np.ones(self._previous[:1].shape, dtype=np.bool_),
            local_layers=local_layers,
            kept_attention=(),
        )
        for names in self._groups(local_layers):
            self._probe_group(asked, names)

    def _reproduce(self, check: OutputCheck) -> list[_Checked]:
        """Queue the comparison of what was served with what the cache gives."""
        try:
            groups = self._groups(check.local_layers & self._kept)
            rows = _to_device(self._rows[check.places], self._ring.device)
            return [self._reproduce_group(rows, names) for names in groups]
        except Exception as error:
            self._errors.count("canary", error)
            return []

    def _reproduce_group(self, rows: torch.Tensor, names: list[str], positions: torch.Tensor | None = None) -> _Checked:
        """Of these rows, int32 [C, NUM_ROW_COLUMNS]; `positions` are what the batch says unless they are given."""
        seen = [self._seen[name] for name in names]
        local_layers = [self._local_layers[name] for name in names]
        one, device = seen[0], self._ring.device
        slots = rows[:, ROW_SLOT].long()
        every = len(local_layers) == len(self._local_layers)
        of_layers = None if every else _to_device(np.array(local_layers, dtype=np.int64), device)

        def kept(ring: torch.Tensor) -> torch.Tensor:
            in_slots = ring.index_select(0, slots)
            return in_slots if of_layers is None else in_slots.index_select(1, of_layers)

        keys, values = [layer.keys() for layer in seen], [layer.values() for layer in seen]
        queries = kept(self._queries)[:, :, : one.num_heads, : one.head_size].to(one.query_dtype)
        outputs = kept(self._outputs)[:, :, : one.num_heads, : values[0].shape[3]]
        kept_kv = kept(self._kept_kv)[:, :, :, : keys[0].shape[1], : one.head_size] if self._gave_kv(one) else None
        tables = self._built[names[0]]
        sums, kv_sums = row_output(
            queries,
            outputs,
            CachedLayers.of(keys, values, [layer.params for layer in seen], one.num_heads),
            tables.block_table,
            tables.positions(rows) if positions is None else positions,
            kept_kv,
        )
        rounding = OutputRounding.of(
            queries.dtype, outputs.dtype, fp8_cache=keys[0].dtype in FP8_TYPES, on_gpu=queries.is_cuda
        )
        return _Checked(local_layers, sums, kv_sums, one.head_size, rounding.unit)

    def _collect_checked(self, check: OutputCheck, checked: list[_Checked]) -> None:
        """Queue the copies of what a check found; it is concluded when they are done."""
        done = torch.cuda.Event()
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._step_done)
            found = [(_to_host(of.sums), None if of.kv_sums is None else _to_host(of.kv_sums)) for of in checked]
            done.record()

        def conclude() -> None:
            # `checked` also keeps the device's sums alive until they are copied.
            for of, (sums, kv_sums) in zip(checked, found, strict=True):
                of_kv = None if kv_sums is None else kv_sums.numpy()
                check.add(CheckedLayers(of.local_layers, sums.numpy(), of_kv, of.head_size, of.roundoff))
            check.commit()

        self._deferred.add(conclude, done)

    def _groups(self, local_layers: Set[int]) -> list[list[str]]:
        """These layers, by what one launch can do: one block table, one shape, one kind of score."""
        groups: dict[object, list[str]] = {}
        for name, local in self._local_layers.items():
            seen, built = self._seen.get(name), self._built.get(name)
            if local in local_layers and seen is not None and built is not None:
                keys, params = seen.keys(), seen.params
                kind = (keys.dtype, keys.shape[1:], keys.stride(), seen.num_heads, seen.query_dtype, seen.gave_kv)
                extras = (params.alibi_slopes is None, params.sinks is None)
                groups.setdefault((id(built.group), kind, extras), []).append(name)
        return list(groups.values())

    def _probe_group(self, asked: AskedRows, names: list[str]) -> _Answers:
        seen = [self._seen[name] for name in names]
        local_layers = [self._local_layers[name] for name in names]
        num_heads, head_size = seen[0].num_heads, seen[0].head_size
        device = self._ring.device
        slots = _to_device(asked.rows[:, ROW_SLOT].astype(np.int64), device)
        queries = self._queries.index_select(0, slots)
        if len(local_layers) < len(self._local_layers):
            queries = queries.index_select(1, _to_device(np.array(local_layers, dtype=np.int64), device))
        queries = queries[:, :, :num_heads, :head_size]
        keys, block_table = [one.keys() for one in seen], self._built[names[0]].block_table
        places = _to_device(np.stack([asked.rows[:, ROW_BATCH], asked.positions], axis=1), device)
        answers = row_probe(
            queries,
            ProbedLayers.of(keys, [one.params for one in seen], num_heads),
            block_table,
            places,
            asked.questions(local_layers, num_heads).moved(lambda values: _to_device(values, device)),
        )
        if asked.queries:
            params = [one.params for one in seen]
            of_rows, of_keys = probed_vectors(queries, keys, params, block_table, places)
            answers = replace(answers, queries=of_rows, keys=of_keys)
        return local_layers, answers

    def enter_thread(self) -> None:
        """See contract.Measurer. A thread begins at the first GPU, and what it asks of CUDA there, be it only whether
        an event has happened, takes some 500 MB of that one, which another rank has filled."""
        torch.cuda.set_device(self._device)

    def copy(self, now_s: float) -> MeasuredArrays:
        """See contract.Measurer. Waits for the copy, on the calling thread only."""
        with self._lock, torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._step_done)
            self._accumulators.rotate(now_s)
            for host, device in zip(self._host, self._accumulators.exported(), strict=True):
                host.copy_(device, non_blocking=True)
            self._copy_done.record()
        self._copy_done.synchronize()
        return self._accumulators.to_arrays([host.numpy().copy() for host in self._host])

    def _launch(
        self, local: int, layer: StridedLayer, forward: Forward, kv_cache: torch.Tensor, tables: BatchTables
    ) -> None:
        gave_kv = self._gave_kv(layer)
        output = self._output_to_keep(local, forward.output)
        key, value = (forward.key, forward.value) if gave_kv else (None, None)
        if self._is_few(local, layer, forward.query, tables):
            self._keep(local, layer, forward.query, kv_cache, output=output, key=key, value=value)
            return
        self._queue(local, layer, forward.query, kv_cache, tables, output=output, key=key, value=value)
        if self._warming and not torch.cuda.is_current_stream_capturing() and self._few.fits(layer, forward.query):
            # Compiled beside the launch that every layer can have: where this fails, all rows are measured by that one.
            self._can_keep.discard(local)
            with self._errors.guard("observe"):
                if self._finds_again(layer, tables):
                    self._keep(local, layer, forward.query, kv_cache, output=output, key=key, value=value)
                    self._measure_few({local})
                    self._can_keep.add(local)

    def _is_few(self, local: int, layer: StridedLayer, query: torch.Tensor, tables: BatchTables) -> bool:
        """Whether a layer's rows are kept, and measured with those of others: of a graph its tokens decide, of which
        no step can list more."""
        if local not in self._can_keep or not self._few.fits(layer, query):
            return False
        if torch.cuda.is_current_stream_capturing():
            few = self._graphs.capturing and len(query) <= self._few.most
        else:
            few = local in self._lists and len(self._lists[local].rows) <= self._few.most
        return few and self._finds_again(layer, tables)

    def _finds_again(self, layer: StridedLayer, tables: BatchTables) -> bool:
        """Whether the step's end knows the memory that says where a layer's keys are."""
        built = self._built.get(layer.name)
        return built is not None and (built is tables or _memory(built) == _memory(tables))

    def _keep(
        self,
        local: int,
        layer: StridedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        *,
        output: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
    ) -> None:
        self._few.keep(
            local,
            layer,
            query,
            self._first_rows,
            self._num_rows[local:],
            like=layer.keys(kv_cache),
            output=output,
            key=key,
            value=value,
            list_start=self._list_starts[local:],
            **self._rings(local, layer, output, key),
        )
        self._graphs.record(torch.cuda.current_stream())
        if torch.cuda.is_current_stream_capturing():
            self._graphs.record_kept(local)
        else:
            self._few_layers.add(local)

    def _measure_few(self, local_layers: Set[int]) -> None:
        """Queue what was kept of these layers: a launch for those that are alike and have the same rows."""
        kept = {
            local: KeptLayer(local, self._seen[name], self._built[name], self._lists.get(local))
            for name, local in self._local_layers.items()
            if local in local_layers
        }
        for launch in self._few.launches(list(kept.values()), self._groups):
            first = launch.local_layers[0]
            _, one, tables, _ = kept[first]
            self._few.measure(
                launch,
                one,
                tables,
                self._first_rows,
                self._num_rows[first:],
                list_start=self._list_starts[first:],
                sink_tokens=self._sink_tokens,
                local_window=self._local_window,
                ring=self._ring[:, :, : one.num_heads],
                previous=self._previous[:, :, : one.num_heads],
            )

    def _launch_latent(
        self, local: int, layer: StridedLayer, forward: LatentForward, kv_cache: torch.Tensor, tables: BatchTables
    ) -> None:
        """One launch for the tokens whose queries vLLM has absorbed, and one for the others."""
        first = forward.num_absorbed
        if forward.absorbed is not None:
            output = self._output_to_keep(local, forward.output)
            self._queue(local, layer, forward.absorbed, kv_cache, tables, output=output, tokens=(0, first))
        if forward.plain is None:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"prompts of {layer.name} are captured into a graph, in which no rows can be absorbed")
        listed = self._lists.get(local)
        queried = np.zeros(0, dtype=np.int64) if listed is None else listed.rows[:, ROW_QUERY].astype(np.int64)
        first_row = int(np.searchsorted(queried, first))
        wanted = queried[first_row:] - first
        if not len(wanted):
            if not self._warming:
                return
            wanted = np.zeros(1, dtype=np.int64)  # so that the kernel is compiled
        queries = forward.absorb(forward.plain.index_select(0, _to_device(wanted, forward.plain.device)))
        tokens = (first, first + len(forward.plain))
        self._queue(local, layer, queries, kv_cache, tables, tokens=tokens, first_row=first_row)

    @staticmethod
    def _gave_kv(layer: StridedLayer) -> bool:
        return layer.gave_kv and layer.head_size <= MAX_HEAD_SIZE

    def _output_to_keep(self, local: int, output: torch.Tensor | None) -> torch.Tensor | None:
        """Of a layer; one that is quantised for the next operator is not kept: rounding would explain anything."""
        kept = output if output is not None and output.dtype == self._outputs.dtype else None
        (self._kept.discard if kept is None else self._kept.add)(local)
        return kept

    def _queue(
        self,
        local: int,
        layer: StridedLayer,
        queries: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        tables: BatchTables,
        *,
        output: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        **launch: Any,
    ) -> None:
        num_heads = layer.num_heads
        row_stats(
            queries,
            layer.keys(kv_cache),
            tables.block_table,
            tables.query_start_loc,
            tables.seq_lens,
            self._first_rows,
            self._num_rows[local:],
            layer.params,
            self._layer_accumulators(local, num_heads),
            self._workspace,
            sink_tokens=self._sink_tokens,
            local_window=self._local_window,
            ring=self._ring[:, local, :num_heads],
            previous=self._previous[:, local, :num_heads],
            output=output,
            key=key,
            value=value,
            **self._rings(local, layer, output, key),
            list_start=self._list_starts[local:],
            **launch,
        )
        self._graphs.record(torch.cuda.current_stream())

    def _rings(
        self, local: int, layer: StridedLayer, output: torch.Tensor | None, key: torch.Tensor | None
    ) -> dict[str, Any]:
        """Where a layer's traced rows leave their vectors."""
        heads, size = layer.num_heads, layer.head_size
        return {
            "queries": self._queries[:, local, :heads, :size],
            "outputs": None if output is None else self._outputs[:, local, :heads, : output.shape[2]],
            "kept_kv": None if key is None else self._kept_kv[:, local, :, : key.shape[1], :size],
        }

    def _layer_accumulators(self, local: int, num_heads: int) -> LayerAccumulators:
        a = self._accumulators
        apart = a.num_adapters > 1
        heads = slice(None if apart else num_heads)
        return LayerAccumulators(
            counts=a.counts[local, heads],
            sums=a.sums[local, heads],
            rows=a.rows[local, heads],
            nonfinite=a.nonfinite[local, heads],
            window_max=a.window_max[:, local, :num_heads],
            window_slot=a.window_slot,
            bounds=a.bounds,
            adapter_heads=a.num_heads if apart else 0,
        )


def _memory(tables: BatchTables) -> tuple[int, ...]:
    """Where a kernel finds them."""
    return (*(tensor.data_ptr() for tensor in tables[:3]), tables.block_table.stride(0))


def _span(local_layers: Collection[int]) -> slice:
    """From the first of these layers to the last: what lies between is dearer to leave out than to take along."""
    return slice(min(local_layers, default=0), max(local_layers, default=-1) + 1)


def _to_host(source: torch.Tensor) -> torch.Tensor:
    """Queue a copy into pinned memory of its own."""
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.numel() > 0)
    return pinned.copy_(source, non_blocking=True)


def _to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Queue a copy from pinned memory of its own; nothing waits for it."""
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory().to(device, non_blocking=True)
