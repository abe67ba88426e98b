"""Queries of the listed rows of one layer, and what is kept of traced ones, copied to where they outlast the layer.

For `row_stats.row_stats_layers`, which measures the rows of all layers after the forward pass, when the layers' own
tensors have been overwritten. Owns the kernel and its launch; it computes nothing.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl

from glassbox.core import rows as row_list
from glassbox.kernels.paged_keys import FUSED, MAX_HEAD_SIZE
from glassbox.kernels.row_stats import check_kept
from glassbox.kernels.wide_rows import copy_heads

# Compiled kernels and their constants, by all that decides which one a launch takes.
Compiled = dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]]

_NUM_ROW_COLUMNS = tl.constexpr(row_list.NUM_ROW_COLUMNS)
_ROW_QUERY = tl.constexpr(row_list.ROW_QUERY)
_ROW_SLOT = tl.constexpr(row_list.ROW_SLOT)

_FREE_POINTERS: Final = [
    "q_ptr",
    "rows_ptr",
    "num_rows_ptr",
    "list_start_ptr",
    "kept_ptr",
    "queries_ptr",
    "output_ptr",
    "outputs_ptr",
    "key_ptr",
    "value_ptr",
    "kept_kv_ptr",
]
_FREE_INTEGERS: Final = [
    "stride_q_token",
    "stride_q_head",
    "stride_kept_row",
    "stride_kept_row_head",
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
]


@triton.jit(do_not_specialize=_FREE_INTEGERS, do_not_specialize_on_alignment=_FREE_POINTERS)
def _row_keep_kernel(
    q_ptr,  # [T, H, D]
    rows_ptr,  # [max_rows, _NUM_ROW_COLUMNS] int32
    num_rows_ptr,  # [1] int32
    list_start_ptr,  # [1] int32
    kept_ptr,  # [max_rows, H, D]
    queries_ptr,  # [ring, H, D]
    output_ptr,  # [T, H, DV]
    outputs_ptr,  # [ring, H, DV]
    key_ptr,  # [T, Hkv, D]
    value_ptr,  # [T, Hkv, D]
    kept_kv_ptr,  # [ring, 2, Hkv, D]
    stride_q_token,
    stride_q_head,
    stride_kept_row,
    stride_kept_row_head,
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
    HAS_START: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_KV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    if HAS_START:
        rows_ptr += tl.load(list_start_ptr) * _NUM_ROW_COLUMNS
    # Behind num_rows the list holds what earlier steps left: read, not used.
    token = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_QUERY).to(tl.int64)
    slot = tl.load(rows_ptr + row * _NUM_ROW_COLUMNS + _ROW_SLOT).to(tl.int64)
    if row < tl.load(num_rows_ptr):
        in_group = tl.arange(0, BLOCK_H)
        heads = kv_head * GROUP + in_group
        is_head = in_group < GROUP
        q = q_ptr + token * stride_q_token + heads * stride_q_head
        copy_heads(
            q, kept_ptr + row.to(tl.int64) * stride_kept_row + heads * stride_kept_row_head, is_head, HEAD_SIZE, BLOCK_D
        )
        if slot >= 0:
            copy_heads(
                q, queries_ptr + slot * stride_queries + heads * stride_queries_head, is_head, HEAD_SIZE, BLOCK_D
            )
            if HAS_OUTPUT:
                served = output_ptr + token * stride_output_token + heads * stride_output_head
                kept_output = outputs_ptr + slot * stride_outputs + heads * stride_outputs_head
                copy_heads(served, kept_output, is_head, OUTPUT_SIZE, BLOCK_OUTPUT)
            if HAS_KV:
                offs_d = tl.arange(0, BLOCK_D)
                is_element = offs_d < HEAD_SIZE
                kept_kv = kept_kv_ptr + slot * stride_kept + kv_head * stride_kept_head + offs_d
                own_key = key_ptr + token * stride_key_token + kv_head * stride_key_head + offs_d
                own_value = value_ptr + token * stride_value_token + kv_head * stride_value_head + offs_d
                tl.store(kept_kv, tl.load(own_key, mask=is_element), mask=is_element)
                tl.store(kept_kv + stride_kept_tensor, tl.load(own_value, mask=is_element), mask=is_element)


def row_keep(
    q: torch.Tensor,
    rows: torch.Tensor,
    num_rows: torch.Tensor,
    kept: torch.Tensor,
    *,
    like: torch.Tensor,
    queries: torch.Tensor,
    compiled: Compiled,
    output: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    kept_kv: torch.Tensor | None = None,
    list_start: torch.Tensor | None = None,
) -> None:
    """Copy what the listed rows need of one layer, on the current stream; asynchronous.

    Args:
        q: [T, H, D], the last dimension contiguous, as all below.
        rows: [>= R, NUM_ROW_COLUMNS] int32 row list, see `core/rows.py`; R entries can be read from where the list
            begins.
        num_rows: int32, its first element is the number of rows in use, at most R.
        kept: [R, H, D] of q's type: the queries of all rows in use.
        like: the layer's K cache, [num_blocks, Hkv, block_size, D], of which only the shape is used.
        queries: [slots, H, D] of a type that holds q's numbers: those of rows with a slot.
        compiled: what earlier launches have compiled.
        output, outputs, key, value, kept_kv, list_start: as of `row_stats`.

    Raises:
        ValueError: heads that are too wide, or tensors that don't fit each other.
    """
    _, num_heads, head_size = kept.shape
    if head_size > MAX_HEAD_SIZE or q.shape[1:] != kept.shape[1:] or kept.dtype != q.dtype:
        raise ValueError(
            f"kept must be of q's type, of its heads of at most {MAX_HEAD_SIZE} elements, got {kept.dtype} "
            f"{list(kept.shape)} for {q.dtype} {list(q.shape)}; measure this layer while it runs"
        )
    if output is None or outputs is None:
        output = outputs = None
    if key is None or value is None or kept_kv is None or key.shape != value.shape:
        key = value = kept_kv = None
    check_kept(like, num_heads, output, outputs, key, value, kept_kv)
    num_kv_heads = like.shape[1]
    output_size = head_size if output is None else output.shape[2]
    tensors = ((q, 2), (kept, 2), (queries, 2), (output, 2), (outputs, 2), (key, 2), (value, 2), (kept_kv, 3))
    strides = (
        stride for tensor, count in tensors for stride in ((0,) * count if tensor is None else tensor.stride()[:count])
    )
    arguments = (
        q, rows, num_rows, list_start, kept, queries, output, outputs, key, value, kept_kv, *strides,
    )  # fmt: skip
    grid = (len(kept), num_kv_heads, 1)
    # Everything that Triton specialises the kernel on, as in `row_stats`.
    variant = (
        q.dtype,
        kept.shape[1:],
        num_kv_heads,
        queries.dtype,
        None if output is None else (output.dtype, output_size),
        None if key is None else key.dtype,
        list_start is None,
    )
    known = compiled.get(variant)
    if known is not None:
        kernel, constants = known
        kernel[grid](*arguments, *constants)
        return
    group = num_heads // num_kv_heads
    constants = (
        list_start is not None,
        group,
        head_size,
        output_size,
        output is not None,
        kept_kv is not None,
        triton.next_power_of_2(group),
        max(triton.next_power_of_2(head_size), 16),
        max(triton.next_power_of_2(output_size), 16),
    )
    kernel = _row_keep_kernel[grid](*arguments, *constants, num_warps=4, **FUSED)
    if kernel is not None:  # None from the interpreter
        compiled[variant] = (kernel, constants)
