"""Attention statistics of the listed rows of one layer, on a GPU: one Triton launch, one pass over the keys.

Owns the kernel, its workspace and its launch. It does not choose rows, know vLLM, or read anything back: results are
added to a layer's cumulative accumulators on the device, and rows of traced requests are written to a ring. The
statistics are those of `glassbox/core/statistics.py`, whose symbols (m, Zk, E, Z2) the kernel uses.

How it works. The keys of all listed rows, cut into tiles, form one sequence of units (row, KV head, tile); every
program of a persistent grid takes an equal, contiguous share of it. So one long row spreads over the whole GPU, and
many short ones are not split. A (row, KV head) that crosses a share's border leaves a partial state per program; of 16
neighbours the program that arrives last merges theirs, and so on; nothing waits for another program. The grid, and
everything the host passes, is the same on every launch: row list, lengths and block table are read on the device, so a
captured launch is right on replay, and one with an empty row list reads one word and returns.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from glassbox.core import rows as row_list
from glassbox.core.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS
from glassbox.kernels.cached_layers import ProbedLayers
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.paged_keys import (
    FUSED,
    MAX_HEAD_SIZE,
    MAX_PAGE_ELEMENTS,
    MAX_WIDE_HEAD_SIZE,
    UNLIMITED,
    dot_dtype,
    head_parts,
    is_hopper,
    load_keys,
    soft_capped,
    widened,
)
from glassbox.kernels.row_state import combine, exponent, no_keys
from glassbox.kernels.wide_rows import copy_heads, heads_dot, wide_sums

_NUM_ROW_COLUMNS = tl.constexpr(row_list.NUM_ROW_COLUMNS)
_ROW_QUERY = tl.constexpr(row_list.ROW_QUERY)
_ROW_BATCH = tl.constexpr(row_list.ROW_BATCH)
_ROW_PHASE = tl.constexpr(row_list.ROW_PHASE)
_ROW_PROMPT_LEN = tl.constexpr(row_list.ROW_PROMPT_LEN)
_ROW_SLOT = tl.constexpr(row_list.ROW_SLOT)
_ROW_DECODE = tl.constexpr(row_list.ROW_DECODE)
_ROW_UNCOUNTED = tl.constexpr(row_list.ROW_UNCOUNTED)
_ROW_ADAPTER_SHIFT = tl.constexpr(row_list.ROW_ADAPTER_SHIFT)

_ENTROPY_RATIO = tl.constexpr(INDEX["entropy_ratio"])
_EFFECTIVE_KEYS = tl.constexpr(INDEX["effective_keys"])
_MAX_LOGIT = tl.constexpr(INDEX["max_logit"])
_TOP1_RATIO = tl.constexpr(INDEX["top1_ratio"])
_SINK_RATIO = tl.constexpr(INDEX["sink_ratio"])
_LOCAL_RATIO = tl.constexpr(INDEX["local_ratio"])
_DISTANCE_TOKENS = tl.constexpr(INDEX["distance_tokens"])
_SELF_LOGPROB = tl.constexpr(INDEX["self_logprob"])
_LOOKBACK_RATIO = tl.constexpr(INDEX["lookback_ratio"])
_NUM_STATISTICS = tl.constexpr(NUM_STATISTICS)
_NUM_BUCKETS = tl.constexpr(NUM_BUCKETS)
_BLOCK_STATISTICS = tl.constexpr(triton.next_power_of_2(NUM_STATISTICS))

_LN2 = tl.constexpr(0.6931471805599453)
# How far (natural units) a score may be above the reference: e^16 squared and summed is far from overflow, and what
# the entropy loses to cancellation is 23 bits' worth of float32 rounding, 1e-6.
_MAX_RISE = tl.constexpr(16.0)
# Fields of a partial state: m, context sum, generated sum, E, Z2, sink, local, distance, own score, nonfinite.
_STATE_FIELDS = tl.constexpr(10)
_MERGE_BLOCK = tl.constexpr(16)

# Query heads of one KV head that share a tile; more of them (wide MQA) are done in groups of this many. Wide heads are
# those of latent attention, of which all query heads have one KV head, whose keys are to be read once.
_MAX_BLOCK_HEADS: Final = 16
_MAX_WIDE_BLOCK_HEADS: Final = 128
# Elements of a wide head that are copied at a time.
_COPIED: Final = 64
# 16 states are merged at a time, of up to 4,096 programs.
_MERGE_LEVELS: Final = 3
# Strides and number of layers of a launch for one.
_NO_LAYERS: Final = (0,) * 8 + (1,)
# Of a launch that is for all rows.
_ALL_TOKENS: Final = (0, 2**31 - 1)


@triton.jit
def _sums(a1, b1, c1, d1, e1, f1, g1, a2, b2, c2, d2, e2, f2, g2):
    return a1 + a2, b1 + b2, c1 + c2, d1 + d2, e1 + e2, f1 + f2, g1 + g2


@triton.jit
def _first_visible(position, reach, HAS_CHUNKS: tl.constexpr):
    """Position of the first key that a row sees; `reach` is a window, or a chunk's size."""
    first = tl.maximum(position + 1 - reach, 0)
    if HAS_CHUNKS:
        first = position // reach * reach
    return first


@triton.jit
def _slot(program, first):
    """Where a program's state of a segment goes: 0 if the segment began in an earlier program, 1 if it begins here."""
    return program * 2 + (program == first).to(tl.int32)


@triton.jit
def _load_partial(partial_ptr, slots, field: tl.constexpr, heads, present, other, BLOCK_H: tl.constexpr):
    offsets = (slots[:, None] * _STATE_FIELDS + field) * BLOCK_H + heads[None, :]
    # .cg: other SMs wrote these words during this launch, so L1 must not serve them.
    return tl.load(partial_ptr + offsets, mask=present[:, None], other=other, cache_modifier=".cg")


