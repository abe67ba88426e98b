"""Where K and V stand in a layer's KV cache, found by writing known numbers into a scratch cache.

Owns the finding. A cache's layout is no interface of vLLM: it differs between devices, instruction sets and releases.
So it isn't assumed: numbers are written with the layer's own `do_kv_cache_update`, which has had one signature in all
releases, into a small cache of the layer's shape, type and strides, and looked up there. What comes back as other
numbers (types with scales of their own, packed or rotated ones) is refused.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

# Of vLLM's `kv_cache_dtype`, on every device.
FP8_DTYPES: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Digits written per pass must be exact in the narrowest type of a cache: e5m2 has two mantissa bits, so 0..7.
_DIGIT_BASE: Final = 8
# Two blocks show that a page holds its own block and nothing else.
_BLOCKS: Final = 2


class CacheLayoutError(RuntimeError):
    """A KV cache is laid out in a way that can't be read; the message says how."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the elements of K, or of V, stand: block * block_stride + head * head_stride + offsets[token, d].

    Attributes:
        block_stride, head_stride: in elements.
        offsets: int64 [block, D] on the host, of block 0 and KV head 0 from the cache's first element.
    """

    block_stride: int
    head_stride: int
    offsets: Tensor

    @cached_property
    def strides(self) -> tuple[int, int, int] | None:
        """(offset of the first element, stride of tokens, stride of D) if that is all there is to say of `offsets`."""
        block_size, head_size = self.offsets.shape
        first = int(self.offsets[0, 0])
        by_token = int(self.offsets[1, 0]) - first if block_size > 1 else 0
        by_dim = int(self.offsets[0, 1]) - first if head_size > 1 else 1
        made = first + torch.arange(block_size)[:, None] * by_token + torch.arange(head_size)[None, :] * by_dim
        return (first, by_token, by_dim) if torch.equal(made, self.offsets) else None


@dataclass(frozen=True, eq=False)
class CacheLayout:
    """Of one layer's cache.

    Attributes:
        blocks: dimension of the cache that numbers its blocks.
        shape: of a block, that is without that dimension; strides: of the cache, in elements.
        dtype: of the stored numbers; an FP8 type may be stored as bytes.
        block_size: tokens of a block; num_kv_heads: Hkv.
        key, value: where they stand.
    """

    blocks: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    num_kv_heads: int
    key: Places
    value: Places

    def fits(self, kv_cache: Tensor) -> bool:
        """Whether a cache has the shape and the strides of the one that was looked at."""
        return _without(kv_cache.shape, self.blocks) == self.shape and kv_cache.stride() == self.strides

    def view(self, kv_cache: Tensor, places: Places) -> Tensor:
        """K or V of a cache whose elements stand in strides, [num_blocks, Hkv, block, D] in its numbers' type.

        Raises:
            CacheLayoutError: they don't.
        """
        strides = places.strides
        if strides is None or strides[2] != 1:
            raise CacheLayoutError("the elements of a token must stand side by side in the cache, and don't")
        first, by_token, _ = strides
        numbers = kv_cache if kv_cache.dtype == self.dtype else kv_cache.view(self.dtype)
        return numbers.as_strided(
            (kv_cache.shape[self.blocks], self.num_kv_heads, *places.offsets.shape),
            (places.block_stride, places.head_stride, by_token, 1),
            kv_cache.storage_offset() + first,
        )


# Writes key and value, [tokens, Hkv, D], into slots (int64 [tokens]) of a cache with scales of 1.
Write = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def stored_dtype(kv_cache: Tensor, kv_cache_dtype: str) -> torch.dtype:
    """Type of a cache's numbers.

    Raises:
        CacheLayoutError: they are of no type with which glassbox could read them.
    """
    fp8 = FP8_DTYPES.get(kv_cache_dtype)
    if fp8 is not None and kv_cache.element_size() == 1:
        return fp8
    if fp8 is None and kv_cache.is_floating_point() and kv_cache.element_size() > 1:
        return kv_cache.dtype
    raise CacheLayoutError(
        f"a cache of kv_cache_dtype {kv_cache_dtype} must hold float16, bfloat16 or float32 (auto) or bytes (fp8), got "
        f"{kv_cache.dtype}"
    )


def find_layout(
    write: Write,
    kv_cache: Tensor,
    *,
    kv_cache_dtype: str,
    num_kv_heads: int,
    head_size: int,
    value_head_size: int,
    written_dtype: torch.dtype,
    num_blocks: int | None = None,
) -> CacheLayout:
    """Find where a layer's `write` puts each element. Allocates two blocks; waits for the device.

    Args:
        write: the layer's.
        kv_cache: of the layer.
        kv_cache_dtype: as vLLM names it.
        num_kv_heads, head_size, value_head_size: Hkv and D of the layer's K and V.
        written_dtype: of K and V before they are stored.
        num_blocks: that vLLM hands out; a layer may have each of them in several parts. None if it isn't known: then
            the first dimension is that of the blocks.

    Raises:
        CacheLayoutError: the elements of K and V don't stand in it as plain numbers, each once.
    """
    dtype = stored_dtype(kv_cache, kv_cache_dtype)
    blocks = _blocks_dimension(kv_cache, num_blocks)
    shape = _without(kv_cache.shape, blocks)
    of_token = num_kv_heads * (head_size + value_head_size)
    block_size, rest = divmod(math.prod(shape), of_token)
    if rest or not block_size:
        raise CacheLayoutError(
            f"a block of {list(shape)} numbers is no whole number of tokens of {num_kv_heads} KV heads of "
            f"{head_size} + {value_head_size} numbers: the cache holds more than K and V"
        )
    scratch, cache, order = _scratch_like(kv_cache, blocks)
    numbers = torch.arange(1, _BLOCKS * block_size * of_token + 1, device=kv_cache.device)
    num_keys = _BLOCKS * block_size * num_kv_heads * head_size
    keys = numbers[:num_keys].view(_BLOCKS * block_size, num_kv_heads, head_size)
    values = numbers[num_keys:].view(_BLOCKS * block_size, num_kv_heads, value_head_size)
    slots = torch.arange(_BLOCKS * block_size, device=kv_cache.device)
    found = torch.zeros(scratch.numel(), dtype=torch.int64, device=kv_cache.device)
    unit = 1
    while unit <= len(numbers):
        scratch.zero_()
        key_digits, value_digits = ((part // unit % _DIGIT_BASE).to(written_dtype) for part in (keys, values))
        try:
            write(key_digits, value_digits, cache, slots)
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CacheLayoutError(f"vLLM can't write a KV cache of {kv_cache_dtype}: {first}") from error
        read = (scratch if scratch.dtype == dtype else scratch.view(dtype)).double().nan_to_num(nan=-1.0)
        found += read.long() * unit
        unit *= _DIGIT_BASE
    index = torch.unravel_index(_places_of(found, len(numbers)).cpu(), [cache.shape[d] for d in order])
    places = torch.stack([of * kv_cache.stride(d) for of, d in zip(index, order, strict=True)]).sum(0)
    return CacheLayout(
        blocks=blocks,
        shape=shape,
        strides=tuple(kv_cache.stride()),
        dtype=dtype,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        key=_regular(places[:num_keys].view(_BLOCKS, block_size, num_kv_heads, head_size), "keys"),
        value=_regular(places[num_keys:].view(_BLOCKS, block_size, num_kv_heads, value_head_size), "values"),
    )


def _without(shape: Sequence[int], dimension: int) -> tuple[int, ...]:
    return (*shape[:dimension], *shape[dimension + 1 :])


def _blocks_dimension(kv_cache: Tensor, num_blocks: int | None) -> int:
    if not num_blocks:
        return 0
    found = [d for d, size in enumerate(kv_cache.shape) if size and size % num_blocks == 0]
    if not found:
        raise CacheLayoutError(
            f"no dimension of a cache of shape {list(kv_cache.shape)} is that of {num_blocks} blocks"
        )
    return found[0]


def _scratch_like(kv_cache: Tensor, blocks: int) -> tuple[Tensor, Tensor, list[int]]:
    """Contiguous memory for two blocks, a cache in it, and the cache's dimensions in the order of their strides."""
    shape = list(kv_cache.shape)
    shape[blocks] = _BLOCKS
    strides: tuple[int, ...] = kv_cache.stride()
    order = sorted(range(kv_cache.ndim), key=strides.__getitem__, reverse=True)
    memory = torch.zeros([shape[d] for d in order], dtype=kv_cache.dtype, device=kv_cache.device)
    return memory.view(-1), memory.permute([order.index(d) for d in range(kv_cache.ndim)]), order


