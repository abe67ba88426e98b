"""The forward pass of a layer with latent attention (MLA) in the measurers' terms.

Owns how queries are absorbed: q_nope @ W_UK for each head, as vLLM does it for the tokens that it decodes.
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
    return LatentForward(absorbed, served, plain, partial(absorb_queries, layer))


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
        # [Hq, P, Lkv]; made when the weights are loaded.
        weights = getattr(layer, "W_UK_T", None)
        if weights is None:
            raise RuntimeError(f"{layer.layer_name} must have W_UK_T, by which queries are absorbed; don't observe it")
        torch.bmm(nope.transpose(0, 1), weights, out=latent.transpose(0, 1))
    if has_quantised_queries(layer):
        return latent / layer._q_scale.to(latent.dtype), rotary / layer._q_scale.to(rotary.dtype)
    return latent, rotary
