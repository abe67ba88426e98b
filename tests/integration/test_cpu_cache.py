"""Keys read from vLLM's CPU cache are the keys that were written, and scores are made as vLLM makes them."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops

from glassbox.adapter.attention.cache_layout import CacheLayout, CacheLayoutError
from glassbox.adapter.attention.cpu_cache import PackedReader, PageOrder
from glassbox.adapter.attention.layer_view import PackedView
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.kernels.row_stats_cpu import LayerRows, plan_rows, row_stats_cpu
from glassbox.kernels.row_stats_native import NativeRows, NativeStep
from glassbox.measure.native_layers import CachedLayer
from tests.integration.cpu_layer import VllmLayer, cpu_layer, layout_of
from tests.kernels.tolerances import ATTENTION_OUTPUT, assert_two_oracles

pytestmark = pytest.mark.integration


FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
NUM_BLOCKS, NUM_HEADS = 5, 2
HAS_AMX = torch.cpu._is_amx_tile_supported()
# vLLM's operators for CPUs with AVX2 alone know neither FP8 caches nor AMX's order.
NEEDS_AVX512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM packs FP8 and AMX caches with its AVX-512 build"
)


@dataclass(frozen=True)
class Kind:
    """A cache of vLLM: `dtype` is the model's, `kv_dtype` the cache's."""

    isa: str
    block_size: int
    head_size: int
    dtype: torch.dtype
    kv_dtype: str

    @property
    def id(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.isa}-b{self.block_size}-d{self.head_size}-{name}-{self.kv_dtype}"

    @property
    def needs_avx512(self) -> bool:
        return self.isa == "amx" or self.kv_dtype != "auto"

    def empty(self) -> Tensor:
        """All NaN, as far as the type has one."""
        shape = (NUM_BLOCKS, NUM_HEADS, self.block_size, 2 * self.head_size)
        if self.kv_dtype in FP8:
            return torch.full(shape, 0x7F, dtype=torch.uint8)
        return torch.full(shape, math.nan, dtype=self.dtype)

    def halves(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value half as vLLM's backend passes them to its operators."""
        return cache.view(NUM_BLOCKS, NUM_HEADS, 2 * self.block_size, self.head_size).chunk(2, dim=2)


def kinds() -> list:
    """What vLLM's operator packs on x86: FP8 needs isa vec or amx and a head size divisible by 32."""
    found = []
    for isa in ("vec", "vec16", "amx"):
        for block_size in (16, 32, 64, 128):
            for head_size in (64, 80, 128):
                if (isa, block_size) == ("amx", 16) and head_size != 80:
                    continue  # refused by the operator: AMX's tiles are 32 deep (bf16)
                plain = (torch.bfloat16, torch.float16, torch.float32)
                found += [Kind(isa, block_size, head_size, dtype, "auto") for dtype in plain]
                if isa != "vec16" and head_size % 32 == 0:
                    found += [Kind(isa, block_size, head_size, torch.bfloat16, kv) for kv in FP8]
    return [pytest.param(kind, id=kind.id, marks=[NEEDS_AVX512] if kind.needs_avx512 else []) for kind in found]


def stored(keys: Tensor, kind: Kind, k_scale: float) -> Tensor:
    """What a cache of this kind holds of `keys`, float64.

    FP8 stores key / k_scale, saturated; vLLM's CPU operator cuts digits off and doesn't round to nearest.
    """
    if kind.kv_dtype not in FP8:
        return keys.double()
    fp8 = FP8[kind.kv_dtype]
    largest = torch.finfo(fp8).max
    exact = (keys.float() / k_scale).clamp(-largest, largest)
    nearest = exact.to(fp8)
    too_large = nearest.float().abs() > exact.abs()
    return (nearest.view(torch.uint8) - too_large.to(torch.uint8)).view(fp8).double() * k_scale


def write(cache: Tensor, kind: Kind, keys: Tensor, values: Tensor, slots: Tensor, *, k_scale: float) -> None:
    key_half, value_half = kind.halves(cache)
    ops.cpu_attn_reshape_and_cache(keys, values, key_half, value_half, slots, kind.isa, k_scale, 1.0, kind.kv_dtype)


def layout_of_cache(kind: Kind, cache: Tensor) -> CacheLayout:
    """As a worker finds it."""
    return layout_of(layer_of(kind, cache), kind.dtype)


def layer_of(kind: Kind, cache: Tensor, k_scale: float = 1.0, **impl: object) -> VllmLayer:
    """A layer with such a cache."""
    return cpu_layer(
        cache, num_kv_heads=NUM_HEADS, head_size=kind.head_size, isa=kind.isa, kv_cache_dtype=kind.kv_dtype,
        k_scale=k_scale, scale=0.3, **impl,
    )  # fmt: skip


