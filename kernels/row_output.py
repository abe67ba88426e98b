"""The check of rows' outputs on a GPU: softmax(scores) V in float32 from the paged cache against the output served.

The GPU twin of `row_output_cpu.py`, for a few rows in all layers of one KV-cache group. Owns the kernel that reads K
and V of those rows once more and sums what a verdict needs; what the sums mean stands in `glassbox.core.output_checks`
and, exactly, in `reference/row_output.py`; what rounding explains in `output_rounding.py`. It runs outside CUDA graphs,
from queries and outputs that were kept during the forward pass, and never waits for the device.

How it works. One program takes one row in one layer and up to 16 query heads of a KV head over all keys that the row
sees, with a running maximum. Beside sum p v it sums what the bound and the derivative by a factor of the scores need;
the growth of a score is taken relative to that of the key with the largest weight, so that what all keys have in
common cancels exactly.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from glassbox.core import output_checks
from glassbox.kernels import output_rounding
from glassbox.kernels.cached_layers import CachedLayers
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.paged_keys import (
    FUSED,
    LOG2E,
    MAX_HEAD_SIZE,
    dot_dtype,
    first_visible,
    head_parts,
    load_keys,
    soft_capped,
)

__all__ = ["CachedLayers", "row_output"]

_WORST = tl.constexpr(output_checks.OUTPUT_SUM["worst"])
_ERROR2 = tl.constexpr(output_checks.OUTPUT_SUM["error2"])
_NOISE2 = tl.constexpr(output_checks.OUTPUT_SUM["noise2"])
_NORM2 = tl.constexpr(output_checks.OUTPUT_SUM["norm2"])
_GAIN_DOT = tl.constexpr(output_checks.OUTPUT_SUM["gain_dot"])
_GAIN_NOISE2 = tl.constexpr(output_checks.OUTPUT_SUM["gain_noise2"])
_GAIN_SHARED = tl.constexpr(output_checks.OUTPUT_SUM["gain_shared"])
_SCALE_DOT = tl.constexpr(output_checks.OUTPUT_SUM["scale_dot"])
_SCALE_NORM2 = tl.constexpr(output_checks.OUTPUT_SUM["scale_norm2"])
_SCALE_NOISE2 = tl.constexpr(output_checks.OUTPUT_SUM["scale_noise2"])
_SCALE_SHARED = tl.constexpr(output_checks.OUTPUT_SUM["scale_shared"])
_NONFINITE = tl.constexpr(output_checks.OUTPUT_SUM["nonfinite"])
_NUM_SUMS = tl.constexpr(len(output_checks.OUTPUT_SUMS))
_BOTH = tl.constexpr(float(output_checks.NONFINITE_BOTH))
_OUTPUT = tl.constexpr(float(output_checks.NONFINITE_OUTPUT))
_REFERENCE = tl.constexpr(float(output_checks.NONFINITE_REFERENCE))
_NUM_KV_SUMS = tl.constexpr(len(output_checks.KV_SUMS))
_KEY_SUMS = tl.constexpr(output_checks.KV_SUM["key_error2"])
_VALUE_SUMS = tl.constexpr(output_checks.KV_SUM["value_error2"])

_MEAN_SQUARE = tl.constexpr(output_rounding.MEAN_SQUARE)
_SCORE_ERROR = tl.constexpr(output_rounding.SCORE_ERROR)
_SUM_BOUND = tl.constexpr(output_rounding.SUM_BOUND)
_SUM_NOISE = tl.constexpr(output_rounding.SUM_NOISE)
_LARGE_VALUE = tl.constexpr(output_rounding.LARGE_VALUE)
_LOST = tl.constexpr(output_rounding.LOST)
_PLACE_1, _PLACE_2, _PLACE_3 = (tl.constexpr(place) for place in output_rounding.PLACES[1:])  # the first is 1

# Query heads of one KV head that share a program, the fewest that tensor cores take; wide MQA is done in groups.
_BLOCK_H: Final = 16
# Keys of one tile, warps of a program and stages of the software pipeline: 5.9 ms for 8 rows of 4,096 keys in 32 layers
# of 32 heads of 128 on an H200, 9.7 ms with 32 keys; 4.0 and 5.1 ms in 26 layers of 16 heads of 256 (2026-11).
_BLOCK_N: Final = 64
_WARPS: Final = 8
_STAGES: Final = 2

# Of wide heads, of which less fits a GPU's shared memory; not measured.
_WIDE_BLOCK_N: Final = 16
_WIDE_STAGES: Final = 1

# What differs between steps must not compile another variant.
_FREE_POINTERS: Final = [
    "q_ptr",
    "outputs_ptr",
    "key_pointers_ptr",
    "value_pointers_ptr",
    "block_table_ptr",
    "rows_ptr",
    "factors_ptr",
    "key_scales_ptr",
    "value_scales_ptr",
    "reaches_ptr",
    "soft_caps_ptr",
    "alibi_slopes_ptr",
    "sinks_ptr",
    "kept_kv_ptr",
    "kv_sums_ptr",
    "sums_ptr",
]
_FREE_INTEGERS: Final = [
    "stride_block_table",
    "stride_rows",
    "stride_q_row",
    "stride_q_layer",
    "stride_q_head",
    "stride_o_row",
    "stride_o_layer",
    "stride_o_head",
    "stride_kept_row",
    "stride_kept_layer",
    "stride_kept_tensor",
    "stride_kept_head",
    "num_layers",
]


@triton.jit
def _noise2(f2q2, rounded2, o, h, z):
    """What rounding makes of the square of sum_d e_d z_d, [BLOCK_H]; z [BLOCK_H, BLOCK_V]."""
    of_output = rounded2 * tl.sum(o * z * (o * z), 1)
    shared = tl.sum(h * tl.abs(z), 1)
    return f2q2 * tl.sum(z * z, 1) + of_output + shared * shared


@triton.jit
def _parts(p):
    """p as a sum of two numbers that a product of TF32 takes: the first exactly, the second as precisely as float32."""
    high = ((p.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, p - high


@triton.jit
def _moved(x, LOST_BITS: tl.constexpr):
    """Sums over the keys of what rounding to nearest, half to even, adds to weights x, [BLOCK_H, BLOCK_N]."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> LOST_BITS) & 1
    rounded = ((bits + ((1 << (LOST_BITS - 1)) - 1) + odd) >> LOST_BITS) << LOST_BITS
    return tl.sum(rounded.to(tl.float32, bitcast=True) - x, 1)


