"""Layers of vLLM's CPU backend without an engine: its own impl, as far as it writes a cache and glassbox reads it."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from glassbox.adapter.attention.cache_layout import CacheLayout
from glassbox.adapter.attention.layer_cache import CacheFinder

_FINDERS = {dtype: CacheFinder(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}


class VllmLayer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


def cpu_layer(
    cache: Tensor,
    *,
    num_kv_heads: int,
    head_size: int,
    isa: str = "vec",
    kv_cache_dtype: str = "auto",
    name: str = "layer",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    **impl: Any,
) -> VllmLayer:
    """A layer with this cache; `impl` are further attributes of its impl."""
    # Its constructor wants a whole configuration; what writes a cache reads these alone.
    made = object.__new__(CPUAttentionBackendImpl)
    vars(made).update(
        scale=0.2, sliding_window=-1, logits_soft_cap=0, alibi_slopes=None, sinks=None, isa=isa,
        attn_type=AttentionType.DECODER, kv_cache_dtype=kv_cache_dtype, num_kv_heads=num_kv_heads, head_size=head_size,
        glassbox_view=None, glassbox_finder=None,
    )  # fmt: skip
    vars(made).update(impl)
    return VllmLayer(
        layer_name=name, impl=made, kv_cache=cache, isa=isa, head_size=head_size, head_size_v=head_size,
        _q_scale=torch.tensor(1.0), _k_scale=torch.tensor(k_scale), _v_scale=torch.tensor(v_scale),
        _k_scale_float=k_scale, _v_scale_float=v_scale,
    )  # fmt: skip


def layout_of(layer: VllmLayer, dtype: torch.dtype) -> CacheLayout:
    """As a worker of a model of that type finds it, once for each kind; the impl knows it from then on."""
    finder = layer.impl.glassbox_finder = _FINDERS[dtype]
    return finder.find(layer)  # type: ignore[arg-type]
