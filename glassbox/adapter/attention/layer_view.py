"""A layer as its measurer reads it: vLLM's attention impl, layer and cache in the kernels' terms.

Owns what a window, a cap or a scale is called where, and how a view of a layer's keys is made. It computes nothing.
"""

import weakref
from typing import Any

from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout
from glassbox.adapter.attention.cpu_cache import PackedReader, page_order
from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.protocols import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    CommonMetadata,
    LatentLayer,
    ObservedImpl,
    ObservedLatentImpl,
)
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_stats_native import KeyOrder, KeyPages
from glassbox.measure.contract import BatchTables, Forward


class View:
    """See contract.LayerView. Its KV cache is vLLM's to free, so the layer is held weakly."""

    def __init__(
        self, impl: ObservedImpl | ObservedLatentImpl, layer: AttentionLayer | LatentLayer, params: LayerParams
    ) -> None:
        if impl.glassbox_finder is None:
            raise RuntimeError(f"the KV cache of {layer.layer_name} was not looked at; its keys can't be read")
        self.name, self.params = layer.layer_name, params
        self._finder: CacheFinder = impl.glassbox_finder
        self._layout: CacheLayout | None = None
        self._layer: weakref.ref[Any] = weakref.ref(layer)

    def is_of(self, layer: AttentionLayer | LatentLayer) -> bool:
        """Whether it is of this very object: an engine made anew in the process has layers of the same names."""
        return self._layer() is layer

    @property
    def layer(self) -> Any:
        """The layer.

        Raises:
            RuntimeError: it is gone.
        """
        layer = self._layer()
        if layer is None:
            raise RuntimeError(f"layer {self.name} is gone; nothing of it can be measured any more")
        return layer

    def layout(self, kv_cache: Tensor) -> CacheLayout:
        """Of the layer's cache, which vLLM may make anew, in another shape.

        Raises:
            CacheLayoutError: it can't be read.
        """
        if self._layout is None or not self._layout.fits(kv_cache):
            self._layout = self._finder.find(self.layer, kv_cache)
        return self._layout


class PackedView(View):
    """Of a layer on a CPU, whose pages are packed. See contract.PackedLayer."""

    def __init__(self, impl: ObservedImpl, layer: AttentionLayer) -> None:
        super().__init__(impl, layer, _params(impl, layer))

    @property
    def _scales(self) -> tuple[float, float]:
        """Of K and V."""
        return self.layer._k_scale_float, self.layer._v_scale_float

    def block_size(self, kv_cache: Tensor) -> int:
        """See contract.PackedLayer."""
        return self.layout(kv_cache).block_size

    def reader(self, kv_cache: Tensor) -> PackedReader:
        """See contract.PackedLayer."""
        layout = self.layout(kv_cache)
        return PackedReader(kv_cache, layout, layout.key, self._scales[0])

    def value_reader(self, kv_cache: Tensor) -> PackedReader:
        """See contract.PackedLayer."""
        layout = self.layout(kv_cache)
        return PackedReader(kv_cache, layout, layout.value, self._scales[1])

    def pages(self, kv_cache: Tensor) -> KeyPages:
        """See contract.PackedLayer."""
        layout = self.layout(kv_cache)
        order = page_order(layout.key)
        return KeyPages(
            dtype=layout.dtype,
            # Bytes of an FP8 cache are its numbers.
            page_stride=layout.key.block_stride,
            head_stride=layout.key.head_stride,
            num_pages=kv_cache.shape[layout.blocks],
            num_kv_heads=layout.num_kv_heads,
            block_size=layout.block_size,
            order=KeyOrder.of(order.offsets.view(order.block_size, order.head_size).T.numpy()),
            scale=1.0 if layout.dtype.itemsize > 1 else self._scales[0],
            address=kv_cache.data_ptr() + order.first * kv_cache.element_size(),
        )


