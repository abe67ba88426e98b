"""What a GPU's measurer launches, measures and copies of a step, without a GPU in Triton's interpreter.

There queued work is done when the call returns, so streams and events order nothing, and their place is empty.
"""

import logging
import threading
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import ROW_DECODE, ROW_PHASE, ROW_SLOT, ROW_UNCOUNTED
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.measure import gpu_measurer
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import (
    AskedPrompt,
    BatchTables,
    DeviceNeeds,
    Forward,
    LatentForward,
    LayeredRows,
    MeasuredLayers,
    StepLayers,
)
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.gpu_measurer import GpuMeasurer
from glassbox.processes.worker.traces.active import ActiveTrace
from glassbox.processes.worker.traces.traced_step import TracedPrompt, TracedRows, TracedStep
from glassbox.store.trace_record import TraceOptions
from tests.kernels.nothing_queued import queue_nothing
from tests.kernels.row_stats_cases import Case, Inputs, Sequence, make_inputs
from tests.trace_samples import make_host

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Three requests that generate, in four layers.
CASE: Final = Case(
    "lists", (Sequence(1, 37, 20), Sequence(1, 9, 3), Sequence(1, 50, 40)), dtype=torch.float32, max_rows=8
)
# With latent attention: two that generate, whose queries vLLM absorbs, and a prompt of three tokens.
LATENT: Final = Case(
    "latent", (Sequence(1, 37, 20), Sequence(1, 9, 3), Sequence(3, 20, 40)), heads=3, kv_heads=1, head_size=320,
    dtype=torch.float32, max_rows=8,
)  # fmt: skip
NUM_LAYERS: Final = 4
LAYERS: Final = range(NUM_LAYERS)


