"""How to read keys from vLLM's CPU KV cache.

Owns the layout of a CPU cache page: its permutation (found by probing), its dtype and its scale. It computes
nothing on keys and knows nothing of rows.

vLLM's CPU backend keeps a cache of logical shape [num_blocks, Hkv, block, 2*D], but writes into each head's
page first all keys, then all values, in an order that suits the instructions in use (its "isa"): a transpose
for the vector kernels, tiles for AMX. The order is no interface of vLLM, so it isn't assumed here: known
numbers are written with vLLM's own operator and looked up in the page.
"""

import functools
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

# (size, stride) of nested dimensions, outermost first.
Dims: TypeAlias = tuple[tuple[int, int], ...]

# Of vLLM's `kv_cache_dtype`, on every device.
FP8_DTYPES: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_INTEGERS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Digits written per probing pass must be exact in the narrowest type of a cache: e5m2 has two mantissa bits,
# so 0..7.
_DIGIT_BASE: Final = 8
# Two blocks and two heads show that a page holds its own head and block and nothing else.
_PROBE_BLOCKS: Final = 2
_PROBE_HEADS: Final = 2
# e4m3 bits shifted into float16 are the number times 2^-8 (exponent biases 7 and 15).
_E4M3_AS_HALF_SCALE: Final = 256.0


class CacheLayoutError(RuntimeError):
    """vLLM's CPU cache is laid out in a way that can't be read."""


