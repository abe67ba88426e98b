"""How to read keys and values from vLLM's CPU KV cache.

Owns the packing of a page, its numbers' type and its scale. It computes nothing on keys and knows nothing of rows.

vLLM's CPU backend keeps a cache of logical shape [num_blocks, Hkv, block, 2*D], but writes into each head's page first
all keys, then all values, in an order that suits the instructions in use: a transpose for the vector kernels, tiles for
AMX. Where each element stands is found by `cache_layout.py`.
"""

import functools
from dataclasses import dataclass
from typing import Final, Self, TypeAlias

import torch
from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout, Places

# (size, stride) of nested dimensions, outermost first.
Dims: TypeAlias = tuple[tuple[int, int], ...]

_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# e4m3 bits shifted into float16 are the number times 2^-8 (exponent biases 7 and 15).
_E4M3_AS_HALF_SCALE: Final = 256.0


@dataclass(frozen=True, eq=False)
class PageOrder:
    """Where element (token t, dimension d) of a head's K or V stands in its page.

    Attributes:
        block_size: tokens of a page.
        head_size: D.
        first: the page's first element, from the head's own in the cache.
        length: elements from the first to the last.
        token_dims, head_dims: (size, stride) pairs, outermost first, if the offset is a sum of a mixed-radix
            function of t and one of d; empty if it isn't.
        offsets: from the first, of every (t, d) in row-major order, int64 [block * D].
    """

    block_size: int
    head_size: int
    first: int
    length: int
    token_dims: Dims
    head_dims: Dims
    offsets: Tensor

    @classmethod
    def of(cls, offsets: Tensor) -> Self:
        """Of offsets [block, D] from the head's first element in the cache."""
        first = int(offsets.min())
        within = offsets - first
        token_dims, head_dims = _strided_form(within)
        length = int(within.max()) + 1
        block_size, head_size = offsets.shape
        return cls(block_size, head_size, first, length, token_dims, head_dims, within.flatten())

    @property
    def is_view(self) -> bool:
        """True if elements are read without moving a single one within its page."""
        return len(self.token_dims) == 1 and len(self.head_dims) == 1

    def unpack(self, pages: Tensor) -> Tensor:
        """Elements of pages, in order.

        Args:
            pages: contiguous [N, Hkv, length], any dtype.

        Returns:
            [N, Hkv, block, D]; a view of `pages` if `is_view`.
        """
        if not self.token_dims:
            shape = (*pages.shape[:2], self.block_size, self.head_size)
            return pages.index_select(2, self.offsets).view(shape)
        dims = self.token_dims + self.head_dims
        if self.is_view:
            return _nested(pages, dims)
        # Neighbours that stay neighbours are moved as one integer: six times as fast for AMX's pairs of bf16.
        size, stride = dims[-1]
        wide = _INTEGERS.get(size * pages.element_size()) if stride == 1 and self.length % size == 0 else None
        if wide is None or any(stride % size for _, stride in dims[:-1]):
            return _nested(pages, dims).reshape(*pages.shape[:2], self.block_size, self.head_size)
        narrowed = tuple((outer, stride // size) for outer, stride in dims[:-1])
        moved = _nested(pages.view(wide), narrowed).reshape(*pages.shape[:2], self.block_size, -1)
        return moved.view(pages.dtype)


@functools.lru_cache(maxsize=64)
def page_order(places: Places) -> PageOrder:
    """Of a kind of cache; kept, since a model's layers share it."""
    return PageOrder.of(places.offsets)


def _nested(pages: Tensor, dims: Dims) -> Tensor:
    """Contiguous pages [N, Hkv, page] as a view [N, Hkv, *sizes of dims]."""
    num_pages, num_heads, page = pages.shape
    return pages.as_strided(
        (num_pages, num_heads, *(size for size, _ in dims)),
        (num_heads * page, page, *(stride for _, stride in dims)),
    )


class PackedReader:
    """Reads K, or V, of one layer from vLLM's CPU cache.

    Attributes:
        key_scale: factor that turns what `read` returns into keys or values. It belongs on the scores, or on the
            output (one factor for all), not on each number.
        num_kv_heads: Hkv.
        order: of a page.
        fp8: type of the stored numbers; None if it is the cache's own.
        largest: what `read` returns for the largest number of an FP8 type; None of other types.
    """

    def __init__(self, kv_cache: Tensor, layout: CacheLayout, places: Places, scale: float) -> None:
        """Makes a reader; cheap, for it must not outlive the step.

        Args:
            kv_cache: of the layer.
            layout: of it.
            places: `layout.key` or `layout.value`.
            scale: key = stored number * scale; only FP8 caches use it.
        """
        self.fp8: Final = layout.dtype if layout.dtype.itemsize == 1 else None
        stored = kv_cache if self.fp8 is None else kv_cache.view(torch.uint8)
        order = page_order(places)
        self.order: Final = order
        self._pages = stored.as_strided(
            (kv_cache.shape[layout.blocks], layout.num_kv_heads, order.length),
            (places.block_stride, places.head_stride, 1),
            kv_cache.storage_offset() + order.first,
        )
        self.num_kv_heads: Final = layout.num_kv_heads
        self.largest: Final = None if self.fp8 is None else torch.finfo(self.fp8).max / _half_scale(self.fp8)
        self.key_scale: Final = 1.0 if self.fp8 is None else scale * _half_scale(self.fp8)

    def read(self, block_ids: Tensor) -> Tensor:
        """Keys or values of the given blocks, to be multiplied by `key_scale`.

        Args:
            block_ids: int64 [N].

        Returns:
            [N, Hkv, block, D] in the cache's dtype (float16 or float32 of an FP8 cache), possibly strided.
            Unused slots of a block hold whatever the cache holds.
        """
        pages = self._pages.index_select(0, block_ids)
        if self.fp8 is not None:
            pages = _widen_fp8(pages, self.fp8)
        return self.order.unpack(pages)


def _half_scale(fp8: torch.dtype) -> float:
    return _E4M3_AS_HALF_SCALE if fp8 == torch.float8_e4m3fn else 1.0


def _widen_fp8(stored: Tensor, fp8: torch.dtype) -> Tensor:
    """FP8 numbers over `_half_scale(fp8)`, exact, in float16 or float32, of bytes of any shape.

    torch's own conversion of e4m3 takes 2.7 ns a number on one AVX-512 core, these shifts 0.2 ns.
    """
    if fp8 == torch.float8_e5m2:
        return stored.to(torch.int16).bitwise_left_shift_(8).view(torch.float16)
    # NaN is 0x7f and 0xff, which the shift would turn into 480.
    if int((stored & 0x7F).max()) == 0x7F:
        return stored.view(fp8).to(torch.float32).div_(_E4M3_AS_HALF_SCALE)
    # As int8 the sign extends into bit 14, the top bit of the exponent, which is cleared.
    half = stored.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return half.view(torch.float16)


def _strided_form(
    offsets: Tensor,
) -> tuple[Dims, Dims]:
    """Token and head dimensions of `offsets` [block, D]; empty if it has no such form."""
    by_token = (offsets[:, 0] - offsets[0, 0]).tolist()
    by_dim = (offsets[0] - offsets[0, 0]).tolist()
    separable = torch.tensor(by_token)[:, None] + torch.tensor(by_dim)[None, :]
    token_dims, head_dims = _mixed_radix(by_token), _mixed_radix(by_dim)
    if token_dims is None or head_dims is None or not torch.equal(separable, offsets):
        return (), ()
    return token_dims, head_dims


def _mixed_radix(values: list[int]) -> Dims | None:
    """Dimensions whose offsets are `values` (the first is 0), or None if there are none."""
    dims: list[tuple[int, int]] = []
    while len(values) > 1:
        stride = values[1]
        size = next((x for x, value in enumerate(values) if value != x * stride), len(values))
        if len(values) % size or any(
            value != values[x - x % size] + x % size * stride for x, value in enumerate(values)
        ):
            return None
        dims.insert(0, (size, stride))
        values = values[::size]
    return tuple(dims) or ((1, 1),)
