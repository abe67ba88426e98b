"""Both ways of measuring on the CPU keep the same, over caches that vLLM's own operator has written."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops

from glassbox.adapter.attention.layer_view import PackedView, tables_of
from glassbox.config.load import GlassboxConfig
from glassbox.core.accumulator_arrays import AccumulatorArrays
from glassbox.core.errors import ErrorCounter
from glassbox.core.native import NativeError
from glassbox.core.rows import ROW_UNCOUNTED
from glassbox.core.statistics import INDEX
from glassbox.measure import cpu_measurer
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import Forward, MeasuredLayers, StepLayers
from glassbox.measure.cpu_measurer import CpuMeasurer
from glassbox.processes.worker.traces.active import ActiveTrace
from glassbox.processes.worker.traces.traced_step import TracedRows, TracedStep
from glassbox.store.trace_record import RequestTrace, Span, TraceOptions
from tests.integration.cpu_layer import cpu_layer, layout_of
from tests.integration.observed_worker import KEYS, ObservedWorker
from tests.trace_samples import make_host

pytestmark = pytest.mark.integration

NUM_LAYERS, HEADS, KV_HEADS, D, BLOCK = 3, 4, 2, 64, 32
# Sequence and query lengths of a decode step, a chunk of a prompt and another decode step.
SEQ_LENS, QUERY_LENS, PROMPT_LENS = (70, 40, 3), (1, 20, 1), (30, 100, 2)
ASKS = TraceOptions(top_k=5, spans=(Span("first", 0, 4), Span("rest", 4, 1000)), attention=True)
FEW = TraceOptions(top_k=2, layers=(8,))


class Step:
    """A step of three requests in three layers, the last with a sliding window and learned sinks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        starts = np.r_[0, np.cumsum(QUERY_LENS)].astype(np.int32)
        table = torch.tensor([[5, 1, 7], [0, 3, 9], [2, 9, 9]], dtype=torch.int32)
        self.metadata = [
            SimpleNamespace(
                query_start_loc=torch.from_numpy(starts),
                seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
                block_table=table.clone(),
            )
            for _ in range(2)
        ]
        self.layers: list[dict[str, Any]] = []
        self.vllm_layers: list[Any] = []
        for number in range(NUM_LAYERS):
            cache = torch.zeros(8, KV_HEADS, BLOCK, 2 * D)
            key_half, value_half = cache.view(8, KV_HEADS, 2 * BLOCK, D).chunk(2, dim=2)
            for b, n in enumerate(SEQ_LENS):
                keys, j = normal(n, KV_HEADS, D), torch.arange(n)
                slots = table[b].long()[j // BLOCK] * BLOCK + j % BLOCK
                ops.cpu_attn_reshape_and_cache(
                    keys, torch.zeros_like(keys), key_half, value_half, slots, "vec", 1.0, 1.0, "auto"
                )
            last = number == NUM_LAYERS - 1
            # Held here: a view does not keep vLLM's layer alive.
            layer = cpu_layer(
                cache,
                num_kv_heads=KV_HEADS,
                head_size=D,
                name=f"layer{number}",
                sliding_window=10 if last else -1,
                sinks=normal(HEADS) if last else None,
            )
            layout_of(layer, torch.float32)
            self.vllm_layers.append(layer)
            self.layers.append({
                "layer": PackedView(layer.impl, layer),
                "forward": Forward(normal(int(starts[-1]), HEADS, D), None, None, None),
                "kv_cache": cache,
                "tables": tables_of(self.metadata[last]),
            })  # fmt: skip
        # Two rows of the prompt, the rest decode; requests 0 and 2 are traced, 2 is not in the sample.
        self.rows = np.array(
            [[0, 0, 1, 30, 0], [3, 1, 0, 100, -1], [20, 1, 0, 100, -1], [21, 2, 1 | ROW_UNCOUNTED, 2, 1]],
            dtype=np.int32,
        )

    def measured(
        self, sampled: frozenset[int] = frozenset(range(NUM_LAYERS)), **options: Any
    ) -> tuple[AccumulatorArrays, list[RequestTrace], ErrorCounter]:
        """The step by a measurer of its own, twice, the sample in some layers; the second time without the traces, of
        which nothing may be left."""
        host = make_host(layers=(0, 4, 8), num_heads=HEADS)
        traces = [
            ActiveTrace(
                host, name, why="opt_in", options=asked, traceparent=None, prompt_len=prompt_len, local_layers=layers,
                head_columns=(0, 1, 3),
            )
            for name, asked, prompt_len, layers in (("a", ASKS, 30, (0, 1, 2)), ("c", FEW, 2, (2,)))
        ]  # fmt: skip
        errors = ErrorCounter(logging.getLogger("glassbox.tests"))
        accumulators = Accumulators(NUM_LAYERS, HEADS)
        measured = MeasuredLayers(accumulators, {f"layer{n}": n for n in range(NUM_LAYERS)}, 4, 8)
        measurer = CpuMeasurer(measured, errors=errors, **options)
        every = frozenset(range(NUM_LAYERS))
        for again in (False, True):
            members = [
                TracedRows(trace, i, np.array([position + again], dtype=np.int32), np.array([1], dtype=np.uint8))
                for i, (trace, position) in enumerate(zip(traces, (69, 2), strict=True))
            ]
            traced = TracedStep(members, self.rows, np.array([0, 3]), NUM_LAYERS, HEADS)
            measurer.begin(self.rows, StepLayers(sampled, every), None if again else traced, None)
            for layer in self.layers:
                measurer.after_attention(**layer)
            measurer.finish()
        return accumulators.copy(), [trace.record() for trace in traces], errors


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


def assert_same(
    one: tuple[AccumulatorArrays, list[RequestTrace], ErrorCounter],
    other: tuple[AccumulatorArrays, list[RequestTrace], ErrorCounter],
) -> None:
    np.testing.assert_array_equal(one[0].rows, other[0].rows)
    np.testing.assert_array_equal(one[0].counts, other[0].counts)
    np.testing.assert_allclose(one[0].sums, other[0].sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one[0].window_max, other[0].window_max, rtol=1e-5)
    for mine, theirs in zip(one[1], other[1], strict=True):
        for name in ("positions", "phases", "topk_positions", "mean_topk_positions", "attention_offsets"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
        for name in ("stats", "topk_mass", "mean_topk_mass", "span_mass"):
            np.testing.assert_allclose(
                getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, equal_nan=True, err_msg=name
            )
        np.testing.assert_allclose(mine.attention_values, theirs.attention_values, rtol=2e-3, atol=1e-6)
    assert one[2].counts() == other[2].counts()


def test_the_native_kernel_and_torch_agree(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulators, traces, top positions, spans and rows; each is used when it should be."""
    native = step.measured()
    monkeypatch.setattr(cpu_measurer, "NativeStep", None)  # not to be touched
    by_torch = step.measured(native=False)
    assert_same(native, by_torch)
    arrays, (asked, few), errors = native
    assert not any(errors.counts().values())
    # Of the twice measured step: three rows are in the sample, the first is a trace's as well.
    assert arrays.rows[..., 0].tolist() == [[4] * HEADS] * NUM_LAYERS
    assert arrays.rows[..., 1].tolist() == [[2] * HEADS] * NUM_LAYERS
    assert asked.topk_mass.shape == (1, 3, 3, 5)
    np.testing.assert_allclose(asked.span_mass[0, :2].sum(-1), 1, rtol=1e-5)
    assert (asked.span_mass[0, 2, :, 0] == 0).all()  # the window hides the first four
    assert few.topk_positions.shape == (1, 1, 3, 2)


def test_some_layers_each_way(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window may be light where the others are not."""
    expected = step.measured()
    light = cpu_measurer.NativeRows.is_light
    monkeypatch.setattr(
        cpu_measurer.NativeRows,
        "is_light",
        lambda self, *size, **more: self._struct.reach > 0 and light(self, *size, **more),
    )
    assert_same(step.measured(), expected)


@pytest.mark.parametrize("native", [True, False])
def test_the_sample_in_one_layer(step: Step, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Its numbers are what they are beside the others', which have none; traces have theirs of all their layers. A
    layer of which nothing is wanted is not looked at."""
    expected, expected_traces, _ = step.measured()
    seen: list[str] = []
    put_by = CpuMeasurer._put_by_listed
    monkeypatch.setattr(
        CpuMeasurer, "_put_by_listed", lambda self, *args: seen.append(args[2].name) or put_by(self, *args)
    )
    arrays, traces, errors = step.measured(frozenset({1}), native=native)
    assert ["layer0", "layer1", "layer2", "layer1"] == seen, "with traces, and without"
    assert not any(errors.counts().values())
    others = [0, 2]
    for name in ("rows", "counts"):
        np.testing.assert_array_equal(getattr(arrays, name)[1], getattr(expected, name)[1])
        assert not getattr(arrays, name)[others].any()
    np.testing.assert_allclose(arrays.sums[1], expected.sums[1], rtol=1e-5, atol=1e-5)
    assert (arrays.window_max[others] == -np.inf).all()
    for mine, theirs in zip(traces, expected_traces, strict=True):
        for name in ("stats", "topk_mass", "mean_topk_mass", "span_mass"):
            np.testing.assert_allclose(
                getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, equal_nan=True, err_msg=name
            )


def test_without_a_compiler(step: Step, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """torch measures; it is counted, and the log says so."""
    expected = step.measured()

    def no_compiler() -> None:
        raise NativeError("no C++ compiler")

    monkeypatch.setattr(cpu_measurer, "native_kernel", no_compiler)
    monkeypatch.setattr(cpu_measurer, "NativeStep", None)
    logger = logging.getLogger("glassbox.tests")
    logger.addHandler(caplog.handler)
    try:
        arrays, traces, errors = step.measured()
    finally:
        logger.removeHandler(caplog.handler)
    assert {"kernel": 1} == errors.counts()
    assert "rows are measured by torch, which takes several times as long: no C++ compiler" in caplog.text
    assert_same((arrays, traces, expected[2]), expected)


def test_another_cache(step: Step) -> None:
    """A cache that vLLM has made anew is read where and as it is now."""
    accumulators = Accumulators(1, HEADS)
    measured = MeasuredLayers(accumulators, {"layer0": 0}, 4, 8)
    measurer = CpuMeasurer(measured, errors=ErrorCounter(logging.getLogger("t")))
    old = step.layers[0]
    spread = torch.full((16, KV_HEADS, BLOCK, 2 * D), torch.nan)
    spread[::2] = old["kv_cache"]
    maxima = []
    for cache in (old["kv_cache"], spread[::2]):
        measurer.begin(step.rows, StepLayers(frozenset({0}), frozenset({0})), None, None)
        measurer.after_attention(**{**old, "kv_cache": cache})
        measurer.finish()
        maxima.append(accumulators.copy())
    np.testing.assert_allclose(maxima[1].sums, 2 * maxima[0].sums, rtol=1e-12)


@pytest.mark.parametrize("native", [True, False])
def test_layers_in_turn(native: bool) -> None:
    """Beneath a real observer: each layer has the sample of every third step, the traced request all its rows; an edit
    holds from the next step on."""
    worker = ObservedWorker("cpu", native=native)
    whole, turns = (
        GlassboxConfig.model_validate({"sample_rate": 1.0, "sampling": {"layers_per_step": count}})
        for count in ("all", 1)
    )
    worker.observer._read_config = lambda: turns
    after = []
    for _ in range(6):
        worker.step()
        after.append(worker.rows())
    one = len(KEYS)
    assert [one, 0, 0] == sorted(after[0], reverse=True)
    assert [[one] * 3, [2 * one] * 3] == [after[2], after[5]]
    worker.observer._read_config = lambda: whole
    worker.step()
    assert [3 * one] * 3 == worker.rows()
    (trace,) = worker.requests.active()
    record = trace.record()
    assert list(range(KEYS[0], KEYS[0] + 7)) == record.positions.tolist()
    assert np.isfinite(record.stats[..., INDEX["max_logit"]]).all()
    assert not any(worker.errors.counts().values())
