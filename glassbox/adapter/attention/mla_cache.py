"""Where a token's key and value stand in a latent cache (MLA), found as `cache_layout.py` finds those of others.

A token has one vector [Lkv + R] in it, the latent one and a rotary part: all of it is the key of all query heads, the
latent part is the value as well.
"""

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout, CacheLayoutError, Places, find_layout
from glassbox.adapter.protocols import LatentLayer


def is_latent(layer: Any) -> TypeGuard[LatentLayer]:
    """Whether a layer of vLLM's has latent attention."""
    return hasattr(layer, "kv_lora_rank")


def head_sizes(layer: Any) -> tuple[int, int]:
    """Of K and V in the cache of a layer, latent or not."""
    if is_latent(layer):
        return layer.kv_lora_rank + layer.qk_rope_head_dim, layer.kv_lora_rank
    return layer.head_size, layer.head_size_v


def find_latent_layout(
    layer: LatentLayer, kv_cache: Tensor, *, written_dtype: torch.dtype, num_blocks: int | None
) -> CacheLayout:
    """As `find_layout` does it, with the layer's own `do_kv_cache_update`.

    Raises:
        CacheLayoutError: the latent vectors don't stand in it as plain numbers, each once.
        AttributeError: the layer can't be asked to write one.
    """
    impl, unit_scale = layer.impl, torch.ones_like(layer._k_scale)
    if not layer.qk_rope_head_dim:
        raise CacheLayoutError("latent vectors without a rotary part are not supported")

    def write(latent: Tensor, rotary: Tensor, cache: Tensor, slots: Tensor) -> None:
        impl.do_kv_cache_update(latent.squeeze(1), rotary, cache, slots, impl.kv_cache_dtype, unit_scale)

    found = find_layout(
        write,
        kv_cache,
        kv_cache_dtype=impl.kv_cache_dtype,
        num_kv_heads=1,
        head_size=layer.kv_lora_rank,
        value_head_size=layer.qk_rope_head_dim,
        written_dtype=written_dtype,
        num_blocks=num_blocks,
    )
    latent, rotary = found.key, found.value
    if latent.block_stride != rotary.block_stride:
        raise CacheLayoutError("latent vectors and their rotary parts stand in blocks of different strides")
    whole = Places(latent.block_stride, 0, torch.cat([latent.offsets, rotary.offsets], dim=1))
    return replace(found, key=whole, value=latent)
