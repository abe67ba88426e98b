"""Looks at the KV caches of a worker's layers, once for each kind; see `cache_layout.py`."""

from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout, find_layout
from glassbox.adapter.attention.mla_cache import find_latent_layout, head_sizes, is_latent
from glassbox.adapter.protocols import AttentionLayer, LatentLayer


class _UnitScales:
    """A layer, but with scales of 1, so that what is written is what is stored."""

    def __init__(self, layer: AttentionLayer) -> None:
        self._layer = layer
        self._k_scale, self._v_scale = (torch.ones_like(scale) for scale in (layer._k_scale, layer._v_scale))
        self._k_scale_float = self._v_scale_float = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class CacheFinder:
    """Finds the layouts of layers' caches.

    Args:
        written_dtype: of the model's K and V.
        num_blocks: as `find_layout` takes it.
    """

    def __init__(self, written_dtype: torch.dtype, num_blocks: int | None = None) -> None:
        self.written_dtype, self._num_blocks = written_dtype, num_blocks
        self._known: dict[Hashable, CacheLayout] = {}

    def find(self, layer: AttentionLayer | LatentLayer, kv_cache: Tensor | None = None) -> CacheLayout:
        """The layout of a layer's cache. Waits for the device the first time that a kind of cache is seen.

        Args:
            layer: vLLM's.
            kv_cache: its cache; None takes it from the layer.

        Raises:
            CacheLayoutError: it can't be read; the message says why.
            AttributeError: the layer has no cache, or can't be asked to write one.
        """
        impl, cache = layer.impl, layer.kv_cache if kv_cache is None else kv_cache
        # The instructions in use decide how the CPU's page is laid out; releases keep them in different places.
        isa = getattr(layer, "isa", getattr(impl, "isa", None))
        sizes = (impl.num_kv_heads, *head_sizes(layer))
        kind = (
            type(impl),
            isa,
            impl.kv_cache_dtype,
            sizes,
            cache.dtype,
            tuple(cache.shape),
            cache.stride(),
            cache.device,
        )
        found = self._known.get(kind)
        if found is None:
            found = self._known[kind] = self._look_at(layer, cache)
        return found

    def _look_at(self, layer: AttentionLayer | LatentLayer, cache: Tensor) -> CacheLayout:
        if is_latent(layer):
            return find_latent_layout(layer, cache, written_dtype=self.written_dtype, num_blocks=self._num_blocks)
        other = cast(AttentionLayer, layer)
        impl, unit = other.impl, _UnitScales(other)
        return find_layout(
            lambda key, value, scratch, slots: impl.do_kv_cache_update(unit, key, value, scratch, slots),
            cache,
            kv_cache_dtype=impl.kv_cache_dtype,
            num_kv_heads=impl.num_kv_heads,
            head_size=other.head_size,
            value_head_size=other.head_size_v,
            written_dtype=self.written_dtype,
            num_blocks=self._num_blocks,
        )
