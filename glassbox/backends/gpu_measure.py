"""Measuring on a GPU: one kernel launch per layer on a side stream, forked before the inner attention, joined after it.

Owns the device's row list and control words, the streams, and the asynchronous copy for the exporter. The launch is
part of vLLM's CUDA graphs, which have a second executable without it for steps that are not measured
(`graph_nodes.py`); which rows a replay measures is decided by what the step hook wrote to the device before it, in
stream order. No call here waits for the GPU, except `copy`, which runs on the exporter's thread.
"""

import threading
import time
from typing import Any, Final

import numpy as np
import torch

from glassbox.accumulate import AccumulatorArrays, Accumulators
from glassbox.backends.graph_nodes import GraphNodes
from glassbox.errors import ErrorCounter
from glassbox.kernels.row_stats import LayerAccumulators, LayerParams, RowStatsWorkspace, row_stats
from glassbox.sampling import NUM_ROW_COLUMNS
from glassbox.trace_step import TracedStep

_FP8_DTYPES: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class GpuMeasurer:
    """Measures rows with `kernels/row_stats.py`.

    Args:
        accumulators: on the GPU; [L, H] of the observed layers.
        layer_rows: name of each observed layer -> its row in the accumulators.
        sink_tokens, local_window: in tokens, see statistics.py.
        max_rows: length of the row list; captured graphs hold it.
        errors: counts what goes wrong with the graphs.
    """

    def __init__(
        self,
        accumulators: Accumulators,
        layer_rows: dict[str, int],
        *,
        sink_tokens: int,
        local_window: int,
        max_rows: int,
        errors: ErrorCounter,
    ) -> None:
        device = accumulators.counts.device
        self.max_rows = max_rows
        self._accumulators, self._layer_rows = accumulators, layer_rows
        self._sink_tokens, self._local_window = sink_tokens, local_window
        num_layers, num_heads = accumulators.rows.shape[:2]
        self._row_list = torch.zeros(max_rows, NUM_ROW_COLUMNS, dtype=torch.int32, device=device)
        # Rows of this step in each layer; 0 lets a launch return at once.
        self._num_rows = torch.zeros(num_layers, dtype=torch.int32, device=device)
        self._workspace = RowStatsWorkspace(device, max_rows, num_heads)
        self._host = [t.new_empty(t.shape, device="cpu").pin_memory() for t in self._exported()]
        self._graphs = GraphNodes(errors)
        self._graphs.watch()
        self._side = torch.cuda.Stream(device)
        self._copy_stream = torch.cuda.Stream(device)
        self._step_done = torch.cuda.Event()
        self._copy_done = torch.cuda.Event()
        self._params: dict[str, LayerParams] = {}
        self._common: dict[str, Any] = {}
        self._layers: frozenset[int] = frozenset()
        self._active = self._forked = False
        self._warming = True
        # Held while a copy or a step's first and last writes are queued, so that neither runs amid the other.
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        return self._accumulators.nbytes + self._workspace.nbytes + self._row_list.nbytes + self._num_rows.nbytes

    def end_warm_up(self) -> None:
        """See observer.Measurer."""
        self._warming = False
        self._graphs.unwatch()

    def begin(self, rows: np.ndarray, layers: frozenset[int], traced: TracedStep | None) -> None:
        """See observer.Measurer. Queues two small copies on the current stream.

        `traced` is always None: requests are not traced on a GPU (see requests.py).
        """
        counts = np.zeros(len(self._num_rows), dtype=np.int32)
        counts[list(layers)] = len(rows)
        with self._lock:
            torch.cuda.current_stream().wait_event(self._copy_done)
            self._accumulators.rotate(time.monotonic())
            # A fresh pinned tensor for each copy: the GPU may still read the one of the step before.
            self._row_list[: len(rows)].copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
            self._num_rows.copy_(torch.from_numpy(counts).pin_memory(), non_blocking=True)
        self._layers, self._active = layers, True
        self._graphs.measuring = True

    def on_build(self, layer_names: list[str], common_attn_metadata: Any) -> None:
        """Keep what FlashInfer's own metadata lacks: its block table and sequence lengths."""
        for name in layer_names:
            self._common[name] = common_attn_metadata

    def before_attention(self, impl: Any, layer: Any, query: Any, kv_cache: Any, attn_metadata: Any) -> None:
        """Queue this layer's launch beside the attention.

        During warm-up it is queued too, with no rows, so that the kernel is compiled before a capture; during a
        capture always, since every replay will run it.
        """
        row = self._layer_rows.get(layer.layer_name)
        if row is None or kv_cache.numel() == 0:
            return
        if (
            not self._warming
            and not (self._active and row in self._layers)
            and not torch.cuda.is_current_stream_capturing()
        ):
            return
        self._side.wait_stream(torch.cuda.current_stream())
        self._forked = True
        self._launch(row, impl, layer, query, kv_cache, attn_metadata)

    def after_attention(self, impl: Any, layer: Any, query: Any, kv_cache: Any, attn_metadata: Any) -> None:
        """Join the side stream, also when the launch failed: a capture must not end with a loose branch."""
        if self._forked:
            self._forked = False
            torch.cuda.current_stream().wait_stream(self._side)

    def finish(self) -> None:
        """See observer.Measurer. Later replays find no rows."""
        self._graphs.measuring = False
        with self._lock:
            if self._active:
                self._num_rows.zero_()
                self._active = False
            self._step_done.record()

    def copy(self, now_s: float) -> AccumulatorArrays:
        """See observer.Measurer. Waits for the copy, on the calling thread only."""
        with self._lock, torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(self._step_done)
            self._accumulators.rotate(now_s)
            for host, device in zip(self._host, self._exported(), strict=True):
                host.copy_(device, non_blocking=True)
            self._copy_done.record()
        self._copy_done.synchronize()
        counts, sums, rows, nonfinite, window_max = (host.numpy().copy() for host in self._host)
        return AccumulatorArrays(counts, sums, rows, nonfinite, window_max.max(axis=0))

    def _exported(self) -> tuple[torch.Tensor, ...]:
        a = self._accumulators
        return a.counts, a.sums, a.rows, a.nonfinite, a.window_max

    def _launch(self, row: int, impl: Any, layer: Any, query: Any, kv_cache: Any, attn_metadata: Any) -> None:
        name = layer.layer_name
        params = self._params.get(name)
        if params is None:
            params = self._params[name] = self._read_params(impl, layer, query, kv_cache)
        block_table, query_start_loc, seq_lens = self._batch(name, attn_metadata)
        fp8 = _FP8_DTYPES.get(impl.kv_cache_dtype)
        keys = kv_cache if fp8 is None else kv_cache.view(fp8)
        with torch.cuda.stream(self._side):
            row_stats(
                query,
                keys[..., : impl.head_size],
                block_table,
                query_start_loc,
                seq_lens,
                self._row_list,
                self._num_rows[row:],
                params,
                self._layer_accumulators(row, query.shape[1]),
                self._workspace,
            )
            self._graphs.record(self._side)

    def _batch(self, name: str, metadata: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block_table = getattr(metadata, "block_table", None)
        if block_table is not None:
            return block_table, metadata.query_start_loc, metadata.seq_lens
        common = self._common[name]
        return common.block_table_tensor, common.query_start_loc, common.seq_lens

    def _layer_accumulators(self, row: int, num_heads: int) -> LayerAccumulators:
        a = self._accumulators
        return LayerAccumulators(
            counts=a.counts[row, :num_heads],
            sums=a.sums[row, :num_heads],
            rows=a.rows[row, :num_heads],
            nonfinite=a.nonfinite[row, :num_heads],
            window_max=a.window_max[:, row, :num_heads],
            window_slot=a.window_slot,
            bounds=a.bounds,
        )

    def _read_params(self, impl: Any, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> LayerParams:
        window = impl.sliding_window
        if isinstance(window, tuple):  # FlashAttention's (keys to the left, keys to the right)
            window = window[0] + 1 if window[0] >= 0 else None
        return LayerParams(
            scale=impl.scale,
            soft_cap=impl.logits_soft_cap or 0.0,
            sliding_window=window if window is not None and window > 0 else None,
            sink_tokens=self._sink_tokens,
            local_window=self._local_window,
            alibi_slopes=impl.alibi_slopes,
            sinks=getattr(impl, "sinks", None),
            q_scale=layer._q_scale if query.element_size() == 1 else None,
            k_scale=layer._k_scale if kv_cache.element_size() == 1 else None,
        )