def reader_of(kind: Kind, cache: Tensor, k_scale: float = 1.0) -> PackedReader:
    """Of the cache's keys."""
    layout = layout_of_cache(kind, cache)
    return PackedReader(cache, layout, layout.key, k_scale)


def value_reader_of(kind: Kind, cache: Tensor) -> PackedReader:
    """Of the cache's values, whose scale is 1."""
    layout = layout_of_cache(kind, cache)
    return PackedReader(cache, layout, layout.value, 1.0)


class TestReadBack:
    @pytest.mark.parametrize("kind", kinds())
    def test_keys_and_values_are_read_exactly(self, kind: Kind) -> None:
        """What vLLM's operator wrote into shuffled blocks comes back bit for bit (FP8: cut off once)."""
        generator = torch.Generator().manual_seed(1)
        blocks = torch.tensor([3, 1, 4])
        num_tokens = len(blocks) * kind.block_size
        keys, values = (
            (3 * torch.randn(num_tokens, NUM_HEADS, kind.head_size, generator=generator)).to(kind.dtype)
            for _ in range(2)
        )
        k_scale = 0.5 if kind.kv_dtype in FP8 else 1.0
        cache = kind.empty()
        slots = (blocks[:, None] * kind.block_size + torch.arange(kind.block_size)).view(-1)
        write(cache, kind, keys, values, slots, k_scale=k_scale)

        readers = (reader_of(kind, cache, k_scale), value_reader_of(kind, cache))
        for reader, written, scale in zip(readers, (keys, values), (k_scale, 1.0), strict=True):
            got = reader.read(blocks)
            assert got.shape == (3, NUM_HEADS, kind.block_size, kind.head_size)
            expected = stored(written, kind, scale).view(3, kind.block_size, NUM_HEADS, kind.head_size)
            assert torch.equal(got.double() * reader.key_scale, expected.transpose(1, 2))
            assert reader.num_kv_heads == NUM_HEADS

    @NEEDS_AVX512
    @pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
    def test_every_fp8_number(self, kv_dtype: str) -> None:
        """All 256 bit patterns are read as torch reads them: subnormals, both zeros, infinities and NaN."""
        kind = Kind("vec", 32, 64, torch.bfloat16, kv_dtype)
        cache = torch.arange(256, dtype=torch.uint8).repeat(80).view(5, NUM_HEADS, 32, 64)[..., :64]
        cache = torch.cat([cache, cache], dim=3).contiguous()
        reader = reader_of(kind, cache)
        got = reader.read(torch.arange(NUM_BLOCKS)).double() * reader.key_scale
        pages = kind.halves(cache)[0].reshape(NUM_BLOCKS, NUM_HEADS, 64, 32).transpose(2, 3)
        expected = pages.contiguous().view(FP8[kv_dtype]).double()
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        without_nan = (cache & 0x3F).contiguous()
        reader = reader_of(kind, without_nan)
        got = reader.read(torch.arange(NUM_BLOCKS)).double() * reader.key_scale
        pages = kind.halves(without_nan)[0].reshape(NUM_BLOCKS, NUM_HEADS, 64, 32).transpose(2, 3)
        assert torch.equal(got, pages.contiguous().view(FP8[kv_dtype]).double())

    def test_vec_is_read_without_a_copy_of_pages(self) -> None:
        """The transpose of the vector kernels is a view of the gathered pages."""
        kind = Kind("vec", 32, 64, torch.bfloat16, "auto")
        assert reader_of(kind, kind.empty()).order.is_view

    @NEEDS_AVX512
    def test_amx_tiles_have_a_strided_form(self) -> None:
        """AMX's tiles (16 tokens x 2 dimensions) are found as strides, so no index per element is needed."""
        kind = Kind("amx", 32, 64, torch.bfloat16, "auto")
        order = reader_of(kind, kind.empty()).order
        assert order.token_dims == ((2, 1024), (16, 2))
        assert order.head_dims == ((32, 32), (2, 1))

    def test_any_permutation_can_be_read(self) -> None:
        """An order without strided form is read by index."""
        offsets = torch.randperm(12)
        order = PageOrder.of(7 + offsets.view(3, 4))
        keys = torch.randn(2, 5, 12)
        pages = torch.empty_like(keys)
        pages[..., offsets] = keys
        assert (order.token_dims, order.first, order.length) == ((), 7, 12)
        assert torch.equal(order.unpack(pages), keys.view(2, 5, 3, 4))

    @pytest.mark.parametrize("name", ["nvfp4", "int8_per_token_head"])
    def test_types_that_are_no_plain_numbers(self, name: str) -> None:
        """They are refused whatever their bytes look like."""
        kind = Kind("vec", 32, 64, torch.bfloat16, name)
        cache = torch.zeros(NUM_BLOCKS, NUM_HEADS, 32, 128, dtype=torch.uint8)
        with pytest.raises(CacheLayoutError, match=f"a cache of kv_cache_dtype {name} must hold float16, bfloat16"):
            layout_of_cache(kind, cache)

    def test_a_layer_that_cannot_be_written(self) -> None:
        """What vLLM's operator refuses is told in its own words."""
        kind = Kind("nonsense", 32, 64, torch.bfloat16, "auto")
        with pytest.raises(CacheLayoutError, match=r"vLLM can't write a KV cache of auto: Invalid ISA"):
            layout_of_cache(kind, kind.empty())


