"""CUDA graphs with statistics nodes: measured replays run them, all others are the graph as it would be without."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from glassbox.adapter.runner import is_piecewise_forward
from glassbox.core.errors import ErrorCounter

pytestmark = [pytest.mark.gpu, pytest.mark.integration]


class Captured:
    """A graph of x = (x + 1) * 2 + 3 with a node in between that counts its runs."""

    def __init__(self, nodes: Any, *, with_node: bool = True) -> None:
        import torch

        self.x = torch.zeros(8, device="cuda")
        self.runs = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._compute(nodes, with_node)  # once before the capture, to load the kernels
        self.x.zero_()
        self.runs.zero_()
        self.graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._compute(nodes, with_node)

    def _compute(self, nodes: Any, with_node: bool) -> None:
        import torch

        self.x.add_(1)
        if with_node:
            self.runs.add_(1)
            nodes.record(torch.cuda.current_stream())
            nodes.record_kept(3)
        self.x.mul_(2)
        self.x.add_(3)

    def num_nodes_and_edges(self) -> tuple[int, int]:
        """Of the graph that torch holds."""
        from cuda.bindings import runtime

        graph = runtime.cudaGraph_t(init_value=self.graph.raw_cuda_graph())
        _, _, nodes = runtime.cudaGraphGetNodes(graph)
        *_, edges = runtime.cudaGraphGetEdges(graph)
        return int(nodes), int(edges)


@pytest.fixture
def errors() -> ErrorCounter:
    return ErrorCounter(logging.getLogger("test"))


@pytest.fixture
def nodes(errors: ErrorCounter) -> Iterator[Any]:
    """Graphs made in the test are watched."""
    from glassbox.measure.graph_nodes import GraphNodes

    made = GraphNodes(errors, is_piecewise_forward)
    made.watch()
    yield made
    made.unwatch()


def expected_x(replays: int) -> float:
    x = 0.0
    for _ in range(replays):
        x = (x + 1) * 2 + 3
    return x


REPLAYS = (False, True, False, True, True, False)


def replay(captured: Captured, nodes: Any) -> None:
    """Six replays, three of them measured."""
    for measuring in REPLAYS:
        nodes.measuring = measuring
        captured.graph.replay()


def test_measured_replays_run_the_nodes_and_others_do_not(nodes: Any, errors: ErrorCounter) -> None:
    """The computation is the same in both."""
    captured = Captured(nodes)
    replay(captured, nodes)
    assert captured.runs.item() == 3
    assert nodes.kept == {3}
    assert captured.x.tolist() == [expected_x(len(REPLAYS))] * 8
    assert errors.counts() == {}


def test_the_graph_of_other_steps_is_the_one_without_nodes(nodes: Any) -> None:
    """As many nodes as the same computation captured without any, and one after the other as there."""
    assert Captured(nodes).num_nodes_and_edges() == (3, 2)
    assert Captured(nodes, with_node=False).num_nodes_and_edges() == (3, 2)


def test_reset_ends_both_executables(nodes: Any, errors: ErrorCounter) -> None:
    """And a graph that is dropped without a reset ends them, too."""
    captured = Captured(nodes)
    captured.graph.reset()
    assert captured.graph.measured is None
    dropped = Captured(nodes)
    finalizer = dropped.graph._destroy
    assert finalizer.alive
    del dropped
    assert not finalizer.alive
    assert errors.counts() == {}


@pytest.mark.parametrize(
    "failing", ["cudaGraphInstantiate", "cudaGraphAddDependencies", "cudaGraphDestroyNode", "cudaGraphLaunch"]
)
def test_a_failure_is_counted_and_the_computation_goes_on(
    nodes: Any, errors: ErrorCounter, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The tokens never depend on it; a launch that fails loses what it would have measured."""
    call = nodes._call

    def broken(name: str, *args: Any) -> Any:
        if name == failing:
            raise RuntimeError(f"{name} failed: on purpose")
        return call(name, *args)

    monkeypatch.setattr(nodes, "_call", broken)
    captured = Captured(nodes)
    replay(captured, nodes)
    assert captured.x.tolist() == [expected_x(len(REPLAYS))] * 8
    assert errors.counts() == {"graph_nodes": 1}
    # Without its own executable the graph has the node in every replay; with it, only that executable has.
    assert captured.runs.item() == (0 if failing == "cudaGraphLaunch" else len(REPLAYS))
    assert nodes.kept == (set() if failing == "cudaGraphLaunch" else {3})


def test_a_graph_without_statistics_is_left_alone(nodes: Any, errors: ErrorCounter) -> None:
    """Nothing of its own is kept for it."""
    captured = Captured(nodes, with_node=False)
    replay(captured, nodes)
    assert captured.graph.measured is None
    assert captured.x.tolist() == [expected_x(len(REPLAYS))] * 8
    assert errors.counts() == {}


def test_the_class_can_stand_in_annotations(nodes: Any) -> None:
    """Modules that are imported while graphs are watched say `CUDAGraph | None`."""
    import torch

    assert issubclass(torch.cuda.CUDAGraph, torch.cuda.graphs.CUDAGraph)
    assert torch.cuda.CUDAGraph | None
