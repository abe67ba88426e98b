"""Whole prompts of latent attention (MLA) on a GPU: keys of some heads at a time are made of the cached vectors.

Single rows are measured with absorbed queries, which are three times as long as plain ones: of many rows too much to
multiply, and wider than the tiles of `kernels/prompt_rows.py`. So that kernel gets what vLLM's own prefill computes
with, plain queries and keys of each head, in memory that is only needed for a launch.
"""

from typing import Any, Final

import torch
from torch import Tensor

from glassbox.kernels.key_grams import sequence_keys
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.output_rounding import FP8_TYPES
from glassbox.kernels.prompt_rows import PromptChunk, PromptNumbers, prompt_rows
from glassbox.measure.contract import LatentForward
from glassbox.measure.prompt_memory import REMEDY, UnmeasuredPromptError, mib

# Keys that are there at a time, where there is memory for them: 20 heads of 8,192 tokens in half precision.
_KEYS_BYTES: Final = 64 << 20
# Of these keys; tiles of the kernel are whole pages.
_PAGE: Final = 32
# Rows whose queries are absorbed at a time, of all heads.
_ABSORBED_ROWS: Final = 256


def latent_prompt_rows(
    latent: LatentForward,
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    chunk: PromptChunk,
    params: LayerParams,
    heads: Tensor,
    *,
    spans: Tensor | None = None,
    squares: bool = False,
    free_bytes: int | None = None,
    **options: Any,
) -> PromptNumbers:
    """`prompt_rows` of a layer with latent attention.

    Args:
        latent: of the step.
        q: plain queries, [N, H, P + R], of the chunk's rows.
        k_cache: [num_blocks, 1, block_size, Lkv + R].
        block_table, chunk, heads, spans, squares, options: as `prompt_rows` takes them.
        params: of the layer; the scale of absorbed queries doesn't concern plain ones.
        free_bytes: that keys of heads may take; None if nothing else is known than that there is enough.

    Raises:
        ValueError: for a shape the kernel does not do.
        UnmeasuredPromptError: there is not enough for the keys of one head.
    """
    if not len(heads):  # another rank has those that were asked for
        return PromptNumbers.empty(chunk, heads, spans, squares=squares)
    vectors = _cached_vectors(k_cache, block_table, chunk.num_keys, params.k_scale, q.dtype)
    num_pages = -(-len(vectors) // _PAGE)
    table = torch.arange(num_pages, dtype=torch.int32, device=q.device)
    # What fills the last page is seen by no row.
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, num_pages * _PAGE - len(vectors)))
    at_once = _heads_at_once(len(padded) * q.shape[2] * q.element_size(), free_bytes)
    found = []
    for some in heads.split(at_once):
        index = some.long()
        keys = latent.head_keys(padded, index)
        # [h, n, D] as [pages, h, PAGE, D]
        paged = keys.view(len(some), num_pages, _PAGE, -1).transpose(0, 1)
        own = torch.arange(len(some), dtype=torch.int32, device=q.device)
        of_chunk = q.index_select(1, index)
        found.append(
            prompt_rows(
                of_chunk, paged, table, chunk, LayerParams(scale=params.scale), own, spans=spans, squares=squares,
                **options,
            )
        )  # fmt: skip
    received_squares = [one.received_squares for one in found if one.received_squares is not None]
    return PromptNumbers(
        stats=torch.cat([one.stats for one in found], 1),
        previous_mass=torch.cat([one.previous_mass for one in found], 1),
        span_mass=torch.cat([one.span_mass for one in found], 1),
        received=torch.cat([one.received for one in found]),
        received_squares=torch.cat(received_squares) if squares else None,
    )


def _heads_at_once(of_head: int, free_bytes: int | None) -> int:
    """Of how many heads keys are made at a time, which take so many bytes each, and as many while they are made."""
    if free_bytes is None:
        return max(_KEYS_BYTES // of_head, 1)
    if free_bytes < 2 * of_head:
        raise UnmeasuredPromptError(
            f"the keys of one head of a whole prompt take {mib(2 * of_head)} MiB, and of the GPU's memory "
            f"{mib(free_bytes)} MiB are left for them. {REMEDY}"
        )
    return max(min(_KEYS_BYTES, free_bytes // 2) // of_head, 1)


def latent_bytes(q: Tensor, k_cache: Tensor, num_keys: int) -> int:
    """What `latent_prompt_rows` takes beside its answers and the keys of heads: the cached vectors, in the order of
    their positions, in the model's type and padded; and the queries of the chosen heads."""
    of_key = k_cache.shape[3] * (2 * k_cache.element_size() + 4 + 2 * q.element_size())
    return num_keys * of_key + q.nbytes


def absorbed_queries(latent: LatentForward, plain: Tensor) -> Tensor:
    """[N, H, Lkv + R] of plain queries [N, H, P + R]."""
    return torch.cat([torch.cat(latent.absorb(part), dim=-1) for part in plain.split(_ABSORBED_ROWS)])


def _cached_vectors(
    k_cache: Tensor, block_table: Tensor, num_keys: int, k_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[num_keys, Lkv + R] in a type, without the scale of the cache."""
    stored = sequence_keys(k_cache, block_table, 0, num_keys)[:, 0]
    if stored.dtype in FP8_TYPES or k_scale is not None:
        stored = stored.float() if k_scale is None else stored.float() * k_scale
    return stored.to(dtype)
