"""Sums of q q^T and k k^T over a prompt's rows and keys, and the keys themselves, from a paged cache on a GPU.

The singular values of S = Q K^T are the roots of the eigenvalues of (Q^T Q)(K^T K), so two D x D sums, which grow chunk
by chunk, are all that is needed of a prompt of any length. Owns the torch operations; each runs on the current stream,
and none waits for the device.
"""

from typing import Final

import torch
from torch import Tensor

from glassbox.kernels.output_rounding import FP8_TYPES

# Rows that are multiplied at a time, as float32: 64 MiB of 128 heads of size 128.
_ROWS: Final = 1024


def sequence_keys(k_cache: Tensor, block_table: Tensor, start: int, end: int) -> Tensor:
    """Keys at the positions start .. end - 1 of a sequence, [end - start, Hkv, D] as stored.

    Args:
        k_cache: [num_blocks, Hkv, block_size, D].
        block_table: [max_blocks] int32, of the sequence.
        start, end: positions whose keys are in the cache.
    """
    page = k_cache.shape[2]
    first = start // page
    blocks = block_table[first : -(-end // page)].long()
    # torch can't index FP8 everywhere
    stored = k_cache.view(torch.uint8) if k_cache.dtype in FP8_TYPES else k_cache
    pages = stored.index_select(0, blocks).view(k_cache.dtype)
    return pages.transpose(1, 2).flatten(0, 1)[start - first * page : end - first * page]


def keys_at(k_cache: Tensor, blocks: Tensor, slots: Tensor) -> Tensor:
    """Keys at some places of a cache, [R, Hkv, D] as stored.

    Args:
        k_cache: [num_blocks, Hkv, block_size, D].
        blocks, slots: int64 [R], block and place in it.
    """
    stored = k_cache.view(torch.uint8) if k_cache.dtype in FP8_TYPES else k_cache
    return stored.transpose(1, 2)[blocks, slots].view(k_cache.dtype)


def gram(vectors: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sum over n of x x^T of each head, float64 [H, D, D].

    Args:
        vectors: [n, H, D] of any floating type. Products of half types are exact in float32, in which up to 1,024 of
            them are summed; all others are float64's.
        scale: [1] or [H] float32, of the vectors; None is 1.
    """
    half = vectors.dtype.itemsize <= 2
    total = vectors.new_zeros(vectors.shape[1], vectors.shape[2], vectors.shape[2], dtype=torch.float64)
    for part in vectors.split(_ROWS):
        of_heads = part.to(torch.float32 if half else torch.float64).transpose(0, 1)
        # [H, D, n] @ [H, n, D] -> [H, D, D]
        total += torch.matmul(of_heads.transpose(1, 2), of_heads)
    return total if scale is None else total * scale.double().view(-1, 1, 1) ** 2
