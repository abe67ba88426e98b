"""The forward pass of a layer with latent attention (MLA) in the measurers' terms.

Owns how queries are absorbed, q_nope @ W_UK for each head, as vLLM does it for the tokens that it decodes; and how keys
of each head are made of latent vectors, as vLLM does it for those that it prefills.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from glassbox.adapter.protocols import LatentLayer, PackedLatentImpl
from glassbox.measure.contract import LatentForward


def latent_forward(
    layer: LatentLayer, absorbed: Tensor | tuple[Tensor, Tensor] | None, output: object, plain: Tensor | None
) -> LatentForward:
    """Of one step.

    Args:
        layer: vLLM's.
        absorbed: as `forward_mqa` was given its queries, [A, Hq, Lkv + R] or both parts of it.
        output: as it returned it, alone or with the log-sum-exp.
        plain: queries that `forward_mha` was given, [T - A, Hq, P + R].
    """
    if isinstance(absorbed, Tensor):
        absorbed = (absorbed[..., : layer.kv_lora_rank], absorbed[..., layer.kv_lora_rank :])
    served = output[0] if isinstance(output, tuple) else output
    served = served if isinstance(served, Tensor) and served.ndim == 3 else None
    return LatentForward(absorbed, served, plain, partial(absorb_queries, layer), partial(head_keys, layer))


def has_quantised_queries(layer: LatentLayer) -> bool:
    """Whether vLLM hands `forward_mqa` queries in FP8: with an FP8 cache, where the backend takes them."""
    return layer.kv_cache.element_size() == 1 and layer.impl.supports_quant_query_input


def absorb_queries(layer: LatentLayer, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [N, Hq, P + R] as [N, Hq, Lkv] and [N, Hq, R], in their own type.

    Where those that vLLM absorbs are quantised, these are divided by the same scale.
    """
    nope, rotary = plain.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
    latent = plain.new_empty(len(plain), plain.shape[1], layer.kv_lora_rank)
    # [Hq, N, P] @ [Hq, P, Lkv] -> [Hq, N, Lkv]
    if getattr(layer, "is_amx_bmm_enabled", False):
        from vllm import _custom_ops

        impl = cast(PackedLatentImpl, layer.impl)
        scale = getattr(impl, "_w_scale", None)  # of FP8 weights, from 0.31 on
        _custom_ops.bmm_cpu(latent.transpose(0, 1), nope.transpose(0, 1), impl._w_uk_packed, True, scale)
    else:
        torch.bmm(nope.transpose(0, 1), _absorbing_weights(layer), out=latent.transpose(0, 1))
    if has_quantised_queries(layer):
        return latent / layer._q_scale.to(latent.dtype), rotary / layer._q_scale.to(rotary.dtype)
    return latent, rotary


def head_keys(layer: LatentLayer, vectors: Tensor, heads: Tensor) -> Tensor:
    """Keys of some heads, [h, n, P + R], in the type of the vectors.

    Args:
        layer: vLLM's.
        vectors: [n, Lkv + R], of the model's type, without the scale of their cache.
        heads: int64 [h].
    """
    latent, rotary = vectors.split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
    weights = _absorbing_weights(layer).index_select(0, heads)
    # [n, Lkv] @ [h, Lkv, P] -> [h, n, P]
    nope = torch.matmul(latent, weights.transpose(1, 2))
    return torch.cat([nope, rotary.expand(len(heads), -1, -1)], dim=-1)


def _absorbing_weights(layer: LatentLayer) -> Tensor:
    """[Hq, P, Lkv]; made when the weights are loaded."""
    weights: Tensor | None = getattr(layer, "W_UK_T", None)
    if weights is None:
        raise RuntimeError(f"{layer.layer_name} must have W_UK_T, by which queries are absorbed; don't observe it")
    return weights
