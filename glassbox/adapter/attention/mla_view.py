"""A layer with latent attention (MLA) as its measurer reads it: one KV head, whose V is the first part of its K.

See `layer_view.py`, and `contract.LatentForward` for why that gives the scores of all heads.
"""

from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout
from glassbox.adapter.attention.layer_view import PackedView, StridedView, View
from glassbox.adapter.attention.mla_cache import head_sizes
from glassbox.adapter.attention.mla_forward import has_quantised_queries
from glassbox.adapter.protocols import LatentLayer, ObservedLatentImpl
from glassbox.kernels.layer_params import LayerParams
from glassbox.measure.contract import LatentForward


class LatentPackedView(PackedView):
    """On a CPU. See contract.PackedLayer."""

    def __init__(self, impl: ObservedLatentImpl, layer: LatentLayer) -> None:
        View.__init__(self, impl, layer, LayerParams(scale=impl.scale))

    @property
    def _scales(self) -> tuple[float, float]:
        return (self.layer._k_scale_float,) * 2


class LatentStridedView(StridedView):
    """On a GPU. See contract.StridedLayer."""

    def layout(self, kv_cache: Tensor) -> CacheLayout:
        """See View.layout. vLLM hands an FP8 cache to MLA's impls as FP8 numbers, and keeps it as bytes."""
        kept = self.layer.kv_cache.dtype
        return super().layout(kv_cache.view(kept) if kept.itemsize == kv_cache.element_size() else kv_cache)

    def __init__(self, impl: ObservedLatentImpl, layer: LatentLayer, forward: LatentForward, kv_cache: Tensor) -> None:
        k_scale = layer._k_scale if kv_cache.element_size() == 1 else None
        quantised = has_quantised_queries(layer)
        params = LayerParams(
            scale=impl.scale, q_scale=layer._q_scale if quantised else None, k_scale=k_scale, v_scale=k_scale
        )
        View.__init__(self, impl, layer, params)
        self.num_heads, self.head_size = layer.num_heads, head_sizes(layer)[0]
        self.query_dtype = self.layout(kv_cache).dtype if quantised else forward.query_dtype
        self.gave_kv = False  # K and V of the step's tokens stand in one vector


def latent_view_of(
    impl: ObservedLatentImpl, layer: LatentLayer, forward: LatentForward, kv_cache: Tensor
) -> LatentPackedView | LatentStridedView:
    """The view of a layer, made once and kept on its observed impl; see `layer_view.view_of`."""
    view: LatentPackedView | LatentStridedView | None = impl.glassbox_view
    if view is None or not view.is_of(layer):
        on_gpu = kv_cache.is_cuda
        view = LatentStridedView(impl, layer, forward, kv_cache) if on_gpu else LatentPackedView(impl, layer)
        impl.glassbox_view = view
    return view