@dataclass
class Layer:
    """See contract.StridedLayer."""

    name: str
    inputs: Inputs
    num_heads: int
    head_size: int
    query_dtype: torch.dtype = CASE.dtype
    gave_kv: bool = False

    @property
    def params(self) -> LayerParams:
        return self.inputs.params

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        return self.inputs.k_cache

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Step:
    """A measurer, its layers, and what is launched and copied to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, case: Case = CASE) -> None:
        self.case = case
        # Threads that were told which GPU is theirs.
        self.bound: list[str] = []
        if not ON_GPU:
            queue_nothing(monkeypatch)
            monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        self.launched: list[int] = []
        self.copied: list[tuple[int, ...]] = []
        self.monkeypatch = monkeypatch
        launch, to_host = gpu_measurer.row_stats, gpu_measurer._to_host

        def row_stats(*args: Any, **more: Any) -> None:
            self.launched.append(int(args[6][0]))
            launch(*args, **more)

        def copied(source: Tensor) -> Tensor:
            self.copied.append(tuple(source.shape))
            return to_host(source)

        monkeypatch.setattr(gpu_measurer, "row_stats", row_stats)
        monkeypatch.setattr(gpu_measurer, "_to_host", copied)
        self.errors = ErrorCounter(logging.getLogger("test"))
        self.layers = [
            Layer(f"layer{n}", make_inputs(case, DEVICE, seed=n), case.heads, case.head_size) for n in LAYERS
        ]
        self.deferred = DeferredActions(self.errors)
        needs = DeviceNeeds(case.max_rows, case.head_size, case.kv_heads, case.dtype, self.deferred, lambda: False)
        self.accumulators = Accumulators(NUM_LAYERS, case.heads, DEVICE)
        measured = MeasuredLayers(self.accumulators, {one.name: n for n, one in enumerate(self.layers)}, 4, 16)
        self.measurer = GpuMeasurer(measured, needs, self.errors)
        self.measurer._graphs.unwatch()
        self.measurer._warming = False  # there are no graphs, and so no warm-up
        self.host = make_host(layers=tuple(LAYERS), num_heads=case.heads)

    def set_device(self, device: torch.device) -> None:
        assert device == self.accumulators.counts.device
        self.bound.append(threading.current_thread().name.partition("_")[0])

    def trace(self, *layers: int, options: TraceOptions = TraceOptions()) -> ActiveTrace:  # noqa: B008
        return ActiveTrace(
            self.host, f"of {layers}", why="opt_in", options=options, traceparent=None, prompt_len=3,
            local_layers=layers, head_columns=tuple(range(self.case.heads)),
        )  # fmt: skip

    def run(self, sampled: set[int], traces: dict[int, ActiveTrace], *, counted: bool = True) -> None:
        """A step whose rows are the first of each request, as row list of the sample or of its traces alone."""
        places = range(len(self.case.sequences)) if counted else sorted(traces)
        rows = self.layers[0].inputs.rows.cpu().numpy()[list(places)].copy()
        rows[:, ROW_PHASE] = ROW_DECODE if counted else ROW_DECODE | ROW_UNCOUNTED
        indices = np.array([n for n, request in enumerate(places) if request in traces], dtype=np.int64)
        rows[indices, ROW_SLOT] = np.arange(len(indices))
        members = [
            TracedRows(trace, n, np.array([self.position(request)], np.int32), np.array([1], np.uint8))
            for n, (request, trace) in enumerate(sorted(traces.items()))
        ]
        traced = TracedStep(members, rows, indices, NUM_LAYERS, self.case.heads) if members else None
        self.measure(rows, sampled, traced)

    def measure(self, rows: np.ndarray, sampled: set[int], traced: TracedStep | None) -> None:
        """A step with these rows."""
        self.measurer.begin(rows, StepLayers(frozenset(sampled), frozenset(LAYERS)), traced, None)
        self.launched.clear()
        self.copied.clear()
        for layer in self.layers:
            i = layer.inputs
            tables = BatchTables(i.block_table, i.query_start_loc, i.seq_lens, self)
            self.measurer.on_build([layer.name], tables)
            self.measurer.after_attention(layer, self.forward(i.q), i.k_cache, tables)
        self.measurer.finish()
        self.deferred.finish()
        assert not any(count for stage, count in self.errors.counts().items() if stage != "graph_nodes")

    def forward(self, q: Tensor) -> Forward | LatentForward:
        if self.case is CASE:
            return Forward(q, None, None, None)

        def parts(queries: Tensor) -> tuple[Tensor, Tensor]:
            return queries[..., :256].contiguous(), queries[..., 256:].contiguous()

        def head_keys(_vectors: Tensor, _heads: Tensor) -> Tensor:
            raise AssertionError("only whole prompts need them")

        return LatentForward(parts(q[:2]), None, q[2:], absorb=parts, head_keys=head_keys)

    def expected(self, layer: int, request: int, phase: int = ROW_DECODE) -> Tensor:
        """[H, NUM_STATISTICS + 1] float64."""
        inputs, sequence = self.layers[layer].inputs, self.case.sequences[request]
        keys = [keys.double() for keys in inputs.keys]
        return row_stats_ref(
            inputs.q.cpu().double()[[request]], keys, [self.position(request)], request=[request], phase=[phase],
            prompt_len=[sequence.prompt_len], scale=inputs.params.scale, local_window=16,
        )[0]  # fmt: skip

    def position(self, request: int) -> int:
        """Of the row of a request."""
        sequence = self.case.sequences[request]
        return sequence.seq_len - sequence.query_len

    def rows(self) -> list[int]:
        """Rows of each layer that its accumulators have, of a head."""
        return self.accumulators.rows[:, 0].sum(-1).tolist()


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    return Step(monkeypatch)


def assert_has(step: Step, trace: ActiveTrace, request: int, layers: tuple[int, ...], phase: int = ROW_DECODE) -> None:
    """A trace has what float64 gives of its one row in its layers."""
    stats = trace.record().stats
    assert (1, len(layers), step.case.heads, NUM_STATISTICS + 1) == stats.shape
    for n, layer in enumerate(layers):
        np.testing.assert_allclose(stats[0, n], step.expected(layer, request, phase), rtol=1e-4, atol=1e-5)


def test_a_step_for_traces_alone(step: Step) -> None:
    """Each row in its trace's layers and nowhere else: what is listed, launched, counted, and copied to the host."""
    low, high = step.trace(1, 2), step.trace(2)
    step.run(set(), {0: low, 2: high}, counted=False)
    assert [1, 2] == step.launched, "rows of layers 1 and 2"
    assert [(2, 2, CASE.heads, NUM_STATISTICS + 1), (2, 2, CASE.heads)] == step.copied, "two slots, two layers"
    assert [0] * NUM_LAYERS == step.rows()
    assert_has(step, low, 0, (1, 2))
    assert_has(step, high, 2, (2,))


