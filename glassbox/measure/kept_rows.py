"""Rows of all layers of a step in one launch, on a GPU: while the layers run, their queries are only copied.

A launch takes some 10 us however little it reads, so that of few rows the launches of all layers cost far more than
their keys' bytes. Owns the memory of the copies, and what a launch for many layers must know of them. How many rows are
few is `DeviceNeeds.few_rows`; which layers are kept in a step, and when they are measured, `gpu_measurer.py` decides.

The memory is written and read in stream order: the launch after the forward pass comes before whatever the next step
queues. It has room for as many rows as are few, and longer lists never come here.
"""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch

from glassbox.kernels.cached_layers import ProbedLayers, upload
from glassbox.kernels.paged_keys import MAX_HEAD_SIZE
from glassbox.kernels.row_keep import Compiled, row_keep
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, row_stats_layers
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import BatchTables, DeviceNeeds, StridedLayer
from glassbox.measure.row_lists import RowList

# With `sampling.layers_per_step` and traces of some layers, steps ask for many subsets.
_MAX_PLANS: Final = 256
# Of the queries that are kept: 64 rows of a model with 32 layers of 32 heads of 128 elements.
_KEPT_BYTES: Final = 16 << 20


class KeptLayer(NamedTuple):
    """A layer of which rows were kept.

    Attributes:
        local: its index.
        layer, tables: it, and the step's tables.
        listed: its rows; None is none.
    """

    local: int
    layer: StridedLayer
    tables: BatchTables
    listed: RowList | None


@dataclass(frozen=True, eq=False)
class KeptLaunch:
    """Layers that are alike, in reach and soft cap, too, and have the same rows; the same in every step.

    Attributes:
        local_layers: their indices.
        layers, places: see `row_stats_layers`; `layers.like` is empty, for the cache is vLLM's to free.
    """

    local_layers: tuple[int, ...]
    layers: ProbedLayers
    places: torch.Tensor


class KeptRows:
    """Queries of a step's few rows.

    Attributes:
        most: rows that can be kept of a list.

    Args:
        accumulators: of the layers, on the GPU.
        needs: of the device.
        workspace: of launches for all layers.
    """

    def __init__(self, accumulators: Accumulators, needs: DeviceNeeds, workspace: RowStatsWorkspace) -> None:
        self._accumulators, self._workspace = accumulators, workspace
        size = needs.head_size if needs.head_size <= MAX_HEAD_SIZE else 0
        row = (accumulators.num_layers, accumulators.num_heads, size)
        row_bytes = math.prod(row) * needs.query_dtype.itemsize
        self.most = min(needs.few_rows, workspace.max_rows, _KEPT_BYTES // max(row_bytes, 1))
        self._queries = torch.zeros(self.most, *row, dtype=needs.query_dtype, device=accumulators.counts.device)
        self._plans: dict[tuple[object, ...], list[KeptLaunch]] = {}
        self._compiled: Compiled = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        return self._queries.nbytes

    def fits(self, layer: StridedLayer, query: torch.Tensor) -> bool:
        """Whether such queries can be kept, and what else a layer's scores depend on is as it was in earlier steps:
        scales and sinks may be computed or loaded anew, and plans hold copies of them."""
        params = layer.params
        constant = params.q_scale is None and params.k_scale is None and params.sinks is None
        kept = self._queries
        return constant and self.most > 0 and layer.head_size <= kept.shape[3] and query.dtype == kept.dtype

    def keep(
        self,
        local: int,
        layer: StridedLayer,
        query: torch.Tensor,
        rows: torch.Tensor,
        num_rows: torch.Tensor,
        **more: Any,
    ) -> None:
        """Queue the copy of a layer's queries.

        Args:
            local: index of the layer.
            layer, query: it, and the step's queries.
            rows, num_rows, more: see `row_keep`.
        """
        # Of a step's tokens no more can be listed: a small graph's copy is a small one.
        kept = self._queries[: len(query), local, : layer.num_heads, : layer.head_size]
        row_keep(query, rows, num_rows, kept, compiled=self._compiled, **more)

    def launches(
        self, kept: Sequence[KeptLayer], groups: Callable[[Set[int]], list[list[str]]]
    ) -> Sequence[KeptLaunch]:
        """How these layers are measured: planned once for each set of layers, lists and caches.

        Args:
            kept: them.
            groups: names of the layers that a launch can do together, of those with these indices.
        """
        numbers: dict[int, int] = {}

        def number(one: object) -> int:
            return numbers.setdefault(id(one), len(numbers))

        known = tuple((one.local, one.layer.address, number(one.tables.group), number(one.listed)) for one in kept)
        if known not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[known] = self._plan(kept, groups)
        return self._plans[known]

    def _plan(self, kept: Sequence[KeptLayer], groups: Callable[[Set[int]], list[list[str]]]) -> list[KeptLaunch]:
        by_name = {one.layer.name: one for one in kept}
        together: dict[object, list[KeptLayer]] = {}
        for names in groups({one.local for one in kept}):
            for one in (by_name[name] for name in names):
                params = one.layer.params
                alike = (id(one.listed), params.soft_cap, params.sliding_window, params.chunk_size)
                together.setdefault((names[0], alike), []).append(one)
        return [self._launch(those) for those in together.values()]

    def _launch(self, kept: Sequence[KeptLayer]) -> KeptLaunch:
        keys = [each.layer.keys() for each in kept]
        layers = ProbedLayers.of(keys, [each.layer.params for each in kept], kept[0].layer.num_heads)
        local_layers = tuple(each.local for each in kept)
        places = upload(local_layers, torch.int32, self._queries.device)
        return KeptLaunch(local_layers, replace(layers, like=layers.like.new_empty(0)), places)

    def measure(
        self,
        launch: KeptLaunch,
        one: StridedLayer,
        tables: BatchTables,
        rows: torch.Tensor,
        num_rows: torch.Tensor,
        **options: Any,
    ) -> None:
        """Queue a launch.

        Args:
            launch: one of `launches`.
            one: any of its layers.
            tables: of the step.
            rows, num_rows, options: see `row_stats_layers`.
        """
        a = self._accumulators
        heads = slice(None if a.num_adapters > 1 else one.num_heads)
        row_stats_layers(
            self._queries[:, :, : one.num_heads, : one.head_size],
            replace(launch.layers, like=one.keys()),
            launch.places,
            tables.block_table,
            tables.query_start_loc,
            tables.seq_lens,
            rows,
            num_rows,
            one.params,
            LayerAccumulators(
                counts=a.counts[:, heads],
                sums=a.sums[:, heads],
                rows=a.rows[:, heads],
                nonfinite=a.nonfinite[:, heads],
                window_max=a.window_max[:, :, : one.num_heads],
                window_slot=a.window_slot,
                bounds=a.bounds,
                adapter_heads=a.num_heads if a.num_adapters > 1 else 0,
            ),
            self._workspace,
            **options,
        )
