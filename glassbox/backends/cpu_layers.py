"""What the CPU's kernels must know of a layer: vLLM's attention impl and packed cache in their terms."""

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor

from glassbox.backends.cpu_cache import PackedKeyReader
from glassbox.kernels.row_stats_cpu import LayerParams
from glassbox.kernels.row_stats_native import KeyOrder, KeyPages, NativeLayer


def layer_params(impl: Any) -> LayerParams:
    """Of a layer's attention impl; vLLM's CPU impl writes "none" as -1 (window) and 0 (soft cap)."""
    return LayerParams(
        scale=impl.scale,
        sliding_window=impl.sliding_window if impl.sliding_window > 0 else None,
        soft_cap=impl.logits_soft_cap or None,
        alibi_slopes=impl.alibi_slopes,
        sinks=impl.sinks,
    )


class LayerKind(NamedTuple):
    """What layers must have in common to be measured together; sliding_window in tokens, None is none."""

    sliding_window: int | None
    num_heads: int
    head_size: int


@dataclass(frozen=True)
class CachedLayer:
    """A layer for the native kernel, as long as it has the same cache.

    Attributes:
        cache: held weakly: it must not stay alive when vLLM has freed it.
        layer: of the kernel.
        kind: of layer.
    """

    cache: weakref.ref[Tensor]
    layer: NativeLayer
    kind: LayerKind

    @classmethod
    def of(cls, params: LayerParams, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor) -> Self:
        """Look at vLLM's `impl` and `layer`.

        Raises:
            CacheLayoutError: the cache can't be read; the message says why.
        """
        reader = PackedKeyReader(kv_cache, layer.isa, impl.kv_cache_dtype, layer._k_scale_float)
        layout = reader.layout
        keys = KeyPages(
            dtype=reader.fp8 or kv_cache.dtype,
            # Bytes of an FP8 cache are its numbers.
            page_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            num_pages=kv_cache.shape[0],
            num_kv_heads=kv_cache.shape[1],
            block_size=layout.block_size,
            order=KeyOrder.of(layout.offsets.view(layout.block_size, layout.head_size).T.numpy()),
            scale=1.0 if reader.fp8 is None else layer._k_scale_float,
            address=kv_cache.data_ptr(),
        )
        num_heads, head_size = query.shape[1:]
        native = NativeLayer(params, keys, query.dtype, num_heads=num_heads, head_size=head_size)
        return cls(weakref.ref(kv_cache), native, LayerKind(params.sliding_window, num_heads, head_size))
