"""Two executables of each captured CUDA graph: one for steps that are measured, one for all others.

A node that only reads "no rows" and returns costs 0.8 to 2 us a layer on an H200 (docs/performance.md). So a graph
captured while the plugin watches is instantiated as it was captured, for measured steps, and then its statistics nodes
are taken out, which leaves the graph that vLLM would have captured: torch instantiates and replays that one. Where
CUDA's Python bindings are missing, or anything of this fails, torch's graph keeps its statistics nodes, and an empty
row list makes them return at once.
"""

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch

from glassbox.core.errors import ErrorCounter
from glassbox.core.start_parts import StartParts

# As torch instantiates: memory that a graph allocates and does not free is freed at its next launch.
_AUTO_FREE_ON_LAUNCH: Final = 1
# More than the neighbours that any node of a forward pass has.
_MAX_NEIGHBOURS: Final = 64


class GraphNodes:
    """The statistics nodes of this process's graphs.

    Attributes:
        measuring: whether the next replays are to measure; set by the step.
        kept: layers whose rows the replays since `measuring` was set have kept, see `kept_rows.py`.

    Args:
        errors: counts graphs that keep their nodes.
        is_piecewise: whether a forward pass runs that is captured, or replayed, in pieces around the attention.
        start: is told what the second executables cost.
    """

    def __init__(self, errors: ErrorCounter, is_piecewise: Callable[[], bool], start: StartParts | None = None) -> None:
        self.measuring = False
        self.kept: set[int] = set()
        self._errors, self._is_piecewise = errors, is_piecewise
        self._start = StartParts() if start is None else start
        self._capturing: Any = None
        self._restore: Callable[[], None] | None = None
        try:
            from cuda.bindings import runtime

            self._runtime: Any = runtime
        except ImportError as error:
            self._runtime = None
            errors.count("graph_nodes", error)

    def watch(self) -> None:
        """From now on, graphs get two executables."""
        if self._runtime is None or self._restore is not None:
            return
        original = torch.cuda.CUDAGraph

        def restore() -> None:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]

        # A class in its place: modules imported meanwhile use the name in annotations.
        torch.cuda.CUDAGraph = _split_graph(original, self, self._is_piecewise)  # type: ignore[misc]
        self._restore = restore

    def unwatch(self) -> None:
        """Graphs are made as before; those made meanwhile keep both executables."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def record(self, stream: torch.cuda.Stream) -> None:
        """Note the node that was launched last on `stream`, if that is being captured into a watched graph."""
        if self._capturing is None:
            return
        status, _, _, dependencies, _, count = self._call("cudaStreamGetCaptureInfo", stream.cuda_stream)
        if status == self._runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
            self._capturing.nodes.extend(dependencies[:count])

    @property
    def capturing(self) -> bool:
        """Whether a watched graph is being captured."""
        return self._capturing is not None

    def record_kept(self, local: int) -> None:
        """Note that the graph that is being captured keeps the rows of a layer."""
        if self._capturing is not None:
            self._capturing.kept.add(local)

    def begin_capture(self, graph: Any) -> None:
        """`graph` is being captured."""
        self._capturing = graph

    def drop_capture(self, graph: Any) -> None:
        """The capture of `graph` has failed."""
        if self._capturing is graph:
            self._capturing = None

    def end_capture(self, graph: Any) -> None:
        """`graph` is complete: make both executables."""
        self._capturing = None
        if graph.nodes:
            try:
                with self._start.timed("graphs"):
                    self._split(graph)
            except Exception as error:
                self._errors.count("graph_nodes", error)
        graph.instantiate()

    def launch_measured(self, graph: Any) -> bool:
        """Queue the executable with statistics nodes on the current stream; False if that is not possible."""
        try:
            self._call("cudaGraphLaunch", graph.measured, torch.cuda.current_stream().cuda_stream)
        except Exception as error:
            graph.measured = None
            # torch's executable, which runs instead, has no statistics nodes.
            graph.kept.clear()
            self._errors.count("graph_nodes", error)
            return False
        return True

    def _split(self, graph: Any) -> None:
        (executable,) = self._call("cudaGraphInstantiate", graph.raw_cuda_graph(), _AUTO_FREE_ON_LAUNCH)
        # Complete, whatever becomes of the nodes below.
        graph.keep_measured(executable, lambda: self._call("cudaGraphExecDestroy", executable))
        while graph.nodes:
            self._take_out(graph.raw_cuda_graph(), graph.nodes[-1])
            graph.nodes.pop()

    def _take_out(self, graph: int, node: Any) -> None:
        """Remove a node; what came after it comes after what was before it."""
        before, _ = self._neighbours("cudaGraphNodeGetDependencies", node)
        after, edges = self._neighbours("cudaGraphNodeGetDependentNodes", node)
        raw = self._runtime.cudaGraph_t(init_value=graph)
        for earlier in before:
            there = {int(later) for later in self._neighbours("cudaGraphNodeGetDependentNodes", earlier)[0]}
            for later, edge in zip(after, edges, strict=True):
                if int(later) not in there:
                    self._call("cudaGraphAddDependencies", raw, [earlier], [later], [edge], 1)
        self._call("cudaGraphDestroyNode", node)

    def _neighbours(self, name: str, node: Any) -> tuple[list[Any], list[Any]]:
        nodes, edges, count = self._call(name, node, _MAX_NEIGHBOURS)
        if count >= _MAX_NEIGHBOURS:
            raise RuntimeError(f"a statistics node must have fewer than {_MAX_NEIGHBOURS} neighbours, got {count}")
        return nodes[:count], edges[:count]

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        status, *results = getattr(self._runtime, name)(*args)
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} failed: {status.name}")
        return tuple(results)


def _split_graph(base: Any, owner: GraphNodes, is_piecewise: Callable[[], bool]) -> Any:
    """A CUDAGraph class that tells `owner` about its captures and replays the executable that the step needs."""

    class SplitGraph(base):
        def __new__(cls, keep_graph: bool = False) -> Any:
            # From torch 2.14 on this is where the choice is stored by which `capture_end` instantiates.
            return super().__new__(cls, keep_graph or not is_piecewise())

        def __init__(self, keep_graph: bool = False) -> None:
            # The pieces of a piecewise graph hold no attention: hundreds of templates would be kept for nothing.
            watched = not keep_graph and not is_piecewise()
            super().__init__(keep_graph or watched)
            self.watched = watched
            self.nodes: list[Any] = []
            self.kept: set[int] = set()
            self.measured: Any = None
            self._destroy: Callable[[], Any] | None = None

        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            super().capture_begin(*args, **kwargs)
            if self.watched:
                owner.begin_capture(self)

        def capture_end(self) -> None:
            try:
                super().capture_end()
            except BaseException:
                owner.drop_capture(self)
                raise
            if self.watched:
                owner.end_capture(self)

        def keep_measured(self, executable: Any, destroy: Callable[[], Any]) -> None:
            self.measured = executable
            finalizer = self._destroy = weakref.finalize(self, destroy)
            finalizer.atexit = False  # CUDA may be gone before

        def replay(self) -> None:
            # torch's replay also moves on random generators; attention, and so a graph of a forward pass, has none.
            if not (owner.measuring and self.measured is not None and owner.launch_measured(self)):
                super().replay()
            if owner.measuring:
                owner.kept |= self.kept

        def reset(self) -> None:
            if self._destroy is not None:
                self._destroy()
            self.measured = self._destroy = None
            self.kept.clear()
            super().reset()

    return SplitGraph