@dataclass(frozen=True)
class Options:
    """Of a layer, for vLLM and for the reference."""

    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False


OPTIONS = [
    Options(),
    Options(window=10),
    Options(window=1),
    Options(soft_cap=2.0),
    Options(alibi=True),
    Options(sinks=True),
    Options(soft_cap=2.0, alibi=True),
    Options(window=10, soft_cap=2.0, sinks=True),
    Options(window=40, soft_cap=1.0, alibi=True, sinks=True),
]


@dataclass(frozen=True)
class Case:
    """A layer served by vLLM."""

    isa: str
    dtype: torch.dtype
    kv_dtype: str
    k_scale: float


CASES = [
    Case("vec", torch.float32, "auto", 1.0),
    Case("vec", torch.bfloat16, "auto", 1.0),
    Case("vec", torch.float16, "auto", 1.0),
    Case("vec", torch.bfloat16, "fp8", 0.5),
    Case("vec", torch.bfloat16, "fp8_e5m2", 0.5),
    Case("amx", torch.bfloat16, "auto", 1.0),
]


class Served:
    """Two requests served by vLLM's CPU attention: the last 3 of 70 tokens, and 1 of 45 tokens."""

    SEQ_LENS, QUERY_LENS, BLOCK, D, HQ = (70, 45), (3, 1), 32, 64, 4

    def __init__(self, options: Options, case: Case) -> None:
        dtype, k_scale = case.dtype, case.k_scale
        generator = torch.Generator().manual_seed(3)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.kind = Kind(case.isa, self.BLOCK, self.D, dtype, case.kv_dtype)
        self.scale, self.window, self.soft_cap = 0.3, options.window, options.soft_cap
        self.slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if options.alibi else None
        self.sinks = torch.tensor([1.0, 2.0, -1.0, 0.0]) if options.sinks else None
        self.q = normal(sum(self.QUERY_LENS), self.HQ, self.D).to(dtype)
        self.table = torch.tensor([[4, 1, 2], [0, 3, 3]], dtype=torch.int32)
        self.starts = torch.tensor([0, 3, 4], dtype=torch.int32)
        self.lens = torch.tensor(self.SEQ_LENS, dtype=torch.int32)
        # vLLM multiplies unused slots by 0, so unlike elsewhere they are 0 and not NaN.
        self.cache = self.kind.empty().zero_()
        self.keys, self.values = [], []
        for b, n in enumerate(self.SEQ_LENS):
            keys, values = (normal(n, NUM_HEADS, self.D).to(dtype) for _ in range(2))
            j = torch.arange(n)
            slots = self.table[b].long()[j // self.BLOCK] * self.BLOCK + j % self.BLOCK
            write(self.cache, self.kind, keys, values, slots, k_scale=k_scale)
            self.keys.append(stored(keys, self.kind, k_scale))
            self.values.append(stored(values, self.kind, 1.0))
        self.reader = reader_of(self.kind, self.cache, k_scale)
        self.output = self._attend(k_scale)

    def _attend(self, k_scale: float) -> Tensor:
        key_half, value_half = self.kind.halves(self.cache)
        window = -1 if self.window is None else self.window
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=2, num_heads=self.HQ, num_kv_heads=NUM_HEADS, head_dim=self.D, seq_lens=self.lens,
            dtype=self.kind.dtype, query_start_loc=self.starts, causal=True, sliding_window_size=window,
            isa=self.kind.isa, enable_kv_split=True, kv_cache_dtype=self.kind.kv_dtype,
        )  # fmt: skip
        output = torch.full_like(self.q, math.nan)
        ops.cpu_attention_with_kv_cache(
            query=self.q, key_cache=key_half, value_cache=value_half, output=output,
            query_start_loc=self.starts, seq_lens=self.lens, scale=self.scale, causal=True,
            alibi_slopes=self.slopes, sliding_window=window, block_table=self.table,
            softcap=self.soft_cap or 0.0, scheduler_metadata=metadata, s_aux=self.sinks,
            k_scale=k_scale, v_scale=1.0, kv_cache_dtype=self.kind.kv_dtype,
        )  # fmt: skip
        return output

    def read_keys(self, b: int) -> Tensor:
        """Keys of request b as the reader gives them, [n, Hkv, D] float64."""
        pages = self.reader.read(self.table[b].long()).double() * self.reader.key_scale
        return pages.transpose(1, 2).reshape(-1, NUM_HEADS, self.D)[: self.SEQ_LENS[b]]

    def expected_output(self) -> Tensor:
        """Softmax of the scores of the keys as read, times the values, float64; straight from the formula."""
        rows = []
        for b, (n, count) in enumerate(zip(self.SEQ_LENS, self.QUERY_LENS, strict=True)):
            for x in range(count):
                i, q = n - count + x, self.q[int(self.starts[b]) + x].double()
                j = torch.arange(n)
                score = self.scale * torch.einsum("jhd,hd->hj", self.read_keys(b).repeat_interleave(2, 1), q)
                if self.soft_cap is not None:
                    score = self.soft_cap * torch.tanh(score / self.soft_cap)
                if self.slopes is not None:
                    score = score + self.slopes.double()[:, None] * (j - i)
                hidden = j > i
                if self.window is not None:
                    hidden |= j <= i - self.window
                score[:, hidden] = -math.inf
                if self.sinks is not None:
                    score = torch.cat([score, self.sinks.double()[:, None]], dim=1)
                p = torch.softmax(score, 1)[:, :n]
                rows.append(torch.einsum("hj,jhd->hd", p, self.values[b].repeat_interleave(2, 1)))
        return torch.stack(rows)