def _places_of(found: Tensor, count: int) -> Tensor:
    """Where each of the numbers 1 to `count` stands in `found`, in which 0 is nothing; int64 [count]."""
    (where,) = (found != 0).nonzero(as_tuple=True)
    there = found[where]
    if len(where) != count or not torch.equal(there.sort().values, torch.arange(1, count + 1, device=found.device)):
        raise CacheLayoutError("K and V don't come back as the numbers that were written: they are no plain numbers")
    places = torch.empty_like(there)
    places[there - 1] = where
    return places


def _regular(places: Tensor, what: str) -> Places:
    """Places [blocks, block, Hkv, D] as steps from block to block and from head to head."""
    of_first = places[0, :, 0]
    block_stride = int(places[1, 0, 0, 0] - places[0, 0, 0, 0])
    head_stride = int(places[0, 0, 1, 0] - places[0, 0, 0, 0]) if places.shape[2] > 1 else 0
    blocks, heads = torch.arange(places.shape[0]), torch.arange(places.shape[2])
    made = of_first[None, :, None] + blocks.view(-1, 1, 1, 1) * block_stride + heads.view(1, 1, -1, 1) * head_stride
    if not torch.equal(made, places):
        raise CacheLayoutError(f"blocks or KV heads differ in their order of {what}")
    return Places(block_stride, head_stride, of_first.contiguous())
