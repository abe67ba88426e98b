"""Attention rows of a whole chunk of one request's prompt in one layer, on a GPU: statistics, shares, column sums.

Owns the kernels and their launches. Where `row_stats.py` reads all keys for each row of a list, this takes consecutive
rows of one sequence in tiles, so that tensor cores score them and a key is read once for many of them. The statistics
are those of `glassbox/core/statistics.py`; the exact form of the rest stands in `reference/prompt_rows.py`. It runs
outside CUDA graphs, from the layer's own queries, and never waits for the device.

How it works. Two passes over the keys. In the first a program has a tile of queries of one head and goes over the tiles
of keys that they see, with a running maximum m: out come the row's statistics, and m and Z. In the second a program has
a tile of keys and goes over the queries that see them: with m and Z known, the attention that the keys receive is a sum
in its registers, as that of its squares is. So nothing is added by two programs, and the same input gives the same
bits. Masks, the first `sink_tokens` keys, the `local_window` and the row's own key are looked at in the tiles alone
that have them. Masses of spans are a third pass, over the tiles that have some, if any is asked.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.paged_keys import (
    FUSED,
    LOG2E,
    MAX_HEAD_SIZE,
    MAX_PAGE_ELEMENTS,
    UNLIMITED,
    dot_dtype,
    first_visible,
    head_parts,
    is_hopper,
    load_keys,
    soft_capped,
)
from glassbox.kernels.row_state import exponent

MAX_SPANS: Final = 16

_NUM_STATISTICS = tl.constexpr(NUM_STATISTICS)
_ENTROPY_RATIO = tl.constexpr(INDEX["entropy_ratio"])
_EFFECTIVE_KEYS = tl.constexpr(INDEX["effective_keys"])
_MAX_LOGIT = tl.constexpr(INDEX["max_logit"])
_TOP1_RATIO = tl.constexpr(INDEX["top1_ratio"])
_SINK_RATIO = tl.constexpr(INDEX["sink_ratio"])
_LOCAL_RATIO = tl.constexpr(INDEX["local_ratio"])
_DISTANCE_TOKENS = tl.constexpr(INDEX["distance_tokens"])
_SELF_LOGPROB = tl.constexpr(INDEX["self_logprob"])
_LOOKBACK_RATIO = tl.constexpr(INDEX["lookback_ratio"])
_LN2 = tl.constexpr(0.6931471805599453)
_MAX_SPANS = tl.constexpr(MAX_SPANS)
_LANES = tl.constexpr(8)  # columns of a tensor core's result, of which a thread has two

# What differs between steps, layers and requests must not compile another variant.
_FREE_POINTERS: Final = [
    "table_ptr",
    "heads_ptr",
    "q_scale_ptr",
    "k_scale_ptr",
    "alibi_slopes_ptr",
    "sinks_ptr",
    "spans_ptr",
    "reference_ptr",
    "stats_ptr",
    "previous_ptr",
    "span_mass_ptr",
    "received_ptr",
    "squares_ptr",
]
_FREE_INTEGERS: Final = [
    "stride_q_scale",
    "stride_k_scale",
    "num_heads",
    "num_rows",
    "first_position",
    "reach",
    "sink_tokens",
    "local_window",
    "stride_reference",
    "stride_received",
    "first_tile",
    "last_tile",
    "num_spans",
]


@triton.jit
def _factor(scale, q_scale_ptr, k_scale_ptr, stride_q_scale, stride_k_scale, kv_head,
            HAS_Q_SCALE: tl.constexpr, HAS_K_SCALE: tl.constexpr):  # fmt: skip
    """Of a KV head's dot products."""
    factor = scale
    if HAS_Q_SCALE:
        factor = factor * tl.load(q_scale_ptr + kv_head * stride_q_scale)
    if HAS_K_SCALE:
        factor = factor * tl.load(k_scale_ptr + kv_head * stride_k_scale)
    return factor


