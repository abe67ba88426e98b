"""Measuring on the CPU: on the calling thread, over K read from vLLM's packed pages.

One of two ways, chosen per step and kind of layer: the native kernel, or torch for many rows on many cores and where
there is no compiler. Few rows cost mostly calls, and between two layers of a model nothing of them is in the CPU's
caches. So after its attention only a layer's queries are put by, until as many layers have come as are measured at
once, or the step ends; the keys that its rows see stay in the cache until then.
"""

import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch

from glassbox.core.accumulator_arrays import MeasuredArrays
from glassbox.core.errors import ErrorCounter
from glassbox.core.native import NativeError
from glassbox.core.rows import ROW_ADAPTER_SHIFT, ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_QUERY
from glassbox.kernels.probe_answers import ProbeAnswers
from glassbox.kernels.prompt_rows_cpu import PromptChunk, PromptWishes, prompt_rows_cpu
from glassbox.kernels.row_plan import RowPlan, plan_rows
from glassbox.kernels.row_probe_cpu import row_probe_cpu
from glassbox.kernels.row_stats_cpu import LayerRows, row_stats_cpu
from glassbox.kernels.row_stats_native import FEW_CORES, NativeProbe, NativeRows, NativeStep, native_kernel
from glassbox.measure.contract import (
    AskedPrompt,
    AskedRows,
    BatchTables,
    CheckLimits,
    Forward,
    LatentForward,
    LayeredRows,
    MeasuredLayers,
    OutputCheck,
    PackedLayer,
    StepLayers,
    StepTraces,
)
from glassbox.measure.cpu_output_check import CpuOutputCheck
from glassbox.measure.native_layers import CachedLayer, LayerKind
from glassbox.measure.native_sums import NativeSums
from glassbox.measure.row_lists import RowList, observed_only, row_lists

# Statistics of several layers are added to the accumulators together: by torch it takes a dozen calls either way.
_FLUSH_ELEMENTS: Final = 1 << 21  # 8 MB of float32

# A check takes the time of the step that it is made in.
_CHECK_LIMITS: Final = CheckLimits(rows=8, keys=4096)


@dataclass
class _Waiting:
    """Layers of one kind that torch measures together.

    Attributes:
        listed: their rows.
        limit: how many at once.
        asked: what is asked of the rows; None if their statistics are wanted.
        local_layers: which they are.
    """

    plan: RowPlan
    listed: RowList
    limit: int
    asked: AskedRows | None
    local_layers: list[int] = field(default_factory=list)
    layers: list[LayerRows] = field(default_factory=list)


@dataclass
class _Native:
    """Layers of one size that the native kernel measures in a step.

    Attributes:
        listed: their rows.
        step: names layers by their index in the accumulators.
        probe: of the layers of which something is asked; None if nothing is.
        places: of these layers in `probe`, by their index in the accumulators.
    """

    listed: RowList
    step: NativeStep
    probe: NativeProbe | None
    places: Mapping[int, int]


