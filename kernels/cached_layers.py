"""Layers of one KV-cache group as one launch reads them: tables of addresses and parameters on the device.

Owns what the kernels that run over all layers after the forward pass, `row_probe.py` and `row_output.py`, must know of
each layer, and the check that such layers are alike. It owns no kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.paged_keys import MAX_PAGE_ELEMENTS, MAX_WIDE_HEAD_SIZE, UNLIMITED

# An address that is a multiple of this lets a kernel load 16 bytes at once.
_ALIGNMENT: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class ProbedLayers:
    """Layers of one KV-cache group, alike in everything but their tensors; made by `of`.

    Holds addresses, so it lives no longer than the caches do.

    Attributes:
        key_pointers: int64 [L] on the device, address of each layer's K cache.
        like: one of the K caches, [num_blocks, Hkv, block_size, D]: its dtype, strides and shape but for num_blocks
            are those of all.
        alignment: bytes of which every address in `key_pointers` is a multiple, at most 16.
        num_heads: H, query heads of each layer.
        factors: float32 [L, Hkv], scale * q_scale * k_scale.
        reaches: int32 [L], of `LayerParams.reach`; 2^31 - 1 is all.
        soft_caps: float32 [L], 0 is none; None if no layer has one.
        alibi_slopes, sinks: float32 [L, H], or None.
    """

    key_pointers: Tensor
    like: Tensor
    alignment: int
    num_heads: int
    factors: Tensor
    reaches: Tensor
    soft_caps: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    @classmethod
    def of(cls, caches: Sequence[Tensor], params: Sequence[LayerParams], num_heads: int) -> "ProbedLayers":
        """Gather what the kernel needs of each layer; asynchronous, on the current stream.

        Args:
            caches: K of each layer, [num_blocks, Hkv, block_size, D], any strides but a contiguous last dimension.
            params: of each layer.
            num_heads: query heads of each layer, a multiple of Hkv.

        Raises:
            ValueError: the layers are not alike, or have a shape the kernel doesn't do.
        """
        if not caches or len(caches) != len(params):
            raise ValueError(
                f"caches must be one per layer and at least one, got {len(caches)} for {len(params)} layers; "
                f"pass the K cache of each layer"
            )
        like = caches[0]
        _check_caches(caches, num_heads)
        caps = [p.soft_cap or 0.0 for p in params]
        factors = [_factors(like, p.scale, p.q_scale, p.k_scale) for p in params]
        reaches = [p.reach or UNLIMITED for p in params]
        pointers, alignment = _addresses(caches)
        return cls(
            key_pointers=pointers,
            like=like,
            alignment=alignment,
            num_heads=num_heads,
            factors=torch.stack(factors),
            reaches=upload(reaches, torch.int32, like.device),
            soft_caps=upload(caps, torch.float32, like.device) if any(caps) else None,
            alibi_slopes=_per_head("alibi_slopes", [p.alibi_slopes for p in params], num_heads, like),
            sinks=_per_head("sinks", [p.sinks for p in params], num_heads, like),
        )


@dataclass(frozen=True, slots=True, eq=False)
class CachedLayers:
    """Layers of one KV-cache group with both halves of their caches; made by `of`.

    Attributes:
        keys: what scores are made from.
        value_pointers: int64 [L] on the device, address of each layer's V cache.
        values_like: one of the V caches, [num_blocks, Hkv, block_size, Dv], as `like` of `keys`.
        value_alignment: bytes of which every address in `value_pointers` is a multiple, at most 16.
        key_scales, value_scales: float32 [L, Hkv], K and V = number stored * scale.
    """

    keys: ProbedLayers
    value_pointers: Tensor
    values_like: Tensor
    value_alignment: int
    key_scales: Tensor
    value_scales: Tensor

    @classmethod
    def of(
        cls, keys: Sequence[Tensor], values: Sequence[Tensor], params: Sequence[LayerParams], num_heads: int
    ) -> "CachedLayers":
        """Gather what the kernel needs of each layer; asynchronous, on the current stream.

        Args:
            keys, values: of each layer, [num_blocks, Hkv, block_size, D] and [num_blocks, Hkv, block_size, Dv], any
                strides but a contiguous last dimension.
            params: of each layer.
            num_heads: query heads of each layer, a multiple of Hkv.

        Raises:
            ValueError: the layers are not alike, or have a shape the kernel doesn't do.
        """
        of_keys = ProbedLayers.of(keys, params, num_heads)
        if len(values) != len(keys) or values[0].shape[1:3] != keys[0].shape[1:3]:
            raise ValueError(
                f"values must be one per layer with KV heads and block size of the keys, "
                f"{list(keys[0].shape[1:3])}, got {len(values)} for {len(keys)} layers, "
                f"{[list(value.shape[1:3]) for value in values[:1]]}; pass the V cache of each layer"
            )
        _check_caches(values, num_heads)
        pointers, alignment = _addresses(values)
        return cls(
            keys=of_keys,
            value_pointers=pointers,
            values_like=values[0],
            value_alignment=alignment,
            key_scales=torch.stack([_factors(keys[0], 1.0, p.k_scale) for p in params]),
            value_scales=torch.stack([_factors(values[0], 1.0, p.v_scale) for p in params]),
        )


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device; from pinned memory, since a copy from other memory waits for the device."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _addresses(caches: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Of all layers, int64 [L] on the device, and bytes of which each is a multiple, at most 16."""
    addresses = [cache.data_ptr() for cache in caches]
    alignment = next(n for n in (_ALIGNMENT, 8, 4, 2, 1) if not any(address % n for address in addresses))
    return upload(addresses, torch.int64, caches[0].device), alignment