def served_cases() -> list:
    """Attention itself, other than packing, runs AMX instructions."""
    no_amx = pytest.mark.skipif(not HAS_AMX, reason="vLLM's AMX attention needs a CPU with AMX")
    marks = {"amx": [no_amx], "vec": []}
    return [
        pytest.param(
            case,
            id=f"{case.isa}-{case.dtype}-{case.kv_dtype}",
            marks=[*marks[case.isa], *([NEEDS_AVX512] if case.kv_dtype != "auto" else [])],
        )
        for case in CASES
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", served_cases())
class TestScores:
    def test_vllm_attends_to_the_scores_of_the_read_keys(self, options: Options, case: Case) -> None:
        """vLLM's output is the softmax of our scores: order of cap and bias, sign of ALiBi, window, sink."""
        served = Served(options, case)
        error = (served.output.double() - served.expected_output()).abs().max()
        assert error < ATTENTION_OUTPUT[case.dtype]

    def test_statistics_equal_the_reference(self, options: Options, case: Case) -> None:
        """Both measurements over vLLM's own cache equal the reference over the keys that were written."""
        served = Served(options, case)
        rows = np.array([[0, 0, 0, 68, -1], [2, 0, 1, 68, -1], [3, 1, 1, 40, -1]], dtype=np.int32)
        plan = plan_rows(rows, served.starts, served.lens, served.table, 32, reach=options.window)
        params = LayerParams(0.3, options.soft_cap, served.slopes, served.sinks, options.window)
        by_torch = row_stats_cpu([LayerRows.select(served.q, served.reader, plan, params)], plan)[0][0]
        native = NativeStep(
            NativeRows(
                rows, served.starts, served.lens, served.table, 32,
                reach=options.window, sink_tokens=4, local_window=128,
            ),
            num_layers=1,
            num_heads=served.HQ,
            head_size=served.q.shape[2],
        )  # fmt: skip
        layer = layer_of(
            served.kind, served.cache, case.k_scale, sliding_window=options.window or -1,
            logits_soft_cap=options.soft_cap or 0, alibi_slopes=served.slopes, sinks=served.sinks,
        )  # fmt: skip
        layout_of(layer, case.dtype)
        cached = CachedLayer.of(PackedView(layer.impl, layer), served.q, served.cache)
        native.take(0, cached.layer, served.q)
        expected, same_dtype = (
            row_stats_ref(
                served.q[[0, 2, 3]], served.keys, [67, 69, 44], request=[0, 0, 1], phase=[0, 1, 1],
                prompt_len=[68, 68, 40], scale=0.3, sliding_window=options.window, soft_cap=options.soft_cap,
                alibi_slopes=served.slopes, sinks=served.sinks, dtype=oracle,
            )
            for oracle in (torch.float64, torch.float32)
        )  # fmt: skip
        for actual in (by_torch, torch.from_numpy(native.stats()[0])):
            assert_two_oracles(actual, expected, same_dtype, magnitude=60.0, max_keys=70)
