"""Whatever fails in a step, and wherever: it is counted, nobody listens afterwards, and the next step begins clean."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from glassbox.adapter.attention.layer_view import PackedView
from glassbox.measure import cpu_measurer
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.native_sums import NativeSums
from glassbox.processes.worker import observer
from glassbox.processes.worker.traces.traced_step import TracedStep
from tests.integration.observed_worker import KEYS, LAYERS, ObservedWorker

pytestmark = pytest.mark.integration

# (owner, name) of what fails, and the stage that counts it.
Point = tuple[Any, str, str]
CPU: Final[dict[str, Point]] = {
    "metadata": (cpu_measurer.CpuMeasurer, "on_build", "choose_rows"),
    "questions": (TracedStep, "asked", "probe"),
    "view": (observer, "view_of", "observe"),
    "rows": (cpu_measurer, "NativeRows", "observe"),
    "native questions": (cpu_measurer, "NativeProbe", "probe"),
    "layer": (cpu_measurer.CachedLayer, "of", "observe"),
    "queries": (cpu_measurer.NativeStep, "take", "observe"),
    "kernel": (cpu_measurer.NativeStep, "measure", "observe"),
    "statistics of traces": (TracedStep, "add_stats", "end_step"),
    "answers": (TracedStep, "add_answers", "end_step"),
    "accumulators": (NativeSums, "add", "end_step"),
    "traces": (TracedStep, "commit", "end_step"),
}
TORCH: Final[dict[str, Point]] = {
    "plan": (cpu_measurer, "plan_rows", "observe"),
    "reader": (PackedView, "reader", "observe"),
    "rows of a layer": (cpu_measurer.LayerRows, "select", "observe"),
    "statistics": (cpu_measurer, "row_stats_cpu", "end_step"),
    "probe": (cpu_measurer, "row_probe_cpu", "probe"),
    "accumulators": (Accumulators, "add", "end_step"),
}


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def check(
    worker: ObservedWorker,
    monkeypatch: pytest.MonkeyPatch,
    point: Point,
    prepare: Callable[[], None],
    replacement: object = broken,
) -> None:
    """A good step, one that fails at a point, and a good one again."""
    owner, name, stage = point
    worker.step()
    assert worker.rows() == [len(KEYS)] * len(LAYERS)
    spent = worker.observer.counters.overhead_seconds
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        prepare()
        worker.step()
    before = worker.rows()
    assert set(worker.errors.counts()) == {stage}
    assert worker.listening[-1] is False
    assert worker.observer.counters.overhead_seconds > spent
    failed = KEYS[0] + 1
    worker.step()
    assert worker.rows() == [n + len(KEYS) for n in before], "all rows of the good step, and no stale one"
    positions = worker.traced_positions()
    assert {KEYS[0], KEYS[0] + 2} == set(positions) - {failed}
    counts = dict(worker.errors.counts())
    worker.step()
    assert worker.errors.counts() == counts


@pytest.mark.parametrize("point", CPU.values(), ids=CPU)
def test_native(monkeypatch: pytest.MonkeyPatch, point: Point) -> None:
    """The compiled kernel: at each stage of a measured step with a traced request."""
    worker = ObservedWorker("cpu")

    def forget_layers() -> None:
        worker.measurer._cached_layers.clear()

    check(worker, monkeypatch, point, forget_layers)


@pytest.mark.parametrize("point", TORCH.values(), ids=TORCH)
def test_torch(monkeypatch: pytest.MonkeyPatch, point: Point) -> None:
    """Where torch measures."""
    check(ObservedWorker("cpu", native=False), monkeypatch, point, lambda: None)


def test_one_layer_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose cache can't be read is an error in each step, and the only one without rows."""
    worker = ObservedWorker("cpu")
    of = cpu_measurer.CachedLayer.of

    def not_the_second(view: Any, *args: Any) -> Any:
        return broken() if view.name.split(".")[2] == "4" else of(view, *args)

    monkeypatch.setattr(cpu_measurer.CachedLayer, "of", not_the_second)
    worker.step()
    worker.step()
    assert worker.rows() == [2 * len(KEYS), 0, 2 * len(KEYS)]
    assert worker.errors.counts() == {"observe": 2}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "stage", "rows"), [("row_stats", "observe", 0), ("compile", "prompt", len(KEYS))], ids=["rows", "prompts"]
)
def test_gpu_warm_up(monkeypatch: pytest.MonkeyPatch, name: str, stage: str, rows: int) -> None:
    """A kernel that can't be launched while vLLM warms up is counted for each layer and not tried again: without that
    of its rows a layer is bypassed, without that of whole prompts its rows are measured."""
    from glassbox.measure import gpu_measurer

    with monkeypatch.context() as patch:
        patch.setattr({"compile": gpu_measurer.GpuPrompts}.get(name, gpu_measurer), name, broken)
        worker = ObservedWorker("cuda")
    assert {stage: len(LAYERS)} == worker.errors.counts()
    assert worker.observer.armed
    assert worker.listening[-1] is False
    worker.step()
    assert worker.rows() == [rows] * len(LAYERS)
    assert {stage: len(LAYERS)} == worker.errors.counts()


class BrokenRing:
    """Of a GPU's measurer: it fails when the row list is on its way to the device."""

    __getitem__ = broken


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("on_build", "choose_rows"),
        ("rotate", "choose_rows"),
        ("_ring", "choose_rows"),
        ("view_of", "observe"),
        ("row_stats", "observe"),
        ("record", "observe"),
        ("asked", "probe"),
        ("row_probe", "probe"),
        ("_collect", "end_step"),
        ("commit", "deferred"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, name: str, stage: str) -> None:
    """The measurer on a GPU: rows that were queued already are measured, and no replay after it measures any."""
    from glassbox.measure import gpu_measurer

    worker = ObservedWorker("cuda")
    measurer: Any = worker.measurer
    owners = {
        "on_build": gpu_measurer.GpuMeasurer,
        "rotate": Accumulators,
        "_ring": measurer,
        "view_of": observer,
        "record": gpu_measurer.GraphNodes,
        "asked": TracedStep,
        "_collect": gpu_measurer.GpuMeasurer,
        "commit": TracedStep,
    }
    point = (owners.get(name, gpu_measurer), name, stage)
    check(worker, monkeypatch, point, lambda: None, BrokenRing() if name == "_ring" else broken)
    assert not measurer._num_rows.any()
    assert not measurer._active
    assert not measurer._graphs.measuring