# What differs between layers or is configured must not compile another variant; nor need the host look at it to know
# which variant a launch takes (see `row_stats`).
_FREE_POINTERS: Final = [
    "block_table_ptr",
    "query_start_loc_ptr",
    "seq_lens_ptr",
    "rows_ptr",
    "num_rows_ptr",
    "list_start_ptr",
    "q_scale_ptr",
    "k_scale_ptr",
    "alibi_slopes_ptr",
    "sinks_ptr",
    "counts_ptr",
    "sums_ptr",
    "row_counts_ptr",
    "nonfinite_ptr",
    "window_max_ptr",
    "window_slot_ptr",
    "bounds_ptr",
    "ring_ptr",
    "previous_ptr",
    "queries_ptr",
    "output_ptr",
    "outputs_ptr",
    "key_ptr",
    "value_ptr",
    "kept_kv_ptr",
    "out_ptr",
    "partial_ptr",
    "arrivals_ptr",
    "key_pointers_ptr",
    "places_ptr",
    "factors_ptr",
]
_FREE_INTEGERS: Final = [
    "stride_block_table",
    "stride_q_scale",
    "stride_k_scale",
    "stride_window",
    "stride_ring",
    "stride_previous",
    "stride_queries",
    "stride_queries_head",
    "stride_output_token",
    "stride_output_head",
    "stride_outputs",
    "stride_outputs_head",
    "stride_key_token",
    "stride_key_head",
    "stride_value_token",
    "stride_value_head",
    "stride_kept",
    "stride_kept_tensor",
    "stride_kept_head",
    "stride_q_layer",
    "stride_counts_layer",
    "stride_sums_layer",
    "stride_rows_layer",
    "stride_window_layer",
    "stride_ring_layer",
    "stride_previous_layer",
    "stride_out_layer",
    "num_layers",
    "reach",
    "sink_tokens",
    "local_window",
    "max_rows",
    "first_query",
    "end_query",
    "first_row",
]


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _row_stats_kernel(  # noqa: PLR0912, PLR0915
    q_ptr,  # [T, H, D], of wide heads the first BLOCK_D elements; of rows from first_row on with Q_BY_ROW
    q_rest_ptr,  # the other elements of wide heads
    k_ptr,  # [num_blocks, Hkv, PAGE, D]
    k_desc,  # of k_ptr, in boxes of [1, 1, BLOCK_N, BLOCK_D], or None
    k_rest_desc,  # likewise, of [1, 1, BLOCK_N, BLOCK_REST]
    block_table_ptr,  # [num_seqs, max_blocks] int32
    query_start_loc_ptr,  # [num_seqs + 1] int32
    seq_lens_ptr,  # [num_seqs] int32
    rows_ptr,  # [max_rows, _NUM_ROW_COLUMNS] int32
    num_rows_ptr,  # [1] int32
    list_start_ptr,  # [1] int32
    q_scale_ptr,  # [1] or [Hkv] float32
    k_scale_ptr,  # [1] or [Hkv] float32
    alibi_slopes_ptr,  # [H]
    sinks_ptr,  # [H]
    counts_ptr,  # [A, ADAPTER_HEADS, 2, S, B] int64; [H, 2, S, B] without adapters, and so below
    sums_ptr,  # [A, ADAPTER_HEADS, 2, S] float64
    row_counts_ptr,  # [A, ADAPTER_HEADS, 2] int64
    nonfinite_ptr,  # [A, ADAPTER_HEADS, 2] int64
    window_max_ptr,  # [W, H, 2] float32
    window_slot_ptr,  # [1] int32
    bounds_ptr,  # [S, B - 1] float32
    ring_ptr,  # [ring, H, S + 1] float32
    previous_ptr,  # [ring, H] float32
    queries_ptr,  # [ring, H, D]
    output_ptr,  # [T, H, DV]
    outputs_ptr,  # [ring, H, DV]
    key_ptr,  # [T, Hkv, D]
    value_ptr,  # [T, Hkv, D]
    kept_kv_ptr,  # [ring, 2, Hkv, D]
    out_ptr,  # [max_rows, H, S + 1] float32
    partial_ptr,  # [num_programs, 2, _STATE_FIELDS, BLOCK_H] float32
    arrivals_ptr,  # [_MERGE_LEVELS, num_programs, 2] int32, 0 between launches
    key_pointers_ptr,  # [num_layers] int64, addresses of what k_ptr is one of; all of these only with HAS_LAYERS
    places_ptr,  # [num_layers] int32, which of q's layers and of the accumulators' each is
    factors_ptr,  # [num_layers, Hkv] float32, scale * q_scale * k_scale
    stride_q_token,
    stride_q_head,
    stride_q_rest_token,
    stride_q_rest_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_block_table,
    stride_q_scale,
    stride_k_scale,
    stride_window,
    stride_ring,
    stride_previous,
    stride_queries,
    stride_queries_head,
    stride_output_token,
    stride_output_head,
    stride_outputs,
    stride_outputs_head,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_kept,
    stride_kept_tensor,
    stride_kept_head,
    stride_q_layer,
    stride_counts_layer,
    stride_sums_layer,
    stride_rows_layer,
    stride_window_layer,
    stride_ring_layer,
    stride_previous_layer,
    stride_out_layer,
    num_layers,
    scale,
    soft_cap,
    reach,
    sink_tokens,
    local_window,
    max_rows,
    first_query,
    end_query,
    first_row,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    HAS_RING: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_QUERIES: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_KV: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_START: tl.constexpr,
    Q_BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    COPIED: tl.constexpr,
    ADAPTER_HEADS: tl.constexpr,
    BY_PAGE: tl.constexpr,
    HELD: tl.constexpr,
    HAS_LAYERS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    num_rows = tl.load(num_rows_ptr)
    if HAS_START:
        # Before the branch: the two loads wait for each other nowhere, and an empty list costs what it did.
        rows_ptr += tl.load(list_start_ptr) * _NUM_ROW_COLUMNS
    if num_rows == 0:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    # Tensor cores take no fewer than 16 heads; the work after the dot is done for the real ones only.
    DOT_H: tl.constexpr = BLOCK_H if BLOCK_H > 16 else 16
    GROUP_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    HEAD_BLOCKS: tl.constexpr = NUM_KV_HEADS * GROUP_BLOCKS

    # The plan: which tiles of keys each listed row has, [BLOCK_ROWS]. Every program makes the same one.
    index = tl.arange(0, BLOCK_ROWS)
    listed = index < tl.minimum(num_rows, max_rows)
    row_batch = tl.load(rows_ptr + index * _NUM_ROW_COLUMNS + _ROW_BATCH, mask=listed, other=0)
    row_query = tl.load(rows_ptr + index * _NUM_ROW_COLUMNS + _ROW_QUERY, mask=listed, other=0)
    row_prompt = tl.load(rows_ptr + index * _NUM_ROW_COLUMNS + _ROW_PROMPT_LEN, mask=listed, other=0)
    query_start = tl.load(query_start_loc_ptr + row_batch, mask=listed, other=0)
    query_end = tl.load(query_start_loc_ptr + row_batch + 1, mask=listed, other=0)
    seq_len = tl.load(seq_lens_ptr + row_batch, mask=listed, other=0)
    positions = seq_len - query_end + row_query
    # Padding rows of a captured batch have query length 0 and sequence length 0.
    real = listed & (row_query >= query_start) & (row_query < query_end) & (positions >= 0)
    real = real & (row_query >= first_query) & (row_query < end_query)
    first_tiles = _first_visible(positions, reach, HAS_CHUNKS) // BLOCK_N
    tiles = tl.where(real, positions // BLOCK_N + 1 - first_tiles, 0)
    ends = tl.cumsum(tiles, 0)

    of_layer = tl.max(ends, 0) * HEAD_BLOCKS
    total = of_layer
    if HAS_LAYERS:
        total = of_layer * num_layers
    share = tl.cdiv(total, tl.num_programs(0))
    start = tl.program_id(0) * share
    stop = tl.minimum(start + share, total)

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    offs_s = tl.arange(0, _BLOCK_STATISTICS)
    unit = start
    while unit < stop:
        layer = 0
        before_layer = 0
        if HAS_LAYERS:
            layer = unit // of_layer
            before_layer = layer * of_layer
        in_layer = unit - before_layer
        # One reduction and no load that waits for another: what this costs, a launch for a single row costs, too.
        here = (ends * HEAD_BLOCKS > in_layer) & ((ends - tiles) * HEAD_BLOCKS <= in_layer)
        row, row_tiles, row_end, position, query, batch, prompt_len = tl.reduce(
            (
                tl.where(here, index, 0),
                tl.where(here, tiles, 0),
                tl.where(here, ends, 0),
                tl.where(here, positions, 0),
                tl.where(here, row_query, 0),
                tl.where(here, row_batch, 0),
                tl.where(here, row_prompt, 0),
            ),
            0,
            _sums,
        )
        row_begin = before_layer + (row_end - row_tiles) * HEAD_BLOCKS
        head_block = (unit - row_begin) // row_tiles
        begin = row_begin + head_block * row_tiles
        end = begin + row_tiles
        kv_head = head_block // GROUP_BLOCKS
        in_group = (head_block % GROUP_BLOCKS) * BLOCK_H + offs_h
        heads = kv_head * GROUP + in_group
        is_head = in_group < GROUP

        lowest = _first_visible(position, reach, HAS_CHUNKS)
        n_visible = (position + 1 - lowest).to(tl.uint32, bitcast=True)
        first_tile = lowest // BLOCK_N + (unit - begin)
        last_tile = lowest // BLOCK_N + (tl.minimum(end, stop) - begin)
        q_token = query.to(tl.int64)
        if Q_BY_ROW:
            q_token = (row - first_row).to(tl.int64)
        factor = scale
        q_layer_ptr = q_ptr
        k_layer_ptr = k_ptr
        layer_place = 0
        if HAS_LAYERS:
            layer_place = tl.load(places_ptr + layer).to(tl.int64)
            factor = tl.load(factors_ptr + layer * NUM_KV_HEADS + kv_head)
            q_layer_ptr = q_ptr + layer_place * stride_q_layer
            # The compiler knows nothing of a loaded address: without this it would load element by element.
            k_layer_ptr = tl.load(key_pointers_ptr + layer).to(tl.pointer_type(k_ptr.dtype.element_ty))
            k_layer_ptr = tl.multiple_of(k_layer_ptr, ALIGNMENT)
        if HAS_Q_SCALE:
            factor = factor * tl.load(q_scale_ptr + kv_head * stride_q_scale)
        if HAS_K_SCALE:
            factor = factor * tl.load(k_scale_ptr + kv_head * stride_k_scale)
        if HAS_ALIBI:
            slopes = tl.load(alibi_slopes_ptr + layer * NUM_HEADS + heads, mask=is_head, other=0.0).to(tl.float32)
        k_head_ptr = k_layer_ptr + kv_head.to(tl.int64) * stride_k_head
        table_ptr = block_table_ptr + batch.to(tl.int64) * stride_block_table

        if WIDE:
            # [BLOCK_H, BLOCK_D] and [BLOCK_H, BLOCK_REST]
            q = tl.load(
                q_ptr + q_token * stride_q_token + heads[:, None] * stride_q_head + offs_d[None, :],
                mask=is_head[:, None],
                other=0.0,
            ).to(DOT_DTYPE)
            q_rest = q
            if BLOCK_REST > 0:
                offs_r = tl.arange(0, BLOCK_REST)
                q_rest = tl.load(
                    q_rest_ptr + q_token * stride_q_rest_token + heads[:, None] * stride_q_rest_head + offs_r[None, :],
                    mask=is_head[:, None] & (offs_r < HEAD_SIZE - BLOCK_D)[None, :],
                    other=0.0,
                ).to(DOT_DTYPE)
            of_heads = factor
            if HAS_ALIBI:
                of_heads = slopes
            m, row_zc, row_zg, row_e, row_z2, row_sink, row_local, row_distance, row_own, row_bad = wide_sums(
                q, q_rest, k_head_ptr, k_desc, k_rest_desc, kv_head, table_ptr, first_tile, last_tile, lowest,
                n_visible, position, prompt_len, factor, soft_cap, of_heads, sink_tokens, local_window, stride_k_block,
                stride_k_slot, HEAD_SIZE, PAGE, DOT_DTYPE, HAS_SOFT_CAP, HAS_ALIBI, BLOCK_H, BLOCK_D, BLOCK_REST,
                BLOCK_N, STAGES, BY_PAGE, HELD,
            )  # fmt: skip
        else:
            # [BLOCK_D, DOT_H]; the dot's further heads and the padding of HEAD_SIZE are 0.
            dot_in_group = (head_block % GROUP_BLOCKS) * BLOCK_H + tl.arange(0, DOT_H)
            dot_heads = kv_head * GROUP + dot_in_group
            q = tl.load(
                q_layer_ptr + q_token * stride_q_token + dot_heads[None, :] * stride_q_head + offs_d[:, None],
                mask=(dot_in_group < GROUP)[None, :] & (offs_d < HEAD_SIZE)[:, None],
                other=0.0,
            ).to(DOT_DTYPE)
            # The loop has no barrier and rescales nothing: its exponents are relative to `reference`, the maximum of
            # the first tile, and its sums stay per element (with a running maximum and all 16 columns of the dot:
            # 182 us, not 140, at 64 x 4,096 keys on an H200). Only if a later score is far above the reference, the
            # keys are read once more, with the maximum now known.
            reference = tl.full([BLOCK_H], 0.0, tl.float32)
            m, row_zc, row_zg, row_e, row_z2, row_sink, row_local, row_distance, row_own, row_bad = no_keys(
                tl.zeros([BLOCK_H], tl.float32)
            )
            reference_tile = first_tile
            again = True
            while again:
                # Beside the context's mass the generated one, too: their difference would lose a small one to
                # cancellation. E is times log2(e).
                top, z_context, z_generated, e, z2, sink, local, distance, own, bad = no_keys(
                    tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
                )
                for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
                    j = tile * BLOCK_N + offs_n
                    # lowest <= j <= position in one comparison
                    visible = (j - lowest).to(tl.uint32, bitcast=True) < n_visible
                    k = load_keys(
                        k_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_d, stride_k_block,
                        stride_k_slot, HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
                    )  # fmt: skip
                    # [BLOCK_N, BLOCK_D] @ [BLOCK_D, DOT_H] -> [BLOCK_N, DOT_H]
                    s = tl.dot(widened(k, DOT_DTYPE), q, input_precision="ieee")
                    if BLOCK_H < DOT_H:
                        # Heads of padding score 0 (or NaN, where the real ones are not finite either).
                        s = tl.sum(tl.reshape(s, [BLOCK_N, DOT_H // BLOCK_H, BLOCK_H]), 1)
                    s = s * factor
                    bad += s * 0.0  # stays 0 unless s is NaN or infinite
                    if HAS_SOFT_CAP:
                        s = soft_capped(s, soft_cap)
                    age = (position - j).to(tl.float32)
                    if HAS_ALIBI:
                        s = s - slopes[None, :] * age[:, None]
                    s = tl.where(visible[:, None], s, float("-inf"))
                    if tile == reference_tile:
                        reference = tl.max(s, 0)
                    top = tl.maximum(top, s)
                    t = exponent(s, reference[None, :])
                    p = tl.exp2(t)
                    in_context = (j < prompt_len).to(tl.float32)[:, None]
                    z_context += p * in_context
                    z_generated += p * (1.0 - in_context)
                    e += p * t
                    z2 += p * p
                    sink += p * (j < sink_tokens).to(tl.float32)[:, None]
                    local += p * (position - j < local_window).to(tl.float32)[:, None]
                    distance += p * age[:, None]
                    own = tl.where((j == position)[:, None], s, own)

                m, row_zc, row_zg, row_e, row_z2, row_sink, row_local, row_distance, row_own, row_bad = tl.reduce(
                    (top, z_context, z_generated, e, z2, sink, local, distance, own, bad), 0, combine
                )
                again = (reference_tile >= 0) & (tl.max(m - reference, 0) > _MAX_RISE)
                if again:
                    reference = m
                    reference_tile = -1

            # From sums relative to `reference` to sums relative to m:
            # sum e^(s-m) (s-m) = e^(r-m) (sum e^(s-r) (s-r) + (r-m) sum e^(s-r)).
            rise = exponent(reference, m)
            decay = tl.exp2(rise)
            row_e = (row_e + rise * (row_zc + row_zg)) * decay
            row_zc *= decay
            row_zg *= decay
            row_z2 *= decay * decay
            row_sink *= decay
            row_local *= decay
            row_distance *= decay
        row_bad = (row_bad != 0.0).to(tl.float32)

        complete = (begin >= start) & (end <= stop)
        if not complete:
            first = begin // share
            last = (end - 1) // share
            # As a tree: of up to _MERGE_BLOCK neighbours, the one that arrives last merges all, and stands for them.
            lead = tl.program_id(0)
            step = 1
            counters_ptr = arrivals_ptr
            going = True
            while going:
                state_ptr = partial_ptr + _slot(lead, first) * (_STATE_FIELDS * BLOCK_H) + offs_h
                tl.store(state_ptr, m)
                tl.store(state_ptr + 1 * BLOCK_H, row_zc)
                tl.store(state_ptr + 2 * BLOCK_H, row_zg)
                tl.store(state_ptr + 3 * BLOCK_H, row_e)
                tl.store(state_ptr + 4 * BLOCK_H, row_z2)
                tl.store(state_ptr + 5 * BLOCK_H, row_sink)
                tl.store(state_ptr + 6 * BLOCK_H, row_local)
                tl.store(state_ptr + 7 * BLOCK_H, row_distance)
                tl.store(state_ptr + 8 * BLOCK_H, row_own)
                tl.store(state_ptr + 9 * BLOCK_H, row_bad)
                # The atomic is one thread's: the barrier puts every thread's stores before its release.
                tl.debug_barrier()
                lead = first + (lead - first) // (step * _MERGE_BLOCK) * (step * _MERGE_BLOCK)
                members = tl.minimum((last - lead) // step + 1, _MERGE_BLOCK)
                arrival_ptr = counters_ptr + _slot(lead, first)
                going = tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") == members - 1
                if going:
                    tl.store(arrival_ptr, 0)
                    member = tl.arange(0, _MERGE_BLOCK)
                    there = member < members
                    slots = _slot(lead + member * step, first)
                    part_m = _load_partial(partial_ptr, slots, 0, offs_h, there, float("-inf"), BLOCK_H)
                    part_zc = _load_partial(partial_ptr, slots, 1, offs_h, there, 0.0, BLOCK_H)
                    part_zg = _load_partial(partial_ptr, slots, 2, offs_h, there, 0.0, BLOCK_H)
                    part_e = _load_partial(partial_ptr, slots, 3, offs_h, there, 0.0, BLOCK_H)
                    part_z2 = _load_partial(partial_ptr, slots, 4, offs_h, there, 0.0, BLOCK_H)
                    part_sink = _load_partial(partial_ptr, slots, 5, offs_h, there, 0.0, BLOCK_H)
                    part_local = _load_partial(partial_ptr, slots, 6, offs_h, there, 0.0, BLOCK_H)
                    part_distance = _load_partial(partial_ptr, slots, 7, offs_h, there, 0.0, BLOCK_H)
                    part_own = _load_partial(partial_ptr, slots, 8, offs_h, there, float("-inf"), BLOCK_H)
                    part_bad = _load_partial(partial_ptr, slots, 9, offs_h, there, 0.0, BLOCK_H)
                    m = tl.max(part_m, 0)
                    part_shift = exponent(part_m, m[None, :])
                    part_decay = tl.exp2(part_shift)
                    row_e = tl.sum((part_e + part_shift * (part_zc + part_zg)) * part_decay, 0)
                    row_zc = tl.sum(part_zc * part_decay, 0)
                    row_zg = tl.sum(part_zg * part_decay, 0)
                    row_z2 = tl.sum(part_z2 * (part_decay * part_decay), 0)
                    row_sink = tl.sum(part_sink * part_decay, 0)
                    row_local = tl.sum(part_local * part_decay, 0)
                    row_distance = tl.sum(part_distance * part_decay, 0)
                    row_own = tl.max(part_own, 0)
                    row_bad = tl.max(part_bad, 0)
                    step *= _MERGE_BLOCK
                    complete = step > last - first
                    going = step <= last - first
                    counters_ptr += 2 * tl.num_programs(0)
                    # All have read before the first is overwritten.
                    tl.debug_barrier()

        if complete:
            marks = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_PHASE)
            phase = marks & _ROW_DECODE
            in_sample = in_group < tl.where((marks & _ROW_UNCOUNTED) == 0, GROUP, 0)
            zk = row_zc + row_zg
            top = m
            z = zk
            shrink = tl.full([BLOCK_H], 1.0, tl.float32)  # e^(m - top)
            if HAS_SINKS:
                learned = tl.load(sinks_ptr + layer * NUM_HEADS + heads, mask=is_head, other=float("-inf")).to(
                    tl.float32
                )
                top = tl.maximum(m, learned)
                shrink = tl.exp2(exponent(m, top))
                z = zk * shrink + tl.exp2(exponent(learned, top))
            mass = shrink / z
            n = position + 1 - lowest
            n_context = tl.minimum(tl.maximum(prompt_len - lowest, 0), n)
            # n = 1 has no entropy: its log2 is 0, so divide by 1.
            log_n = tl.where(n > 1, tl.log2(n.to(tl.float32)), 1.0)
            entropy = tl.where(n > 1, (tl.log2(zk) - row_e / zk) / log_n, 0.0)
            context = row_zc / tl.maximum(n_context, 1).to(tl.float32)
            generated = row_zg / tl.maximum(n - n_context, 1).to(tl.float32)
            lookback = tl.where(phase == _ROW_DECODE, context / (context + generated), float("nan"))

            # [S, BLOCK_H]; the bounds of a statistic hold against rounding.
            column = offs_s[:, None]
            value = tl.zeros([_BLOCK_STATISTICS, BLOCK_H], tl.float32)
            value = tl.where(column == _ENTROPY_RATIO, tl.minimum(tl.maximum(entropy, 0.0), 1.0)[None, :], value)
            value = tl.where(column == _EFFECTIVE_KEYS, tl.maximum(zk * zk / row_z2, 1.0)[None, :], value)
            value = tl.where(column == _MAX_LOGIT, m[None, :], value)
            value = tl.where(column == _TOP1_RATIO, mass[None, :], value)
            value = tl.where(column == _SINK_RATIO, tl.minimum(row_sink * mass, 1.0)[None, :], value)
            value = tl.where(column == _LOCAL_RATIO, tl.minimum(row_local * mass, 1.0)[None, :], value)
            value = tl.where(column == _DISTANCE_TOKENS, (row_distance / zk)[None, :], value)
            value = tl.where(column == _SELF_LOGPROB, (row_own - top - tl.log2(z) * _LN2)[None, :], value)
            value = tl.where(column == _LOOKBACK_RATIO, lookback[None, :], value)
            value = tl.where(row_bad[None, :] > 0.0, float("nan"), value)

            is_value = is_head[None, :] & (column < _NUM_STATISTICS)
            if HAS_OUT:
                out = out_ptr + layer_place * stride_out_layer + (row * NUM_HEADS + heads) * (_NUM_STATISTICS + 1)
                tl.store(out[None, :] + column, value, mask=is_value)
                tl.store(out + _NUM_STATISTICS, row_bad, mask=is_head)
            if HAS_RING:
                ring_slot = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_SLOT)
                traced = in_group < tl.where(ring_slot >= 0, GROUP, 0)
                ring = (
                    ring_ptr
                    + layer_place * stride_ring_layer
                    + ring_slot.to(tl.int64) * stride_ring
                    + heads * (_NUM_STATISTICS + 1)
                )
                tl.store(ring[None, :] + column, value, mask=is_value & traced[None, :])
                tl.store(ring + _NUM_STATISTICS, row_bad, mask=traced)
            if HAS_PREVIOUS:
                previous_slot = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_SLOT).to(tl.int64)
                if previous_slot >= 0:
                    # Of one key, once more: in the loop over all keys it would cost what the whole row does here.
                    before = position - 1
                    seen = before >= lowest
                    page = tl.load(table_ptr + before // PAGE, mask=seen, other=0).to(tl.int64)
                    key = k_head_ptr + page * stride_k_block + (before % PAGE) * stride_k_slot
                    again_q = q_layer_ptr + q_token * stride_q_token + heads * stride_q_head
                    s = heads_dot(again_q, key, is_head, seen, BLOCK_D if BLOCK_REST > 0 else HEAD_SIZE, COPIED)
                    if BLOCK_REST > 0:
                        again_rest = q_rest_ptr + q_token * stride_q_rest_token + heads * stride_q_rest_head
                        s += heads_dot(again_rest, key + BLOCK_D, is_head, seen, HEAD_SIZE - BLOCK_D, COPIED)
                    s = s * factor
                    if HAS_SOFT_CAP:
                        s = soft_capped(s, soft_cap)
                    if HAS_ALIBI:
                        s = s - slopes
                    # Rounding in another order than before may find it above the maximum.
                    p = tl.exp2(exponent(tl.minimum(s, m), m)) * mass
                    p = tl.where(seen, p, tl.where(position > 0, 0.0, float("nan")))
                    p = tl.where(row_bad > 0.0, float("nan"), p)
                    of_slot = previous_ptr + layer_place * stride_previous_layer + previous_slot * stride_previous
                    tl.store(of_slot + heads, p, mask=is_head)
            if HAS_QUERIES or HAS_OUTPUT or HAS_KV:
                kept_slot = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_SLOT).to(tl.int64)
                if kept_slot >= 0:
                    token = query.to(tl.int64)
                    if HAS_QUERIES:
                        # Read again: to keep them in registers until here would slow the loop.
                        again_q = q_layer_ptr + q_token * stride_q_token + heads * stride_q_head
                        kept = queries_ptr + kept_slot * stride_queries + heads * stride_queries_head
                        if WIDE:
                            copy_heads(again_q, kept, is_head, BLOCK_D, COPIED)
                        else:
                            copy_heads(again_q, kept, is_head, HEAD_SIZE, BLOCK_D)
                        if BLOCK_REST > 0:
                            again_rest = q_rest_ptr + q_token * stride_q_rest_token + heads * stride_q_rest_head
                            copy_heads(again_rest, kept + BLOCK_D, is_head, HEAD_SIZE - BLOCK_D, COPIED)
                    if HAS_OUTPUT:
                        served = output_ptr + token * stride_output_token + heads * stride_output_head
                        kept_output = outputs_ptr + kept_slot * stride_outputs + heads * stride_outputs_head
                        if WIDE:
                            copy_heads(served, kept_output, is_head, OUTPUT_SIZE, COPIED)
                        else:
                            copy_heads(served, kept_output, is_head, OUTPUT_SIZE, BLOCK_OUTPUT)
                    if HAS_KV:
                        # Once for all query heads of a KV head.
                        is_element = offs_d < tl.where(head_block % GROUP_BLOCKS == 0, HEAD_SIZE, 0)
                        kept_kv = kept_kv_ptr + kept_slot * stride_kept + kv_head * stride_kept_head + offs_d
                        own_key = key_ptr + token * stride_key_token + kv_head * stride_key_head + offs_d
                        own_value = value_ptr + token * stride_value_token + kv_head * stride_value_head + offs_d
                        tl.store(kept_kv, tl.load(own_key, mask=is_element), mask=is_element)
                        tl.store(kept_kv + stride_kept_tensor, tl.load(own_value, mask=is_element), mask=is_element)

            cell = heads * 2 + phase  # into [H, 2]
            place = cell  # likewise, of the row's adapter
            if ADAPTER_HEADS > 0:
                place = ((marks >> _ROW_ADAPTER_SHIFT) * ADAPTER_HEADS + heads) * 2 + phase
            ones = tl.full([BLOCK_H], 1, tl.int64)
            tl.atomic_add(row_counts_ptr + layer_place * stride_rows_layer + place, ones, mask=in_sample, sem="relaxed")
            tl.atomic_add(
                nonfinite_ptr + layer_place * stride_rows_layer + place,
                ones,
                mask=in_sample & (row_bad > 0.0),
                sem="relaxed",
            )
            # + 0.0 turns -0.0 into 0.0, which the integer ordering of float atomics needs.
            tl.atomic_max(
                window_max_ptr
                + (tl.load(window_slot_ptr).to(tl.int64) * stride_window + layer_place * stride_window_layer)
                + cell,
                m + 0.0,
                mask=in_sample & (row_bad == 0.0),
                sem="relaxed",
            )
            counted = is_value & in_sample[None, :] & (value == value)  # noqa: PLR0124 (NaN is no value)
            bucket = tl.zeros([_BLOCK_STATISTICS, BLOCK_H], tl.int32)
            for i in tl.static_range(_NUM_BUCKETS - 1):
                bound = tl.load(bounds_ptr + offs_s * (_NUM_BUCKETS - 1) + i, mask=offs_s < _NUM_STATISTICS, other=0.0)
                bucket += (value > bound[:, None]).to(tl.int32)
            flat = place[None, :] * _NUM_STATISTICS + column  # into [A, ADAPTER_HEADS, 2, S]
            tl.atomic_add(
                counts_ptr + layer_place * stride_counts_layer + flat * _NUM_BUCKETS + bucket,
                tl.full([_BLOCK_STATISTICS, BLOCK_H], 1, tl.int64),
                mask=counted,
                sem="relaxed",
            )
            tl.atomic_add(
                sums_ptr + layer_place * stride_sums_layer + flat, value.to(tl.float64), mask=counted, sem="relaxed"
            )
        unit = tl.minimum(end, stop)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is compiled.

    Attributes:
        keys: of one tile.
        warps: of a program.
        stages: of the software pipeline.
        registers: limit of registers per thread; None is the compiler's choice.
        heads: query heads that share a tile, at most; of wide heads just so many, if need be with padding.
        held: of wide heads, whether the queries stay in registers, not in shared memory.
        beside: how many programs fit beside each other on a multiprocessor, 1 or 2.
    """

    keys: int
    warps: int
    stages: int
    registers: int | None = None
    heads: int = _MAX_BLOCK_HEADS
    held: bool = False
    beside: int = 2


@dataclass(frozen=True, slots=True)
class LayerAccumulators:
    """Where a layer's rows are added; views into the worker's accumulators.

    Attributes:
        counts: [H, 2, S, B] int64, contiguous; bucket i counts values <= bounds[:, i], the last the rest.
        sums: [H, 2, S] float64, contiguous.
        rows, nonfinite: [H, 2] int64, contiguous.
        window_max: [W, H, 2] float32, [H, 2] contiguous.
        window_slot: [1] int32, the slot of `window_max` in use.
        bounds: [S, B - 1] float32, contiguous.
        adapter_heads: with adapters, how many heads the rows of each have, at least H: instead of [H], the first four
            begin with [A * adapter_heads], A slots as the row list names them. 0 is without.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    rows: torch.Tensor
    nonfinite: torch.Tensor
    window_max: torch.Tensor
    window_slot: torch.Tensor
    bounds: torch.Tensor
    adapter_heads: int = 0


class RowStatsWorkspace:
    """Memory that launches share: partial states and arrival counters, a few hundred KiB; 2.8 MiB for 128 heads.

    One workspace serves any number of layers whose launches follow each other (one stream, or streams joined by
    events). Launches that may run at the same time need one each.

    Args:
        device: of the tensors.
        max_rows: largest row list.
        num_heads: largest number of query heads of a layer on this worker.
        num_programs: size of the grid, half of it where one program fills a multiprocessor; None takes two programs for
            each of the device's.
    """

    def __init__(
        self, device: torch.device | str, max_rows: int, num_heads: int, num_programs: int | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if num_programs is None:
            num_programs = _default_programs(torch.device(device))
        self.max_rows = max_rows
        self.num_heads = num_heads
        self.num_programs = num_programs
        # As `_tilings` groups them.
        block_heads = next((heads for heads in (_MAX_BLOCK_HEADS, 64) if num_heads <= heads), _MAX_WIDE_BLOCK_HEADS)
        fields = 2 * _STATE_FIELDS.value * block_heads
        self.partial = torch.empty(num_programs * fields, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(_MERGE_LEVELS * 2 * num_programs, dtype=torch.int32, device=device)
        # Compiled kernels and their constants, by all that decides which one a launch takes.
        self.compiled: dict[tuple[object, ...], tuple[Any, tuple[Any, ...], Tiling]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.partial.nbytes + self.arrivals.nbytes


def _default_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    # Two fit beside each other. Up to here an empty list costs 1.2 us in a graph; with four it costs 2.3 us.
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _tilings(q: torch.Tensor, k_cache: torch.Tensor) -> tuple[Tiling, ...]:
    """The fastest of those measured on an H200 (bench_row_stats, suites tune, shapes and latent, 2026-11)."""
    if k_cache.shape[3] > MAX_HEAD_SIZE:
        return _wide_tilings(q, k_cache)
    if torch.float32 in (q.dtype, k_cache.dtype):
        return (Tiling(keys=32, warps=4, stages=3),)  # not tuned: float32 serves tests
    # A tile of small heads is too few bytes in flight: 81 us against 93 us at 64 x 4,096 keys of size 64. With more
    # heads per KV head, 128 keys spill.
    if q.shape[2] <= 64 and q.shape[1] // k_cache.shape[1] <= 4:
        return (Tiling(keys=128, warps=4, stages=5),)
    return (Tiling(keys=64, warps=4, stages=5),)


def _wide_tilings(q: torch.Tensor, k_cache: torch.Tensor) -> tuple[Tiling, ...]:
    """Several, the fastest first, since what fits depends on the GPU's shared memory: the queries of 128 heads are 144
    KiB of bfloat16, a tile of 32 keys is 36 KiB."""
    group, page = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    best: tuple[Tiling, ...]
    few = (Tiling(keys=32, warps=4, stages=2), Tiling(keys=16, warps=4, stages=1))
    wide = (
        Tiling(keys=32, warps=8, stages=2, heads=128, beside=1),
        Tiling(keys=64, warps=4, stages=2, heads=64, beside=1),
        Tiling(keys=32, warps=8, stages=2, heads=64, beside=1),
    )
    others = (*(tiling for tiling in wide if tiling.heads < 2 * group), *few)
    if not is_hopper(q.device) or torch.float32 in (q.dtype, k_cache.dtype):
        return others
    fp8 = k_cache.itemsize == 1
    # The second of each is for pages of 32 tokens.
    if group <= 16:
        stages = 4 if fp8 else 3
        best = (Tiling(keys=64, warps=4, stages=stages, beside=1), Tiling(keys=32, warps=4, stages=stages))
    elif group <= 64 and fp8:
        best = (Tiling(keys=32, warps=4, stages=4, heads=64, held=True),)
    elif group <= 64:
        best = tuple(Tiling(keys, 4, stages, heads=64, beside=1) for keys, stages in ((64, 2), (32, 4)))
    else:
        best = tuple(Tiling(keys, 8, stages, heads=128, held=True, beside=1) for keys, stages in ((64, 3), (32, 4)))
    return (*(tiling for tiling in best if page % tiling.keys == 0 and _by_page(k_cache, tiling)), *others)


def _by_page(k_cache: torch.Tensor, tiling: Tiling) -> bool:
    """Whether tiles lie within a page and can be copied as a whole, by a tensor descriptor."""
    itemsize = k_cache.element_size()
    aligned = k_cache.data_ptr() % 16 == 0 and not any(stride * itemsize % 16 for stride in _box_strides(k_cache)[:3])
    return k_cache.shape[2] % tiling.keys == 0 and aligned and is_hopper(k_cache.device)


def _box_strides(k_cache: torch.Tensor) -> list[int]:
    """Strides that a tensor descriptor takes: one KV head is as far from the next as a page is long, not 0."""
    block, head, slot, element = k_cache.stride()
    return [block, head if k_cache.shape[1] > 1 else k_cache.shape[2] * slot, slot, element]


def _descriptors(k_cache: torch.Tensor, tiling: Tiling) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Of a wide head's two parts. Made for each launch: to keep them would keep the cache."""
    if not _by_page(k_cache, tiling):
        return None, None
    first, rest = head_parts(k_cache.shape[3])
    shape, strides = list(k_cache.shape), _box_strides(k_cache)
    return (
        TensorDescriptor(k_cache, shape, strides, [1, 1, tiling.keys, first]),
        TensorDescriptor(k_cache, shape, strides, [1, 1, tiling.keys, rest]) if rest else None,
    )


def row_stats(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    num_rows: torch.Tensor,
    params: LayerParams,
    accumulators: LayerAccumulators,
    workspace: RowStatsWorkspace,
    *,
    sink_tokens: int = 4,
    local_window: int = 128,
    ring: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
    queries: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    kept_kv: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    list_start: torch.Tensor | None = None,
    tiling: Tiling | None = None,
    tokens: tuple[int, int] = _ALL_TOKENS,
    first_row: int | None = None,
) -> None:
    """Measure the listed rows of one layer on the current stream; asynchronous, allocates nothing on the device.

    Args:
        q: [T, H, D] float32, float16, bfloat16 or FP8; the last dimension contiguous. Of wide heads (D > 256) also as
            two such tensors, the first of the largest power of two elements that D has: [T, H, 512] and [T, H, 64].
        k_cache: [num_blocks, Hkv, block_size, D], any strides but a contiguous last dimension; H a multiple of Hkv.
        block_table: [num_seqs, max_blocks] int32, the last dimension contiguous.
        query_start_loc: [num_seqs + 1] int32, first token of each sequence's queries.
        seq_lens: [num_seqs] int32, keys of each sequence including this step's; 0 is padding.
        rows: [max_rows, NUM_ROW_COLUMNS] int32 row list, see `core/rows.py`; rows marked ROW_UNCOUNTED are not added
            to the accumulators.
        num_rows: int32, its first element is the number of rows in use; 0 leaves everything as it is.
        params: of the layer.
        accumulators: of the layer.
        workspace: for at least rows.shape[0] rows and H heads.
        sink_tokens, local_window: of the statistics sink_ratio and local_ratio, in tokens.
        ring: [slots, H, S + 1] float32, [H, S + 1] contiguous, or None: traced rows are written to their slot.
        previous: [slots, H] float32, the last dimension contiguous, or None: the attention of traced rows to the
            position before their own is written to their slot; NaN where statistics are, and in the row at position 0.
        queries: [slots, H, D] of a type that holds q's numbers, the last dimension contiguous, or None: the
            queries of traced rows are written to their slot.
        output, outputs: [T, H, Dv] as the layer's kernel left it before on this stream, and [slots, H, Dv] of its type,
            both contiguous in the last dimension, or None: outputs of traced rows are written to their slot.
        key, value, kept_kv: K and V of the step's tokens, [T, Hkv, D] each, and [slots, 2, Hkv, D] of their type, all
            contiguous in the last dimension, or None: those of traced rows are written to their slot. Not if V has
            another head size than K, nor of wide heads.
        out: [max_rows, H, S + 1] float32, contiguous, or None: every row is written, padding rows are left alone.
        list_start: int32, its first element tells how many entries behind the begin of `rows` the list begins, whose
            rows are counted from there; the memory behind `rows` must hold it. None is 0.
        tiling: None takes the fastest that fits the GPU.
        tokens: only rows whose ROW_QUERY is in [first, end) are measured.
        first_row: q has the queries of the row list from this row on, which are all that are measured, instead of those
            of the tokens.

    Raises:
        ValueError: for a shape the kernel does not do.
    """
    q, q_rest = _parts(q, k_cache)
    num_heads = q.shape[1]
    head_size = q.shape[2] + (0 if q_rest is None else q_rest.shape[2])
    num_kv_heads, page = k_cache.shape[1:3]
    max_rows = rows.shape[0]
    if head_size > MAX_WIDE_HEAD_SIZE or head_size != k_cache.shape[3] or num_heads % num_kv_heads:
        raise ValueError(
            f"q {(*q.shape[:2], head_size)} and k_cache {tuple(k_cache.shape)} must have the same head size of at most "
            f"{MAX_WIDE_HEAD_SIZE} and query heads that are a multiple of the KV heads; do not observe this layer"
        )
    if max_rows > workspace.max_rows or num_heads > workspace.num_heads:
        raise ValueError(
            f"workspace must hold {max_rows} rows and {num_heads} heads, got {workspace.max_rows} and "
            f"{workspace.num_heads}; make it larger"
        )
    if page * k_cache.stride(2) > MAX_PAGE_ELEMENTS:
        raise ValueError(
            f"a page of k_cache must span at most {MAX_PAGE_ELEMENTS} elements, got {page * k_cache.stride(2)}; "
            f"do not observe this layer"
        )
    if q.stride(2) != 1 or k_cache.stride(3) != 1 or block_table.stride(1) != 1:
        raise ValueError("q, k_cache and block_table must be contiguous in their last dimension; pass such views")
    if output is None or outputs is None:
        output = outputs = None
    if key is None or value is None or kept_kv is None or key.shape != value.shape:
        key = value = kept_kv = None
    check_kept(k_cache, num_heads, output, outputs, key, value, kept_kv)
    # Everything that Triton specialises the kernel on: known again, its own look-up is skipped (33 instead of 76 us).
    variant = (
        params,
        tiling,
        q.dtype,
        k_cache.dtype,
        q.shape[1:],
        k_cache.shape[1:],
        q.stride(),
        k_cache.stride(),
        q.data_ptr() % 16,
        k_cache.data_ptr() % 16,
        None if q_rest is None else (q_rest.stride(), q_rest.data_ptr() % 16),
        first_row is None,
        max_rows,
        ring is None,
        previous is None,
        None if queries is None else queries.dtype,
        None if output is None else (output.dtype, output.shape[2]),
        None if key is None else key.dtype,
        out is None,
        list_start is None,
        accumulators.adapter_heads,
    )
    q_scale, k_scale = params.q_scale, params.k_scale
    before_table = (q, q_rest, k_cache)
    arguments = (
        block_table,
        query_start_loc,
        seq_lens,
        rows,
        num_rows,
        list_start,
        q_scale,
        k_scale,
        params.alibi_slopes,
        params.sinks,
        accumulators.counts,
        accumulators.sums,
        accumulators.rows,
        accumulators.nonfinite,
        accumulators.window_max,
        accumulators.window_slot,
        accumulators.bounds,
        ring,
        previous,
        queries,
        output,
        outputs,
        key,
        value,
        kept_kv,
        out,
        workspace.partial,
        workspace.arrivals,
        None,
        None,
        None,
        q.stride(0),
        q.stride(1),
        *_strides(q_rest, 2),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        block_table.stride(0),
        0 if q_scale is None or q_scale.numel() == 1 else 1,
        0 if k_scale is None or k_scale.numel() == 1 else 1,
        accumulators.window_max.stride(0),
        0 if ring is None else ring.stride(0),
        0 if previous is None else previous.stride(0),
        0 if queries is None else queries.stride(0),
        0 if queries is None else queries.stride(1),
        *_strides(output, 2),
        *_strides(outputs, 2),
        *_strides(key, 2),
        *_strides(value, 2),
        *_strides(kept_kv, 3),
        *_NO_LAYERS,
        params.scale,
        params.soft_cap or 0.0,
        params.chunk_size or params.sliding_window or UNLIMITED,
        sink_tokens,
        local_window,
        max_rows,
        *tokens,
        first_row or 0,
    )
    wide = head_size > MAX_HEAD_SIZE

    def launch_arguments(tiling: Tiling) -> tuple[Any, ...]:
        return (*before_table, *(_descriptors(k_cache, tiling) if wide else (None, None)), *arguments)

    def grid(tiling: Tiling) -> int:
        return max(workspace.num_programs * tiling.beside // 2, 1)

    known = workspace.compiled.get(variant)
    if known is not None:
        compiled, constants, chosen = known
        compiled[(grid(chosen), 1, 1)](*launch_arguments(chosen), *constants)
        return
    tilings = (tiling,) if tiling is not None else _tilings(q, k_cache)
    for last, candidate in enumerate(tilings, 1 - len(tilings)):
        constants = _constants(
            q, k_cache, max_rows, params, candidate,
            ring=ring, previous=previous, queries=queries, output=output, kept_kv=kept_kv, out=out,
            list_start=list_start, by_row=first_row is not None, adapter_heads=accumulators.adapter_heads,
        )  # fmt: skip
        try:
            compiled = _row_stats_kernel[(grid(candidate),)](
                *launch_arguments(candidate),
                *constants,
                num_warps=candidate.warps,
                maxnreg=candidate.registers,
                **FUSED,
            )
        except triton.runtime.errors.OutOfResources:
            if last == 0:
                raise
            continue
        if compiled is not None:  # None from the interpreter
            workspace.compiled[variant] = (compiled, constants, candidate)
        return


def row_stats_layers(
    q: torch.Tensor,
    layers: ProbedLayers,
    places: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    num_rows: torch.Tensor,
    params: LayerParams,
    accumulators: LayerAccumulators,
    workspace: RowStatsWorkspace,
    *,
    sink_tokens: int = 4,
    local_window: int = 128,
    ring: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    list_start: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Measure the listed rows of several layers in one launch, from queries that were kept; as `row_stats` otherwise.

    For few rows, where a launch costs more than what it reads: after the forward pass, while the step's keys are in the
    cache and its tables in use. Not for wide heads.

    Args:
        q: [max_rows, A, H, D] queries of the rows of the list in each of A layers, as `row_keep` leaves them.
        layers: L of them, alike in reach and soft cap, too.
        places: int32 [L], which of the A each of them is.
        block_table, query_start_loc, seq_lens, rows, num_rows: as of `row_stats`.
        params: of one of the layers; its reach and its soft cap are those of all.
        accumulators: of all A layers: its tensors begin with [A] (`window_max` with [W, A]), but for `window_slot` and
            `bounds`.
        workspace: as of `row_stats`.
        sink_tokens, local_window: likewise.
        ring: [slots, A, H, S + 1] float32, [H, S + 1] contiguous, or None.
        previous: [slots, A, H] float32, [H] contiguous, or None.
        out: [A, max_rows, H, S + 1] float32, contiguous, or None.
        list_start: as of `row_stats`.
        tiling: None takes the fastest that fits the GPU.

    Raises:
        ValueError: for a shape the kernel does not do.
    """
    k_cache = layers.like
    _, num_kv_heads, page, head_size = k_cache.shape
    max_rows, _, num_heads, _ = q.shape
    if head_size > MAX_HEAD_SIZE or q.shape[3] != head_size or num_heads != layers.num_heads:
        raise ValueError(
            f"q {tuple(q.shape)} must end with the layers' {layers.num_heads} heads of size {head_size}, of at most "
            f"{MAX_HEAD_SIZE}; measure such layers one by one"
        )
    if rows.shape[0] < max_rows or max_rows > workspace.max_rows or num_heads > workspace.num_heads:
        raise ValueError(
            f"the row list and the workspace must hold the {max_rows} rows of q, and the workspace its {num_heads} "
            f"heads, got {rows.shape[0]} and {workspace.max_rows} rows and {workspace.num_heads} heads; enlarge them"
        )
    if q.stride(3) != 1 or block_table.stride(1) != 1:
        raise ValueError("q and block_table must be contiguous in their last dimension; pass such views")
    of_one = q[:, 0]
    if tiling is None:
        tiling = _tilings(of_one, k_cache)[0]
    variant = (
        "layers",
        tiling,
        q.dtype,
        k_cache.dtype,
        q.shape,
        k_cache.shape[1:],
        q.stride(),
        k_cache.stride(),
        q.data_ptr() % 16,
        k_cache.data_ptr() % 16,
        layers.alignment,
        params.soft_cap,
        params.chunk_size is None,
        layers.alibi_slopes is None,
        layers.sinks is None,
        ring is None,
        previous is None,
        out is None,
        list_start is None,
        accumulators.adapter_heads,
    )
    a = accumulators
    arguments = (
        of_one, None, k_cache, None, None, block_table, query_start_loc, seq_lens, rows, num_rows, list_start, None,
        None, layers.alibi_slopes, layers.sinks,
        a.counts, a.sums, a.rows, a.nonfinite, a.window_max, a.window_slot, a.bounds,
        ring, previous, None, None, None, None, None, None, out, workspace.partial, workspace.arrivals,
        layers.key_pointers, places, layers.factors,
        q.stride(0), q.stride(2), 0, 0, *k_cache.stride()[:3], block_table.stride(0), 0, 0,
        a.window_max.stride(0), 0 if ring is None else ring.stride(0), 0 if previous is None else previous.stride(0),
        *(0,) * 13,
        q.stride(1), a.counts.stride(0), a.sums.stride(0), a.rows.stride(0), a.window_max.stride(1),
        0 if ring is None else ring.stride(1), 0 if previous is None else previous.stride(1),
        0 if out is None else out.stride(0), len(layers.key_pointers),
        params.scale, params.soft_cap or 0.0, params.chunk_size or params.sliding_window or UNLIMITED,
        sink_tokens, local_window, max_rows, *_ALL_TOKENS, 0,
    )  # fmt: skip
    grid = (max(workspace.num_programs * tiling.beside // 2, 1), 1, 1)
    known = workspace.compiled.get(variant)
    if known is not None:
        compiled, constants, _ = known
        compiled[grid](*arguments, *constants)
        return
    constants = (
        num_heads, num_kv_heads, head_size, head_size, page, dot_dtype(q.dtype, k_cache.dtype, not q.is_cuda), False,
        False, bool(params.soft_cap), layers.alibi_slopes is not None, layers.sinks is not None,
        params.chunk_size is not None, ring is not None, previous is not None, False, False, False, out is not None,
        list_start is not None, True, False, triton.next_power_of_2(max_rows),
        min(triton.next_power_of_2(num_heads // num_kv_heads), tiling.heads), head_parts(head_size)[0], 0,
        max(triton.next_power_of_2(head_size), 16), tiling.keys, tiling.stages, _COPIED, accumulators.adapter_heads,
        False, tiling.held, True, layers.alignment,
    )  # fmt: skip
    compiled = _row_stats_kernel[grid](
        *arguments, *constants, num_warps=tiling.warps, maxnreg=tiling.registers, **FUSED
    )
    if compiled is not None:  # None from the interpreter
        workspace.compiled[variant] = (compiled, constants, tiling)


def _parts(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor], k_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries as the kernel loads them: in one part, or wide ones in two."""
    first, rest = head_parts(k_cache.shape[3])
    if isinstance(q, torch.Tensor):
        return (q[..., :first], q[..., first:]) if rest else (q, None)
    if q[0].shape[2] != first or q[0].shape[:2] != q[1].shape[:2] or q[0].dtype != q[1].dtype or q[1].stride(2) != 1:
        raise ValueError(
            f"the parts of q must be [T, H, {first}] and [T, H, {k_cache.shape[3] - first}] of one type and contiguous "
            f"in their last dimension, got {list(q[0].shape)} {q[0].dtype} and {list(q[1].shape)} {q[1].dtype}; pass a "
            "tensor of whole queries"
        )
    return q


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    """The first ones, 0 without a tensor."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


def check_kept(
    k_cache: torch.Tensor,
    num_heads: int,
    output: torch.Tensor | None,
    outputs: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kept_kv: torch.Tensor | None,
) -> None:
    """What is kept beside the queries has the shapes and types of where it goes."""
    if output is not None and outputs is not None:
        _check_copy("output", output, "outputs", outputs, (num_heads, output.shape[2]))
    if key is not None and value is not None and kept_kv is not None:
        of_token = (k_cache.shape[1], k_cache.shape[3])
        if k_cache.shape[3] > MAX_HEAD_SIZE:
            raise ValueError(f"key and value must be of heads of at most {MAX_HEAD_SIZE} elements; pass None")
        _check_copy("key", key, "kept_kv", kept_kv, of_token)
        _check_copy("value", value, "kept_kv", kept_kv, of_token)


def _check_copy(name: str, tensor: torch.Tensor, kept_name: str, kept: torch.Tensor, of_token: tuple[int, int]) -> None:
    if tensor.shape[1:] != of_token or kept.shape[-2:] != of_token or tensor.dtype != kept.dtype:
        raise ValueError(
            f"{name} and {kept_name} must end with {list(of_token)} and be of one type, got {list(tensor.shape)} "
            f"{tensor.dtype} and {list(kept.shape)} {kept.dtype}; pass a ring for this layer"
        )
    if tensor.stride(-1) != 1 or kept.stride(-1) != 1:
        raise ValueError(f"{name} and {kept_name} must be contiguous in their last dimension; pass such views")


def _constants(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    max_rows: int,
    params: LayerParams,
    tiling: Tiling,
    *,
    ring: torch.Tensor | None,
    previous: torch.Tensor | None,
    queries: torch.Tensor | None,
    output: torch.Tensor | None,
    kept_kv: torch.Tensor | None,
    out: torch.Tensor | None,
    list_start: torch.Tensor | None,
    by_row: bool,
    adapter_heads: int,
) -> tuple[Any, ...]:
    """The kernel's constexpr arguments, in order."""
    num_heads = q.shape[1]
    _, num_kv_heads, page, head_size = k_cache.shape
    block_d, block_rest = head_parts(head_size)
    wide = head_size > MAX_HEAD_SIZE
    block_heads = min(triton.next_power_of_2(num_heads // num_kv_heads), tiling.heads)
    output_size = head_size if output is None else output.shape[2]
    return (
        num_heads,
        num_kv_heads,
        head_size,
        output_size,
        page,
        dot_dtype(q.dtype, k_cache.dtype, not q.is_cuda),
        params.q_scale is not None,
        params.k_scale is not None,
        bool(params.soft_cap),
        params.alibi_slopes is not None,
        params.sinks is not None,
        params.chunk_size is not None,
        ring is not None,
        previous is not None,
        queries is not None,
        output is not None,
        kept_kv is not None,
        out is not None,
        list_start is not None,
        by_row,
        wide,
        triton.next_power_of_2(max_rows),
        tiling.heads if wide else block_heads,
        block_d,
        block_rest,
        max(triton.next_power_of_2(output_size), 16),
        tiling.keys,
        tiling.stages,
        _COPIED,
        adapter_heads,
        wide and _by_page(k_cache, tiling),
        tiling.held,
        False,
        16,
    )