def test_some_layers_of_the_sample_beside_traces(step: Step) -> None:
    """The sample's layers have its rows, the traces' their own; where both want a row it is counted."""
    one = step.trace(0, 2)
    step.run({2, 3}, {1: one})
    assert [1, 3, 3] == step.launched
    assert [0, 0, 3, 3] == step.rows()
    assert_has(step, one, 1, (0, 2))
    sums = step.accumulators.sums[3, :, 1].cpu()
    expected = sum(step.expected(3, request)[:, :NUM_STATISTICS] for request in range(3))
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)


def test_a_graph_that_holds_all_layers(step: Step) -> None:
    """A replay runs every captured launch: those of layers whose turn it isn't find no rows and leave all as it is."""
    step.run({1}, {})
    assert [3] == step.launched
    step.monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step.run({3}, {})
    assert [0, 0, 0, 3] == step.launched
    assert [0, 3, 0, 3] == step.rows()
    assert not step.measurer._num_rows.any(), "later replays find none"


def test_a_prompt_that_ends_in_a_graph(step: Step) -> None:
    """All rows of a prompt are wanted in two layers, and a replay runs no Python between them: its last row is listed
    there, so that the graph keeps its queries, and in no other layer."""
    layers, request = (1, 2), 1
    trace = step.trace(*layers, options=TraceOptions(prompt="all"))
    asked = AskedPrompt(
        batch=request, token=request, num_rows=1, position=step.position(request), local_layers=frozenset(layers),
        heads=trace.head_columns, spans=np.zeros((0, 2), dtype=np.int32), grams=False, kept=False, keys_from=0,
    )  # fmt: skip
    rows = step.layers[0].inputs.rows.cpu().numpy()[[0, request]].copy()
    rows[:, ROW_PHASE], rows[:, ROW_SLOT] = [ROW_DECODE, ROW_UNCOUNTED], [-1, 0]
    listed = [LayeredRows(frozenset(layers), np.array([1]))]
    traced = TracedStep([], rows, np.arange(0), NUM_LAYERS, CASE.heads, [TracedPrompt(trace, asked)], listed)
    step.monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step.measure(rows, {0, 1}, traced)
    assert [1, 2, 1, 0] == step.launched
    assert [1, 1, 0, 0] == step.rows()
    assert_has(step, trace, request, layers, phase=0)


@pytest.mark.skipif(ON_GPU, reason="the driver doesn't tell")
def test_other_threads_are_bound_to_the_gpu(step: Step) -> None:
    """They begin at the first one, where the least that they ask would make a context of some 500 MB."""
    step.measurer.enter_thread()
    assert ["MainThread"] == step.bound
    test_a_prompt_that_ends_in_a_graph(step)
    assert ["MainThread", "glassbox-prompts"] == step.bound


def test_a_layer_whose_kernel_fails_in_warm_up(step: Step) -> None:
    """It is told from the others, and one that was compiled at a later size isn't among them."""
    launch, failing = gpu_measurer.row_stats, {1, 2}

    def row_stats(*args: Any, **more: Any) -> None:
        if args[1].data_ptr() in {step.layers[n].inputs.k_cache.data_ptr() for n in failing}:
            raise RuntimeError("ptxas is out of order")
        launch(*args, **more)

    step.monkeypatch.setattr(gpu_measurer, "row_stats", row_stats)
    step.measurer._warming = True
    for _ in range(2):
        for layer in step.layers:
            i = layer.inputs
            tables = BatchTables(i.block_table, i.query_start_loc, i.seq_lens, step)
            with step.errors.guard("observe"):
                step.measurer.after_attention(layer, step.forward(i.q), i.k_cache, tables)
        failing.discard(1)
    assert frozenset({2}) == step.measurer.end_warm_up()
    assert 3 == step.errors.counts()["observe"]


def test_latent_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a layer, of which the second numbers the rows from its own layer's list: a prompt's row that is the
    third of the sample and the first of a trace."""
    step = Step(monkeypatch, LATENT)
    traced = step.trace(0, 3)
    step.run({0, 1}, {2: traced})
    assert [3, 3, 3, 3, 1, 1] == step.launched
    assert [3, 3, 0, 0] == step.rows()
    assert_has(step, traced, 2, (0, 3))
    sums = step.accumulators.sums[1, :, 1].cpu()
    expected = sum(step.expected(1, request)[:, :NUM_STATISTICS] for request in range(3))
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)
