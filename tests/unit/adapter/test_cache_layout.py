"""cache_layout.py: where K and V stand is found, for any order that is regular, and everything else is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout, CacheLayoutError, find_layout

BLOCKS, HEADS, BLOCK, D = 5, 3, 4, 8
Split = Callable[[Tensor], tuple[Tensor, Tensor]]

# Shape of a cache, and its K and V as [blocks, block, Hkv, D].
LAYOUTS: dict[str, tuple[tuple[int, ...], Split]] = {
    "blocks, Hkv, block, 2D": ((BLOCKS, HEADS, BLOCK, 2 * D), lambda c: c.transpose(1, 2).split(D, dim=-1)),
    "blocks, 2, block, Hkv, D": ((BLOCKS, 2, BLOCK, HEADS, D), lambda c: c.unbind(1)),
    "blocks, block, Hkv, 2, D": ((BLOCKS, BLOCK, HEADS, 2, D), lambda c: c.unbind(3)),
    "2, blocks, block, Hkv, D": ((2, BLOCKS, BLOCK, HEADS, D), lambda c: c.unbind(0)),
    "Hkv, blocks, block, 2D": ((HEADS, BLOCKS, BLOCK, 2 * D), lambda c: c.permute(1, 2, 0, 3).split(D, dim=-1)),
    "blocks, 2, Hkv, D, block": ((BLOCKS, 2, HEADS, D, BLOCK), lambda c: c.permute(1, 0, 4, 2, 3).unbind(0)),
}


def writer(split: Split, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., None]:
    """Writes as a backend of vLLM would."""

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        for part, numbers in zip(split(cache), (key, value), strict=True):
            part[slots // BLOCK, slots % BLOCK] = change(numbers).to(part.dtype)

    return write


def found(
    write: Callable[..., None], cache: Tensor, kv_cache_dtype: str = "auto", num_blocks: int = BLOCKS
) -> CacheLayout:
    return find_layout(
        write,
        cache,
        kv_cache_dtype=kv_cache_dtype,
        num_kv_heads=HEADS,
        head_size=D,
        value_head_size=D,
        written_dtype=torch.bfloat16,
        num_blocks=num_blocks,
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_any_regular_order(name: str, dtype: torch.dtype) -> None:
    """K and V of random numbers are read from where they were found to stand, in padded blocks, too."""
    shape, split = LAYOUTS[name]
    of_block = torch.Size(shape[1:]).numel()
    memory = torch.zeros(shape[0] * (of_block + 16), dtype=torch.float32).to(dtype)
    cache = torch.as_strided(memory, shape, (of_block + 16, *torch.empty(shape[1:]).stride()))
    kv_cache_dtype = {1: "fp8_e5m2" if dtype == torch.float8_e5m2 else "fp8"}.get(dtype.itemsize, "auto")
    layout = found(writer(split), cache, kv_cache_dtype)
    assert (layout.block_size, layout.num_kv_heads, layout.dtype) == (BLOCK, HEADS, dtype)
    key, value = torch.randn(2, BLOCKS * BLOCK, HEADS, D).bfloat16().unbind()
    writer(split)(key, value, cache, torch.arange(BLOCKS * BLOCK))
    for places, written in ((layout.key, key), (layout.value, value)):
        expected = written.view(BLOCKS, BLOCK, HEADS, D).transpose(1, 2).to(dtype)
        if name == "blocks, 2, Hkv, D, block":  # to be read by offsets
            with pytest.raises(CacheLayoutError, match="side by side"):
                layout.view(cache, places)
            starts = torch.arange(BLOCKS)[:, None] * places.block_stride + torch.arange(HEADS) * places.head_stride
            got = memory.float()[starts[..., None, None] + places.offsets]
        else:
            got = layout.view(cache, places).float()
        assert torch.equal(expected.float(), got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 1, "no plain numbers"),
        (lambda x: x.flip(-1) * 0, "no plain numbers"),
        (lambda x: x * 0.5, "no plain numbers"),
    ],
)
def test_other_numbers_than_were_written(change: Callable[[Tensor], Tensor], message: str) -> None:
    """A cache that holds them scaled, shifted or not at all."""
    shape, split = LAYOUTS["blocks, Hkv, block, 2D"]
    with pytest.raises(CacheLayoutError, match=message):
        found(writer(split, change), torch.zeros(shape))


def test_blocks_that_differ() -> None:
    """Odd blocks hold their heads in reverse order."""
    shape, split = LAYOUTS["blocks, Hkv, block, 2D"]

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        writer(split)(key, value, cache, slots)
        cache[1] = cache[1].flip(0)

    with pytest.raises(CacheLayoutError, match="blocks or KV heads differ in their order of keys"):
        found(write, torch.zeros(shape))


def test_more_than_keys_and_values() -> None:
    """Room for a scale beside each token's numbers, as in per-token-head types, is no whole number of tokens."""
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * D + 1, dtype=torch.uint8)
    with pytest.raises(CacheLayoutError, match="more than K and V"):
        found(lambda *_: None, cache, "fp8")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.uint8, "int4_per_token_head"), (torch.int8, "auto"), (torch.bfloat16, "fp8")]
)
def test_types_without_plain_numbers(dtype: torch.dtype, name: str) -> None:
    """What the type's name and the cache say must fit."""
    with pytest.raises(CacheLayoutError, match=f"kv_cache_dtype {name} must hold"):
        found(lambda *_: None, torch.zeros(BLOCKS, HEADS, BLOCK, 2 * D, dtype=dtype), name)


def test_a_backend_that_refuses() -> None:
    """Its own words, one line of them."""

    def write(*_: object) -> None:
        raise RuntimeError("not here\nat all")

    with pytest.raises(CacheLayoutError, match=r"^vLLM can't write a KV cache of auto: not here$"):
        found(write, torch.zeros(BLOCKS, HEADS, BLOCK, 2 * D))


def test_no_dimension_of_blocks() -> None:
    """A cache that isn't cut into vLLM's blocks is not read by their numbers."""
    with pytest.raises(CacheLayoutError, match=r"no dimension of a cache of shape \[5, .* is that of 7 blocks"):
        found(lambda *_: None, torch.zeros(BLOCKS, HEADS, BLOCK, 2 * D), num_blocks=7)
