"""A forward pass of a layer as a step will bring it, of tokens that nobody asked for, so that its kernels are compiled.

vLLM runs attention in warm-up where a graph is to hold it, or a backend asks for it: not at all with `--enforce-eager`
or pieces of graphs alone, and of latent attention only as it decodes. What a kernel is compiled for, types, shapes and
whether strides are multiples of 16, follows from the layer and its cache. It computes no attention and writes no key.
"""

from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from glassbox.adapter.attention.layer_view import forward_of, view_of
from glassbox.adapter.attention.mla_cache import is_latent
from glassbox.adapter.attention.mla_forward import absorb_queries, has_quantised_queries, latent_forward
from glassbox.adapter.attention.mla_view import latent_view_of
from glassbox.adapter.protocols import AttentionLayer, LatentLayer
from glassbox.measure.contract import ABSORBED, PLAIN, BatchTables, Forward, LatentForward

# More than one, so that no stride is that of a single token.
_TOKENS: Final = 2
# Of the block table; all of them are block 0.
_BLOCKS: Final = 16


class Rehearsal(NamedTuple):
    """What `Measurer.after_attention` takes of a layer."""

    view: Any
    forward: Forward | LatentForward


def query_kinds(layer: AttentionLayer | LatentLayer) -> tuple[str, ...]:
    """Kinds of queries that steps bring to a layer; see `Forward.kinds`."""
    return (ABSORBED, PLAIN) if is_latent(layer) else (PLAIN,)


def rehearse(layer: AttentionLayer | LatentLayer, kind: str) -> Rehearsal:
    """Queries of one kind in a layer whose cache was looked at."""
    impl: Any = layer.impl
    seen = impl.glassbox_view
    try:
        if is_latent(layer):
            latent = _latent_forward(layer, kind)
            return Rehearsal(latent_view_of(impl, layer, latent, layer.kv_cache), latent)
        forward = _forward(cast(AttentionLayer, layer))
        return Rehearsal(view_of(impl, cast(AttentionLayer, layer), forward, layer.kv_cache), forward)
    finally:
        impl.glassbox_view = seen  # steps read a layer by what they bring


def rehearsed_tables(device: torch.device) -> BatchTables:
    """Of one request."""
    block_table = torch.zeros(1, _BLOCKS, dtype=torch.int32, device=device)
    start, length = (torch.tensor(values, dtype=torch.int32, device=device) for values in ((0, _TOKENS), (_TOKENS,)))
    return BatchTables(block_table, start, length, object())


def _forward(layer: AttentionLayer) -> Forward:
    """Queries, keys and values are parts of one tensor, as a projection leaves them."""
    kv_heads, value_size = layer.impl.num_kv_heads, layer.head_size_v
    sizes = [layer.num_heads * layer.head_size, kv_heads * layer.head_size, kv_heads * value_size]
    query, key, value = _zeros(layer, sum(sizes)).split(sizes, dim=-1)
    query = query.view(_TOKENS, layer.num_heads, layer.head_size)
    if getattr(layer, "query_quant", None) is not None:
        query = query.contiguous().to(_cache_dtype(layer))
    key, value = key.view(_TOKENS, kv_heads, -1), value.view(_TOKENS, kv_heads, -1)
    return forward_of(layer.impl, query, key, value, _zeros(layer, layer.num_heads, value_size))


def _latent_forward(layer: LatentLayer, kind: str) -> LatentForward:
    plain = _zeros(layer, layer.num_heads, layer.qk_nope_head_dim + layer.qk_rope_head_dim)
    if kind == PLAIN:
        return latent_forward(layer, None, None, plain)
    parts = absorb_queries(layer, plain)
    absorbed = torch.cat(parts, dim=-1).to(_cache_dtype(layer)) if has_quantised_queries(layer) else parts
    return latent_forward(layer, absorbed, _zeros(layer, layer.num_heads, layer.kv_lora_rank), None)


def _zeros(layer: AttentionLayer | LatentLayer, *of_token: int) -> Tensor:
    dtype = layer.impl.glassbox_finder.written_dtype  # type: ignore[union-attr]
    return torch.zeros(_TOKENS, *of_token, dtype=dtype, device=layer.kv_cache.device)


def _cache_dtype(layer: AttentionLayer | LatentLayer) -> torch.dtype:
    found: torch.dtype = layer.impl.glassbox_finder.find(layer).dtype  # type: ignore[union-attr]
    return found
