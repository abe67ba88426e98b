"""What a GPU measurer makes of whole prompts is what the CPU's makes of them, without a GPU in Triton's interpreter."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.errors import ErrorCounter
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.prompt_rows_cpu import PromptChunk, PromptWishes, prompt_rows_cpu
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.measure import gpu_prompts, latent_prompts, prompt_memory
from glassbox.measure.contract import AskedPrompt, BatchTables, Forward, LatentForward
from glassbox.measure.gpu_prompts import GpuPrompts, probed_vectors
from glassbox.measure.prompt_memory import MARGIN_BYTES, FreeBytes
from tests.kernels.inputs_layer import InputsLayer
from tests.kernels.row_stats_cases import FP8, Case, Inputs, Sequence, make_inputs
from tests.kernels.simulated_layer import PagesReader

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASE = Case("prompt", (Sequence(1, 9, 4), Sequence(9, 30, 40)), rows=(), heads=4, kv_heads=2, local_window=8)
ASKED = AskedPrompt(
    batch=1,
    token=1,
    num_rows=9,
    position=21,
    local_layers=frozenset({0, 2}),
    heads=(1, 2, 5),
    spans=np.array([(0, 4), (10, 25)], dtype=np.int32),
    grams=True,
    kept=True,
    keys_from=5,
    squares=True,
)


def layer_of(inputs: Inputs, head_size: int = CASE.head_size) -> InputsLayer:
    return InputsLayer(inputs, CASE.heads, head_size)


@pytest.fixture
def errors() -> ErrorCounter:
    return ErrorCounter(logging.getLogger("test"))


def make_prompts(errors: ErrorCounter, ask: Callable[[], FreeBytes] | None = None) -> GpuPrompts:
    device = torch.zeros(0, device=DEVICE).device  # which of them, too
    return GpuPrompts(device, CASE.sink_tokens, CASE.local_window, errors, ask=ask)


@pytest.fixture
def prompts(errors: ErrorCounter) -> GpuPrompts:
    return make_prompts(errors)


def measure(prompts: GpuPrompts, local: int, inputs: Inputs, forward: Any = None) -> None:
    layer = layer_of(inputs)
    forward = forward or Forward(inputs.q, None, None, None)
    prompts.measure(local, layer, forward, inputs.k_cache, layer.tables())


@pytest.mark.parametrize(
    "change",
    [
        {"sinks": True, "sliding_window": 12, "soft_cap": 20.0},
        {"alibi": True, "kv_dtype": FP8[0], "dtype": torch.float16, "k_scale": (0.5, 2.0)},
    ],
    ids=["window", "fp8"],
)
def test_everything_is_what_the_cpu_measures(prompts: GpuPrompts, errors: ErrorCounter, change: dict[str, Any]) -> None:
    """In the layers that are asked, of heads that they have: rows, sums, queries, keys and what scores are made of."""
    inputs = make_inputs(replace(CASE, **change), DEVICE)
    prompts.begin([ASKED])
    assert [prompts.wants(local) for local in range(3)] == [True, False, True]
    for local in range(3):
        measure(prompts, local, inputs)
    assert errors.counts() == {}
    assert [(one.number, one.local_layer) for one in prompts._found] == [(0, 0), (0, 2)]
    assert prompts.missing() == []
    params = inputs.params
    # The CPU's reader knows one factor for all heads.
    factors = torch.ones(2) if params.k_scale is None else params.k_scale.cpu()
    cache = inputs.k_cache.cpu().float() * factors.view(1, -1, 1, 1)
    slopes, sinks = (None if one is None else one.cpu() for one in (params.alibi_slopes, params.sinks))
    chunk = PromptChunk(
        inputs.q[1:10].cpu(), 21, PagesReader(cache), inputs.block_table[1, :2].cpu().long(), CASE.page,
        replace(params, k_scale=None, alibi_slopes=slopes, sinks=sinks),
    )  # fmt: skip
    wishes = PromptWishes(
        [1, 2], torch.from_numpy(ASKED.spans), True, True, 5, CASE.sink_tokens, CASE.local_window, True
    )
    expected, found = prompt_rows_cpu(chunk, wishes), prompts._found[1].answers
    assert found.group == expected.group == 2
    sums = ("received", "received_squares", "query_gram", "key_gram")
    for name in ("stats", "previous_mass", "span_mass", *sums, "queries", "keys"):
        of_gpu, of_cpu = getattr(found, name), getattr(expected, name)
        assert of_gpu.dtype == of_cpu.dtype, name
        torch.testing.assert_close(
            of_gpu.cpu(), of_cpu, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(found.score_params.cpu(), expected.score_params, equal_nan=True)  # type: ignore[union-attr]


def test_a_prompt_that_fails_is_counted_once_and_harms_no_other(
    prompts: GpuPrompts, errors: ErrorCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(CASE, DEVICE)
    prompts.begin([replace(ASKED, token=8), replace(ASKED, num_rows=2, grams=False, kept=False)])
    measure(prompts, 0, inputs)
    measure(prompts, 2, inputs)
    assert errors.counts() == {"prompt": 1}, "rows behind the step's tokens"
    assert [(one.number, one.local_layer) for one in prompts._found] == [(1, 0), (1, 2)]
    monkeypatch.setattr(prompt_memory, "_WAITING_BYTES", 0)
    prompts.begin([replace(ASKED, num_rows=1)])
    measure(prompts, 0, inputs)
    measure(prompts, 2, inputs)
    assert errors.counts() == {"prompt": 2}, "what waits for its copy is bounded"
    assert len(prompts._found) == 1


def test_a_gpu_without_room(errors: ErrorCounter, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of which one layer's numbers don't fit is left out before it is computed; a shorter one is measured."""
    prompts = make_prompts(errors, lambda: FreeBytes(MARGIN_BYTES + 40_000, 0))
    short = replace(ASKED, num_rows=2, grams=False, kept=False, squares=False)
    prompts.begin([replace(ASKED, local_layers=frozenset({0})), short])
    measure(prompts, 0, make_inputs(CASE, DEVICE))
    assert errors.counts() == {"prompt": 1}
    assert [(one.number, one.local_layer) for one in prompts._found] == [(1, 0)]
    assert "1 MiB are left for them" in caplog.text


