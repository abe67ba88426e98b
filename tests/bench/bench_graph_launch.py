"""What launching a CUDA graph costs after another executable of it, with a node per layer more, was launched.

    python tests/bench/bench_graph_launch.py --csv graph_launch.csv

A graph of small kernels stands for a decode step. It has a second executable with one more kernel per layer
(`measured`): on a forked branch, made from one capture as `glassbox/backends/graph_nodes.py` does it; or in line, from
a capture of its own. Timed are launches of the straight executable on an idle GPU, by CUDA events around them and on
the host: before any launch of `measured`, after a number of them, after a kernel on a second stream, after an upload of
the straight one, and after a pause. Needs torch and CUDA's Python bindings, no vLLM.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from cuda.bindings import runtime

LAYERS: Final = 32
KERNELS_PER_LAYER: Final = 12
LAUNCHES: Final = 200


def call(name: str, *args: Any) -> list[Any]:
    """A runtime function that must succeed."""
    status, *results = getattr(runtime, name)(*args)
    if status != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{name} failed: {status.name}")
    return results


class Graphs:
    """A captured step with its two executables.

    Args:
        shape: `forked` or `in line`, where the further kernel of each layer is; `none` has none.
    """

    def __init__(self, shape: str) -> None:
        self.shape = shape
        self.x = torch.zeros(1 << 16, device="cuda")
        self.count = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.side = torch.cuda.Stream()
        self.nodes: list[Any] = []
        self._step(shape)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph):
            self._step("forked" if shape == "forked" else "none")
        self.measured = self.extended = None
        if shape == "in line":
            self.extended = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(self.extended):
                self._step(shape)
            (self.measured,) = call("cudaGraphInstantiate", self.extended.raw_cuda_graph(), 1)
        elif shape == "forked":
            (self.measured,) = call("cudaGraphInstantiate", self.graph.raw_cuda_graph(), 1)
            for node in self.nodes:
                call("cudaGraphDestroyNode", node)
        self.graph.instantiate()

    def _step(self, shape: str) -> None:
        main = torch.cuda.current_stream()
        for _ in range(LAYERS):
            self.x.add_(1)
            if shape == "forked":
                self.side.wait_stream(main)
                with torch.cuda.stream(self.side):
                    self.count.add_(1)
                if torch.cuda.is_current_stream_capturing():
                    _, _, _, dependencies, _, count = call("cudaStreamGetCaptureInfo", self.side.cuda_stream)
                    self.nodes += dependencies[:count]
            elif shape == "in line":
                self.count.add_(1)
            self.x.mul_(0.5)
            if shape == "forked":
                main.wait_stream(self.side)
            for _ in range(KERNELS_PER_LAYER - 2):
                self.x.add_(1)

    def launch_aside(self) -> None:
        """A kernel on the second stream, joined."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.count.add_(1)
        torch.cuda.current_stream().wait_stream(self.side)
        torch.cuda.synchronize()

    def upload(self) -> None:
        """Upload the straight executable."""
        executable = runtime.cudaGraphExec_t(init_value=self.graph.raw_cuda_graph_exec())
        call("cudaGraphUpload", executable, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    def launch_measured(self, times: int) -> None:
        """Launch the executable with the further kernels, if there is one, else the other."""
        stream = torch.cuda.current_stream()
        for _ in range(times):
            if self.measured is None:
                self.graph.replay()
            else:
                call("cudaGraphLaunch", self.measured, stream.cuda_stream)
            torch.cuda.synchronize()

    def time_straight(self) -> tuple[float, float]:
        """Median microseconds of a launch on an idle GPU: by events, and on the host."""
        by_events, on_host = [], []
        for _ in range(LAUNCHES):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            before.record()
            began = time.perf_counter()
            self.graph.replay()
            on_host.append((time.perf_counter() - began) * 1e6)
            after.record()
            torch.cuda.synchronize()
            by_events.append(before.elapsed_time(after) * 1e3)
        return statistics.median(by_events), statistics.median(on_host)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("graph_launch.csv"))
    parser.add_argument("--pauses-s", type=float, nargs="*", default=[1.0, 5.0])
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    rows = []
    for shape in ("none", "forked", "in line"):
        graphs = Graphs(shape)
        steps: list[tuple[str, Callable[[], None]]] = [
            ("before", lambda: None),
            ("after a kernel aside", graphs.launch_aside),
            *[(f"after {n} measured", partial(graphs.launch_measured, n)) for n in (1, 10, 100, 1000)],
            ("again", lambda: None),
            ("after an upload", graphs.upload),
            *[(f"after a pause of {pause:g} s", partial(time.sleep, pause)) for pause in args.pauses_s],
        ]
        for when, prepare in steps:
            prepare()
            by_events, on_host = graphs.time_straight()
            rows.append([shape, when, f"{by_events:.1f}", f"{on_host:.1f}"])
            print(f"{shape:8} {when:24} by events {by_events:8.1f} us   host {on_host:7.1f} us", flush=True)
    with args.csv.open("w", newline="") as file:
        file.write(
            f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
            f"commit {args.commit}\n# command: python tests/bench/bench_graph_launch.py\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measured_nodes", "when", "events_us", "host_us"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
