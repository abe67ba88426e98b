"""Rows of whole chunks on a GPU equal the float64 reference: in Triton's interpreter without one,
compiled with one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.statistics import INDEX
from glassbox.kernels.key_grams import gram, keys_at, sequence_keys
from glassbox.kernels.prompt_rows import PromptChunk, PromptNumbers, PromptTiling, Tile, prompt_rows
from glassbox.kernels.reference.prompt_rows import previous_mass_ref, received_ref, received_squares_ref
from glassbox.kernels.reference.row_probe import row_probe_ref, span_mass_ref
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.kernels.reference.visible import first_visible
from tests.kernels.row_stats_cases import FP8, INF, LARGE, NAN, Case, Inputs, Sequence, make_inputs
from tests.kernels.tolerances import ORACLE_FACTOR, SUM_ROUNDING, assert_two_oracles, score_error

# The interpreter computes in numpy, which warns where the kernel means to reach infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SPANS = ((0, 3), (2, 40), (17, 18), (30, 1000))
# Whole, first and last chunk of a prompt; tiles of 16 rows and 16 keys have plain ones, edges and a tail.
CHUNKED = (Sequence(1, 9, 4), Sequence(35, 80, 200), Sequence(0, 0, 0))
BASE = Case("chunk", CHUNKED, rows=(), heads=2, kv_heads=1, local_window=8)
CASES: tuple[Case, ...] = (
    BASE,
    replace(BASE, name="whole-prompt", sequences=(Sequence(2, 5, 9), Sequence(40, 40, 40))),
    replace(BASE, name="one-row", sequences=(Sequence(1, 1, 1), Sequence(1, 35, 40))),
    replace(BASE, name="fp16-hnd", dtype=torch.float16, layout="hnd"),
    replace(BASE, name="fp32", dtype=torch.float32, sink_tokens=20, local_window=1),
    replace(BASE, name="window", sliding_window=23, local_window=30),
    replace(BASE, name="window-1", sliding_window=1),
    replace(BASE, name="chunks", chunk_size=24),
    replace(BASE, name="chunk-of-one", chunk_size=1),
    replace(BASE, name="soft-cap", soft_cap=5.0, q_magnitude=4.0),
    replace(BASE, name="alibi", alibi=True),
    replace(BASE, name="sinks", sinks=True),
    replace(BASE, name="all", sinks=True, alibi=True, soft_cap=8.0, sliding_window=40, dtype=torch.float16),
    replace(BASE, name="mha-d80", heads=3, kv_heads=3, head_size=80),
    replace(BASE, name="mqa-d128", heads=3, kv_heads=1, head_size=128, page=64),
    replace(BASE, name="d256-page24", head_size=256, page=24, sequences=(Sequence(1, 9, 4), Sequence(20, 50, 200))),
    replace(BASE, name="fp8", kv_dtype=FP8[0], k_scale=0.7),
    replace(BASE, name="fp8-q", kv_dtype=FP8[0], dtype=FP8[0], q_scale=0.5, kv_heads=2, k_scale=(2.0, 0.5)),
    replace(BASE, name="huge", q_magnitude=1e4, dtype=torch.float32),
    replace(BASE, name="huge-bf16", q_magnitude=1e15),
    replace(BASE, name="zero-q", q_magnitude=0.0),
    replace(BASE, name="nan", kv_heads=2, keys=((1, 3, 0, NAN), (1, 75, 1, NAN))),
    replace(BASE, name="inf", kv_heads=2, keys=((1, 19, 0, INF), (1, 70, 1, -INF)), sliding_window=60),
    replace(BASE, name="inf-capped", kv_heads=2, keys=((1, 2, 0, INF), (1, 5, 1, -INF)), soft_cap=3.0),
)
# Of the chunk's sequence in these cases.
BATCH = 1
SMALL = PromptTiling(Tile(16, 16, 4, 2), Tile(32, 16, 4, 2))


def chunk_of(case: Case, inputs: Inputs, batch: int = BATCH) -> PromptChunk:
    of = case.sequences[batch]
    return PromptChunk(int(inputs.query_start_loc[batch]), of.query_len, of.seq_len - of.query_len)


def measure(case: Case, inputs: Inputs, heads: list[int], batch: int = BATCH, **options: Any) -> PromptNumbers:
    return prompt_rows(
        inputs.q,
        inputs.k_cache,
        inputs.block_table[batch],
        chunk_of(case, inputs, batch),
        inputs.params,
        torch.tensor(heads, dtype=torch.int32, device=DEVICE),
        sink_tokens=case.sink_tokens,
        local_window=case.local_window,
        **options,
    )


class Expected:
    """By the references, of the chunk's rows in all heads."""

    def __init__(self, case: Case, inputs: Inputs, batch: int = BATCH) -> None:
        chunk, p = chunk_of(case, inputs, batch), inputs.params
        self.positions = list(range(chunk.position, chunk.num_keys))
        q = inputs.q[chunk.token : chunk.token + chunk.num_rows].cpu().double()
        keys = inputs.keys[batch].double()
        if p.q_scale is not None:
            q = q * p.q_scale.cpu().double().view(1, -1, 1)
        if p.k_scale is not None:
            keys = keys * p.k_scale.cpu().double().view(1, -1, 1)
        scoring = {
            "scale": p.scale,
            "sliding_window": p.sliding_window,
            "chunk_size": p.chunk_size,
            "soft_cap": p.soft_cap,
            "alibi_slopes": None if p.alibi_slopes is None else p.alibi_slopes.cpu(),
            "sinks": None if p.sinks is None else p.sinks.cpu(),
        }
        of_rows = {
            "request": [0] * len(q),
            "phase": [0] * len(q),
            "prompt_len": [case.sequences[batch].prompt_len] * len(q),
        }
        tokens = {"sink_tokens": case.sink_tokens, "local_window": case.local_window}
        self.stats, self.same_dtype = (
            row_stats_ref(q, [keys], self.positions, **of_rows, **scoring, **tokens, dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        self.attention = [row_probe_ref(q[r], keys, i, **scoring) for r, i in enumerate(self.positions)]
        self.first_visible = [first_visible(i, p.sliding_window, p.chunk_size) for i in self.positions]
        group = case.heads // case.kv_heads
        products = torch.einsum(
            "rhd,nhd->rhn", q.abs() * p.scale, keys.abs().repeat_interleave(group, 1).nan_to_num(0, 0)
        )
        self.magnitude = float(products.max())
        if p.alibi_slopes is not None:
            self.magnitude += float(p.alibi_slopes.max()) * chunk.num_keys

    def mass_error(self) -> float:
        """Of a sum of a row's attention: what its scores are off by, and what plain float32 torch is off by."""
        found = [INDEX["sink_ratio"], INDEX["local_ratio"], INDEX["top1_ratio"]]
        torch_error = (self.same_dtype[..., found].double() - self.stats[..., found]).abs().nan_to_num().max()
        return 2 * score_error(self.magnitude) + SUM_ROUNDING + ORACLE_FACTOR * float(torch_error)


def assert_close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_all_numbers_equal_the_reference(case: Case) -> None:
    """Also where keys, queries or scores are not finite, and for whatever a score is made of."""
    inputs = make_inputs(case, DEVICE)
    expected = Expected(case, inputs)
    spans = torch.tensor(SPANS, dtype=torch.int32, device=DEVICE)
    tiling = SMALL if not ON_GPU else None
    found = measure(case, inputs, list(range(case.heads)), spans=spans, squares=True, tiling=tiling)
    assert_two_oracles(
        found.stats.cpu(),
        expected.stats,
        expected.same_dtype,
        expected.magnitude,
        len(expected.positions) + expected.positions[0],
    )
    error = expected.mass_error()
    previous = torch.stack([previous_mass_ref(row) for row in expected.attention])
    assert_close(found.previous_mass, previous, error)
    masses = [[[span_mass_ref(of_head, *span) for span in SPANS] for of_head in row] for row in expected.attention]
    assert_close(found.span_mass, torch.tensor(masses, dtype=torch.float64), error)
    assert_close(
        found.received, received_ref(expected.attention, expected.first_visible), error * len(expected.positions)
    )
    assert found.received_squares is not None
    squares = received_squares_ref(expected.attention, expected.first_visible)
    assert_close(found.received_squares, squares, 2 * error * len(expected.positions))


def test_chosen_heads_alone_are_measured() -> None:
    """Each with the keys of its own KV head, and the same numbers as beside all others."""
    case = replace(BASE, heads=4, kv_heads=2, sequences=(Sequence(1, 9, 4), Sequence(17, 33, 200)))
    inputs = make_inputs(case, DEVICE)
    every, some = measure(case, inputs, [0, 1, 2, 3], tiling=SMALL), measure(case, inputs, [1, 2], tiling=SMALL)
    assert torch.equal(some.stats.nan_to_num(), every.stats[:, [1, 2]].nan_to_num())
    assert torch.equal(some.previous_mass, every.previous_mass[:, [1, 2]])
    assert torch.equal(some.received, every.received[[1, 2]])
    assert some.span_mass.shape == (17, 2, 0)
    assert some.received_squares is None


def test_chunks_of_a_prompt_are_the_whole_prompt() -> None:
    """Row by row, and the attention received adds up."""
    whole = replace(BASE, local_window=16, sequences=(Sequence(0, 0, 0), Sequence(40, 40, 40)))
    inputs = make_inputs(whole, DEVICE)
    heads = torch.arange(2, dtype=torch.int32, device=DEVICE)
    received = torch.zeros(2, 40, device=DEVICE)
    parts = []
    for first, rows in ((0, 23), (23, 1), (24, 16)):
        found = prompt_rows(
            inputs.q, inputs.k_cache, inputs.block_table[1], PromptChunk(first, rows, first), inputs.params, heads,
            local_window=16, tiling=SMALL,
        )  # fmt: skip
        received[:, : found.received.shape[1]] += found.received
        parts.append(found.stats)
    at_once = measure(whole, inputs, [0, 1], tiling=SMALL)
    torch.testing.assert_close(torch.cat(parts), at_once.stats, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(received, at_once.received, rtol=1e-5, atol=1e-5)
    assert float(received.sum(1).sub(40).abs().max()) < 1e-3, "every row gives what it has: 1"


@pytest.mark.parametrize("name", ["chunk", "fp32", "fp8-q", "d256-page24"])
def test_sums_of_queries_and_keys(name: str) -> None:
    """From a paged cache of any type, from any position on, and their singular values are those of Q K^T."""
    case = next(case for case in CASES if case.name == name)
    inputs, chunk = make_inputs(case, DEVICE), chunk_of(case, make_inputs(case, DEVICE))
    keys = sequence_keys(inputs.k_cache, inputs.block_table[BATCH], 5, chunk.num_keys)
    assert torch.equal(keys.cpu().float(), inputs.keys[BATCH][5:].float())
    queries = inputs.q[chunk.token : chunk.token + chunk.num_rows]
    scale = torch.tensor([0.5], device=DEVICE)
    of_queries, of_keys = gram(queries), gram(keys, scale)
    for found, vectors, factor in ((of_queries, queries, 1.0), (of_keys, keys, 0.25)):
        exact = vectors.cpu().double().permute(1, 2, 0) @ vectors.cpu().double().permute(1, 0, 2) * factor
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-6, atol=1e-5)
    scores = queries[:, 0].cpu().double() @ keys[:, 0].cpu().double().T * 0.5
    squares = torch.linalg.eigvals(of_queries[0] @ of_keys[0]).real.sort(descending=True).values
    torch.testing.assert_close(squares[:4].sqrt().cpu(), torch.linalg.svdvals(scores)[:4], rtol=1e-5, atol=0)


def test_keys_of_single_places() -> None:
    case = replace(BASE, kv_dtype=FP8[0])
    inputs = make_inputs(case, DEVICE)
    positions = torch.tensor([79, 3, 16], device=DEVICE)
    blocks = inputs.block_table[BATCH][positions // case.page].long()
    found = keys_at(inputs.k_cache, blocks, positions % case.page)
    assert torch.equal(found.cpu().float(), inputs.keys[BATCH].float()[positions.cpu()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 576}, "do not measure prompts of this layer"),
        ({"sequences": (Sequence(0, 0, 0), Sequence(0, 9, 9))}, "pass rows of this step"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    case = replace(BASE, **change)
    with pytest.raises(ValueError, match=message):
        measure(case, make_inputs(case, DEVICE), [0])


@pytest.mark.skipif(not ON_GPU, reason="the interpreter would take hours; see the small cases")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_large_chunks(dtype: torch.dtype, head_size: int) -> None:
    """With the tiling that is served, on tensor cores."""
    case = replace(
        LARGE[2],
        rows=(),
        sequences=(Sequence(1, 9, 9), Sequence(700, 1500, 4000)),
        dtype=dtype,
        head_size=head_size,
        heads=8,
        kv_heads=2,
        sliding_window=None,
    )
    inputs = make_inputs(case, DEVICE)
    expected = Expected(case, inputs)
    spans = torch.tensor(SPANS, dtype=torch.int32, device=DEVICE)
    found = measure(case, inputs, list(range(8)), spans=spans, squares=True)
    assert_two_oracles(found.stats.cpu(), expected.stats, expected.same_dtype, expected.magnitude, 1500)
    error = expected.mass_error()
    assert_close(found.received, received_ref(expected.attention, expected.first_visible), error * 700)
    assert found.received_squares is not None
    squares = received_squares_ref(expected.attention, expected.first_visible)
    assert_close(found.received_squares, squares, 2 * error * 700)
    masses = [[[span_mass_ref(of_head, *span) for span in SPANS] for of_head in row] for row in expected.attention]
    assert_close(found.span_mass, torch.tensor(masses, dtype=torch.float64), error)