@triton.jit
def _store_kv_sums(out_ptr, stored, computed, scale, largest):
    """error2, norm2 and saturated of one row's own K or V; stored and computed are [BLOCK]."""
    error = stored * scale - computed
    tl.store(out_ptr, tl.sum(error * error, 0))
    tl.store(out_ptr + 1, tl.sum(computed * computed, 0))
    tl.store(out_ptr + 2, tl.sum((tl.abs(stored) == largest).to(tl.float32), 0))


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _row_output_kernel(  # noqa: PLR0912, PLR0915
    q_ptr,  # [R, L, H, D]
    outputs_ptr,  # [R, L, H, DV]
    key_pointers_ptr,  # [L] int64
    value_pointers_ptr,  # [L] int64
    like_ptr,  # for its type only: [num_blocks, Hkv, PAGE, D]
    values_like_ptr,  # likewise: [num_blocks, Hkv, PAGE, DV]
    block_table_ptr,  # [num_seqs, max_blocks] int32
    rows_ptr,  # [R, 2] int32
    factors_ptr,  # [L, Hkv] float32
    key_scales_ptr,  # [L, Hkv] float32
    value_scales_ptr,  # [L, Hkv] float32
    reaches_ptr,  # [L] int32
    soft_caps_ptr,  # [L] float32
    alibi_slopes_ptr,  # [L, H] float32
    sinks_ptr,  # [L, H] float32
    kept_kv_ptr,  # [R, L, 2, Hkv, D]
    sums_ptr,  # [R, L, H, _NUM_SUMS] float32
    kv_sums_ptr,  # [R, L, Hkv, _NUM_KV_SUMS] float32
    stride_q_row,
    stride_q_layer,
    stride_q_head,
    stride_o_row,
    stride_o_layer,
    stride_o_head,
    stride_k_block,
    stride_k_head,
    stride_k_slot,
    stride_v_block,
    stride_v_head,
    stride_v_slot,
    stride_block_table,
    stride_rows,
    stride_kept_row,
    stride_kept_layer,
    stride_kept_tensor,
    stride_kept_head,
    num_layers,
    weight,  # this and the following: of OutputRounding
    weight_step,
    operand,
    output,
    output_step,
    output_limit,
    tanh_error,
    inverse_root_d,  # 1 / sqrt(D)
    key_largest,  # largest number of an FP8 cache, else NaN
    value_largest,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    V_IS_TF32: tl.constexpr,
    LOST_BITS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_KV: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VALUE_ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    GROUP_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    index = tl.program_id(0)  # of (row, layer)
    row = (index // num_layers).to(tl.int64)
    layer = (index % num_layers).to(tl.int64)
    kv_head = tl.program_id(1) // GROUP_BLOCKS
    in_group = (tl.program_id(1) % GROUP_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP

    batch = tl.load(rows_ptr + row * stride_rows)
    position = tl.load(rows_ptr + row * stride_rows + 1)
    lowest = first_visible(position, tl.load(reaches_ptr + layer))

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    # [BLOCK_H, BLOCK_D]; further heads and the padding of HEAD_SIZE are 0.
    q_heads_ptr = q_ptr + row * stride_q_row + layer * stride_q_layer + heads * stride_q_head
    q = tl.load(
        q_heads_ptr[:, None] + offs_d[None, :],
        mask=is_head[:, None] & (offs_d < HEAD_SIZE)[None, :],
        other=0.0,
    )
    q_size = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
    q = q.to(DOT_DTYPE)
    if BLOCK_REST > 0:
        # The rest of wide heads: [BLOCK_H, BLOCK_REST].
        offs_r = tl.arange(0, BLOCK_REST)
        q_rest = tl.load(
            q_heads_ptr[:, None] + BLOCK_D + offs_r[None, :],
            mask=is_head[:, None] & (offs_r < HEAD_SIZE - BLOCK_D)[None, :],
            other=0.0,
        )
        q_size += tl.sum(q_rest.to(tl.float32) * q_rest.to(tl.float32), 1)
        q_rest = q_rest.to(DOT_DTYPE)
    q_size = tl.sqrt(q_size)
    factor = tl.load(factors_ptr + layer * NUM_KV_HEADS + kv_head)
    soft_cap = 0.0
    if HAS_SOFT_CAP:
        # A layer without one has 0, which must not be divided by.
        soft_cap = tl.load(soft_caps_ptr + layer)
        divisor = tl.where(soft_cap > 0.0, soft_cap, 1.0)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes_ptr + layer * NUM_HEADS + heads, mask=is_head, other=0.0)
    # The compiler knows nothing of a loaded address: without the multiples it would load element by element.
    k_ptr = tl.load(key_pointers_ptr + layer).to(tl.pointer_type(like_ptr.dtype.element_ty))
    v_ptr = tl.load(value_pointers_ptr + layer).to(tl.pointer_type(values_like_ptr.dtype.element_ty))
    k_head_ptr = tl.multiple_of(k_ptr, ALIGNMENT) + kv_head.to(tl.int64) * stride_k_head
    v_head_ptr = tl.multiple_of(v_ptr, VALUE_ALIGNMENT) + kv_head.to(tl.int64) * stride_v_head
    table_ptr = block_table_ptr + batch.to(tl.int64) * stride_block_table

    # Sums over keys, relative to the running maximum m; growth relative to top, that of the key with score m.
    zeros = tl.zeros([BLOCK_H], tl.float32)
    m = zeros + float("-inf")
    top = zeros
    z = zeros  # of p
    z_score = zeros  # of p |s|
    z_key = zeros  # of p |k|
    z_growth = zeros  # of p (growth - top)
    z_squares = zeros  # of p^2 |v|^2
    power = zeros  # log2 of a power of two above the largest weight
    moved_0 = zeros  # what rounding the weights adds, relative to that
    moved_1 = zeros
    moved_2 = zeros
    moved_3 = zeros
    squares = tl.zeros([BLOCK_N], tl.float32)  # of |v|^2, per column
    r = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)  # of p v
    a = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)  # of p |v|
    c = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)  # of p (growth - top) v
    for tile in tl.range(lowest // BLOCK_N, position // BLOCK_N + 1, num_stages=STAGES):
        j = tile * BLOCK_N + offs_n
        visible = (j >= lowest) & (j <= position)
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_d, stride_k_block, stride_k_slot,
            BLOCK_D if BLOCK_REST > 0 else HEAD_SIZE, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        v = load_keys(
            v_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_v, stride_v_block, stride_v_slot,
            VALUE_SIZE, PAGE, BLOCK_V, BLOCK_N,
        ).to(tl.float32)  # fmt: skip
        # [BLOCK_H, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_H, BLOCK_N]
        s = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        k_wide = k.to(tl.float32)
        k_size = tl.sum(k_wide * k_wide, 1)
        if BLOCK_REST > 0:
            rest = load_keys(
                k_head_ptr + BLOCK_D, table_ptr, tile, j, visible, position, offs_n, offs_r, stride_k_block,
                stride_k_slot, HEAD_SIZE - BLOCK_D, PAGE, BLOCK_REST, BLOCK_N,
            )  # fmt: skip
            s = tl.dot(q_rest, tl.trans(rest.to(DOT_DTYPE)), s, input_precision="ieee")
            rest_wide = rest.to(tl.float32)
            k_size += tl.sum(rest_wide * rest_wide, 1)
        s = s * factor
        growth = s
        if HAS_SOFT_CAP:
            capped = soft_capped(s, divisor)
            tanh = capped / divisor
            slope = 1.0 - tanh * tanh
            # A tanh that is rounded to 1 no longer grows, though the product be infinite.
            slope = tl.where(slope > 0.0, s * slope, tl.where(slope <= 0.0, 0.0, slope))
            growth = tl.where(soft_cap > 0.0, slope, s)
            s = tl.where(soft_cap > 0.0, capped, s)
        if HAS_ALIBI:
            s = s - slopes[:, None] * (position - j).to(tl.float32)[None, :]
        s = tl.where(visible[None, :], s, float("-inf"))

        highest = tl.max(s, 1)
        rises = highest > m
        new_top = tl.max(tl.where(s == highest[:, None], growth, float("-inf")), 1)
        new_top = tl.where(rises, new_top, top)
        new_m = tl.maximum(m, highest)
        # Scores of -inf alone have no weight, until one that is finite comes.
        reference = tl.where(new_m == float("-inf"), 0.0, new_m)
        decay = tl.exp2((m - reference) * LOG2E)
        p = tl.exp2((s - reference[:, None]) * LOG2E)
        fall = top - new_top
        z_growth = (z_growth + fall * z) * decay
        c = (c + fall[:, None] * r) * decay[:, None]
        m = new_m
        top = new_top
        if LOST_BITS > 0:
            # Relative to a power of two: what a later one rescales is rounded as if it had been known.
            new_power = tl.ceil(reference * LOG2E)
            fewer = tl.exp2(power - new_power)
            power = new_power
            x = p * tl.exp2(reference * LOG2E - power)[:, None]
            moved_0 = moved_0 * fewer + _moved(x, LOST_BITS)
            moved_1 = moved_1 * fewer + _moved(x * _PLACE_1, LOST_BITS) / _PLACE_1
            moved_2 = moved_2 * fewer + _moved(x * _PLACE_2, LOST_BITS) / _PLACE_2
            moved_3 = moved_3 * fewer + _moved(x * _PLACE_3, LOST_BITS) / _PLACE_3

        grown = tl.where(p == 0.0, 0.0, p * (growth - top[:, None]))
        k_size = tl.sqrt(k_size)
        k_size = tl.where(k_size < float("inf"), k_size, 0.0)
        v_squares = tl.sum(v * v, 1)
        squares += v_squares
        z = z * decay + tl.sum(p, 1)
        z_score = z_score * decay + tl.sum(tl.where(p == 0.0, 0.0, p * tl.abs(s)), 1)
        z_key = z_key * decay + tl.sum(p * k_size[None, :], 1)
        z_growth += tl.sum(grown, 1)
        z_squares = z_squares * (decay * decay) + tl.sum(p * p * v_squares[None, :], 1)
        # [BLOCK_H, BLOCK_N] @ [BLOCK_N, BLOCK_V] -> [BLOCK_H, BLOCK_V]
        if V_IS_TF32:
            high, low = _parts(p)
            r = tl.dot(low, v, tl.dot(high, v, r * decay[:, None], input_precision="tf32"), input_precision="tf32")
            a = tl.dot(high, tl.abs(v), a * decay[:, None], input_precision="tf32")
            high, low = _parts(grown)
            c = tl.dot(low, v, tl.dot(high, v, c, input_precision="tf32"), input_precision="tf32")
        else:
            r = tl.dot(p, v, r * decay[:, None], input_precision="tf32x3")
            a = tl.dot(p, tl.abs(v), a * decay[:, None], input_precision="tf32x3")
            c = tl.dot(grown, v, c, input_precision="tf32x3")

    moved = tl.maximum(tl.maximum(tl.abs(moved_0), tl.abs(moved_1)), tl.maximum(tl.abs(moved_2), tl.abs(moved_3)))
    shared = moved / (z * tl.exp2(m * LOG2E - power))
    # From sums to means: each key's weight is that in the softmax, of which a learned sink has a share.
    inverse = 1.0 / z
    of_sink = zeros
    if HAS_SINKS:
        learned = tl.load(sinks_ptr + layer * NUM_HEADS + heads, mask=is_head, other=float("-inf"))
        most = tl.maximum(m, learned)
        shrink = tl.exp2((m - most) * LOG2E)
        learned_weight = tl.exp2((learned - most) * LOG2E)
        total = z * shrink + learned_weight
        inverse = shrink / total
        of_sink = learned_weight / total
    value_scale = tl.load(value_scales_ptr + layer * NUM_KV_HEADS + kv_head)
    size = tl.abs(value_scale)
    n = (position + 1 - lowest).to(tl.float32)
    r = r * (inverse * value_scale)[:, None]
    a = a * (inverse * size)[:, None]
    # The weights sum to 1 - of_sink: as much of top remains.
    c = c * (inverse * value_scale)[:, None] - (z_growth * inverse - top * of_sink)[:, None] * r
    q2 = z_squares * (inverse * inverse) * (size * size)
    value_size = tl.sqrt(tl.sum(squares, 0) / (n * VALUE_SIZE)) * size
    uncancelled = z_key / z * q_size * tl.abs(factor) * inverse_root_d
    score_size = tl.maximum(tl.maximum(z_score / z, uncancelled), 1.0)

    is_output = is_head[:, None] & (offs_v < VALUE_SIZE)[None, :]
    o = tl.load(
        outputs_ptr + row * stride_o_row + layer * stride_o_layer + heads[:, None] * stride_o_head + offs_v[None, :],
        mask=is_output,
        other=0.0,
    ).to(tl.float32)
    # Comparisons with NaN are false.
    output_good = tl.min((tl.abs(o) < float("inf")).to(tl.int32), 1) != 0
    reference_good = tl.min(((tl.abs(r) < output_limit) | (is_output == 0)).to(tl.int32), 1) != 0
    nonfinite = tl.where(reference_good, 0.0, _REFERENCE)
    nonfinite = tl.where(output_good, nonfinite, tl.where(reference_good, _OUTPUT, _BOTH))

    # The formulas of output_rounding.py, whose names these are.
    e = o - r
    # A constant comes last: before a tensor the interpreter makes a constant of both.
    score_error = tl.maximum(score_size, soft_cap) * _SCORE_ERROR
    of_cap = 0.0
    if HAS_SOFT_CAP:
        of_cap = tl.where(soft_cap > 0.0, tanh_error, 0.0)
    w = n * weight_step * value_size * _LARGE_VALUE
    of_score = score_error + (2.0 * operand + of_cap) * score_size
    per_value = 2.0 * weight + operand + 2.0 * of_score + _SUM_BOUND
    b = output * tl.abs(o) + output_step + per_value[:, None] * a + w
    y2 = score_error * score_error / 16.0
    y2 += (operand * operand + of_cap * of_cap) * (score_size * score_size) / 4.0
    f2q2 = (y2 + (weight * weight + operand * operand) * _MEAN_SQUARE) * q2
    h = (tl.sqrt(y2) * of_sink + _SUM_NOISE)[:, None] * a + w + output_step
    h = tl.where(is_output, h, 0.0)
    rounded2 = output * output * _MEAN_SQUARE
    worst = tl.max(tl.where(e == 0.0, 0.0, tl.abs(e) / b), 1)
    growth2 = tl.sum(c * c, 1)
    lost = score_error * _LOST
    known = growth2 > lost * lost * q2

    sums = sums_ptr + (row * num_layers + layer) * (NUM_HEADS * _NUM_SUMS) + heads * _NUM_SUMS
    finite = nonfinite == 0.0
    known = known & finite
    noise2 = f2q2 + rounded2 * tl.sum(o * o, 1) + tl.sum(h * h, 1)
    tl.store(sums + _WORST, tl.where(finite, worst, 0.0), mask=is_head)
    tl.store(sums + _ERROR2, tl.where(finite, tl.sum(e * e, 1), 0.0), mask=is_head)
    tl.store(sums + _NOISE2, tl.where(finite, noise2, 0.0), mask=is_head)
    tl.store(sums + _NORM2, tl.where(finite, tl.sum(r * r, 1), 0.0), mask=is_head)
    tl.store(sums + _GAIN_DOT, tl.where(finite, tl.sum(e * r, 1), 0.0), mask=is_head)
    tl.store(sums + _GAIN_NOISE2, tl.where(finite, _noise2(f2q2, rounded2, o, h, r), 0.0), mask=is_head)
    tl.store(sums + _GAIN_SHARED, tl.where(finite, shared * tl.sum(a * tl.abs(r), 1), 0.0), mask=is_head)
    tl.store(sums + _SCALE_DOT, tl.where(known, tl.sum(e * c, 1), 0.0), mask=is_head)
    tl.store(sums + _SCALE_NORM2, tl.where(known, growth2, 0.0), mask=is_head)
    tl.store(sums + _SCALE_NOISE2, tl.where(known, _noise2(f2q2, rounded2, o, h, c), 0.0), mask=is_head)
    tl.store(sums + _SCALE_SHARED, tl.where(known, shared * tl.sum(a * tl.abs(c), 1), 0.0), mask=is_head)
    tl.store(sums + _NONFINITE, nonfinite, mask=is_head)

    if HAS_KV:  # noqa: SIM102 (known when it is compiled)
        if tl.program_id(1) % GROUP_BLOCKS == 0:
            # The row's own key and value, as the cache holds them and as they were computed.
            block = tl.load(table_ptr + position // PAGE).to(tl.int64)
            slot = position % PAGE
            is_element = offs_d < HEAD_SIZE
            kept = kept_kv_ptr + row * stride_kept_row + layer * stride_kept_layer + kv_head * stride_kept_head + offs_d
            own_k = tl.load(k_head_ptr + block * stride_k_block + slot * stride_k_slot + offs_d, is_element, 0.0)
            own_v = tl.load(v_head_ptr + block * stride_v_block + slot * stride_v_slot + offs_d, is_element, 0.0)
            made_k = tl.load(kept, is_element, 0.0).to(tl.float32)
            made_v = tl.load(kept + stride_kept_tensor, is_element, 0.0).to(tl.float32)
            key_scale = tl.load(key_scales_ptr + layer * NUM_KV_HEADS + kv_head)
            kv_sums = kv_sums_ptr + ((row * num_layers + layer) * NUM_KV_HEADS + kv_head) * _NUM_KV_SUMS
            _store_kv_sums(kv_sums + _KEY_SUMS, own_k.to(tl.float32), made_k, key_scale, key_largest)
            _store_kv_sums(kv_sums + _VALUE_SUMS, own_v.to(tl.float32), made_v, value_scale, value_largest)


def row_output(
    queries: Tensor,
    outputs: Tensor,
    layers: CachedLayers,
    block_table: Tensor,
    rows: Tensor,
    kept_kv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums over the elements of the rows' outputs, and of their own K and V, in every layer. Asynchronous, on the
    current stream; its memory is that of the results.

    Args:
        queries: [R, L, H, D] float32, float16, bfloat16 or FP8; the last dimension contiguous.
        outputs: that were served, [R, L, H, Dv] float32, float16 or bfloat16; the last dimension contiguous.
        layers: of one KV-cache group, L of them.
        block_table: of the group, [num_seqs, max_blocks] int32, the last dimension contiguous.
        rows: [R, 2] int32, (batch row, position) of each row; the last dimension contiguous.
        kept_kv: K and V of the rows' own tokens as computed, [R, L, 2, Hkv, D], the last dimension contiguous, or None.

    Returns:
        float32 [R, L, H, len(OUTPUT_SUMS)] and, with `kept_kv`, float32 [R, L, Hkv, len(KV_SUMS)].

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    _check(queries, outputs, layers, block_table, rows, kept_kv)
    num_rows, num_layers, num_heads, head_size = queries.shape
    keys, like, values_like = layers.keys, layers.keys.like, layers.values_like
    num_kv_heads, page, value_size = values_like.shape[1:]
    rounding = OutputRounding.of(
        queries.dtype, outputs.dtype, fp8_cache=like.dtype in FP8_TYPES, on_gpu=queries.is_cuda
    )
    place = (num_rows, num_layers)
    sums = queries.new_empty((*place, num_heads, len(output_checks.OUTPUT_SUMS)), dtype=torch.float32)
    kv_sums: Tensor | None = None
    if kept_kv is not None:
        kv_sums = queries.new_empty((*place, num_kv_heads, len(output_checks.KV_SUMS)), dtype=torch.float32)
    if not num_rows:
        return sums, kv_sums
    block_d, block_rest = head_parts(head_size)
    wide = head_size > MAX_HEAD_SIZE
    grid = (num_rows * num_layers, num_kv_heads * triton.cdiv(num_heads // num_kv_heads, _BLOCK_H))
    _row_output_kernel[grid](
        queries,
        outputs,
        keys.key_pointers,
        layers.value_pointers,
        like,
        values_like,
        block_table,
        rows,
        keys.factors,
        layers.key_scales,
        layers.value_scales,
        keys.reaches,
        keys.soft_caps,
        keys.alibi_slopes,
        keys.sinks,
        kept_kv,
        sums,
        kv_sums,
        *queries.stride()[:3],
        *outputs.stride()[:3],
        *like.stride()[:3],
        *values_like.stride()[:3],
        block_table.stride(0),
        rows.stride(0),
        *((0, 0, 0, 0) if kept_kv is None else kept_kv.stride()[:4]),
        num_layers,
        rounding.weight,
        rounding.weight_step,
        rounding.operand,
        rounding.output,
        rounding.output_step,
        rounding.output_limit,
        rounding.tanh,
        1 / math.sqrt(head_size),
        _largest(like),
        _largest(values_like),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        PAGE=page,
        DOT_DTYPE=dot_dtype(queries.dtype, like.dtype, not queries.is_cuda),
        V_IS_TF32=values_like.dtype != torch.float32,
        LOST_BITS=rounding.lost_bits,
        HAS_SOFT_CAP=keys.soft_caps is not None,
        HAS_ALIBI=keys.alibi_slopes is not None,
        HAS_SINKS=keys.sinks is not None,
        HAS_KV=kept_kv is not None,
        ALIGNMENT=keys.alignment,
        VALUE_ALIGNMENT=layers.value_alignment,
        BLOCK_H=_BLOCK_H,
        BLOCK_D=block_d,
        BLOCK_REST=block_rest,
        BLOCK_V=max(triton.next_power_of_2(value_size), 16),
        BLOCK_N=_WIDE_BLOCK_N if wide else _BLOCK_N,
        STAGES=_WIDE_STAGES if wide else _STAGES,
        num_warps=_WARPS,
        **FUSED,
    )
    return sums, kv_sums


def _largest(cache: Tensor) -> float:
    """Largest number of an FP8 cache; of others NaN, which no number equals."""
    return torch.finfo(cache.dtype).max if cache.dtype in FP8_TYPES else math.nan


def _check(
    queries: Tensor, outputs: Tensor, layers: CachedLayers, block_table: Tensor, rows: Tensor, kept_kv: Tensor | None
) -> None:
    num_rows, num_layers = len(rows), len(layers.value_pointers)
    place = (num_rows, num_layers, layers.keys.num_heads)
    num_kv_heads, _, head_size = layers.keys.like.shape[1:]
    value_size = layers.values_like.shape[3]
    shapes = [
        ("queries", queries, (*place, head_size)),
        ("outputs", outputs, (*place, value_size)),
        ("rows", rows, (num_rows, 2)),
    ]
    if kept_kv is not None:
        shapes.append(("kept_kv", kept_kv, (num_rows, num_layers, 2, num_kv_heads, head_size)))
    for name, tensor, shape in shapes:
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for these layers and {num_rows} rows, got {list(tensor.shape)}; "
                f"pass tensors of the same rows and layers"
            )
    if kept_kv is not None and (value_size != head_size or head_size > MAX_HEAD_SIZE):
        raise ValueError(
            f"kept_kv must be of layers with V of K's head size, {head_size}, got {value_size}, of at most "
            f"{MAX_HEAD_SIZE}; pass None"
        )
    tensors = (queries, outputs, rows, block_table, *(() if kept_kv is None else (kept_kv,)))
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(
            "queries, outputs, rows, block_table and kept_kv must be contiguous in their last dimension; "
            "pass such views"
        )
