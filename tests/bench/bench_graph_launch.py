"""What launching a CUDA graph costs after another executable of it, with a node per layer more, was launched.

    python tests/bench/bench_graph_launch.py --csv graph_launch.csv

A graph of small kernels stands for a decode step. It is captured with one more kernel per layer, on a forked branch or
in line, instantiated so (`measured`), and once more without those kernels (`straight`), as
`glassbox/backends/graph_nodes.py` does it. Timed are launches of `straight` on an idle GPU, by CUDA events around them
and on the host: before any launch of `measured`, after a number of them, and after a pause. Needs torch and CUDA's
Python bindings, no vLLM.
"""

import argparse
import csv
import statistics
import time
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
        self._step(record=False)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph):
            self._step(record=True)
        self.measured = None
        if self.nodes:
            (self.measured,) = call("cudaGraphInstantiate", self.graph.raw_cuda_graph(), 1)
            for node in self.nodes:
                call("cudaGraphDestroyNode", node)
        self.graph.instantiate()

    def _step(self, record: bool) -> None:
        main = torch.cuda.current_stream()
        for _ in range(LAYERS):
            self.x.add_(1)
            if self.shape == "forked":
                self.side.wait_stream(main)
                with torch.cuda.stream(self.side):
                    self.count.add_(1)
            elif self.shape == "in line":
                self.count.add_(1)
            if record and self.shape != "none":
                stream = self.side if self.shape == "forked" else main
                _, _, _, dependencies, _, count = call("cudaStreamGetCaptureInfo", stream.cuda_stream)
                self.nodes += dependencies[:count]
            self.x.mul_(0.5)
            if self.shape == "forked":
                main.wait_stream(self.side)
            for _ in range(KERNELS_PER_LAYER - 2):
                self.x.add_(1)

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
        launched = 0
        steps: list[tuple[str, int, float]] = [("before", 0, 0.0)]
        steps += [(f"after {n} measured", n, 0.0) for n in (1, 10, 100, 1000)]
        steps += [(f"after a pause of {pause:g} s", 0, pause) for pause in args.pauses_s]
        for when, times, pause in steps:
            graphs.launch_measured(times - min(launched, times) if times else 0)
            launched = max(launched, times)
            time.sleep(pause)
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
