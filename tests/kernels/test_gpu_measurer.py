"""What a GPU's measurer launches, measures and copies of a step, without a GPU in Triton's interpreter.

There queued work is done when the call returns, so streams and events order nothing, and their place is empty.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
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
from glassbox.measure import gpu_measurer, kept_rows
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

    @property
    def address(self) -> int:
        return self.inputs.k_cache.data_ptr()

    def keys(self, kv_cache: Tensor | None = None) -> Tensor:
        return self.inputs.k_cache

    def values(self, kv_cache: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def scaled(inputs: Inputs, factor: float) -> Inputs:
    """The same batch in another layer: its keys at the same places are these, times a power of two."""
    k = inputs.k_cache
    cache = torch.empty_strided(k.shape, k.stride(), dtype=k.dtype, device=DEVICE).copy_(k * factor)
    return replace(inputs, k_cache=cache, keys=[keys * factor for keys in inputs.keys])


class Step:
    """A measurer, its layers, and what is launched and copied to the host.

    Args:
        few_rows: as of DeviceNeeds; if there are any, the measurer has been warmed up.

    Attributes:
        launched: rows of each launch for one layer; of one into a graph -1.
        at_once: layers of each launch for several.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, case: Case = CASE, few_rows: int = 0) -> None:
        self.case = case
        # Threads that were told which GPU is theirs.
        self.bound: list[str] = []
        if not ON_GPU:
            queue_nothing(monkeypatch)
            monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        self.launched: list[int] = []
        self.at_once: list[int] = []
        self.into_graph: list[Callable[[], None]] | None = None
        self.copied: list[tuple[int, ...]] = []
        self.monkeypatch = monkeypatch
        launch, to_host = gpu_measurer.row_stats, gpu_measurer._to_host
        launch_layers, keep = kept_rows.row_stats_layers, kept_rows.row_keep

        def row_stats(*args: Any, **more: Any) -> None:
            self.launched.append(int(args[6][0]) if self.into_graph is None else -1)
            self.queue(partial(launch, *args, **more))

        def row_keep(*args: Any, **more: Any) -> None:
            self.queue(partial(keep, *args, **more))

        def row_stats_layers(*args: Any, **more: Any) -> None:
            self.at_once.append(len(args[2]))
            launch_layers(*args, **more)

        def copied(source: Tensor) -> Tensor:
            self.copied.append(tuple(source.shape))
            return to_host(source)

        monkeypatch.setattr(gpu_measurer, "row_stats", row_stats)
        monkeypatch.setattr(gpu_measurer, "_to_host", copied)
        monkeypatch.setattr(kept_rows, "row_keep", row_keep)
        monkeypatch.setattr(kept_rows, "row_stats_layers", row_stats_layers)
        self.errors = ErrorCounter(logging.getLogger("test"))
        inputs = make_inputs(case, DEVICE)
        self.layers = [Layer(f"layer{n}", scaled(inputs, (-0.5) ** n), case.heads, case.head_size) for n in LAYERS]
        self.deferred = DeferredActions(self.errors)
        needs = DeviceNeeds(
            case.max_rows, case.head_size, case.kv_heads, case.dtype, self.deferred, lambda: False, few_rows=few_rows
        )
        self.accumulators = Accumulators(NUM_LAYERS, case.heads, DEVICE)
        measured = MeasuredLayers(self.accumulators, {one.name: n for n, one in enumerate(self.layers)}, 4, 16)
        self.measurer = GpuMeasurer(measured, needs, self.errors)
        self.measurer._graphs.unwatch()
        if few_rows:
            self.attend()
        self.measurer._warming = False
        self.host = make_host(layers=tuple(LAYERS), num_heads=case.heads)

    def queue(self, launch: Callable[[], None]) -> None:
        """Without a GPU also for the replays of what is captured."""
        launch()
        if self.into_graph is not None:
            self.into_graph.append(launch)

    def capture(self) -> tuple[Any, Callable[[], None]]:
        """A graph of all layers, and what replays it."""
        self.launched.clear()
        self.into_graph, graphs = [], self.measurer._graphs
        if ON_GPU:
            graphs.watch()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.attend()
            graphs.unwatch()
            self.into_graph = None
            return graph, graph.replay
        graph = SimpleNamespace(nodes=[], kept=set())
        graphs.begin_capture(graph)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            monkeypatch.setattr(graphs, "record", lambda _: None)
            self.attend()
        graphs.drop_capture(graph)
        queued, self.into_graph = self.into_graph, None

        def replay() -> None:
            for launch in queued:
                launch()
            if graphs.measuring:
                graphs.kept |= graph.kept

        return graph, replay

    def attend(self) -> None:
        """All layers run."""
        for layer in self.layers:
            i = layer.inputs
            tables = BatchTables(i.block_table, i.query_start_loc, i.seq_lens, self)
            self.measurer.on_build([layer.name], tables)
            self.measurer.after_attention(layer, self.forward(i.q), i.k_cache, tables)

    def set_device(self, device: torch.device) -> None:
        assert device == self.accumulators.counts.device
        self.bound.append(threading.current_thread().name.partition("_")[0])

    def trace(self, *layers: int, options: TraceOptions = TraceOptions()) -> ActiveTrace:  # noqa: B008
        return ActiveTrace(
            self.host, f"of {layers}", why="opt_in", options=options, traceparent=None, prompt_len=3,
            local_layers=layers, head_columns=tuple(range(self.case.heads)),
        )  # fmt: skip

    def run(
        self,
        sampled: set[int],
        traces: dict[int, ActiveTrace],
        *,
        counted: bool = True,
        attend: Callable[[], None] | None = None,
    ) -> None:
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
        self.measure(rows, sampled, traced, attend)

    def measure(
        self,
        rows: np.ndarray,
        sampled: set[int],
        traced: TracedStep | None,
        attend: Callable[[], None] | None = None,
    ) -> None:
        """A step with these rows, whose layers run in Python unless it is said how."""
        self.measurer.begin(rows, StepLayers(frozenset(sampled), frozenset(LAYERS)), traced, None)
        for noted in (self.launched, self.at_once, self.copied):
            noted.clear()
        (attend or self.attend)()
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


