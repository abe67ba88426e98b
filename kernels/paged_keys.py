"""Keys of a paged cache in the Triton kernels: where a tile's keys lie, their loads, and the soft cap of their scores.

Owns what every kernel that scores a paged K on a GPU has in common: the functions that are compiled into it, the limits
of what they can read and the type they multiply in. It owns no kernel and no launch.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl

# Of one that is loaded as a whole, padded to a power of two, and of one that is loaded in two parts (latent attention).
MAX_HEAD_SIZE: Final = 256
MAX_WIDE_HEAD_SIZE: Final = 576
# Of each launch: a product and a sum may be one instruction, as everything was measured. Triton's own choice until 3.9.
FUSED: Final = {"enable_fp_fusion": True}
# Offsets within a page are int32 in the kernels; those of pages are int64.
MAX_PAGE_ELEMENTS: Final = 2**31 - 1
# Reach (see `LayerParams.reach`) of a layer whose rows see all keys before them.
UNLIMITED: Final = 2**31 - 1

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_visible(
    position,  # of a row, int32
    reach,  # a window, or -chunk_size
):
    """Position of the first key that a row sees."""
    chunk = tl.maximum(-reach, 1)
    return tl.where(reach > 0, tl.maximum(position + 1 - reach, 0), position // chunk * chunk)


def is_hopper(device: torch.device) -> bool:
    """Whether what was measured on a Hopper GPU holds; the interpreter takes the same way."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


@triton.jit
def load_keys(
    k_head_ptr,  # of one KV head: [num_blocks, PAGE, D]
    table_ptr,  # of one sequence: [max_blocks] int32
    tile,
    j,  # [BLOCK_N], positions of the tile's keys
    visible,  # [BLOCK_N], the keys that the row sees
    position,  # the row's own: no table entry behind it is read
    offs_n,  # [BLOCK_N]
    offs_d,  # [BLOCK_D]
    stride_k_block,
    stride_k_slot,
    HEAD_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] as stored; 0 where a key is not visible and in the padding of HEAD_SIZE."""
    if BLOCK_N % PAGE == 0:
        # Whole pages a tile: one table entry per page, and where a key lies in its page never changes.
        offs_p = tl.arange(0, BLOCK_N // PAGE)
        entry = tl.load(
            table_ptr + tile * (BLOCK_N // PAGE) + offs_p,
            mask=tile * BLOCK_N + offs_p * PAGE <= position,
            other=0,
        )
        block = tl.reshape(tl.broadcast_to(entry[:, None], [BLOCK_N // PAGE, PAGE]), [BLOCK_N])
        slot = offs_n % PAGE
    else:
        block = tl.load(table_ptr + j // PAGE, mask=j <= position, other=0)
        slot = j % PAGE
    wanted = visible[:, None]
    if HEAD_SIZE < BLOCK_D:
        wanted = wanted & (offs_d < HEAD_SIZE)[None, :]
    return tl.load(
        k_head_ptr
        + block.to(tl.int64)[:, None] * stride_k_block
        # int32 within a page: int64 here costs 40 registers
        + (slot[:, None] * stride_k_slot + offs_d[None, :]),
        mask=wanted,
        other=0.0,
    )


@triton.jit
def widened(k, DOT_DTYPE: tl.constexpr):
    """Keys in the type of the product, exactly; FP8 to bfloat16 over types from which a GPU converts at full speed."""
    if tl.bfloat16 == DOT_DTYPE and k.dtype.is_fp8():
        k = k.to(tl.float16).to(tl.float32)
    return k.to(DOT_DTYPE)


@triton.jit
def soft_capped(s, cap):
    """cap * tanh(s / cap); cap is not 0."""
    # tanh(x) = 1 - 2 / (e^2x + 1), which is +-1 where e^2x overflows or vanishes.
    return cap - 2.0 * cap / (tl.exp2(s * (2.0 * LOG2E / cap)) + 1.0)


def head_parts(head_size: int) -> tuple[int, int]:
    """(elements of the first part, block of the rest or 0) in which a head of that size is loaded.

    A wide one would waste up to half of what is loaded and multiplied if it were padded: 576 is 512 and 64.
    """
    if head_size <= MAX_HEAD_SIZE:
        return max(triton.next_power_of_2(head_size), 16), 0
    first = 1 << (head_size.bit_length() - 1)
    return first, max(triton.next_power_of_2(head_size - first), 16) if head_size > first else 0


def dot_dtype(q: torch.dtype, k: torch.dtype, on_cpu: bool) -> Any:
    """Type of the dot's operands: the narrowest in which q and K are exact."""
    half = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    # Triton's interpreter multiplies bfloat16 by its bit pattern (seen in 3.9).
    if on_cpu or torch.float32 in (q, k):
        return tl.float32
    if q in half and k in half:
        return half[q] if q == k else tl.float32
    # FP8 is exact in both half types; two FP8 operands take bfloat16.
    return half.get(q) or half.get(k) or tl.bfloat16