@dataclass(frozen=True)
class KeyLayout:
    """Where key element (token t, dimension d) of a page stands.

    Attributes:
        block_size: tokens of a page.
        head_size: D.
        token_dims, head_dims: (size, stride) pairs, outermost first, if the offset is a sum of a mixed-radix
            function of t and one of d; empty if it isn't.
        offsets: offset of every (t, d) in row-major order, int64 [block * D].
    """

    block_size: int
    head_size: int
    token_dims: Dims
    head_dims: Dims
    offsets: Tensor

    @property
    def is_view(self) -> bool:
        """True if keys are read without moving a single one within its page."""
        return len(self.token_dims) == 1 and len(self.head_dims) == 1

    def unpack(self, pages: Tensor) -> Tensor:
        """Keys of pages, in order.

        Args:
            pages: contiguous [N, Hkv, block * D], any dtype.

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
        wide = _INTEGERS.get(size * pages.element_size()) if stride == 1 else None
        if wide is None or any(stride % size for _, stride in dims[:-1]):
            return _nested(pages, dims).reshape(*pages.shape[:2], self.block_size, self.head_size)
        narrowed = tuple((outer, stride // size) for outer, stride in dims[:-1])
        moved = _nested(pages.view(wide), narrowed).reshape(*pages.shape[:2], self.block_size, -1)
        return moved.view(pages.dtype)


def _nested(pages: Tensor, dims: Dims) -> Tensor:
    """Contiguous pages [N, Hkv, page] as a view [N, Hkv, *sizes of dims]."""
    num_pages, num_heads, page = pages.shape
    return pages.as_strided(
        (num_pages, num_heads, *(size for size, _ in dims)),
        (num_heads * page, page, *(stride for _, stride in dims)),
    )


class PackedKeyReader:
    """Reads keys of one layer from vLLM's CPU cache.

    Attributes:
        key_scale: factor that turns what `read` returns into keys. It belongs on the scores (one factor for
            all), not on the keys.
        num_kv_heads: Hkv.
        layout: of a page.
        fp8: type of the stored numbers; None if it is the cache's own.
    """

    def __init__(
        self,
        kv_cache: Tensor,
        isa: str,
        kv_cache_dtype: str = "auto",
        k_scale: float = 1.0,
    ) -> None:
        """Makes a reader; the first one of a layout probes it (some milliseconds).

        Args:
            kv_cache: [num_blocks, Hkv, block, 2*D] of the layer; uint8 if `kv_cache_dtype` is an FP8 type.
            isa: that vLLM chose for the layer (`layer.isa`).
            kv_cache_dtype: "auto", "fp8", "fp8_e4m3" or "fp8_e5m2" (`impl.kv_cache_dtype`).
            k_scale: key = stored number * k_scale; only FP8 caches use it.

        Raises:
            CacheLayoutError: the cache can't be read; the message says why.
        """
        _, num_heads, block_size, twice_head_size = kv_cache.shape
        head_size = twice_head_size // 2
        fp8 = FP8_DTYPES.get(kv_cache_dtype)
        if fp8 is None and kv_cache_dtype != "auto" and not _is_plain(kv_cache_dtype, kv_cache.dtype):
            raise CacheLayoutError(
                f"kv_cache_dtype must be auto, {', '.join(FP8_DTYPES)} or the cache's own dtype, "
                f"got {kv_cache_dtype}; its layers can't be observed"
            )
        if fp8 is not None and kv_cache.element_size() != 1:
            raise CacheLayoutError(f"a cache of kv_cache_dtype {kv_cache_dtype} must hold bytes, got {kv_cache.dtype}")
        if kv_cache.stride(3) != 1 or kv_cache.stride(2) != twice_head_size:
            raise CacheLayoutError(
                f"a head's page of the CPU cache must be contiguous, got strides {kv_cache.stride()}"
            )
        self.layout: Final = probe_layout(
            isa, block_size, head_size, None if fp8 else kv_cache.dtype, kv_cache_dtype if fp8 else "auto"
        )
        stored = kv_cache.view(torch.uint8) if fp8 else kv_cache
        page = block_size * head_size
        # Keys are the first half of each head's page.
        self._pages = stored.as_strided((kv_cache.shape[0], num_heads, page), (stored.stride(0), stored.stride(1), 1))
        self.fp8: Final = fp8
        self.num_kv_heads: Final = num_heads
        self.key_scale: Final = 1.0 if fp8 is None else k_scale * _half_scale(fp8)

    def read(self, block_ids: Tensor) -> Tensor:
        """Keys of the given blocks, to be multiplied by `key_scale`.

        Args:
            block_ids: int64 [N].

        Returns:
            [N, Hkv, block, D] in the cache's dtype (float16 or float32 of an FP8 cache), possibly strided.
            Unused slots of a block hold whatever the cache holds.
        """
        pages = self._pages.index_select(0, block_ids)
        if self.fp8 is not None:
            pages = _widen_fp8(pages, self.fp8)
        return self.layout.unpack(pages)


def _is_plain(kv_cache_dtype: str, dtype: torch.dtype) -> bool:
    return kv_cache_dtype == str(dtype).removeprefix("torch.")


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


@functools.cache
def probe_layout(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype | None, kv_cache_dtype: str
) -> KeyLayout:
    """Finds the layout of a page by writing known keys with vLLM's operator; the result is kept.

    Args:
        isa: of vLLM's CPU attention ("vec", "vec16", "amx", "neon", ...).
        block_size: tokens of a block.
        head_size: D.
        dtype: of the cache; None for FP8 caches.
        kv_cache_dtype: "auto" or an FP8 type.

    Raises:
        CacheLayoutError: the operator refuses, or what it writes is no permutation.
    """
    name = f"{isa=} {block_size=} {head_size=} {dtype=} {kv_cache_dtype=}"
    page = block_size * head_size
    try:
        found = _written_numbers(isa, block_size, head_size, dtype, kv_cache_dtype)
    except RuntimeError as error:
        raise CacheLayoutError(f"vLLM can't write a CPU cache of {name}: {str(error).splitlines()[0]}") from error
    # found[b, h, x] is the number of the key element that page (b, h) holds at x.
    own = torch.arange(_PROBE_BLOCKS * _PROBE_HEADS).view(_PROBE_BLOCKS, _PROBE_HEADS, 1) * page
    order = found - own
    if int(order.min()) < 0 or int(order.max()) >= page:
        raise CacheLayoutError(f"CPU cache of {name}: a page holds keys of another head or block")
    if not torch.equal(order, order[:1, :1].expand_as(order)):
        raise CacheLayoutError(f"CPU cache of {name}: pages differ in their order of keys")
    order = order[0, 0]
    if not torch.equal(order.sort().values, torch.arange(page)):
        raise CacheLayoutError(f"CPU cache of {name}: the order of keys in a page is no permutation")
    offsets = torch.empty(page, dtype=torch.int64)
    offsets[order] = torch.arange(page)
    token_dims, head_dims = _strided_form(offsets.view(block_size, head_size))
    return KeyLayout(block_size, head_size, token_dims, head_dims, offsets)


def _written_numbers(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype | None, kv_cache_dtype: str
) -> Tensor:
    """Numbers the elements of 2 blocks x 2 heads of keys, writes them, and reads the pages back as they lie.

    Returns:
        int64 [_PROBE_BLOCKS, _PROBE_HEADS, block * D].
    """
    from vllm import _custom_ops as ops

    fp8 = FP8_DTYPES.get(kv_cache_dtype)
    key_dtype = torch.bfloat16 if dtype is None else dtype
    num_tokens = _PROBE_BLOCKS * block_size
    # Number of (block, head, token, d), as keys [tokens, Hkv, D].
    numbers = torch.arange(num_tokens * _PROBE_HEADS * head_size)
    keys = numbers.view(_PROBE_BLOCKS, _PROBE_HEADS, block_size, head_size).transpose(1, 2)
    keys = keys.reshape(num_tokens, _PROBE_HEADS, head_size)
    slots = torch.arange(num_tokens)
    found = torch.zeros(_PROBE_BLOCKS, _PROBE_HEADS, block_size * head_size, dtype=torch.int64)
    unit = 1
    while unit < len(numbers):
        digit = (keys // unit % _DIGIT_BASE).to(key_dtype)
        cache = torch.zeros(
            (_PROBE_BLOCKS, _PROBE_HEADS, 2 * block_size, head_size), dtype=torch.uint8 if fp8 else key_dtype
        )
        key_cache, value_cache = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digit, torch.zeros_like(digit), key_cache, value_cache, slots, isa, 1.0, 1.0, kv_cache_dtype
        )
        stored = key_cache.reshape(found.shape)
        found += (stored.view(fp8) if fp8 else stored).to(torch.float64).long() * unit
        unit *= _DIGIT_BASE
    return found


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
