"""Measuring on the CPU: after the inner attention, on the calling thread, over K read from vLLM's packed pages.

Few rows cost mostly calls, so a layer's queries are put by until as many layers have come as are measured at once, or
the step ends; the keys that its rows see stay in the cache until then.
"""

import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from glassbox.accumulate import AccumulatorArrays, Accumulators
from glassbox.backends.cpu_cache import PackedKeyReader
from glassbox.errors import ErrorCounter
from glassbox.kernels.row_plan import RowPlan, plan_rows
from glassbox.kernels.row_probe_cpu import row_probe_cpu
from glassbox.kernels.row_stats_cpu import LayerParams, LayerRows, row_stats_cpu
from glassbox.sampling import ROW_PHASE, ROW_UNCOUNTED
from glassbox.trace_record import MAX_ROW_KEYS
from glassbox.trace_step import AskedRows, LayersAnswer, TracedStep

# Statistics of several layers are added to the accumulators together: it costs a dozen torch calls either way.
_FLUSH_ELEMENTS: Final = 1 << 21  # 8 MB of float32


@dataclass
class _Waiting:
    """Layers of one kind that are measured together.

    Attributes:
        limit: how many at once.
        asked: what is asked of the rows; None if their statistics are wanted.
        rows: of the layers in the accumulators.
    """

    plan: RowPlan
    limit: int
    asked: AskedRows | None
    rows: list[int] = field(default_factory=list)
    layers: list[LayerRows] = field(default_factory=list)