class StridedView(View):
    """Of a layer on a GPU, whose keys are a strided tensor. See contract.StridedLayer."""

    def __init__(self, impl: ObservedImpl, layer: AttentionLayer, forward: Forward, kv_cache: Tensor) -> None:
        query, key, value, output = forward
        quantised = kv_cache.element_size() == 1
        params = _params(
            impl,
            layer,
            q_scale=layer._q_scale if query.element_size() == 1 else None,
            k_scale=layer._k_scale if quantised else None,
            v_scale=layer._v_scale if quantised else None,
        )
        super().__init__(impl, layer, params)
        self.num_heads, self.head_size, self.query_dtype = query.shape[1], impl.head_size, query.dtype
        self.gave_kv = (
            key is not None
            and value is not None
            and output is not None
            and key.shape == value.shape
            and key.dtype == value.dtype == output.dtype
        )

    @property
    def address(self) -> int:
        """See contract.StridedLayer."""
        return self._cache(None).data_ptr()

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        """See contract.StridedLayer."""
        cache = self._cache(kv_cache)
        layout = self.layout(cache)
        return layout.view(cache, layout.key)

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        """See contract.StridedLayer."""
        cache = self._cache(kv_cache)
        layout = self.layout(cache)
        return layout.view(cache, layout.value)

    def _cache(self, kv_cache: Tensor | None) -> Tensor:
        return self.layer.kv_cache if kv_cache is None else kv_cache


def _params(
    impl: AttentionImpl,
    layer: AttentionLayer,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> LayerParams:
    window = impl.sliding_window
    if isinstance(window, tuple):  # FlashAttention's (keys to the left, keys to the right)
        window = window[0] + 1
    return LayerParams(
        scale=impl.scale,
        soft_cap=impl.logits_soft_cap or None,
        alibi_slopes=impl.alibi_slopes,
        # Not all impls have learned sinks.
        sinks=getattr(impl, "sinks", None),
        # "None" is -1 on a CPU, and (-1, -1) on a GPU.
        sliding_window=window if window is not None and window > 0 else None,
        # Of ChunkedLocalAttention alone.
        chunk_size=getattr(layer, "attention_chunk_size", None),
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def view_of(impl: ObservedImpl, layer: AttentionLayer, forward: Forward, kv_cache: Tensor) -> PackedView | StridedView:
    """The view of a layer, made once and kept on its observed impl.

    Args:
        impl: observed, of the layer.
        forward: of a step.
        kv_cache: of the layer.
    """
    view: PackedView | StridedView | None = impl.glassbox_view
    if view is None or not view.is_of(layer):
        view = StridedView(impl, layer, forward, kv_cache) if kv_cache.is_cuda else PackedView(impl, layer)
        impl.glassbox_view = view
    return view


def forward_of(impl: AttentionImpl, query: Tensor, key: Tensor | None, value: Tensor | None, output: object) -> Forward:
    """What an impl was given and returned, [T, H, D] each.

    Args:
        impl: of the layer; one that reads another layer's cache does not store the K and V that it is given.
        query, key, value: as it was given them.
        output: as it returned it, [T, Hq, Dv] or [T, Hq * Dv].
    """
    served = output if isinstance(output, Tensor) and output.ndim in (2, 3) else None
    if served is not None and served.ndim == 2:
        served = served.view(served.shape[0], query.shape[1], -1)
    if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
        key = value = None
    return Forward(query, key, value, served)


def tables_of(metadata: AttentionMetadata) -> BatchTables | None:
    """Where a step's requests stand, of a layer's metadata; None if that has no block table (FlashInfer's)."""
    block_table = getattr(metadata, "block_table", None)
    if block_table is None:
        return None
    return BatchTables(block_table, metadata.query_start_loc, metadata.seq_lens, metadata)


def common_tables(metadata: CommonMetadata) -> BatchTables:
    """Likewise of what a metadata builder was given, whose tensors persist."""
    return BatchTables(metadata.block_table_tensor, metadata.query_start_loc, metadata.seq_lens, metadata)