class CpuMeasurer:
    """Measures rows with `kernels/row_stats_native.py`, or `kernels/row_stats_cpu.py` and `kernels/row_probe_cpu.py`.

    Args:
        layers: what is measured, whose accumulators are on the CPU.
        errors: counts what goes wrong with probes.
        native: whether the native kernel may be used.
    """

    def __init__(
        self,
        layers: MeasuredLayers,
        *,
        errors: ErrorCounter,
        native: bool = True,
    ) -> None:
        self._accumulators, self._local_layers = layers.accumulators, layers.local_layers
        self._sink_tokens, self._local_window = layers.sink_tokens, layers.local_window
        self._errors = errors
        self.max_rows = self.max_traced_rows = self.num_slots = sys.maxsize
        self.check_limits = _CHECK_LIMITS
        self._check: CpuOutputCheck | None = None
        # Of each KV-cache group, by its first layer.
        self._built: dict[str, tuple[Sequence[str], BatchTables]] = {}
        self._observed: frozenset[int] = frozenset()
        # Rows of each layer that has any, by its index in the accumulators.
        self._lists: dict[int, RowList] = {}
        self._traced: StepTraces | None = None
        self._asked: AskedRows | None = None
        self._prompts: Sequence[AskedPrompt] = ()
        # Of the asked rows by layer, [R, Hq, D] and [R, Hkv, D], if they are wanted.
        self._vectors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Their ids are keys below, so they must not be another's.
        self._groups: list[object] = []
        # Of torch: plans, and layers that wait.
        self._plans: dict[tuple[int, int | None, int], RowPlan] = {}
        self._waiting: dict[Hashable, _Waiting] = {}
        # Of the native kernel: what it knows of layers, and the step's rows and results.
        self._native = native and _has_kernel(errors)
        self._sums = NativeSums(self._accumulators) if self._native else None
        self._cached_layers: dict[int, CachedLayer] = {}
        self._native_rows: dict[Hashable, NativeRows] = {}
        self._natives: dict[Hashable, _Native] = {}
        # [N, R, H, NUM_STATISTICS + 1] of so many layers and their counted rows, for the accumulators.
        self._pending: list[tuple[RowList, list[int], np.ndarray]] = []

    def is_warm(self, layer_name: str, kind: str) -> bool:
        """See contract.Measurer. Nothing is compiled."""
        return True

    def end_warm_up(self) -> frozenset[int]:
        """Nothing was captured, and torch measures where the kernel can't be compiled."""
        return frozenset()

    def begin(self, rows: np.ndarray, layers: StepLayers, traced: StepTraces | None, check: OutputCheck | None) -> None:
        """See contract.Measurer."""
        self._check = None if check is None else CpuOutputCheck(check, rows)
        self._asked = None
        wanted: list[LayeredRows] = []
        if traced is not None:
            self._prompts = traced.prompts
            wanted = observed_only(traced.wanted, layers.observed)
            with self._errors.guard("probe"):
                self._asked = traced.asked()
        lists = row_lists(rows, layers.sampled, wanted)
        self._lists = {local: listed for listed in lists for local in listed.local_layers}
        self._observed, self._traced = layers.observed, traced

    def on_build(self, layer_names: Sequence[str], tables: BatchTables) -> None:
        """Keep what the metadata of latent attention lacks: its block table and sequence lengths."""
        if layer_names:
            self._built[layer_names[0]] = (layer_names, tables)

    def after_attention(
        self,
        layer: PackedLayer,
        forward: Forward | LatentForward,
        kv_cache: torch.Tensor,
        tables: BatchTables | None,
    ) -> None:
        """Put by the queries of this layer's rows, if it is one of the step's layers."""
        local = self._local_layers.get(layer.name)
        if local is None:
            return
        check = self._check if self._check is not None and local in self._check.local_layers else None
        prompts = [
            (number, prompt)
            for number, prompt in enumerate(self._prompts)
            if local in prompt.local_layers and local in self._observed
        ]
        listed = self._lists.get(local)
        if listed is None and check is None and not prompts:
            return
        tables = tables or self._tables_of(layer.name)
        if isinstance(forward, LatentForward):
            of_lists = [one.rows[:, ROW_QUERY].astype(np.int64) for one in (listed, check) if one is not None]
            of_prompts = [np.arange(prompt.token, prompt.token + prompt.num_rows) for _, prompt in prompts]
            forward = forward.at(torch.from_numpy(np.unique(np.concatenate(of_lists + of_prompts))))
        if check is not None:
            with self._errors.guard("canary"):
                plan = self._plan(check.rows, tables, layer.block_size(kv_cache), layer.params.reach)
                check.take(local, layer, kv_cache, forward, plan)
        for number, prompt in prompts:
            with self._errors.guard("probe"):
                self._measure_prompt(number, prompt, local, layer, forward.query, kv_cache, tables)
        if listed is not None:
            self._put_by_listed(local, listed, layer, forward.query, kv_cache, tables)

    def _put_by_listed(
        self,
        local: int,
        listed: RowList,
        layer: PackedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tables: BatchTables,
    ) -> None:
        asked = self._asked if self._asked is not None and local in self._asked.local_layers else None
        if asked is not None and asked.queries:
            with self._errors.guard("probe"):
                self._vectors[local] = self._vectors_of(asked, layer, query, kv_cache, tables)
        if self._native and self._take(local, listed, layer, query, kv_cache, tables):
            return
        params = layer.params
        block_size = layer.block_size(kv_cache)
        plan = self._plan(listed.rows, tables, block_size, params.reach)
        # Made for each call: it is a view, and keeping it would keep a KV cache alive that vLLM has freed.
        reader = layer.reader(kv_cache)
        self._put_by(local, LayerRows.select(query, reader, plan, params), plan, listed, None)
        if asked is not None:
            plan = self._plan(asked.rows, tables, block_size, params.reach)
            self._put_by(local, LayerRows.select(query, reader, plan, params), plan, listed, asked)

    def finish(self) -> None:
        """Add what was measured in this step."""
        try:
            for key in list(self._waiting):
                self._measure(key)
            for native in self._natives.values():
                with self._errors.guard("observe"):
                    native.step.measure()
                if native.step.measured:
                    self._keep(native.listed, native.step.measured, native.step.stats(), native.step.previous())
                probed = [local for local in native.step.measured if local in native.places]
                if self._traced is not None and native.probe is not None and probed:
                    found = native.probe.answers([native.places[n] for n in probed])
                    self._traced.add_answers(probed, self._with_vectors(probed, found))
            self._flush()
            if self._traced is not None:
                self._traced.commit()
            if self._check is not None:
                with self._errors.guard("canary"):
                    self._check.finish()
        finally:
            self.discard()

    def discard(self) -> None:
        """See contract.Measurer."""
        for of_step in (self._waiting, self._plans, self._natives, self._native_rows, self._vectors, self._lists):
            of_step.clear()
        self._prompts = ()
        self._pending.clear()
        self._groups.clear()
        self._traced = self._asked = self._check = None

    def enter_thread(self) -> None:
        """See contract.Measurer. All threads are on the same CPU."""

    def copy(self, now_s: float) -> MeasuredArrays:
        """See contract.Measurer."""
        self._accumulators.rotate(now_s)
        return self._accumulators.copy()

    def _tables_of(self, name: str) -> BatchTables:
        for names, tables in self._built.values():
            if name in names:
                return tables
        raise ValueError(f"the metadata of {name} must have a block table; do not observe this layer")

    def _take(
        self,
        local: int,
        listed: RowList,
        layer: PackedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tables: BatchTables,
    ) -> bool:
        """Put by a layer's queries for the native kernel, if that is the faster way."""
        cached = self._cached_layers.get(local)
        if cached is None or cached.cache() is not kv_cache:
            cached = self._cached_layers[local] = CachedLayer.of(layer, query, kv_cache)
        key = (id(tables.group), cached.kind, id(listed))
        native = self._natives.get(key)
        if native is None:
            rows = self._rows_for(listed, tables, layer.block_size(kv_cache), cached.kind.reach)
            if not rows.is_light(cached.kind.num_heads, cached.kind.head_size, cores=torch.get_num_threads()):
                return False
            native = self._natives[key] = self._new_native(listed, rows, cached.kind)
        native.step.take(local, cached.layer, query, native.places.get(local, -1))
        return True

    def _rows_for(self, listed: RowList, tables: BatchTables, block_size: int, reach: int | None) -> NativeRows:
        key = (id(tables.group), reach, id(listed))
        rows = self._native_rows.get(key)
        if rows is None:
            rows = self._native_rows[key] = NativeRows(
                listed.rows,
                tables.query_start_loc,
                tables.seq_lens,
                tables.block_table,
                block_size,
                reach=reach,
                sink_tokens=self._sink_tokens,
                local_window=self._local_window,
                asked=None if self._asked is None else listed.find(self._asked.places),
            )
            self._groups.append(tables.group)
        return rows

    def _new_native(self, listed: RowList, rows: NativeRows, kind: LayerKind) -> _Native:
        asked = self._asked
        probe, places = None, {}
        probed = [] if asked is None else sorted(asked.local_layers & listed.local_layers)
        if asked is not None and probed:
            with self._errors.guard("probe"):
                probe = NativeProbe(asked.questions(probed, kind.num_heads))
                places = {local: place for place, local in enumerate(probed)}
        step = NativeStep(rows, len(listed.local_layers), kind.num_heads, kind.head_size, probe)
        return _Native(listed, step, probe, places)

    def _plan(self, rows: np.ndarray, tables: BatchTables, block_size: int, reach: int | None) -> RowPlan:
        key = (id(tables.group), reach, id(rows))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_rows(
                rows,
                tables.query_start_loc,
                tables.seq_lens,
                tables.block_table,
                block_size=block_size,
                reach=reach,
                sink_tokens=self._sink_tokens,
                local_window=self._local_window,
            )
            self._groups.append(tables.group)
        return plan

    def _put_by(self, local: int, layer: LayerRows, plan: RowPlan, listed: RowList, asked: AskedRows | None) -> None:
        key = (id(plan), layer.kind)
        waiting = self._waiting.get(key)
        if waiting is None:
            limit = plan.layers_at_once(layer.num_heads, layer.key_numbers, whole=asked is not None)
            waiting = self._waiting[key] = _Waiting(plan, listed, limit, asked)
        waiting.local_layers.append(local)
        waiting.layers.append(layer)
        if len(waiting.local_layers) >= waiting.limit:
            self._measure(key)

    def _measure(self, key: Hashable) -> None:
        # Taken out first: layers that fail must not stand in the way of the next ones.
        waiting = self._waiting.pop(key)
        if waiting.asked is not None:
            self._probe(waiting, waiting.asked)
        else:
            stats, previous = row_stats_cpu(waiting.layers, waiting.plan)
            before = None if previous is None else previous.numpy()
            self._keep(waiting.listed, waiting.local_layers, stats.numpy(), before)

    def _keep(self, listed: RowList, local_layers: list[int], stats: np.ndarray, previous: np.ndarray | None) -> None:
        """Statistics of these layers, for the accumulators and for traces, and for these alone attention to the token
        before each."""
        if self._traced is not None and not self._traced.local_layers.isdisjoint(local_layers):
            self._traced.add_stats(local_layers, listed.places, stats, previous)
        if not len(listed.counted):
            return
        counted = stats if len(listed.counted) == len(listed.rows) else stats[:, listed.counted]
        self._pending.append((listed, local_layers, counted))
        if sum(stats.size for _, _, stats in self._pending) > _FLUSH_ELEMENTS:
            self._flush()

    def _probe(self, waiting: _Waiting, asked: AskedRows) -> None:
        try:
            questions = asked.questions(waiting.local_layers, waiting.layers[0].num_heads)
            found = row_probe_cpu(waiting.layers, waiting.plan, questions.moved(torch.from_numpy))
        except Exception as error:
            self._errors.count("probe", error)
        else:
            assert self._traced is not None
            local_layers = waiting.local_layers
            self._traced.add_answers(local_layers, self._with_vectors(local_layers, found.moved(torch.Tensor.numpy)))

    def _measure_prompt(
        self,
        number: int,
        asked: AskedPrompt,
        local: int,
        layer: PackedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tables: BatchTables,
    ) -> None:
        """Measure all rows of a prompt in a layer now, while its queries are there."""
        block_size = layer.block_size(kv_cache)
        chunk = PromptChunk(
            queries=query[asked.token : asked.token + asked.num_rows],
            position=asked.position,
            reader=layer.reader(kv_cache),
            block_ids=tables.block_table[asked.batch, : -(-asked.num_keys // block_size)].long(),
            block_size=block_size,
            params=layer.params,
        )
        wishes = PromptWishes(
            heads=[head for head in asked.heads if head < query.shape[1]],
            spans=torch.from_numpy(asked.spans),
            squares=asked.squares,
            grams=asked.grams,
            kept=asked.kept,
            keys_from=asked.keys_from,
            sink_tokens=self._sink_tokens,
            local_window=self._local_window,
        )
        assert self._traced is not None
        native = self._native and torch.get_num_threads() <= FEW_CORES
        found = prompt_rows_cpu(chunk, wishes, native=native)
        self._traced.add_prompt(number, local, found.moved(torch.Tensor.numpy))

    def _vectors_of(
        self,
        asked: AskedRows,
        layer: PackedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tables: BatchTables,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and own keys of the asked rows, [R, Hq, D] and [R, Hkv, D] float32."""
        block_size, reader = layer.block_size(kv_cache), layer.reader(kv_cache)
        positions = torch.from_numpy(asked.positions.astype(np.int64))
        rows = torch.from_numpy(asked.rows.astype(np.int64))
        pages = reader.read(tables.block_table[rows[:, ROW_BATCH], positions // block_size].long())
        keys = pages[torch.arange(len(rows)), :, positions % block_size].float() * reader.key_scale
        return query[rows[:, ROW_QUERY]].float(), keys

    def _with_vectors(self, local_layers: Sequence[int], found: ProbeAnswers[np.ndarray]) -> ProbeAnswers[np.ndarray]:
        """Answers with queries and keys, if they were asked for in all of these layers."""
        vectors = [self._vectors.get(local) for local in local_layers]
        there = [pair for pair in vectors if pair is not None]
        if not there or len(there) < len(vectors):
            return found
        queries, keys = (torch.stack(of_layers, 1).numpy() for of_layers in zip(*there, strict=True))
        return replace(found, queries=queries, keys=keys)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        self._accumulators.rotate(time.monotonic())
        together: dict[tuple[int, int], list[tuple[RowList, list[int], np.ndarray]]] = {}
        for one in pending:
            together.setdefault((id(one[0]), one[2].shape[2]), []).append(one)
        for group in together.values():
            listed = group[0][0]
            marks = listed.rows[listed.counted, ROW_PHASE].astype(np.int64)
            adapters = marks >> ROW_ADAPTER_SHIFT if self._accumulators.num_adapters > 1 else None
            layers = [local for _, local_layers, _ in group for local in local_layers]
            stats = group[0][2] if len(group) == 1 else np.concatenate([of for _, _, of in group])
            self._add(layers, stats, marks & ROW_DECODE, adapters)

    def _add(self, layers: Sequence[int], stats: np.ndarray, phases: np.ndarray, adapters: np.ndarray | None) -> None:
        """See NativeSums.add."""
        if self._sums is not None:
            self._sums.add(layers, stats, phases, adapters)
            return
        slots = None if adapters is None else torch.from_numpy(adapters)
        self._accumulators.add(torch.tensor(layers), torch.from_numpy(stats), torch.from_numpy(phases), slots)


def _has_kernel(errors: ErrorCounter) -> bool:
    try:
        native_kernel()
    except (NativeError, OSError) as error:
        errors.count("kernel", f"rows are measured by torch, which takes several times as long: {error}")
        return False
    return True
