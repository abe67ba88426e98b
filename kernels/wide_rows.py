"""Wide heads in the Triton kernel of row statistics: those of latent attention, of which all query heads share one key.

Owns the functions that are compiled into `row_stats.py` for them. A head of 512 + 64 elements is loaded in two parts.
"""

import triton
import triton.language as tl

from glassbox.kernels.paged_keys import load_keys, soft_capped
from glassbox.kernels.row_state import exponent, no_keys


@triton.jit
def wide_sums(
    q,  # [BLOCK_H, BLOCK_D]
    q_rest,  # [BLOCK_H, BLOCK_REST]
    k_head_ptr,
    table_ptr,
    first_tile,
    last_tile,
    lowest,
    n_visible,
    position,
    prompt_len,
    factor,
    soft_cap,
    slopes,  # [BLOCK_H]
    sink_tokens,
    local_window,
    stride_k_block,
    stride_k_slot,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State of the keys of some tiles, as `combine` has it, with heads as the rows of the product.

    For many heads: what is summed is one number per head, not one per score, whose registers 128 heads don't leave.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    m, z_context, z_generated, e, z2, sink, local, distance, own, bad = no_keys(tl.zeros([BLOCK_H], tl.float32))
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        j = tile * BLOCK_N + offs_n
        visible = (j - lowest).to(tl.uint32, bitcast=True) < n_visible
        k = load_keys(
            k_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_d, stride_k_block, stride_k_slot,
            BLOCK_D, PAGE, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        # [BLOCK_H, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_H, BLOCK_N]
        s = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        if BLOCK_REST > 0:
            rest = load_keys(
                k_head_ptr + BLOCK_D, table_ptr, tile, j, visible, position, offs_n, tl.arange(0, BLOCK_REST),
                stride_k_block, stride_k_slot, HEAD_SIZE - BLOCK_D, PAGE, BLOCK_REST, BLOCK_N,
            )  # fmt: skip
            s = tl.dot(q_rest, tl.trans(rest.to(DOT_DTYPE)), s, input_precision="ieee")
        s = s * factor
        bad += tl.sum(s * 0.0, 1)  # stays 0 unless s is NaN or infinite
        if HAS_SOFT_CAP:
            s = soft_capped(s, soft_cap)
        age = (position - j).to(tl.float32)
        if HAS_ALIBI:
            s = s - slopes[:, None] * age[None, :]
        s = tl.where(visible[None, :], s, float("-inf"))
        risen = tl.maximum(m, tl.max(s, 1))
        shift = exponent(m, risen)
        decay = tl.exp2(shift)
        t = exponent(s, risen[:, None])
        p = tl.exp2(t)
        m = risen
        in_context = (j < prompt_len).to(tl.float32)[None, :]
        e = (e + shift * (z_context + z_generated)) * decay + tl.sum(p * t, 1)
        z_context = z_context * decay + tl.sum(p * in_context, 1)
        z_generated = z_generated * decay + tl.sum(p * (1.0 - in_context), 1)
        z2 = z2 * (decay * decay) + tl.sum(p * p, 1)
        sink = sink * decay + tl.sum(p * (j < sink_tokens).to(tl.float32)[None, :], 1)
        local = local * decay + tl.sum(p * (position - j < local_window).to(tl.float32)[None, :], 1)
        distance = distance * decay + tl.sum(p * age[None, :], 1)
        own = tl.maximum(own, tl.max(tl.where((j == position)[None, :], s, float("-inf")), 1))
    return m, z_context, z_generated, e, z2, sink, local, distance, own, bad


@triton.jit
def copy_heads(source_ptr, target_ptr, is_head, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Copies SIZE elements of each head from pointers [BLOCK_H] to others."""
    for begin in tl.static_range(0, SIZE, CHUNK):
        d = begin + tl.arange(0, CHUNK)
        wanted = is_head[:, None] & (d < SIZE)[None, :]
        numbers = tl.load(source_ptr[:, None] + d[None, :], mask=wanted, other=0.0)
        tl.store(target_ptr[:, None] + d[None, :], numbers.to(target_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def heads_dot(q_ptr, key_ptr, is_head, there, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Products [BLOCK_H] of SIZE elements of each head, from pointers [BLOCK_H], with one key, if it is there."""
    total = is_head.to(tl.float32) * 0.0
    for begin in tl.static_range(0, SIZE, CHUNK):
        d = begin + tl.arange(0, CHUNK)
        q = tl.load(q_ptr[:, None] + d[None, :], mask=is_head[:, None] & (d < SIZE)[None, :], other=0.0)
        key = tl.load(key_ptr + d, mask=d < tl.where(there, SIZE, 0), other=0.0)
        total += tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    return total
