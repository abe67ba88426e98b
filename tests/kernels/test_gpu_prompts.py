"""What a GPU measurer makes of whole prompts is what the CPU's makes of them, without a GPU in Triton's interpreter."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.errors import ErrorCounter
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.prompt_rows_cpu import PromptChunk, PromptWishes, prompt_rows_cpu
from glassbox.measure import gpu_prompts
from glassbox.measure.contract import AskedPrompt, BatchTables, Forward, LatentForward
from glassbox.measure.gpu_prompts import GpuPrompts, probed_vectors
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
)


@dataclass
class Layer:
    """See contract.StridedLayer."""

    inputs: Inputs
    num_heads: int = CASE.heads
    head_size: int = CASE.head_size
    name: str = "layer"
    gave_kv: bool = True

    @property
    def params(self) -> LayerParams:
        return self.inputs.params

    @property
    def query_dtype(self) -> torch.dtype:
        return self.inputs.q.dtype

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        return self.inputs.k_cache

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def tables(self) -> BatchTables:
        return BatchTables(self.inputs.block_table, self.inputs.query_start_loc, self.inputs.seq_lens, self)


@pytest.fixture
def errors() -> ErrorCounter:
    return ErrorCounter(logging.getLogger("test"))


@pytest.fixture
def prompts(errors: ErrorCounter) -> GpuPrompts:
    return GpuPrompts(torch.device(DEVICE), CASE.sink_tokens, CASE.local_window, errors)


def measure(prompts: GpuPrompts, local: int, inputs: Inputs, forward: Any = None) -> None:
    layer = Layer(inputs)
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
    wishes = PromptWishes([1, 2], torch.from_numpy(ASKED.spans), True, True, 5, CASE.sink_tokens, CASE.local_window)
    expected, found = prompt_rows_cpu(chunk, wishes), prompts._found[1].answers
    assert found.group == expected.group == 2
    for name in ("stats", "previous_mass", "span_mass", "received", "query_gram", "key_gram", "queries", "keys"):
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
    monkeypatch.setattr(gpu_prompts, "_WAITING_BYTES", 0)
    prompts.begin([replace(ASKED, num_rows=1)])
    measure(prompts, 0, inputs)
    measure(prompts, 2, inputs)
    assert errors.counts() == {"prompt": 2}, "what waits for its copy is bounded"
    assert len(prompts._found) == 1


def test_latent_attention_is_refused(prompts: GpuPrompts, errors: ErrorCounter) -> None:
    inputs = make_inputs(CASE, DEVICE)
    prompts.begin([ASKED])
    measure(prompts, 0, inputs, LatentForward(None, None, inputs.q, lambda q: (q, q)))
    assert errors.counts() == {"prompt": 1}
    assert prompts._found == []


def test_what_a_graph_has_run_is_known_and_measured_from_kept_queries(
    prompts: GpuPrompts, errors: ErrorCounter
) -> None:
    inputs = make_inputs(CASE, DEVICE)
    layer, last = Layer(inputs), replace(ASKED, token=9, num_rows=1, position=29)
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