def assert_sums(step: Step, layer: int, steps: int = 1) -> None:
    """A layer has its three rows of so many steps alike."""
    expected = steps * sum(step.expected(layer, request)[:, :NUM_STATISTICS] for request in range(3))
    np.testing.assert_allclose(step.accumulators.sums[layer, :, 1].cpu(), expected, rtol=1e-4, atol=1e-4)


class TestFewRows:
    """They are kept while the layers run, and measured after all of them."""

    def test_a_launch_for_all_layers_with_the_same_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Traced ones keep their vectors, and nothing of a step is left for the next one."""
        step = Step(monkeypatch, few_rows=16)
        one = step.trace(0, 2)
        step.run({2, 3}, {1: one})
        assert [] == step.launched
        assert [1, 1, 1] == step.at_once, "layers 0, 2 and 3 have other rows than each other"
        assert [0, 0, 3, 3] == step.rows()
        assert_has(step, one, 1, (0, 2))
        assert_sums(step, 3)
        step.run({2, 3}, {})
        assert [2] == step.at_once
        assert [0, 0, 6, 6] == step.rows()
        assert_sums(step, 2, steps=2)

    def test_lists_with_more_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each list for itself: a layer whose list has no room is measured while it runs."""
        step = Step(monkeypatch, few_rows=2)
        one = step.trace(0)
        step.run({2, 3}, {1: one})
        assert ([3, 3], [1]) == (step.launched, step.at_once)
        assert [0, 0, 3, 3] == step.rows()
        assert_has(step, one, 1, (0,))
        assert_sums(step, 3)

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However large a model is: fewer rows are few then, and where not one has room, none."""
        row_bytes = NUM_LAYERS * CASE.heads * CASE.head_size * CASE.dtype.itemsize
        monkeypatch.setattr(kept_rows, "_KEPT_BYTES", 2 * row_bytes)
        step = Step(monkeypatch, few_rows=16)
        assert 2 * row_bytes == step.measurer._few.nbytes
        step.run({2, 3}, {1: step.trace(0)})
        assert ([3, 3], [1]) == (step.launched, step.at_once)
        monkeypatch.setattr(kept_rows, "_KEPT_BYTES", row_bytes - 1)
        step = Step(monkeypatch, few_rows=16)
        assert step.measurer._few.nbytes == 0
        step.run({2}, {1: step.trace(0)})
        assert ([1, 3], []) == (step.launched, step.at_once)
        assert [0, 0, 3, 0] == step.rows()

    def test_layers_that_look_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that was given other tables than the step's end has, or whose scales may change, runs as ever."""
        step = Step(monkeypatch, few_rows=16)
        own = step.layers[1].inputs
        own.block_table = own.block_table.clone()
        changing = step.layers[2].inputs
        changing.params = replace(changing.params, k_scale=torch.ones(1, device=DEVICE))

        def attend() -> None:
            for layer in step.layers:
                i = layer.inputs
                built = BatchTables(step.layers[0].inputs.block_table, i.query_start_loc, i.seq_lens, step)
                given = built._replace(block_table=i.block_table)
                step.measurer.on_build([layer.name], built)
                step.measurer.after_attention(layer, step.forward(i.q), i.k_cache, given)

        step.run({0, 1, 2, 3}, {}, attend=attend)
        assert ([3, 3], [2]) == (step.launched, step.at_once)
        for layer in LAYERS:
            assert_sums(step, layer)

    def test_a_cache_that_was_made_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is read where it lies now."""
        step = Step(monkeypatch, few_rows=16)
        step.run({0, 3}, {})
        before = step.layers[3].inputs.k_cache
        step.layers[3].inputs = scaled(step.layers[3].inputs, 1.0)
        before.fill_(torch.nan)
        step.run({0, 3}, {})
        assert [2] == step.at_once
        assert_sums(step, 3, steps=2)

    @pytest.mark.parametrize("few_rows", [16, 2], ids=["few tokens", "more tokens than few rows"])
    def test_graphs(self, monkeypatch: pytest.MonkeyPatch, few_rows: int) -> None:
        """What a graph has captured is right in every replay, in whatever layers rows are wanted; other replays, and
        those before and after, measure nothing."""
        step = Step(monkeypatch, few_rows=few_rows)
        graph, replay = step.capture()
        assert (set(LAYERS) if few_rows == 16 else set()) == graph.kept
        assert ([] if few_rows == 16 else [-1] * NUM_LAYERS) == step.launched
        replay()
        assert [0] * NUM_LAYERS == step.rows()
        one = step.trace(0, 1)
        step.run({1, 3}, {2: one}, attend=replay)
        assert ([1, 1, 1] if few_rows == 16 else []) == step.at_once
        assert [0, 3, 0, 3] == step.rows()
        assert_has(step, one, 2, (0, 1))
        assert_sums(step, 3)
        step.layers[0].inputs.q.neg_()  # of all layers
        two = step.trace(2)
        replay()
        step.run({0}, {1: two}, attend=replay)
        assert [3, 3, 0, 3] == step.rows()
        assert_has(step, two, 1, (2,))
        assert_sums(step, 0)
        step.run({3}, {})
        assert [3, 3, 0, 6] == step.rows()

    def test_a_kernel_that_fails_in_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of few rows: they are measured as many are, and the layer is not refused."""
        step = Step(monkeypatch)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("ptxas is out of order")

        monkeypatch.setattr(kept_rows, "row_stats_layers", fail)
        needs = DeviceNeeds(8, CASE.head_size, CASE.kv_heads, CASE.dtype, step.deferred, lambda: False)
        measured = MeasuredLayers(step.accumulators, {one.name: n for n, one in enumerate(step.layers)}, 4, 16)
        step.measurer = GpuMeasurer(measured, needs, step.errors)
        step.measurer._graphs.unwatch()
        step.attend()
        assert NUM_LAYERS == step.errors.counts()["observe"]
        assert not step.measurer._uncompiled
        step.measurer._warming = False
        step.measurer.begin(
            step.layers[0].inputs.rows.cpu().numpy()[:1], StepLayers(frozenset({1}), frozenset(LAYERS)), None, None
        )
        step.launched.clear()
        step.attend()
        step.measurer.finish()
        assert [1] == step.launched
        assert [0, 1, 0, 0] == step.rows()