@triton.jit
def _scores(dot, age, factor, soft_cap, slope, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Of dot products; without cap and bias these themselves, whose factor then is that of their differences."""
    s = dot
    if HAS_SOFT_CAP or HAS_ALIBI:
        s = s * factor
    if HAS_SOFT_CAP:
        s = soft_capped(s, soft_cap)
    if HAS_ALIBI:
        s = s - slope * age.to(tl.float32)
    return s


@triton.jit
def _load_queries(q_head_ptr, rows, offs_d, num_rows, stride_q_token,
                  HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[rows, BLOCK_D]; the last row's behind the chunk's rows, and 0 in the padding of HEAD_SIZE."""
    row = tl.minimum(rows, num_rows - 1).to(tl.int64)
    wanted = (offs_d >= 0)[None, :]
    if HEAD_SIZE < BLOCK_D:
        wanted = (offs_d < HEAD_SIZE)[None, :]
    return tl.load(q_head_ptr + row[:, None] * stride_q_token + offs_d[None, :], mask=wanted, other=0.0)


@triton.jit
def _by_lane(tile):
    """[X, Y] as [X, Y // LANES, LANES]. A thread has some lanes of the columns that tensor cores give it, so what goes
    along axis 1 alone stays in its registers."""
    return tl.reshape(tile, [tile.shape[0], tile.shape[1] // _LANES, _LANES])


@triton.jit
def _halves(tile):
    """Of [X, GROUPS, LANES] along axis 1."""
    tile = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2, _LANES])
    return tl.split(tl.permute(tile, (0, 2, 3, 1)))


@triton.jit
def _add_group(z, e, z2, groups, p, t, GROUP: tl.constexpr):
    """Sums of p, p * t, p * p and p * GROUP, with the group's [X, 1, LANES]."""
    p = tl.reshape(p, [p.shape[0], _LANES])
    t = tl.reshape(t, [t.shape[0], _LANES])
    return z + p, e + p * t, z2 + p * p, groups + p * GROUP


@triton.jit
def _add_two(z, e, z2, groups, p, t, FIRST: tl.constexpr):
    p_0, p_1 = _halves(p)
    t_0, t_1 = _halves(t)
    z, e, z2, groups = _add_group(z, e, z2, groups, p_0, t_0, FIRST)
    return _add_group(z, e, z2, groups, p_1, t_1, FIRST + 1)


@triton.jit
def _add_four(z, e, z2, groups, p, t, FIRST: tl.constexpr):
    p_0, p_1 = _halves(p)
    t_0, t_1 = _halves(t)
    z, e, z2, groups = _add_two(z, e, z2, groups, p_0, t_0, FIRST)
    return _add_two(z, e, z2, groups, p_1, t_1, FIRST + 2)


@triton.jit
def _add_eight(z, e, z2, groups, p, t, FIRST: tl.constexpr):
    p_0, p_1 = _halves(p)
    t_0, t_1 = _halves(t)
    z, e, z2, groups = _add_four(z, e, z2, groups, p_0, t_0, FIRST)
    return _add_four(z, e, z2, groups, p_1, t_1, FIRST + 4)


@triton.jit
def _add_groups(z, e, z2, groups, p, t):
    """`_add_group` for all of [X, 2, 4, 8 or 16, LANES], one after the other, as that is one multiply-add each: the
    compiler's own sums are trees, which need more. (Triton before 3.6 has no function that calls itself.)"""
    tl.static_assert(p.shape[1] <= 16 and p.shape[1] >= 2, "tiles have 16 to 128 keys")
    if p.shape[1] == 2:
        z, e, z2, groups = _add_two(z, e, z2, groups, p, t, 0)
    elif p.shape[1] == 4:
        z, e, z2, groups = _add_four(z, e, z2, groups, p, t, 0)
    elif p.shape[1] == 8:
        z, e, z2, groups = _add_eight(z, e, z2, groups, p, t, 0)
    else:
        p_0, p_1 = _halves(p)
        t_0, t_1 = _halves(t)
        z, e, z2, groups = _add_eight(z, e, z2, groups, p_0, t_0, 0)
        z, e, z2, groups = _add_eight(z, e, z2, groups, p_1, t_1, 8)
    return z, e, z2, groups


@triton.jit
def _add_keys(
    m, z, e, z2, distance, bad,  # [BLOCK_M, LANES], of the keys before
    dot,  # [BLOCK_M, BLOCK_N]
    begin,  # position of the first of the tile's keys
    positions,  # [BLOCK_M], of the rows
    lowest,  # [BLOCK_M], the first key that each sees
    factor, soft_cap, slope, unit,
    MASKED: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state with a tile's keys in it, their p relative to the new m, their s, both [BLOCK_M, BLOCK_N // LANES,
    LANES], and what the old sums decay by."""
    offs_n = tl.reshape(tl.arange(0, BLOCK_N), [1, BLOCK_N // _LANES, _LANES])
    dot = _by_lane(dot)
    ages = (positions - begin)[:, None, None] - offs_n
    s = _scores(dot, ages, factor, soft_cap, slope, HAS_SOFT_CAP, HAS_ALIBI)
    if MASKED:
        visible = (ages >= 0) & (begin + offs_n >= lowest[:, None, None])
        bad += tl.sum(tl.where(visible, dot * 0.0, 0.0), 1)
        s = tl.where(visible, s, float("-inf"))
    elif HAS_SOFT_CAP:
        bad += tl.sum(dot * 0.0, 1)  # capped, what is infinite is not any more
    now = tl.maximum(m, tl.max(s, 1))
    # Subtract before scaling: exact for scores near the maximum however large they are.
    t = (s - now[:, None, :]) * unit
    if MASKED:
        t = tl.maximum(t, -256.0)  # 2^-256 is 0, and 0 * -inf is not
    p = tl.exp2(t)
    rise = tl.maximum((m - now) * unit, -256.0)
    decay = tl.exp2(rise)
    zeros = tl.zeros_like(z)
    # A visible score that is not finite makes E NaN: 0 * -inf is.
    of_tile, e, z2, groups = _add_groups(zeros, (e + rise * z) * decay, z2 * (decay * decay), zeros, p, t)
    z = z * decay + of_tile
    ahead = (positions - begin).to(tl.float32)[:, None] - tl.arange(0, _LANES).to(tl.float32)[None, :]
    distance = distance * decay + (ahead * of_tile - _LANES * groups)
    return now, z, e, z2, distance, bad, p, s, decay


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _prompt_rows_kernel(  # noqa: PLR0915
    q_ptr,  # [num_rows, H, D]
    k_ptr,  # [num_blocks, Hkv, PAGE, D]
    table_ptr,  # [max_blocks] int32
    heads_ptr,  # [num_heads] int32
    q_scale_ptr,  # [1] or [Hkv] float32
    k_scale_ptr,  # [1] or [Hkv] float32
    alibi_slopes_ptr,  # [H]
    sinks_ptr,  # [H]
    stats_ptr,  # [num_rows, num_heads, S + 1] float32
    previous_ptr,  # [num_rows, num_heads] float32
    reference_ptr,  # [num_heads, 2, stride_reference] float32
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_q_scale,
    stride_k_scale,
    stride_reference,
    num_heads,
    num_rows,
    first_position,
    scale,
    soft_cap,
    reach,
    sink_tokens,
    local_window,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last tiles see the most keys, so they go first.
    row_tile = tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads
    number = tl.program_id(0) % num_heads
    head = tl.load(heads_ptr + number)
    kv_head = head // GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = first_position + rows
    lowest = first_visible(positions, reach)
    first = first_position + row_tile * BLOCK_M
    last = first_position + tl.minimum(row_tile * BLOCK_M + BLOCK_M, num_rows) - 1

    factor = _factor(scale, q_scale_ptr, k_scale_ptr, stride_q_scale, stride_k_scale, kv_head, HAS_Q_SCALE, HAS_K_SCALE)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head).to(tl.float32)
    # log2 of a weight is (s - m) * unit, and a score is s * natural.
    natural = factor
    if HAS_SOFT_CAP or HAS_ALIBI:
        natural = 1.0
    unit = natural * LOG2E
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    q = _load_queries(
        q_ptr + head.to(tl.int64) * stride_q_head, rows, offs_d, num_rows, stride_q_token, HEAD_SIZE, BLOCK_D
    ).to(DOT_DTYPE)

    # Each lane has a state of its own until all keys are in it: threads exchange nothing in the loops.
    zeros = tl.zeros([BLOCK_M, _LANES], tl.float32)
    m = zeros + float("-inf")
    z = zeros
    e = zeros
    z2 = zeros
    distance = zeros
    bad = zeros
    sink = zeros
    local = zeros
    previous = zeros
    own = m
    # Tiles [plain, plain_end) are seen whole by all rows, and have neither sink nor local keys.
    begin_tile = first_visible(first, reach) // BLOCK_N
    end_tile = last // BLOCK_N + 1
    plain = tl.cdiv(tl.maximum(first_visible(last, reach), sink_tokens), BLOCK_N)
    plain = tl.minimum(tl.maximum(plain, begin_tile), end_tile)
    plain_end = tl.maximum(first + 1 - tl.maximum(local_window, 2), 0) // BLOCK_N
    plain_end = tl.minimum(tl.maximum(plain_end, plain), end_tile)
    before = plain - begin_tile
    for i in tl.range(0, before + end_tile - plain_end, num_stages=STAGES):
        tile = tl.where(i < before, begin_tile + i, plain_end - before + i)
        j = tile * BLOCK_N + offs_n
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, (j >= first_visible(first, reach)) & (j <= last), last, offs_n, offs_d,
            stride_k_block, stride_k_slot, HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        dot = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        m, z, e, z2, distance, bad, p, s, decay = _add_keys(
            m, z, e, z2, distance, bad, dot, tile * BLOCK_N, positions, lowest, factor, soft_cap, slope, unit,
            True, HAS_SOFT_CAP, HAS_ALIBI, BLOCK_N,
        )  # fmt: skip
        j = tl.reshape(j, [1, BLOCK_N // _LANES, _LANES])
        ages = positions[:, None, None] - j
        sink = sink * decay + tl.sum(tl.where(j < sink_tokens, p, 0.0), 1)
        local = local * decay + tl.sum(tl.where(ages < local_window, p, 0.0), 1)
        previous = previous * decay + tl.sum(tl.where(ages == 1, p, 0.0), 1)
        own = tl.maximum(own, tl.max(tl.where(ages == 0, s, float("-inf")), 1))
    # These have all that they get; what they are relative to is brought up to date at the end.
    base = tl.max(m, 1)
    weight = tl.exp2(tl.maximum((m - base[:, None]) * unit, -256.0))
    sink = tl.sum(sink * weight, 1)
    local = tl.sum(local * weight, 1)
    previous = tl.sum(previous * weight, 1)
    own = tl.max(own, 1)
    for tile in tl.range(plain, plain_end, num_stages=STAGES):
        j = tile * BLOCK_N + offs_n
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, offs_n >= 0, last, offs_n, offs_d,
            stride_k_block, stride_k_slot, HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        dot = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        m, z, e, z2, distance, bad, p, s, decay = _add_keys(
            m, z, e, z2, distance, bad, dot, tile * BLOCK_N, positions, lowest, factor, soft_cap, slope, unit,
            False, HAS_SOFT_CAP, HAS_ALIBI, BLOCK_N,
        )  # fmt: skip

    top = tl.max(m, 1)
    rise = tl.maximum((m - top[:, None]) * unit, -256.0)
    weight = tl.exp2(rise)
    e = tl.sum((e + rise * z) * weight, 1)
    z2 = tl.sum(z2 * (weight * weight), 1)
    z = tl.sum(z * weight, 1)
    distance = tl.sum(distance * weight, 1)
    bad = tl.sum(bad, 1)
    m = top
    since = tl.exp2(tl.maximum((base - m) * unit, -256.0))
    sink *= since
    local *= since
    previous *= since

    is_bad = (bad != 0.0) | (e != e) | (z != z)  # noqa: PLR0124 (NaN)
    score = m * natural
    own *= natural
    top = score
    total = z
    shrink = tl.full([BLOCK_M], 1.0, tl.float32)  # e^(m - top)
    if HAS_SINKS:
        learned = tl.load(sinks_ptr + head).to(tl.float32)
        top = tl.maximum(score, learned)
        shrink = tl.exp2(exponent(score, top))
        total = z * shrink + tl.exp2(exponent(learned, top))
    mass = shrink / total
    n = positions + 1 - lowest
    log_n = tl.where(n > 1, tl.log2(n.to(tl.float32)), 1.0)
    nothing = tl.where(is_bad, float("nan"), 0.0)
    present = rows < num_rows
    out = stats_ptr + (rows.to(tl.int64) * num_heads + number) * (_NUM_STATISTICS + 1)
    # The bounds of a statistic hold against rounding.
    entropy = tl.where(n > 1, (tl.log2(z) - e / z) / log_n, 0.0)
    tl.store(out + _ENTROPY_RATIO, tl.minimum(tl.maximum(entropy, 0.0), 1.0) + nothing, mask=present)
    tl.store(out + _EFFECTIVE_KEYS, tl.maximum(z * z / z2, 1.0) + nothing, mask=present)
    tl.store(out + _MAX_LOGIT, score + nothing, mask=present)
    tl.store(out + _TOP1_RATIO, mass + nothing, mask=present)
    tl.store(out + _SINK_RATIO, tl.minimum(sink * mass, 1.0) + nothing, mask=present)
    tl.store(out + _LOCAL_RATIO, tl.minimum(local * mass, 1.0) + nothing, mask=present)
    tl.store(out + _DISTANCE_TOKENS, tl.maximum(distance / z, 0.0) + nothing, mask=present)
    tl.store(out + _SELF_LOGPROB, own - top - tl.log2(total) * _LN2 + nothing, mask=present)
    tl.store(out + _LOOKBACK_RATIO, nothing + float("nan"), mask=present)
    tl.store(out + _NUM_STATISTICS, is_bad.to(tl.float32), mask=present)
    to_previous = tl.where(positions > 0, previous * mass, float("nan"))
    tl.store(previous_ptr + rows.to(tl.int64) * num_heads + number, to_previous + nothing, mask=present)
    # What the later passes subtract: p = 2^((s - m) * unit - log2(Z)).
    row_reference = reference_ptr + number.to(tl.int64) * 2 * stride_reference + rows
    tl.store(row_reference, m, mask=present)
    tl.store(row_reference + stride_reference, (top - score) * LOG2E + tl.log2(total) + nothing, mask=present)


@triton.jit
def _load_reference(reference_ptr, number, rows, stride_reference):
    """m and log2(Z) of rows; those behind the chunk's have infinite ones, and so no attention."""
    row_reference = reference_ptr + number.to(tl.int64) * 2 * stride_reference + rows
    return tl.load(row_reference), tl.load(row_reference + stride_reference)


@triton.jit
def _given(
    dot, reference, log_z, begin, positions, lowest, factor, soft_cap, slope, unit,
    MASKED: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M]: attention of each row to each of a tile's keys, from dot products of this shape."""
    offs_n = tl.arange(0, BLOCK_N)
    ages = (positions - begin)[None, :] - offs_n[:, None]
    s = _scores(dot, ages, factor, soft_cap, slope, HAS_SOFT_CAP, HAS_ALIBI)
    # Rounding in another order than before may find a huge score above the maximum.
    p = tl.exp2(tl.minimum(s - reference[None, :], 0.0) * unit - log_z[None, :])
    if MASKED:
        p = tl.where((ages >= 0) & (begin + offs_n[:, None] >= lowest[None, :]), p, 0.0)
    return p


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _received_kernel(  # noqa: PLR0915
    q_ptr,  # [num_rows, H, D]
    k_ptr,  # [num_blocks, Hkv, PAGE, D]
    table_ptr,  # [max_blocks] int32
    heads_ptr,  # [num_heads] int32
    q_scale_ptr,  # [1] or [Hkv] float32
    k_scale_ptr,  # [1] or [Hkv] float32
    alibi_slopes_ptr,  # [H]
    reference_ptr,  # [num_heads, 2, stride_reference] float32
    received_ptr,  # [num_heads, stride_received] float32
    squares_ptr,  # likewise
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_q_scale,
    stride_k_scale,
    stride_reference,
    stride_received,
    num_heads,
    num_rows,
    first_position,
    scale,
    soft_cap,
    reach,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The first keys are seen by the most rows, so they go first.
    tile = tl.program_id(0) // num_heads
    number = tl.program_id(0) % num_heads
    head = tl.load(heads_ptr + number)
    kv_head = head // GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    begin = tile * BLOCK_N
    j = begin + offs_n
    last_position = first_position + num_rows - 1
    last = tl.minimum(begin + BLOCK_N - 1, last_position)

    factor = _factor(scale, q_scale_ptr, k_scale_ptr, stride_q_scale, stride_k_scale, kv_head, HAS_Q_SCALE, HAS_K_SCALE)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head).to(tl.float32)
    natural = factor
    if HAS_SOFT_CAP or HAS_ALIBI:
        natural = 1.0
    unit = natural * LOG2E
    # Keys behind what the first row sees may lie in pages that are not the sequence's any more.
    k = load_keys(
        k_ptr + kv_head.to(tl.int64) * stride_k_head, table_ptr, tile, j,
        (j >= first_visible(first_position, reach)) & (j <= last_position), last_position, offs_n, offs_d,
        stride_k_block, stride_k_slot, HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
    ).to(DOT_DTYPE)  # fmt: skip
    q_head_ptr = q_ptr + head.to(tl.int64) * stride_q_head

    # The last row that sees some of these keys, and the last one that sees them all.
    some = last_position
    every = last_position
    if reach > 0:
        some = tl.minimum(last.to(tl.int64) + reach - 1, last_position).to(tl.int32)
        every = tl.minimum(begin.to(tl.int64) + reach - 1, last_position).to(tl.int32)
    else:
        some = tl.minimum((last // -reach + 1) * -reach - 1, last_position)
        every = tl.minimum((begin // -reach + 1) * -reach - 1, last_position)
    begin_tile = tl.maximum(begin - first_position, 0) // BLOCK_M
    end_tile = tl.maximum(some - first_position + BLOCK_M, 0) // BLOCK_M
    # What a row gives itself has no part in the squares.
    seen_whole = last - first_position
    if HAS_SQUARES:
        seen_whole += 1
    plain = tl.minimum(tl.maximum(tl.cdiv(seen_whole, BLOCK_M), begin_tile), end_tile)
    plain_end = tl.maximum(every + 1 - first_position, 0) // BLOCK_M
    # Rows of padding weigh nothing.
    plain_end = tl.where(every == last_position, end_tile, plain_end)
    plain_end = tl.minimum(tl.maximum(plain_end, plain), end_tile)
    before = plain - begin_tile
    received = tl.zeros([BLOCK_N, _LANES], tl.float32)
    squares = tl.zeros([BLOCK_N, _LANES], tl.float32)
    for i in tl.range(0, before + end_tile - plain_end, num_stages=STAGES):
        rows = tl.where(i < before, begin_tile + i, plain_end - before + i) * BLOCK_M + offs_m
        q = _load_queries(q_head_ptr, rows, offs_d, num_rows, stride_q_token, HEAD_SIZE, BLOCK_D).to(DOT_DTYPE)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        dot = tl.dot(k, tl.trans(q), input_precision="ieee")
        positions = first_position + rows
        reference, log_z = _load_reference(reference_ptr, number, rows, stride_reference)
        p = _given(
            dot, reference, log_z, begin, positions, first_visible(positions, reach), factor, soft_cap, slope, unit,
            True, HAS_SOFT_CAP, HAS_ALIBI, BLOCK_N,
        )  # fmt: skip
        received += tl.sum(_by_lane(p), 1)
        if HAS_SQUARES:
            squares += tl.sum(_by_lane(tl.where(positions[None, :] > j[:, None], p * p, 0.0)), 1)
    for row_tile in tl.range(plain, plain_end, num_stages=STAGES):
        rows = row_tile * BLOCK_M + offs_m
        q = _load_queries(q_head_ptr, rows, offs_d, num_rows, stride_q_token, HEAD_SIZE, BLOCK_D).to(DOT_DTYPE)
        dot = tl.dot(k, tl.trans(q), input_precision="ieee")
        positions = first_position + rows
        reference, log_z = _load_reference(reference_ptr, number, rows, stride_reference)
        p = _given(
            dot, reference, log_z, begin, positions, positions, factor, soft_cap, slope, unit,
            False, HAS_SOFT_CAP, HAS_ALIBI, BLOCK_N,
        )  # fmt: skip
        received += tl.sum(_by_lane(p), 1)
        if HAS_SQUARES:
            squares += tl.sum(_by_lane(p * p), 1)
    received = tl.sum(received, 1)
    squares = tl.sum(squares, 1)
    tl.store(received_ptr + number.to(tl.int64) * stride_received + j, received, mask=j <= last_position)
    if HAS_SQUARES:
        tl.store(squares_ptr + number.to(tl.int64) * stride_received + j, squares, mask=j <= last_position)


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _span_mass_kernel(
    q_ptr,  # [num_rows, H, D]
    k_ptr,  # [num_blocks, Hkv, PAGE, D]
    table_ptr,  # [max_blocks] int32
    heads_ptr,  # [num_heads] int32
    q_scale_ptr,  # [1] or [Hkv] float32
    k_scale_ptr,  # [1] or [Hkv] float32
    alibi_slopes_ptr,  # [H]
    spans_ptr,  # [_MAX_SPANS, 2] int32; (0, 0) fills up
    reference_ptr,  # [num_heads, 2, stride_reference] float32
    span_mass_ptr,  # [num_rows, num_heads, num_spans] float32
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_q_scale,
    stride_k_scale,
    stride_reference,
    num_heads,
    num_rows,
    first_position,
    scale,
    soft_cap,
    reach,
    first_tile,
    last_tile,
    num_spans,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_tile = tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads
    number = tl.program_id(0) % num_heads
    head = tl.load(heads_ptr + number)
    kv_head = head // GROUP
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, _MAX_SPANS)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = first_position + rows
    lowest = first_visible(positions, reach)
    first = first_position + row_tile * BLOCK_M
    last = first_position + tl.minimum(row_tile * BLOCK_M + BLOCK_M, num_rows) - 1
    factor = _factor(scale, q_scale_ptr, k_scale_ptr, stride_q_scale, stride_k_scale, kv_head, HAS_Q_SCALE, HAS_K_SCALE)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes_ptr + head).to(tl.float32)
    natural = factor
    if HAS_SOFT_CAP or HAS_ALIBI:
        natural = 1.0
    unit = natural * LOG2E
    k_head_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head
    q = _load_queries(
        q_ptr + head.to(tl.int64) * stride_q_head, rows, offs_d, num_rows, stride_q_token, HEAD_SIZE, BLOCK_D
    ).to(DOT_DTYPE)
    reference, log_z = _load_reference(reference_ptr, number, rows, stride_reference)

    starts = tl.load(spans_ptr + 2 * offs_s)
    ends = tl.load(spans_ptr + 2 * offs_s + 1)
    masses = tl.zeros([BLOCK_M, _MAX_SPANS], tl.float32)
    begin_tile = tl.maximum(first_visible(first, reach) // BLOCK_N, first_tile)
    for tile in tl.range(begin_tile, tl.minimum(last // BLOCK_N + 1, last_tile), num_stages=STAGES):
        j = tile * BLOCK_N + offs_n
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, (j >= first_visible(first, reach)) & (j <= last), last, offs_n, offs_d,
            stride_k_block, stride_k_slot, HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        dot = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        ages = positions[:, None] - j[None, :]
        s = _scores(dot, ages, factor, soft_cap, slope, HAS_SOFT_CAP, HAS_ALIBI)
        p = tl.exp2(tl.minimum(s - reference[:, None], 0.0) * unit - log_z[:, None])
        p = tl.where((ages >= 0) & (j[None, :] >= lowest[:, None]), p, 0.0)
        inside = (j[:, None] >= starts[None, :]) & (j[:, None] < ends[None, :])  # [BLOCK_N, _MAX_SPANS]
        # In three parts of bfloat16, which tensor cores multiply by 0 and 1 exactly; together they are a float32.
        if DOT_DTYPE == tl.float32:  # noqa: SIM300
            masses = tl.dot(p, inside.to(tl.float32), masses, input_precision="ieee")
        else:
            high = p.to(tl.bfloat16)
            rest = p - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            of_spans = inside.to(tl.bfloat16)
            masses = tl.dot(high, of_spans, masses)
            masses = tl.dot(middle, of_spans, masses)
            masses = tl.dot(low, of_spans, masses)
    masses += tl.where(log_z == log_z, 0.0, float("nan"))[:, None]  # noqa: PLR0124
    out = span_mass_ptr + (rows.to(tl.int64)[:, None] * num_heads + number) * num_spans + offs_s[None, :]
    tl.store(out, masses, mask=(rows < num_rows)[:, None] & (offs_s < num_spans)[None, :])


class Tile(NamedTuple):
    """How a pass is compiled: rows and keys of a tile, warps of a program, stages of the software pipeline, and a limit
    of registers per thread (None is the compiler's choice)."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self, head_size: int) -> dict[str, Any]:
        """Of a launch."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "BLOCK_D": head_parts(head_size)[0],
            "STAGES": self.stages,
            "num_warps": self.warps,
            "maxnreg": self.registers,
            **FUSED,
        }


class PromptTiling(NamedTuple):
    """Tiles of the passes over rows, and of that over keys."""

    by_rows: Tile
    by_keys: Tile


@dataclass(frozen=True, slots=True, eq=False)
class PromptChunk:
    """Consecutive rows of one sequence in a step.

    Attributes:
        token: the first one's index into the step's tokens; num_rows: N of them.
        position: of the first one in its sequence, whose keys up to the last row's are in the cache.
    """

    token: int
    num_rows: int
    position: int

    @property
    def num_keys(self) -> int:
        """Up to the last row's own."""
        return self.position + self.num_rows


class PromptNumbers(NamedTuple):
    """Of a chunk's rows in H chosen heads of a layer, as `probe_answers.PromptAnswers` has them.

    Attributes:
        stats: float32 [N, H, S + 1]; previous_mass: float32 [N, H]; span_mass: float32 [N, H, spans].
        received: float32 [H, num_keys]; received_squares: likewise, or None.
    """

    stats: Tensor
    previous_mass: Tensor
    span_mass: Tensor
    received: Tensor
    received_squares: Tensor | None

    @classmethod
    def empty(cls, chunk: PromptChunk, heads: Tensor, spans: Tensor | None, *, squares: bool) -> "PromptNumbers":
        """Memory for them; see `prompt_rows` for the arguments."""
        of = partial(torch.empty, dtype=torch.float32, device=heads.device)
        num_rows, num_keys, num_heads = chunk.num_rows, chunk.num_keys, len(heads)
        return cls(
            of(num_rows, num_heads, NUM_STATISTICS + 1),
            of(num_rows, num_heads),
            of(num_rows, num_heads, 0 if spans is None else len(spans)),
            of(num_heads, num_keys),
            of(num_heads, num_keys) if squares else None,
        )


def _tiling(q: Tensor, k_cache: Tensor) -> PromptTiling:
    """The fastest of those that were tried on a Hopper GPU (`bench_prompt_rows.py --tune`)."""
    if torch.float32 in (q.dtype, k_cache.dtype):
        tile = Tile(rows=32, keys=32, warps=4, stages=2)  # not tuned: float32 serves tests
        return PromptTiling(tile, tile)
    if q.shape[2] > 128:
        if is_hopper(q.device):
            return PromptTiling(Tile(64, 32, 4, 3, 128), Tile(128, 128, 8, 2))
        return PromptTiling(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))  # of others a program has less shared memory
    if q.shape[2] > 64:
        return PromptTiling(Tile(64, 64, 4, 3, 128), Tile(64, 128, 8, 3, 128))
    return PromptTiling(Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 2))


def prompt_rows(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    chunk: PromptChunk,
    params: LayerParams,
    heads: Tensor,
    *,
    spans: Tensor | None = None,
    span_range: tuple[int, int] = (0, UNLIMITED),
    squares: bool = False,
    sink_tokens: int = 4,
    local_window: int = 128,
    tiling: PromptTiling | None = None,
) -> PromptNumbers:
    """Measure a chunk in one layer on the current stream; asynchronous.

    Args:
        q: [T, H, D] float32, float16, bfloat16 or FP8, of the step; the last dimension contiguous.
        k_cache: [num_blocks, Hkv, block_size, D], any strides but a contiguous last dimension; H a multiple of Hkv.
        block_table: [max_blocks] int32, contiguous, of the sequence.
        chunk: which rows.
        params: of the layer.
        heads: int32, which query heads, ascending.
        spans: int32 [spans, 2] on the device, (start, exclusive end) of positions, at most MAX_SPANS; or None.
        span_range: where the first of them starts and the last one ends, if the host knows it.
        squares: whether `received_squares` are wanted.
        sink_tokens, local_window: of the statistics sink_ratio and local_ratio, in tokens.
        tiling: None takes one that fits.

    Raises:
        ValueError: for a shape the kernel does not do.
    """
    _check(q, k_cache, block_table, chunk, spans)
    num_kv_heads, page, head_size = k_cache.shape[1:]
    num_heads, num_rows, num_keys = len(heads), chunk.num_rows, chunk.num_keys
    of_rows, of_keys = tiling or _tiling(q, k_cache)
    by_rows = (triton.cdiv(num_rows, of_rows.rows) * num_heads,)
    by_keys = (triton.cdiv(num_keys, of_keys.keys) * num_heads,)
    of_chunk = q[chunk.token : chunk.token + num_rows]
    numbers = PromptNumbers.empty(chunk, heads, spans, squares=squares)
    # The later passes read whole tiles of it.
    padded = max(triton.cdiv(num_rows, tile.rows) * tile.rows for tile in (of_rows, of_keys))
    reference = q.new_full((num_heads, 2, padded), float("inf"), dtype=torch.float32)
    q_scale, k_scale = params.q_scale, params.k_scale
    keys = (of_chunk, k_cache, block_table, heads, q_scale, k_scale, params.alibi_slopes)
    strides = (
        of_chunk.stride(0),
        of_chunk.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        0 if q_scale is None or q_scale.numel() == 1 else 1,
        0 if k_scale is None or k_scale.numel() == 1 else 1,
        reference.stride(1),
    )
    reach = params.reach or UNLIMITED
    scoring = (num_heads, num_rows, chunk.position, params.scale, params.soft_cap or 0.0, reach)
    constants: dict[str, Any] = {
        "GROUP": q.shape[1] // num_kv_heads,
        "HEAD_SIZE": head_size,
        "PAGE": page,
        "DOT_DTYPE": dot_dtype(q.dtype, k_cache.dtype, not q.is_cuda),
        "HAS_Q_SCALE": q_scale is not None,
        "HAS_K_SCALE": k_scale is not None,
        "HAS_SOFT_CAP": params.soft_cap is not None,
        "HAS_ALIBI": params.alibi_slopes is not None,
    }
    _prompt_rows_kernel[by_rows](
        *keys, params.sinks, numbers.stats, numbers.previous_mass, reference, *strides, *scoring, sink_tokens,
        local_window, HAS_SINKS=params.sinks is not None, **constants, **of_rows.options(head_size),
    )  # fmt: skip
    _received_kernel[by_keys](
        *keys, reference, numbers.received, numbers.received_squares, *strides, num_keys, *scoring,
        HAS_SQUARES=squares, **constants, **of_keys.options(head_size),
    )  # fmt: skip
    if spans is not None:
        padded = torch.zeros(MAX_SPANS, 2, dtype=torch.int32, device=q.device)
        padded[: len(spans)] = spans
        tiles = span_range[0] // of_rows.keys, triton.cdiv(min(span_range[1], num_keys), of_rows.keys)
        _span_mass_kernel[by_rows](
            *keys, padded, reference, numbers.span_mass, *strides, *scoring, *tiles, len(spans), **constants,
            **of_rows.options(head_size),
        )  # fmt: skip
    return numbers


def _check(q: Tensor, k_cache: Tensor, block_table: Tensor, chunk: PromptChunk, spans: Tensor | None) -> None:
    num_heads, head_size = q.shape[1:]
    _, num_kv_heads, page, key_size = k_cache.shape
    if head_size > MAX_HEAD_SIZE or head_size != key_size or num_heads % num_kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)} must have the same head size of at most "
            f"{MAX_HEAD_SIZE} and query heads that are a multiple of the KV heads; do not measure prompts of this layer"
        )
    if page * k_cache.stride(2) > MAX_PAGE_ELEMENTS:
        raise ValueError(
            f"a page of k_cache must span at most {MAX_PAGE_ELEMENTS} elements, got {page * k_cache.stride(2)}; "
            f"do not measure prompts of this layer"
        )
    if q.stride(2) != 1 or k_cache.stride(3) != 1 or block_table.stride(0) != 1:
        raise ValueError("q, k_cache and block_table must be contiguous in their last dimension; pass such views")
    if chunk.num_rows < 1 or chunk.token < 0 or chunk.token + chunk.num_rows > len(q):
        raise ValueError(
            f"chunk must be of tokens of q, which has {len(q)}, got {chunk.num_rows} from {chunk.token} on; "
            f"pass rows of this step"
        )
    if spans is not None and not 0 < len(spans) <= MAX_SPANS:
        raise ValueError(f"spans must be 1 to {MAX_SPANS}, got {len(spans)}; pass None for none")
