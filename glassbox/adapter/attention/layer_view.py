"""A layer as its measurer reads it: vLLM's attention impl, layer and cache in the kernels' terms.

Owns what a window, a cap or a scale is called where, and how a view of a layer's keys is made. It computes nothing.
"""

import weakref

from torch import Tensor

from glassbox.adapter.attention.cpu_cache import FP8_DTYPES, PackedKeyReader
from glassbox.adapter.protocols import AttentionImpl, AttentionLayer, AttentionMetadata, CommonMetadata, ObservedImpl
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_stats_native import KeyOrder, KeyPages
from glassbox.measure.contract import BatchTables


class _View:
    """See contract.LayerView. Its KV cache is vLLM's to free, so the layer is held weakly."""

    def __init__(
        self, impl: AttentionImpl, layer: AttentionLayer, q_scale: Tensor | None = None, k_scale: Tensor | None = None
    ) -> None:
        self.name = layer.layer_name
        self.params = _params(impl, q_scale, k_scale)
        self._layer: weakref.ref[AttentionLayer] = weakref.ref(layer)

    def is_of(self, layer: AttentionLayer) -> bool:
        """Whether it is of this very object: an engine made anew in the process has layers of the same names."""
        return self._layer() is layer

    @property
    def layer(self) -> AttentionLayer:
        """The layer.

        Raises:
            RuntimeError: it is gone.
        """
        layer = self._layer()
        if layer is None:
            raise RuntimeError(f"layer {self.name} is gone; nothing of it can be measured any more")
        return layer


class PackedView(_View):
    """Of a layer on a CPU, whose pages are packed. See contract.PackedLayer."""

    def __init__(self, impl: AttentionImpl, layer: AttentionLayer) -> None:
        super().__init__(impl, layer)
        self._kv_cache_dtype = impl.kv_cache_dtype

    def reader(self, kv_cache: Tensor) -> PackedKeyReader:
        """See contract.PackedLayer."""
        layer = self.layer
        return PackedKeyReader(kv_cache, layer.isa, self._kv_cache_dtype, layer._k_scale_float)

    def pages(self, kv_cache: Tensor) -> KeyPages:
        """See contract.PackedLayer."""
        reader = self.reader(kv_cache)
        layout = reader.layout
        return KeyPages(
            dtype=reader.fp8 or kv_cache.dtype,
            # Bytes of an FP8 cache are its numbers.
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            num_pages=kv_cache.shape[0],
            num_kv_heads=kv_cache.shape[1],
            block_size=layout.block_size,
            order=KeyOrder.of(layout.offsets.view(layout.block_size, layout.head_size).T.numpy()),
            scale=1.0 if reader.fp8 is None else self.layer._k_scale_float,
            address=kv_cache.data_ptr(),
        )


class StridedView(_View):
    """Of a layer on a GPU, whose keys are a strided tensor. See contract.StridedLayer."""

    def __init__(self, impl: AttentionImpl, layer: AttentionLayer, query: Tensor, kv_cache: Tensor) -> None:
        super().__init__(
            impl,
            layer,
            q_scale=layer._q_scale if query.element_size() == 1 else None,
            k_scale=layer._k_scale if kv_cache.element_size() == 1 else None,
        )
        self.num_heads, self.head_size = query.shape[1], impl.head_size
        self._fp8 = FP8_DTYPES.get(impl.kv_cache_dtype)

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        """See contract.StridedLayer."""
        cache = self.layer.kv_cache if kv_cache is None else kv_cache
        return (cache if self._fp8 is None else cache.view(self._fp8))[..., : self.head_size]


def _params(impl: AttentionImpl, q_scale: Tensor | None, k_scale: Tensor | None) -> LayerParams:
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
        q_scale=q_scale,
        k_scale=k_scale,
    )


def view_of(impl: ObservedImpl, layer: AttentionLayer, query: Tensor, kv_cache: Tensor) -> PackedView | StridedView:
    """The view of a layer, made once and kept on its observed impl.

    Args:
        impl: observed, of the layer.
        query: [T, Hq, D] of a step.
        kv_cache: of the layer.
    """
    view: PackedView | StridedView | None = impl.glassbox_view
    if view is None or not view.is_of(layer):
        view = PackedView(impl, layer) if kv_cache.device.type == "cpu" else StridedView(impl, layer, query, kv_cache)
        impl.glassbox_view = view
    return view


def tables_of(metadata: AttentionMetadata) -> BatchTables | None:
    """Where a step's requests stand, of a layer's metadata; None if that has no block table (FlashInfer's)."""
    block_table = getattr(metadata, "block_table", None)
    if block_table is None:
        return None
    return BatchTables(block_table, metadata.query_start_loc, metadata.seq_lens, metadata)


def common_tables(metadata: CommonMetadata) -> BatchTables:
    """Likewise of what a metadata builder was given, whose tensors persist."""
    return BatchTables(metadata.block_table_tensor, metadata.query_start_loc, metadata.seq_lens, metadata)
