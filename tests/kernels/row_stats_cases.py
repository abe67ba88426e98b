"""Inputs for the tests of row_stats: paged, poisoned, in every shape the kernel must do."""

from dataclasses import dataclass, field, replace

import torch

from glassbox.core.rows import NUM_ROW_COLUMNS
from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_stats import LayerAccumulators
from tests.kernels.row_lists import entry

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BAD_BLOCK = 2**30  # an unused block table entry: following it is an illegal access


@dataclass(frozen=True)
class Sequence:
    """One batch row: the step's queries are its last `query_len` tokens."""

    query_len: int
    seq_len: int
    prompt_len: int


@dataclass(frozen=True)
class Case:
    """What to make; `rows` are (batch row, query of that row) pairs, None takes every query."""

    name: str
    sequences: tuple[Sequence, ...]
    rows: tuple[tuple[int, int], ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    page: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layout: str = "nhd"  # of a page in memory: nhd or hnd
    q_magnitude: float = 1.0
    soft_cap: float = 0.0
    sliding_window: int | None = None
    chunk_size: int | None = None
    sink_tokens: int = 4
    local_window: int = 16
    alibi: bool = False
    sinks: bool = False
    q_scale: float | None = None
    k_scale: float | tuple[float, ...] | None = None
    max_rows: int = 16
    # (sequence, position, KV head, value) written to the first element of a key
    keys: tuple[tuple[int, int, int, float], ...] = ()
    num_programs: int = 5
    slots: tuple[int, ...] = field(default=())


@dataclass
class Inputs:
    """A made case: the kernel's arguments, and `keys` as dense [seq_len, Hkv, D] per sequence."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    rows: torch.Tensor
    num_rows: torch.Tensor
    params: LayerParams
    keys: list[torch.Tensor]
    sink_tokens: int
    local_window: int


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _paged(case: Case, keys: list[torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """K in pages of shuffled blocks, interleaved with V; all that no sequence owns is NaN."""
    needed = [-(-k.shape[0] // case.page) for k in keys]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator)
    table = torch.full((len(keys), max([*needed, 1]) + 2), _BAD_BLOCK, dtype=torch.int32)
    dtype = keys[0].dtype
    shape = (num_blocks, case.kv_heads, case.page, 2 * case.head_size)
    cache = torch.full(shape, torch.nan).to(dtype)
    used = 0
    for i, k in enumerate(keys):
        blocks = order[used : used + needed[i]]
        used += needed[i]
        table[i, : needed[i]] = blocks
        for p, block in enumerate(blocks.tolist()):
            part = k[p * case.page : (p + 1) * case.page].transpose(0, 1)
            cache[block, :, : part.shape[1], : case.head_size] = part
    if case.layout == "nhd":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    return cache, table


def _scale_tensor(value: float | tuple[float, ...] | None, device: str) -> torch.Tensor | None:
    if value is None:
        return None
    return torch.tensor([value] if isinstance(value, float) else value, device=device)


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Make a case. The row list is longer than `num_rows` and poisoned behind it, q is padded with NaN tokens."""
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = case.kv_dtype or case.dtype
    keys = [_random((s.seq_len, case.kv_heads, case.head_size), kv_dtype, generator) for s in case.sequences]
    for sequence, position, head, value in case.keys:
        keys[sequence][position, head, 0] = value
    cache, table = _paged(case, keys, generator)
    starts = [0]
    for s in case.sequences:
        starts.append(starts[-1] + s.query_len)
    q = torch.full((starts[-1] + 3, case.heads, case.head_size), torch.nan)
    queries = torch.randn((starts[-1], case.heads, case.head_size), generator=generator)
    q[: starts[-1]] = queries * case.q_magnitude
    listed = case.rows
    if listed is None:
        listed = tuple((b, i) for b, s in enumerate(case.sequences) for i in range(s.query_len))
    rows = torch.full((case.max_rows, NUM_ROW_COLUMNS), -(2**30), dtype=torch.int32)
    for r, (b, i) in enumerate(listed):
        s = case.sequences[b]
        position = s.seq_len - s.query_len + i
        slot = case.slots[r] if case.slots else -1
        rows[r] = torch.tensor(entry(starts[b] + i, b, position, s.prompt_len, slot))
    slopes = torch.rand(case.heads, generator=generator) * 0.2
    sinks = torch.randn(case.heads, generator=generator) * 2
    params = LayerParams(
        scale=case.head_size**-0.5,
        soft_cap=case.soft_cap or None,
        sliding_window=case.sliding_window,
        chunk_size=case.chunk_size,
        alibi_slopes=slopes.to(device) if case.alibi else None,
        sinks=sinks.to(torch.bfloat16).to(device) if case.sinks else None,
        q_scale=_scale_tensor(case.q_scale, device),
        k_scale=_scale_tensor(case.k_scale, device),
    )
    return Inputs(
        sink_tokens=case.sink_tokens,
        local_window=case.local_window,
        q=q.to(case.dtype).to(device),
        k_cache=cache.to(device)[..., : case.head_size],
        block_table=table.to(device),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([s.seq_len for s in case.sequences], dtype=torch.int32, device=device),
        rows=rows.to(device),
        num_rows=torch.tensor([len(listed)], dtype=torch.int32, device=device),
        params=params,
        keys=keys,
    )


def make_accumulators(heads: int, device: str, window_slots: int = 3) -> LayerAccumulators:
    """Empty accumulators of one layer; slot 1 of the window is in use."""
    return LayerAccumulators(
        counts=torch.zeros(heads, 2, NUM_STATISTICS, NUM_BUCKETS, dtype=torch.int64, device=device),
        sums=torch.zeros(heads, 2, NUM_STATISTICS, dtype=torch.float64, device=device),
        rows=torch.zeros(heads, 2, dtype=torch.int64, device=device),
        nonfinite=torch.zeros(heads, 2, dtype=torch.int64, device=device),
        window_max=torch.full((window_slots, heads, 2), -torch.inf, device=device),
        window_slot=torch.ones(1, dtype=torch.int32, device=device),
        bounds=torch.tensor([s.buckets for s in STATISTICS], dtype=torch.float32, device=device),
    )


_DECODE = (Sequence(1, 37, 20), Sequence(1, 1, 1), Sequence(1, 130, 64))
_MIXED = (
    Sequence(5, 70, 100),  # a chunk of a prompt
    Sequence(1, 129, 50),  # decode
    Sequence(0, 0, 0),  # padding
    Sequence(4, 66, 30),  # speculative verification
    Sequence(3, 3, 3),  # a whole prompt
)
BASE = Case("decode", _DECODE)
MIXED = Case("mixed", _MIXED)
NAN, INF = float("nan"), float("inf")

CASES: tuple[Case, ...] = (
    BASE,
    MIXED,
    replace(BASE, name="one-key", sequences=(Sequence(1, 1, 1), Sequence(1, 1, 0))),
    replace(BASE, name="fp16", dtype=torch.float16, layout="hnd"),
    replace(MIXED, name="fp32", dtype=torch.float32),
    replace(MIXED, name="no-prompt-visible", sliding_window=8, sequences=(Sequence(1, 90, 20), Sequence(2, 40, 39))),
    replace(MIXED, name="window", sliding_window=33),
    replace(MIXED, name="window-1", sliding_window=1),
    replace(MIXED, name="chunks", chunk_size=24),
    replace(MIXED, name="chunk-of-one", chunk_size=1),
    replace(BASE, name="soft-cap", soft_cap=5.0, q_magnitude=4.0),
    replace(MIXED, name="alibi", alibi=True),
    replace(MIXED, name="sinks", sinks=True),
    replace(MIXED, name="all", sinks=True, alibi=True, soft_cap=8.0, sliding_window=40, dtype=torch.float16),
    replace(BASE, name="mha-d80", heads=3, kv_heads=3, head_size=80),
    replace(BASE, name="gqa7-d96", heads=14, kv_heads=2, head_size=96),
    replace(BASE, name="gqa16-d112", heads=16, kv_heads=1, head_size=112, page=32),
    replace(BASE, name="mqa20-d128", heads=20, kv_heads=1, head_size=128, page=64),
    replace(BASE, name="d192", head_size=192, page=128),
    replace(BASE, name="d256-page24", head_size=256, page=24),
    replace(BASE, name="fp8-e4m3", kv_dtype=torch.float8_e4m3fn, k_scale=0.7),
    replace(BASE, name="fp8-e5m2-fp16", kv_dtype=torch.float8_e5m2, dtype=torch.float16, k_scale=(0.5, 1.5)),
    replace(BASE, name="fp8-q", kv_dtype=torch.float8_e4m3fn, dtype=torch.float8_e4m3fn, q_scale=0.5, k_scale=2.0),
    replace(BASE, name="huge", q_magnitude=1e4, dtype=torch.float32),
    replace(BASE, name="huge-bf16", q_magnitude=1e15),
    replace(BASE, name="tiny", q_magnitude=1e-6),
    replace(MIXED, name="nan", keys=((0, 67, 0, NAN), (1, 3, 1, NAN))),
    replace(MIXED, name="inf", keys=((0, 0, 0, INF), (3, 65, 1, -INF)), sliding_window=66),
    # The largest score comes late and is far above what came before: the keys are read twice.
    replace(BASE, name="late", sequences=(Sequence(1, 300, 20),), keys=((0, 280, 0, 900.0),), num_programs=1),
    replace(BASE, name="zero-q", q_magnitude=0.0),
    # Latent attention: one KV head of 512 + 64 elements.
    replace(BASE, name="latent", heads=20, kv_heads=1, head_size=576),
    replace(MIXED, name="latent-128-heads", heads=128, kv_heads=1, head_size=576, page=64, num_programs=3),
    replace(MIXED, name="latent-fp8", heads=16, kv_heads=1, head_size=576, kv_dtype=FP8[0], k_scale=0.7),
    replace(
        BASE,
        name="latent-fp8-q",
        heads=3,
        kv_heads=1,
        head_size=576,
        kv_dtype=FP8[0],
        dtype=FP8[0],
        q_scale=0.5,
        k_scale=2.0,
    ),
    replace(MIXED, name="latent-320", heads=8, kv_heads=1, head_size=320, page=32, dtype=torch.float16),
    replace(BASE, name="latent-512", heads=4, kv_heads=2, head_size=512, dtype=torch.float32),
    replace(
        MIXED,
        name="latent-all",
        heads=5,
        kv_heads=1,
        head_size=576,
        sinks=True,
        alibi=True,
        soft_cap=8.0,
        sliding_window=40,
    ),
    replace(MIXED, name="latent-nan", heads=4, kv_heads=1, head_size=576, keys=((0, 67, 0, NAN), (1, 3, 0, INF))),
    replace(BASE, name="latent-capped-inf", kv_heads=1, head_size=576, soft_cap=8.0, keys=((0, 3, 0, INF),)),
    replace(BASE, name="wide-held", heads=65, kv_heads=1, head_size=512, page=64),
    replace(MIXED, name="thinned", rows=((0, 4), (3, 1), (1, 0)), num_programs=3),
)
# For every tiling: pages smaller than a tile, larger, and neither a divisor nor a multiple.
TILE_CASES: tuple[Case, ...] = (
    replace(BASE, name="page-16"),
    replace(BASE, name="page-256", page=256),
    replace(BASE, name="page-24", page=24, kv_dtype=torch.float8_e4m3fn),
)
_LARGE = replace(BASE, head_size=128, num_programs=264, local_window=128, max_rows=256)
LARGE: tuple[Case, ...] = (
    replace(
        _LARGE,
        name="long",
        sequences=(Sequence(1, 40_001, 39_000), Sequence(1, 77, 5), Sequence(1, 5_000, 4_999)),
        heads=8,
        max_rows=16,
    ),
    replace(
        _LARGE,
        name="many",
        sequences=tuple(Sequence(1, 100 + 37 * i, 60 + 30 * i) for i in range(64)),
        heads=32,
        kv_heads=8,
    ),
    replace(
        _LARGE,
        name="prefill",
        sequences=(Sequence(2_000, 4_000, 8_000), Sequence(500, 500, 500)),
        rows=tuple((0, i) for i in range(0, 2_000, 97)) + tuple((1, i) for i in range(0, 500, 61)),
        heads=16,
        num_programs=132,
        sliding_window=1_024,
        local_window=16,
    ),
)
