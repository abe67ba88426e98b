"""Whole attention vectors on a GPU, and what traced requests ask of them: top positions, span masses, the vectors.

The GPU twin of `row_probe_cpu.py`, for a few rows in all layers of one KV-cache group. Owns the kernel that
scores the keys (as `row_stats.py` does, by the same formula) and the torch operations that follow it; their exact form
stands in `reference/row_probe.py`. It runs outside CUDA graphs, from queries that were kept during the forward pass,
and never waits for the device: what the host must know is passed to it, and every answer stays on the device.

How it works. One launch writes the scores [rows, layers, heads, keys] of as many layers as fit a given size, each K
read once for all query heads of its KV head. Keys that a row doesn't see score -inf, and keys whose raw score is not
finite score NaN, which softmax spreads over exactly the heads that have no answer.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassbox.core.trace_arrays import NO_POSITION
from glassbox.kernels.cached_layers import ProbedLayers
from glassbox.kernels.paged_keys import (
    FUSED,
    MAX_HEAD_SIZE,
    dot_dtype,
    first_visible,
    head_parts,
    load_keys,
    soft_capped,
)
from glassbox.kernels.probe_answers import ProbeAnswers, Questions, no_answers

__all__ = ["SCRATCH_BYTES", "ProbedLayers", "row_probe"]

SCRATCH_BYTES: Final = 16 << 20

# Keys of one tile, tiles of one program, stages of the software pipeline and warps of a program: as in row_stats, where
# they were measured; here they were not.
_BLOCK_N: Final = 64
_TILES: Final = 4
_STAGES: Final = 3
_WARPS: Final = 4
# Of wide heads, so that they fit the shared memory of any GPU; not measured.
_WIDE_BLOCK_N: Final = 32
_WIDE_STAGES: Final = 2
# Query heads of one KV head that share a tile, the fewest that tensor cores take; wide MQA is done in groups of them.
_BLOCK_H: Final = 16

# What differs between steps must not compile another variant.
_FREE_POINTERS: Final = [
    "q_ptr",
    "key_pointers_ptr",
    "block_table_ptr",
    "rows_ptr",
    "factors_ptr",
    "reaches_ptr",
    "soft_caps_ptr",
    "alibi_slopes_ptr",
]
_FREE_INTEGERS: Final = ["stride_block_table", "stride_rows", "first_row", "first_layer", "chunk_layers"]


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _row_probe_kernel(
    q_ptr,  # [R, L, H, D]
    key_pointers_ptr,  # [L] int64
    like_ptr,  # for its type only: [num_blocks, Hkv, PAGE, D]
    block_table_ptr,  # [num_seqs, max_blocks] int32
    rows_ptr,  # [R, 2] int32
    factors_ptr,  # [L, Hkv] float32
    reaches_ptr,  # [L] int32
    soft_caps_ptr,  # [L] float32
    alibi_slopes_ptr,  # [L, H] float32
    scores_ptr,  # [chunk_rows, chunk_layers, H, num_columns] float32, -inf before the launch
    stride_q_row,
    stride_q_layer,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_block_table,
    stride_rows,
    first_row,
    first_layer,
    chunk_layers,
    num_columns,  # a multiple of BLOCK_N, above every position
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    GROUP_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    index = tl.program_id(0)  # of (row, layer) in the chunk
    row = first_row + index // chunk_layers
    layer = first_layer + index % chunk_layers
    kv_head = tl.program_id(1) // GROUP_BLOCKS
    in_group = (tl.program_id(1) % GROUP_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP

    batch = tl.load(rows_ptr + row * stride_rows)
    position = tl.load(rows_ptr + row * stride_rows + 1)
    lowest = first_visible(position, tl.load(reaches_ptr + layer))
    # This program's tiles that hold a visible key; there may be none.
    share = tl.program_id(2) * TILES
    first_tile = tl.maximum(share, lowest // BLOCK_N)
    last_tile = tl.minimum(share + TILES, position // BLOCK_N + 1)
    if first_tile >= last_tile:
        return

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D, BLOCK_H]; further heads and the padding of HEAD_SIZE are 0.
    q_row_ptr = q_ptr + row.to(tl.int64) * stride_q_row + layer.to(tl.int64) * stride_q_layer
    q = tl.load(
        q_row_ptr + heads[None, :] * stride_q_head + offs_d[:, None],
        mask=is_head[None, :] & (offs_d < HEAD_SIZE)[:, None],
        other=0.0,
    ).to(DOT_DTYPE)
    if BLOCK_REST > 0:
        offs_r = tl.arange(0, BLOCK_REST)
        q_rest = tl.load(
            q_row_ptr + heads[None, :] * stride_q_head + (BLOCK_D + offs_r)[:, None],
            mask=is_head[None, :] & (offs_r < HEAD_SIZE - BLOCK_D)[:, None],
            other=0.0,
        ).to(DOT_DTYPE)
    factor = tl.load(factors_ptr + layer * NUM_KV_HEADS + kv_head)
    if HAS_SOFT_CAP:
        # A layer without one has 0, which must not be divided by.
        soft_cap = tl.load(soft_caps_ptr + layer)
        divisor = tl.where(soft_cap > 0.0, soft_cap, 1.0)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes_ptr + layer * NUM_HEADS + heads, mask=is_head, other=0.0)
    k_ptr = tl.load(key_pointers_ptr + layer).to(tl.pointer_type(like_ptr.dtype.element_ty))
    # The compiler knows nothing of a loaded address: without this it would load element by element.
    k_ptr = tl.multiple_of(k_ptr, ALIGNMENT)
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    table_ptr = block_table_ptr + batch.to(tl.int64) * stride_block_table
    head_scores_ptr = scores_ptr + (index.to(tl.int64) * NUM_HEADS + heads) * num_columns

    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        j = tile * BLOCK_N + offs_n
        visible = (j >= lowest) & (j <= position)
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_d, stride_k_block, stride_k_slot,
            BLOCK_D if BLOCK_REST > 0 else HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_H] -> [BLOCK_N, BLOCK_H]
        s = tl.dot(k.to(DOT_DTYPE), q, input_precision="ieee")
        if BLOCK_REST > 0:
            rest = load_keys(
                k_head_ptr + BLOCK_D, table_ptr, tile, j, visible, position, offs_n, offs_r, stride_k_block,
                stride_k_slot, HEAD_SIZE - BLOCK_D, PAGE, BLOCK_REST, BLOCK_N,
            )  # fmt: skip
            s = tl.dot(rest.to(DOT_DTYPE), q_rest, s, input_precision="ieee")
        s = s * factor
        finite = tl.abs(s) < float("inf")
        if HAS_SOFT_CAP:
            s = tl.where(soft_cap > 0.0, soft_capped(s, divisor), s)
        if HAS_ALIBI:
            s = s - slopes[None, :] * (position - j).to(tl.float32)[:, None]
        s = tl.where(finite, s, float("nan"))
        tl.store(head_scores_ptr[None, :] + j[:, None], s, mask=visible[:, None] & is_head[None, :])


def row_probe(
    queries: Tensor,
    layers: ProbedLayers,
    block_table: Tensor,
    rows: Tensor,
    asked: Questions[Tensor],
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> ProbeAnswers[Tensor]:
    """Attention of each row to every position up to its own, in every layer: softmax over its visible keys (and a
    learned sink). Asynchronous, on the current stream.

    Memory: beside the answers a few times `scratch_bytes`. A chunk is as many layers as fit it, or as many rows of one
    layer, and one row of one layer if not even that fits.

    Args:
        queries: [R, L, H, D] float32, float16, bfloat16 or FP8; the last dimension contiguous.
        layers: of one KV-cache group, L of them.
        block_table: of the group, [num_seqs, max_blocks] int32, the last dimension contiguous.
        rows: [R, 2] int32, (batch row, position) of each row; the last dimension contiguous.
        asked: of these rows, whose positions are those in `rows`, and these layers.
        scratch_bytes: of the scores that are held at once.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    num_rows, num_layers, num_heads, _ = queries.shape
    _check(queries, layers, block_table, rows, asked)
    longest = asked.longest
    columns = (longest // _BLOCK_N + 1) * _BLOCK_N  # at least one more than keys: the sink's
    answers = no_answers(asked)
    fitting = max(scratch_bytes // (4 * num_heads * columns), 1)  # (row, layer) pairs
    row_step = min(fitting, max(num_rows, 1))
    layer_step = fitting // row_step
    for first_row in range(0, num_rows, row_step):
        of_rows = slice(first_row, min(first_row + row_step, num_rows))
        for first_layer in range(0, num_layers, layer_step):
            of_layers = slice(first_layer, min(first_layer + layer_step, num_layers))
            scores = _scores(queries, layers, block_table, rows, of_rows, of_layers, columns)
            part = (of_rows, of_layers)
            column = _fill_positions(answers, scores, part, min(asked.top_k, longest))
            if layers.sinks is not None:
                # One more score without a key, in the column behind the last one.
                scores[..., longest] = layers.sinks[of_layers]
            attention = torch.softmax(scores, -1)
            # Of rows that are summed: a head without an answer has none at the keys that its row sees, and 0 elsewhere.
            summed = [row - of_rows.start for row in asked.received if of_rows.start <= row < of_rows.stop]
            hidden = [scores[row] == -torch.inf for row in summed]
            del scores
            _fill_top_mass(answers, attention, part, column)
            attention = attention[..., :longest]
            _fill_spans(answers, attention, part, asked.spans[of_rows])
            for out, row in zip(answers.attention, asked.kept_attention, strict=True):
                if of_rows.start <= row < of_rows.stop:
                    end = asked.positions[row] + 1
                    out[of_layers] = attention[row - of_rows.start, :, :, end - out.shape[-1] : end]
            for row, of_row in zip(summed, hidden, strict=True):
                out = answers.received[asked.received.index(row + of_rows.start)]
                out[of_layers] = attention[row].masked_fill(of_row[..., :longest], 0.0)[..., : out.shape[-1]]
            # In place, so last. Not a product: NaN * 0 is NaN.
            attention.masked_fill_(~asked.chosen[part].unsqueeze(-1), 0.0)
            answers.chosen_sum[of_rows] += attention.sum((1, 2))
    return answers


def _check(queries: Tensor, layers: ProbedLayers, block_table: Tensor, rows: Tensor, asked: Questions[Tensor]) -> None:
    num_rows = len(asked.positions)
    place = (num_rows, len(layers.key_pointers), layers.num_heads)
    for name, tensor, shape in (
        ("queries", queries, (*place, layers.like.shape[3])),
        ("rows", rows, (num_rows, 2)),
        ("spans", asked.spans, (num_rows, *asked.spans.shape[1:2], 2)),
        ("chosen", asked.chosen, place),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for these layers and {num_rows} positions, got {list(tensor.shape)}; "
                f"pass tensors of the same rows and layers"
            )
    if queries.stride(3) != 1 or rows.stride(1) != 1 or block_table.stride(1) != 1:
        raise ValueError("queries, rows and block_table must be contiguous in their last dimension; pass such views")


def _scores(
    queries: Tensor,
    layers: ProbedLayers,
    block_table: Tensor,
    rows: Tensor,
    of_rows: slice,
    of_layers: slice,
    columns: int,
) -> Tensor:
    """Scores of a chunk, float32 [rows, layers, H, columns]; -inf where there is no visible key, NaN where the score of
    one is not finite."""
    like, num_heads = layers.like, layers.num_heads
    num_kv_heads, page, head_size = like.shape[1:]
    block_d, block_rest = head_parts(head_size)
    chunk_rows, chunk_layers = of_rows.stop - of_rows.start, of_layers.stop - of_layers.start
    scores = queries.new_full((chunk_rows, chunk_layers, num_heads, columns), -torch.inf, dtype=torch.float32)
    head_blocks = num_kv_heads * triton.cdiv(num_heads // num_kv_heads, _BLOCK_H)
    block_n, stages = (_WIDE_BLOCK_N, _WIDE_STAGES) if head_size > MAX_HEAD_SIZE else (_BLOCK_N, _STAGES)
    grid = (chunk_rows * chunk_layers, head_blocks, triton.cdiv(columns, block_n * _TILES))
    _row_probe_kernel[grid](
        queries,
        layers.key_pointers,
        like,
        block_table,
        rows,
        layers.factors,
        layers.reaches,
        layers.soft_caps,
        layers.alibi_slopes,
        scores,
        queries.stride(0),
        queries.stride(1),
        queries.stride(2),
        like.stride(0),
        like.stride(1),
        like.stride(2),
        block_table.stride(0),
        rows.stride(0),
        of_rows.start,
        of_layers.start,
        chunk_layers,
        columns,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        PAGE=page,
        DOT_DTYPE=dot_dtype(queries.dtype, like.dtype, not queries.is_cuda),
        HAS_SOFT_CAP=layers.soft_caps is not None,
        HAS_ALIBI=layers.alibi_slopes is not None,
        ALIGNMENT=layers.alignment,
        BLOCK_H=_BLOCK_H,
        BLOCK_D=block_d,
        BLOCK_REST=block_rest,
        BLOCK_N=block_n,
        TILES=_TILES,
        STAGES=stages,
        num_warps=_WARPS,
        **FUSED,
    )
    return scores


def _fill_positions(answers: ProbeAnswers[Tensor], scores: Tensor, part: tuple[slice, slice], k: int) -> Tensor:
    """Write the positions of a chunk's k highest scores; returns their columns, int64 [rows, layers, H, k]."""
    # Of the scores, not of the mass: an invisible key must not stand before a visible one whose mass is 0, too.
    best, column = torch.topk(scores, k, dim=-1)
    # NaN counts as the highest: it comes first in a head that has one.
    there = (best > -torch.inf) & ~best[..., :1].isnan()
    answers.topk_positions[part][..., :k] = torch.where(there, column, NO_POSITION)
    return column


def _fill_top_mass(answers: ProbeAnswers[Tensor], attention: Tensor, part: tuple[slice, slice], column: Tensor) -> None:
    """Write the masses of those columns, where they are positions."""
    k = column.shape[-1]
    there = answers.topk_positions[part][..., :k] != NO_POSITION
    answers.topk_mass[part][..., :k] = torch.where(there, attention.gather(-1, column), 0.0)


def _fill_spans(answers: ProbeAnswers[Tensor], attention: Tensor, part: tuple[slice, slice], spans: Tensor) -> None:
    """Write a chunk's masses of spans [rows, S, 2], from its attention [rows, layers, H, longest]."""
    j = torch.arange(attention.shape[-1], device=attention.device)
    bad = attention[..., 0].isnan()  # one score that is not finite makes all of a head's attention NaN
    for s in range(spans.shape[1]):
        inside = (j >= spans[:, s, :1]) & (j < spans[:, s, 1:])  # [rows, longest]
        mass = torch.where(inside[:, None, None], attention, 0.0).sum(-1)
        answers.span_mass[part][..., s] = torch.where(bad, torch.nan, mass)