def _kind(cache: Tensor) -> tuple[object, ...]:
    return cache.dtype, cache.stride(), cache.device, tuple(cache.shape[1:])


def _check_caches(caches: Sequence[Tensor], num_heads: int) -> None:
    """The first is one that the kernels can read, and the others are like it."""
    like = caches[0]
    _check_cache(like, num_heads)
    for i, cache in enumerate(caches):
        if _kind(cache) != _kind(like):
            raise ValueError(
                f"caches must have the dtype, strides, device and shape (but for num_blocks) of the first, "
                f"{_kind(like)}, got {_kind(cache)} at {i}; probe such layers by themselves"
            )


def _check_cache(cache: Tensor, num_heads: int) -> None:
    _, num_kv_heads, page, head_size = cache.shape
    if head_size > MAX_WIDE_HEAD_SIZE or num_heads % num_kv_heads:
        raise ValueError(
            f"caches {tuple(cache.shape)} must have a head size of at most {MAX_WIDE_HEAD_SIZE} and KV heads that "
            f"divide the {num_heads} query heads; do not probe these layers"
        )
    if cache.stride(3) != 1:
        raise ValueError("caches must be contiguous in their last dimension; pass such views")
    if page * cache.stride(2) > MAX_PAGE_ELEMENTS:
        raise ValueError(
            f"a page of a cache must span at most {MAX_PAGE_ELEMENTS} elements, got {page * cache.stride(2)}; "
            f"do not probe these layers"
        )


def _factors(cache: Tensor, factor: float, *scales: Tensor | None) -> Tensor:
    """The product, float32 [Hkv]."""
    out = torch.full((cache.shape[1],), factor, dtype=torch.float32, device=cache.device)
    for scale in scales:
        if scale is not None:
            out *= scale.detach().float()
    return out


def _per_head(name: str, values: Sequence[Tensor | None], num_heads: int, cache: Tensor) -> Tensor | None:
    """Of all layers, float32 [L, H], or None if none has any."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) < len(values) or any(value.shape != (num_heads,) for value in present):
        shapes = [None if value is None else tuple(value.shape) for value in values]
        raise ValueError(
            f"{name} must be [{num_heads}] in all layers or None in all, got {shapes}; probe such layers by themselves"
        )
    return torch.stack([value.detach().to(cache.device, torch.float32) for value in present])
