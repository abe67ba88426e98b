"""Wide heads in the Triton kernel of row statistics: those of latent attention, of which all query heads share one key.

Owns the functions that are compiled into `row_stats.py` for them. A head of 512 + 64 elements is loaded in two parts.
"""

import triton
import triton.language as tl

from glassbox.kernels.paged_keys import LOG2E, load_keys, soft_capped, widened
from glassbox.kernels.row_state import no_keys

# Score of a key that a row does not see: far below all others, and its product with a weight of 0 is 0.
_HIDDEN = tl.constexpr(-1e30)


@triton.jit
def _page_of(table_ptr, tile, last_tile, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """Where a tile's page lies in the cache, for tiles of at most a page; behind the last tile, that of the last."""
    return tl.load(table_ptr + tl.minimum(tile, last_tile - 1) * BLOCK_N // PAGE)


@triton.jit
def wide_sums(  # noqa: PLR0912, PLR0915
    q,  # [BLOCK_H, BLOCK_D]
    q_rest,  # [BLOCK_H, BLOCK_REST]; q if there is no rest
    k_head_ptr,
    k_desc,  # with BY_PAGE, see `_row_stats_kernel`
    k_rest_desc,
    kv_head,
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
    BY_PAGE: tl.constexpr,
    HELD: tl.constexpr,
):
    """State of the keys of some tiles, as `combine` has it, with heads as the rows of the product.

    For many heads: what is summed is one number per head, not one per score, whose registers 128 heads don't leave.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    column = offs_n.to(tl.float32)
    # Scores stay unscaled unless something but a factor is between them and the softmax.
    PLAIN: tl.constexpr = not (HAS_SOFT_CAP or HAS_ALIBI)
    unit = LOG2E
    if PLAIN:
        unit = factor * LOG2E
    m, z_context, z_generated, e, z2, sink, local, distance, own, bad = no_keys(tl.zeros([BLOCK_H], tl.float32))
    if HELD:
        # The queries in registers, not in shared memory, which is for more keys then: they take the layout of what they
        # are added to, a product's, and operands in that layout stay where they are.
        zeros = tl.zeros([16, BLOCK_REST if BLOCK_REST > 0 else BLOCK_D], DOT_DTYPE)
        product = tl.dot(q_rest, tl.trans(zeros), input_precision="ieee")
        nothing = (tl.max(product, 1) * 0.0)[:, None].to(DOT_DTYPE)
        q = q + nothing
        q_rest = q_rest + nothing
    block = 0
    if BY_PAGE:
        block = _page_of(table_ptr, first_tile, last_tile, BLOCK_N, PAGE)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        begin = tile * BLOCK_N
        j = begin + offs_n
        visible = (j - lowest).to(tl.uint32, bitcast=True) < n_visible
        if BY_PAGE:
            # What is loaded beside visible keys may be anything.
            slot = begin % PAGE
            k = k_desc.load([block, kv_head, slot, 0]).reshape(BLOCK_N, BLOCK_D)
            if BLOCK_REST > 0:
                rest = k_rest_desc.load([block, kv_head, slot, BLOCK_D]).reshape(BLOCK_N, BLOCK_REST)
            block = _page_of(table_ptr, tile + 1, last_tile, BLOCK_N, PAGE)
        else:
            k = load_keys(
                k_head_ptr, table_ptr, tile, j, visible, position, offs_n, offs_d, stride_k_block, stride_k_slot,
                BLOCK_D, PAGE, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            if BLOCK_REST > 0:
                rest = load_keys(
                    k_head_ptr + BLOCK_D, table_ptr, tile, j, visible, position, offs_n, tl.arange(0, BLOCK_REST),
                    stride_k_block, stride_k_slot, HEAD_SIZE - BLOCK_D, PAGE, BLOCK_REST, BLOCK_N,
                )  # fmt: skip
        # [BLOCK_H, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_H, BLOCK_N]
        s = tl.dot(q, tl.trans(widened(k, DOT_DTYPE)), input_precision="ieee")
        if BLOCK_REST > 0:
            s = tl.dot(q_rest, tl.trans(widened(rest, DOT_DTYPE)), s, input_precision="ieee")

        end = begin + BLOCK_N
        age = (position - begin).to(tl.float32) - column
        if not PLAIN:
            s = s * factor
            bad += tl.sum(tl.where(visible[None, :], s * 0.0, 0.0), 1)  # which a cap would hide
            if HAS_SOFT_CAP:
                s = soft_capped(s, soft_cap)
            if HAS_ALIBI:
                s = s - slopes[:, None] * age[None, :]
        # Always true: what is in an `if` comes behind the loads for the next tiles, which must not wait for it.
        if begin <= position:
            if (begin < lowest) | (end > position):
                s = tl.where(visible[None, :], s, _HIDDEN)
                own = tl.maximum(own, tl.max(tl.where((j == position)[None, :], s, float("-inf")), 1))
            risen = tl.maximum(m, tl.max(s, 1))
            shift = tl.maximum((m - risen) * unit, -256.0)
            decay = tl.exp2(shift)
            # No floor: a score that is not finite must make E so, too.
            t = (s - risen[:, None]) * unit
            p = tl.exp2(t)
            e = (e + shift * (z_context + z_generated)) * decay + tl.sum(p * t, 1)
            z2 = z2 * (decay * decay) + tl.sum(p * p, 1)
            distance = distance * decay + tl.sum(p * age[None, :], 1)
            m = risen
            # The keys of most tiles are all of the context, or none, and so on: of them the sum is enough.
            mixed = (
                (begin < sink_tokens)
                | ((begin + local_window <= position) & (end + local_window > position + 1))
                | ((begin < prompt_len) & (end > prompt_len))
            )
            if mixed:
                is_context = (j < prompt_len)[None, :]
                of_context = tl.sum(tl.where(is_context, p, 0.0), 1)
                of_generated = tl.sum(tl.where(is_context, 0.0, p), 1)
                of_sink = tl.sum(tl.where((j < sink_tokens)[None, :], p, 0.0), 1)
                of_local = tl.sum(tl.where((position - j < local_window)[None, :], p, 0.0), 1)
            else:
                z = tl.sum(p, 1)
                in_context = (begin < prompt_len).to(tl.float32)
                of_context = z * in_context
                of_generated = z - of_context
                of_sink = tl.zeros([BLOCK_H], tl.float32)
                of_local = z * (position - begin < local_window).to(tl.float32)
            z_context = z_context * decay + of_context
            z_generated = z_generated * decay + of_generated
            sink = sink * decay + of_sink
            local = local * decay + of_local
    bad += e * 0.0
    if PLAIN:
        m = m * factor
        own = own * factor
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