def test_memory_that_is_gone(
    prompts: GpuPrompts, errors: ErrorCounter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What torch raises where others were faster is told like what was foreseen, and the next step is measured."""

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    inputs = make_inputs(CASE, DEVICE)
    prompts.begin([ASKED])
    with monkeypatch.context() as patch:
        patch.setattr(gpu_prompts, "prompt_rows", full)
        measure(prompts, 0, inputs)
    measure(prompts, 2, inputs)
    assert errors.counts() == {"prompt": 1}, "nor is it tried again in other layers of the step"
    assert "UnmeasuredPromptError" in caplog.text
    assert "which the GPU had not got when they were asked for (CUDA out of memory." in caplog.text
    prompts.begin([ASKED])
    measure(prompts, 0, inputs)
    assert errors.counts() == {"prompt": 1}
    assert len(prompts._found) == 1


class LatentStep:
    """A step of a layer with latent attention: a request that decodes, whose query vLLM has absorbed, then a prompt.

    Args:
        dtype: of the model; cache_dtype: of the cached vectors, which are divided by `k_scale`, None is 1.
    """

    latent, rotary, nope, heads, page = 32, 16, 24, 4, 8

    def __init__(self, dtype: torch.dtype, cache_dtype: torch.dtype, k_scale: float | None) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.weights = (normal(self.heads, self.nope, self.latent) * self.latent**-0.5).to(DEVICE, dtype)
        blocks = torch.randperm(12, generator=generator).int().to(DEVICE)
        self.block_table = torch.stack([blocks[:5], blocks[5:10]])
        self.seq_lens = torch.tensor([40, 30], dtype=torch.int32, device=DEVICE)
        vectors = normal(12, 1, self.page, self.latent + self.rotary)
        cache = torch.full_like(vectors, torch.nan).to(DEVICE, cache_dtype)
        used = self.block_table.flatten().long()
        cache.view(torch.uint8 if cache_dtype in FP8 else cache_dtype)[used] = (
            vectors[used.cpu()].to(cache_dtype).to(DEVICE).view(torch.uint8 if cache_dtype in FP8 else cache_dtype)
        )
        self.k_cache = cache
        self.params = LayerParams(
            scale=(self.nope + self.rotary) ** -0.5,
            # Of absorbed queries, if these are quantised: not the prompt's.
            q_scale=None if k_scale is None else torch.tensor([2.0], device=DEVICE),
            k_scale=None if k_scale is None else torch.tensor([k_scale], device=DEVICE),
        )
        self.plain = normal(9, self.heads, self.nope + self.rotary).to(DEVICE, dtype) * 2
        decoded = normal(1, self.heads, self.latent + self.rotary).to(DEVICE, dtype)
        self.forward = LatentForward(
            (decoded[..., : self.latent], decoded[..., self.latent :]), None, self.plain, self.absorb, self.head_keys
        )

    num_heads, head_size, name = heads, latent + rotary, "layer"

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        return self.k_cache

    def absorb(self, plain: Tensor) -> tuple[Tensor, Tensor]:
        nope, rotary = plain.split([self.nope, self.rotary], dim=-1)
        latent = torch.einsum("thp,hpl->thl", nope, self.weights)
        scale = 1.0 if self.params.q_scale is None else float(self.params.q_scale)
        return latent / scale, rotary / scale

    def head_keys(self, vectors: Tensor, heads: Tensor) -> Tensor:
        nope = torch.einsum("nl,hpl->hnp", vectors[:, : self.latent], self.weights[heads])
        return torch.cat([nope, vectors[:, self.latent :].expand(len(heads), -1, -1)], dim=-1)

    def tables(self) -> BatchTables:
        starts = torch.tensor([0, 1, 10], dtype=torch.int32, device=DEVICE)
        return BatchTables(self.block_table, starts, self.seq_lens, self)

    def keys_of_heads(self) -> Tensor:
        """Of the prompt, float64 [n, H, P + R]."""
        stored = self.k_cache.cpu().float()[self.block_table[1].cpu().long(), 0].flatten(0, 1)[:30].double()
        stored *= 1.0 if self.params.k_scale is None else float(self.params.k_scale)
        nope = torch.einsum("nl,hpl->nhp", stored[:, : self.latent], self.weights.cpu().double())
        return torch.cat([nope, stored[:, None, self.latent :].expand(-1, self.heads, -1)], dim=-1)


LATENT_ASKED = replace(ASKED, heads=(0, 1, 3), grams=False)


@pytest.mark.parametrize(
    ("cache_dtype", "k_scale"), [(torch.float32, None), (FP8[0], 0.5)], ids=["float32", "fp8 of another scale"]
)
def test_latent_attention(
    prompts: GpuPrompts, errors: ErrorCounter, monkeypatch: pytest.MonkeyPatch, cache_dtype: torch.dtype,
    k_scale: float | None,
) -> None:  # fmt: skip
    """Rows of the heads whose keys were made, against float64; what is kept is absorbed, as generated rows are."""
    step = LatentStep(torch.float32, cache_dtype, k_scale)
    monkeypatch.setattr(latent_prompts, "_KEYS_BYTES", 2 * 32 * 40 * 4)  # two of the three heads at a time
    prompts.compile(step, step.forward, step.k_cache)  # in warm-up, of whatever is there
    prompts.begin([LATENT_ASKED])
    prompts.measure(0, step, step.forward, step.k_cache, step.tables())
    assert errors.counts() == {}
    found, keys, scale = prompts._found[0].answers, step.keys_of_heads(), step.params.scale
    assert found.group == step.heads, "all heads have one key of the cache"
    heads, positions = list(LATENT_ASKED.heads), list(range(21, 30))
    queries = step.plain.cpu().double()
    expected = row_stats_ref(
        queries, [keys], positions, request=[0] * 9, phase=[0] * 9, prompt_len=[30] * 9, scale=scale,
        sink_tokens=CASE.sink_tokens, local_window=CASE.local_window,
    )[:, heads]  # fmt: skip
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(found.stats.cpu(), expected, **close)
    attention = [row_probe_ref(queries[row], keys, position, scale=scale) for row, position in enumerate(positions)]
    received = torch.zeros(step.heads, 30, dtype=torch.float64)
    for row, p in enumerate(attention):
        received[:, : p.shape[1]] += p
        torch.testing.assert_close(found.previous_mass[row].cpu(), p[heads, -2], **close)
        masses = torch.stack([p[heads, start:end].sum(1) for start, end in LATENT_ASKED.spans.tolist()], dim=1)
        torch.testing.assert_close(found.span_mass[row].cpu(), masses, **close)
    torch.testing.assert_close(found.received.cpu(), received[heads], **close)
    assert found.queries is not None
    assert found.keys is not None
    products = torch.einsum("rhd,nkd->hrn", found.queries.cpu(), found.keys.cpu())
    exact = torch.einsum("rhd,nhd->hrn", queries[:, heads], keys[5:, heads])
    torch.testing.assert_close(products, exact, rtol=1e-4, atol=1e-3, check_dtype=False)


def test_keys_of_heads_that_do_not_fit(errors: ErrorCounter, caplog: pytest.LogCaptureFixture) -> None:
    """Fewer heads at a time, and where there is no room for those of one, none."""
    step = LatentStep(torch.float32, torch.float32, None)
    made: list[int] = []

    def head_keys(vectors: Tensor, heads: Tensor) -> Tensor:
        made.append(len(heads))
        return step.head_keys(vectors, heads)

    forward, of_head = step.forward._replace(head_keys=head_keys), 2 * 32 * 40 * 4
    for room, expected in ((3 * of_head, [3]), (3 * of_head - 1, [2, 1]), (of_head, [1, 1, 1]), (of_head - 1, [])):
        made.clear()
        prompts = make_prompts(errors)
        prompts._memory.left = lambda _, room=room, **__: room  # type: ignore[method-assign]
        prompts.begin([LATENT_ASKED])
        prompts.measure(0, step, forward, step.k_cache, step.tables())
        assert made == expected
    assert errors.counts() == {"prompt": 1}
    assert "the keys of one head of a whole prompt take 1 MiB" in caplog.text


def test_latent_attention_of_which_another_rank_has_the_heads(prompts: GpuPrompts, errors: ErrorCounter) -> None:
    """Nothing is measured, which is all that was asked of this one."""
    step = LatentStep(torch.float32, torch.float32, None)
    prompts.begin([replace(LATENT_ASKED, heads=(), grams=True)])
    prompts.measure(0, step, step.forward, step.k_cache, step.tables())
    assert errors.counts() == {}
    answers = prompts._found[0].answers
    assert (9, 0, NUM_STATISTICS + 1) == answers.stats.shape
    assert (9, 0, len(LATENT_ASKED.spans)) == answers.span_mass.shape
    assert answers.received_squares is not None
    assert (0, 30) == answers.received.shape == answers.received_squares.shape


def test_rows_that_come_absorbed_are_refused(
    prompts: GpuPrompts, errors: ErrorCounter, caplog: pytest.LogCaptureFixture
) -> None:
    """In chunks so short that vLLM computes them as it decodes, replayed from a graph or not: counted, and said."""
    step = LatentStep(torch.float32, torch.float32, None)
    prompts.begin([replace(LATENT_ASKED, token=0, num_rows=1)])
    prompts.measure(0, step, step.forward, step.k_cache, step.tables())
    assert errors.counts() == {"prompt": 1}
    prompts.begin([LATENT_ASKED])
    prompts.measure(0, step, step.forward._replace(plain=None), step.k_cache, step.tables())
    assert errors.counts() == {"prompt": 2}
    wide = layer_of(make_inputs(CASE, DEVICE), head_size=576)
    prompts.begin([LATENT_ASKED])
    prompts.measure_kept(0, 2, wide, torch.zeros(9, 4, 576, device=DEVICE), wide.tables())
    assert errors.counts() == {"prompt": 3}
    assert prompts._found == []
    assert "in chunks that vLLM computes as it decodes" in caplog.text


def test_what_a_graph_has_run_is_known_and_measured_from_kept_queries(
    prompts: GpuPrompts, errors: ErrorCounter
) -> None:
    inputs = make_inputs(CASE, DEVICE)
    layer, last = layer_of(inputs), replace(ASKED, token=9, num_rows=1, position=29)
    prompts.begin([last])
    measure(prompts, 0, inputs)
    assert [(number, layers) for number, _, layers in prompts.missing()] == [(0, [2])]
    prompts.measure_kept(0, 2, layer, inputs.q[9:10], layer.tables())
    first, second = (one.answers for one in prompts._found)
    for name in ("stats", "received", "query_gram"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=0, atol=0, equal_nan=True)
    assert prompts.missing() == []
    assert errors.counts() == {}


def test_queries_and_own_keys_of_single_rows() -> None:
    """Of rows of several requests in several layers, each with the factors of its quantisation."""
    case = replace(CASE, kv_dtype=FP8[0], dtype=FP8[0], q_scale=0.5, k_scale=(2.0, 4.0))
    inputs = make_inputs(case, DEVICE)
    plain = replace(inputs.params, q_scale=torch.tensor([1.0, 3.0], device=DEVICE), k_scale=None)
    places = torch.tensor([(1, 29), (0, 8)], dtype=torch.int32, device=DEVICE)
    queries = inputs.q.float()[[9, 0]].to(case.dtype)[:, None].expand(-1, 2, -1, -1)
    found, keys = probed_vectors(queries, [inputs.k_cache] * 2, [inputs.params, plain], inputs.block_table, places)
    q = inputs.q.float()[[9, 0]].cpu()
    k = torch.stack([inputs.keys[1][29].float(), inputs.keys[0][8].float()])
    assert torch.equal(found[:, 0].cpu(), q * 0.5)
    assert torch.equal(found[:, 1].cpu(), q * torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None])
    assert torch.equal(keys[:, 0].cpu(), k * torch.tensor([2.0, 4.0])[:, None])
    assert torch.equal(keys[:, 1].cpu(), k)


EVERYTHING: tuple[dict[str, bool], ...] = (
    {},
    {"grams": False},
    {"kept": False},
    {"grams": False, "kept": False, "squares": False},
)


def needed_and_taken(prompts: GpuPrompts, measure_it: Callable[[], None]) -> tuple[int, int]:
    """Bytes that a prompt in a layer was said to need, and those that it took: on a GPU at most at a time, elsewhere
    those that are kept."""
    needed: list[int] = []
    left = prompts._memory.left

    def noting(nbytes: int, **held: int) -> int:
        needed.append(nbytes)
        return left(nbytes, **held)

    prompts._memory.left = noting  # type: ignore[method-assign]
    if not ON_GPU:
        measure_it()
        return needed[0], prompts._found_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measure_it()
    return needed[0], torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("change", EVERYTHING, ids=["all", "kept", "grams", "rows"])
@pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent"])
def test_no_more_is_taken_than_foreseen(errors: ErrorCounter, change: dict[str, bool], *, latent: bool) -> None:
    """Of whatever can be asked."""
    asked = replace(ASKED, local_layers=frozenset({0}), heads=(0, 1, 3), **change)
    step = LatentStep(torch.float32, torch.float32, None)
    inputs = make_inputs(CASE, DEVICE)

    def run() -> None:
        if latent:
            prompts.measure(0, step, step.forward, step.k_cache, step.tables())
        else:
            measure(prompts, 0, inputs)

    for _ in range(2):  # libraries take workspaces the first time
        prompts = make_prompts(errors)
        prompts.begin([asked])
        needed, taken = needed_and_taken(prompts, run)
    assert errors.counts() == {}
    keys_of_heads = 2 * 3 * 32 * 40 * 4 if latent else 0
    in_blocks = 512 * 64 if ON_GPU else 0  # torch rounds each tensor up
    assert 0 < taken <= needed + keys_of_heads + in_blocks


class Answers:
    """See contract.StepTraces: what came of prompts."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Any] = {}
        self.assembled = False

    def add_prompt(self, number: int, local_layer: int, answers: Any) -> None:
        self.found[number, local_layer] = answers

    def assemble_prompts(self) -> None:
        self.assembled = True


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is nothing to copy")
def test_answers_come_to_the_host(prompts: GpuPrompts, errors: ErrorCounter) -> None:
    """On another thread, all of them, before anybody hears that they are there; what waits is counted down again."""
    inputs, traced = make_inputs(replace(CASE, sinks=True), DEVICE), Answers()
    prompts.begin([ASKED, replace(ASKED, num_rows=3, kept=False)])
    measure(prompts, 0, inputs)
    measure(prompts, 2, inputs)
    on_device = {(one.number, one.local_layer): one.answers for one in prompts._found}
    done = torch.cuda.Event(blocking=True)
    done.record()
    copied = prompts.collect(traced, done)  # type: ignore[arg-type]
    copied.synchronize()
    assert copied.query()
    assert traced.assembled
    assert set(traced.found) == set(on_device) == {(0, 0), (0, 2), (1, 0), (1, 2)}
    for key, answers in on_device.items():
        for name in ("stats", "received", "span_mass", "query_gram"):
            np.testing.assert_array_equal(getattr(traced.found[key], name), getattr(answers, name).cpu().numpy())
    assert traced.found[1, 0].queries is None
    assert prompts._waiting_bytes == 0
    assert errors.counts() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is nothing to wait for")
def test_the_driver_is_not_asked_to_wait(prompts: GpuPrompts, errors: ErrorCounter) -> None:
    """torch's own watch over synchronising calls finds none."""
    inputs = make_inputs(replace(CASE, sinks=True, kv_dtype=FP8[0], k_scale=(0.5, 2.0)), DEVICE)
    for mode in ("default", "error"):  # the first call compiles
        prompts.begin([ASKED])
        torch.cuda.set_sync_debug_mode(mode)
        try:
            measure(prompts, 0, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert errors.counts() == {}