class CpuMeasurer:
    """Measures rows with `kernels/row_stats_cpu.py` and `kernels/row_probe_cpu.py`.

    Args:
        accumulators: on the CPU; [L, H] of the observed layers.
        layer_rows: name of each observed layer -> its row in the accumulators.
        sink_tokens, local_window: in tokens, see statistics.py.
        errors: counts what goes wrong with probes.
    """

    def __init__(
        self,
        accumulators: Accumulators,
        layer_rows: dict[str, int],
        *,
        sink_tokens: int,
        local_window: int,
        errors: ErrorCounter,
    ) -> None:
        self._accumulators, self._layer_rows, self._errors = accumulators, layer_rows, errors
        self._sink_tokens, self._local_window = sink_tokens, local_window
        self.max_rows = self.max_traced_rows = sys.maxsize
        self._rows: np.ndarray | None = None
        self._layers: frozenset[int] = frozenset()
        self._traced: TracedStep | None = None
        self._asked: AskedRows | None = None
        # Of the rows that enter the accumulators, None is all.
        self._counted: torch.Tensor | None = None
        self._plans: dict[tuple[int, int | None, bool], RowPlan] = {}
        self._metadata: list[Any] = []
        self._waiting: dict[Hashable, _Waiting] = {}
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._params: dict[str, LayerParams] = {}

    def end_warm_up(self) -> None:
        """Nothing was captured."""

    def begin(self, rows: np.ndarray, layers: frozenset[int], traced: TracedStep | None) -> None:
        """See observer.Measurer."""
        self._rows, self._layers, self._traced = rows, layers, traced
        self._asked = None if traced is None else traced.asked()
        counted = (rows[:, ROW_PHASE] & ROW_UNCOUNTED) == 0
        self._counted = None if counted.all() else torch.from_numpy(np.flatnonzero(counted))

    def on_build(self, layer_names: list[str], common_attn_metadata: Any) -> None:
        """Nothing to keep: the CPU's metadata holds all that is needed."""

    def after_attention(self, impl: Any, layer: Any, query: Any, kv_cache: Any, attn_metadata: Any) -> None:
        """Take this layer's rows, if it is one of the step's layers."""
        row = self._layer_rows.get(layer.layer_name)
        if self._rows is None or row is None or row not in self._layers:
            return
        name = layer.layer_name
        params = self._params.get(name)
        if params is None:
            params = self._params[name] = self._read_params(impl)
        plan = self._plan(self._rows, attn_metadata, kv_cache.shape[2], params.sliding_window)
        # Made for each call: it is a view, and keeping it would keep a KV cache alive that vLLM has freed.
        reader = PackedKeyReader(kv_cache, layer.isa, impl.kv_cache_dtype, layer._k_scale_float)
        self._put_by(row, LayerRows.select(query, reader, plan, params), plan, None)
        if self._asked is not None and row in self._asked.layer_rows:
            plan = self._plan(self._asked.rows, attn_metadata, kv_cache.shape[2], params.sliding_window)
            self._put_by(row, LayerRows.select(query, reader, plan, params), plan, self._asked)

    def finish(self) -> None:
        """Add what was measured in this step."""
        try:
            for key in list(self._waiting):
                self._measure(key)
            self._flush()
            if self._traced is not None:
                self._traced.commit()
        finally:
            self._waiting.clear()
            self._pending.clear()
            self._rows = self._traced = self._asked = self._counted = None
            self._plans.clear()
            self._metadata.clear()

    def copy(self, now_s: float) -> AccumulatorArrays:
        """See observer.Measurer."""
        self._accumulators.rotate(now_s)
        return self._accumulators.copy()

    def _plan(self, rows: np.ndarray, metadata: Any, block_size: int, window: int | None) -> RowPlan:
        # Layers of one KV-cache group share their metadata object; it is kept so that its id stays its own.
        key = (id(metadata), window, rows is self._rows)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_rows(
                rows,
                metadata.query_start_loc,
                metadata.seq_lens,
                metadata.block_table,
                block_size=block_size,
                sliding_window=window,
                sink_tokens=self._sink_tokens,
                local_window=self._local_window,
            )
            self._metadata.append(metadata)
        return plan

    def _put_by(self, row: int, layer: LayerRows, plan: RowPlan, asked: AskedRows | None) -> None:
        key = (id(plan), layer.kind)
        waiting = self._waiting.get(key)
        if waiting is None:
            limit = plan.layers_at_once(layer.num_heads, layer.key_numbers, whole=asked is not None)
            waiting = self._waiting[key] = _Waiting(plan, limit, asked)
        waiting.rows.append(row)
        waiting.layers.append(layer)
        if len(waiting.rows) >= waiting.limit:
            self._measure(key)

    def _measure(self, key: Hashable) -> None:
        # Taken out first: layers that fail must not stand in the way of the next ones.
        waiting = self._waiting.pop(key)
        if waiting.asked is not None:
            self._probe(waiting, waiting.asked)
            return
        for row, stats in zip(waiting.rows, row_stats_cpu(waiting.layers, waiting.plan), strict=True):
            if self._traced is not None:
                self._traced.add_stats(row, stats.numpy())
            self._pending.append((row, stats if self._counted is None else stats[self._counted]))
        if sum(stats.numel() for _, stats in self._pending) > _FLUSH_ELEMENTS:
            self._flush()

    def _probe(self, waiting: _Waiting, asked: AskedRows) -> None:
        assert self._traced is not None
        try:
            found = row_probe_cpu(
                waiting.layers,
                waiting.plan,
                asked.positions.tolist(),
                top_k=asked.top_k,
                spans=torch.from_numpy(asked.spans),
                chosen=torch.from_numpy(asked.chosen[:, waiting.rows, : waiting.layers[0].num_heads]),
                kept_rows=asked.kept,
                max_row_keys=MAX_ROW_KEYS,
            )
            answer = LayersAnswer(
                layer_rows=waiting.rows,
                topk_positions=found.topk_positions.numpy(),
                topk_mass=found.topk_mass.numpy(),
                span_mass=found.span_mass.numpy(),
                chosen_sum=found.chosen_sum.numpy(),
                rows=tuple(row.numpy() for row in found.rows),
            )
            self._traced.add_layers(answer, asked.kept)
        except Exception as error:
            self._errors.count("probe", error)

    def _flush(self) -> None:
        if not self._pending or self._rows is None:
            return
        self._accumulators.rotate(time.monotonic())
        layers = torch.tensor([row for row, _ in self._pending])
        stats = torch.stack([stats for _, stats in self._pending])
        phases = torch.from_numpy(self._rows[:, ROW_PHASE].astype(np.int64))
        if self._counted is not None:
            phases = phases[self._counted]
        self._pending.clear()
        self._accumulators.add(layers, stats, phases)

    @staticmethod
    def _read_params(impl: Any) -> LayerParams:
        # vLLM's CPU impl writes "none" as -1 (window) and 0 (soft cap).
        return LayerParams(
            scale=impl.scale,
            sliding_window=impl.sliding_window if impl.sliding_window > 0 else None,
            soft_cap=impl.logits_soft_cap or None,
            alibi_slopes=impl.alibi_slopes,
            sinks=impl.sinks,
        )
