"""Switching the statistics nodes of captured CUDA graphs on and off between replays.

A node that only reads "no rows" and returns costs 0.8 to 2 us a layer on an H200, forked or in line; a forked node that
is disabled costs nothing that could be measured (docs/performance.md). So graphs captured while the plugin watches are
instantiated with their statistics nodes disabled, and the first replay of a sampled step enables them
(cudaGraphNodeSetEnabled, which needs the graph that was captured to be kept). Where CUDA's Python bindings are missing,
nodes stay enabled and an empty row list makes them return at once.
"""

from collections.abc import Callable
from typing import Any

import torch

from glassbox import vllm_compat
from glassbox.errors import ErrorCounter


class GraphNodes:
    """The statistics nodes of this process's graphs.

    Attributes:
        measuring: whether the next replays are to measure; set by the step.
    """

    def __init__(self, errors: ErrorCounter) -> None:
        self.measuring = False
        self._errors = errors
        self._capturing: Any = None
        self._restore: Callable[[], None] | None = None
        try:
            from cuda.bindings import runtime

            self._runtime: Any = runtime
        except ImportError as error:
            self._runtime = None
            errors.count("graph_nodes", error)

    def watch(self) -> None:
        """From now on, graphs are made such that their nodes can be switched."""
        if self._runtime is None or self._restore is not None:
            return
        original = torch.cuda.CUDAGraph
        switchable = _switchable_graph(original, self)

        def make(keep_graph: bool = False) -> Any:
            # The pieces of a piecewise graph hold no attention: hundreds of templates would be kept for nothing.
            if keep_graph or vllm_compat.is_piecewise_forward():
                return original(keep_graph)
            return switchable(True)

        def restore() -> None:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]

        torch.cuda.CUDAGraph = make  # type: ignore[misc, assignment]
        self._restore = restore

    def unwatch(self) -> None:
        """Graphs are made as before; those made meanwhile stay switchable."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def record(self, stream: torch.cuda.Stream) -> None:
        """Note the node that was launched last on `stream`, if that is being captured into a switchable graph."""
        if self._capturing is None:
            return
        status, _, _, dependencies, _, count = self._call("cudaStreamGetCaptureInfo", stream.cuda_stream)
        if status == self._runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
            self._capturing.nodes.extend(dependencies[:count])

    def begin_capture(self, graph: Any) -> None:
        """`graph` is being captured."""
        self._capturing = graph

    def end_capture(self, graph: Any) -> None:
        """`graph` is complete: instantiate it with its nodes disabled."""
        self._capturing = None
        graph.instantiate()
        graph.enabled = True
        self._switch(graph, False)

    def before_replay(self, graph: Any) -> None:
        """Bring the nodes of `graph` into the state that this step needs."""
        if graph.enabled != self.measuring and graph.nodes:
            self._switch(graph, self.measuring)

    def _switch(self, graph: Any, enabled: bool) -> None:
        try:
            executable = graph.raw_cuda_graph_exec()
            for node in graph.nodes:
                self._call("cudaGraphNodeSetEnabled", executable, node, int(enabled))
        except Exception as error:
            self._errors.count("graph_nodes", error)
        # Also after an error: trying again at each replay would cost more than the wrong state does.
        graph.enabled = enabled

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        status, *results = getattr(self._runtime, name)(*args)
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} failed: {status.name}")
        return tuple(results)


def _switchable_graph(base: Any, owner: GraphNodes) -> Any:
    """A CUDAGraph class that tells `owner` about its captures and replays."""

    class SwitchableGraph(base):
        def __init__(self, keep_graph: bool) -> None:
            super().__init__(keep_graph)
            self.nodes: list[Any] = []
            self.enabled = True

        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            super().capture_begin(*args, **kwargs)
            owner.begin_capture(self)

        def capture_end(self) -> None:
            super().capture_end()
            owner.end_capture(self)

        def replay(self) -> None:
            owner.before_replay(self)
            super().replay()

    return SwitchableGraph
