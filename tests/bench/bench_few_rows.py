"""What a measured step adds on a GPU, over all layers of a model: each layer in line, or all in one launch at its end.

    python -m tests.bench.bench_few_rows --csv few_rows.csv --quick    # two minutes or so; needs no vLLM
    python -m tests.bench.bench_few_rows --csv few_rows.csv            # more grids and tilings

Tells from how many rows on a layer's own launch is the cheaper one (`DeviceNeeds.few_rows`). GPU time of replayed
graphs, in microseconds for the whole model, in turns: one that only reads each layer's keys and values as its attention
would, so that what the statistics read lies in L2 as far as it does in a forward pass, and the same with the statistics
of each layer behind it ("in line"), or with copies of the queries behind each layer and one launch behind all ("kept").
What the latter two take longer is `added_us`, from the medians, `low_us` and `high_us` from the quartiles. Beside them
what copying the bytes of the listed rows' K would take, and the bound of 1.25 times that + 60 us.

Before it is timed, each way must have added the same to the accumulators.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from glassbox.core import rows as row_list
from glassbox.kernels.cached_layers import ProbedLayers
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_keep import Compiled, row_keep
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, Tiling, row_stats, row_stats_layers
from tests.bench.bench_row_stats import PAGE, Row, copy_gb_s, write_csv
from tests.kernels.row_stats_cases import make_accumulators

ROUNDS = 41
# Of a row list, as is the default of `sampling.max_rows_per_step`.
MAX_ROWS = 256


@dataclass(frozen=True)
class Model:
    """Of which rows are measured."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int


EIGHT, HALF = Model("8B", 32, 32, 8, 128), Model("0.5B", 24, 14, 2, 64)
CASES = (
    *((EIGHT, *shape) for shape in ((1, 576), (4, 576), (16, 576), (64, 640), (256, 192), (16, 8224))),
    *((HALF, *shape) for shape in ((1, 576), (16, 576), (64, 640), (256, 192))),
)
ROOMS = (16, 64, 256)
TILINGS = [Tiling(keys, 4, stages) for keys, stages in ((64, 5), (64, 3), (64, 2), (128, 3), (32, 4))]


class Step:
    """Decode rows of a model: caches, queries and accumulators of all its layers.

    Args:
        model: it.
        batch, context: rows, and keys of each.
        device: of all.
    """

    def __init__(self, model: Model, batch: int, context: int, device: str = "cuda") -> None:
        self.model, self.batch, self.context, self.device = model, batch, context, device
        pages = -(-context // PAGE)
        shape = (model.layers, batch * pages, PAGE, model.kv_heads, 2 * model.head_size)
        self.kv = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for layer in self.kv:
            layer.normal_()
        self.keys = [layer.transpose(1, 2)[..., : model.head_size] for layer in self.kv]
        self.read = torch.empty(model.layers, shape[1], dtype=torch.bfloat16, device=device)
        self.q = torch.randn(model.layers, batch, model.heads, model.head_size, dtype=torch.bfloat16, device=device)
        self.table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
        self.rows = torch.zeros(MAX_ROWS, row_list.NUM_ROW_COLUMNS, dtype=torch.int32, device=device)
        index = torch.arange(batch, dtype=torch.int32)
        self.rows[:batch, row_list.ROW_QUERY] = self.rows[:batch, row_list.ROW_BATCH] = index.to(device)
        self.rows[:, row_list.ROW_PHASE], self.rows[:, row_list.ROW_SLOT] = row_list.ROW_DECODE, -1
        self.rows[:, row_list.ROW_PROMPT_LEN] = context // 2
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.num_rows = torch.tensor([batch], dtype=torch.int32, device=device)
        self.params = LayerParams(scale=model.head_size**-0.5)
        one = make_accumulators(model.heads, device)
        of_all = (torch.stack([part] * model.layers) for part in (one.counts, one.sums, one.rows, one.nonfinite))
        window = torch.stack([one.window_max] * model.layers, 1)
        self.added = LayerAccumulators(*of_all, window, one.window_slot, one.bounds)
        self.layers = ProbedLayers.of(self.keys, [self.params] * model.layers, model.heads)
        self.places = torch.arange(model.layers, dtype=torch.int32, device=device)
        self.queries = torch.empty(8, model.heads, model.head_size, dtype=torch.bfloat16, device=device)

    @property
    def key_bytes(self) -> int:
        """That a perfect kernel reads."""
        m = self.model
        return m.layers * self.batch * self.context * m.kv_heads * m.head_size * 2

    def workspace(self, per_sm: int) -> RowStatsWorkspace:
        on_gpu = self.device == "cuda"
        sms = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 2
        return RowStatsWorkspace(self.device, MAX_ROWS, self.model.heads, per_sm * sms)

    def attend(self, layer: int) -> None:
        """Read what attention reads of a layer, at a memory's pace."""
        torch.amax(self.kv[layer].flatten(1), 1, out=self.read[layer])

    def attention(self) -> None:
        """Of all layers, of which nothing is measured."""
        for layer in range(self.model.layers):
            self.attend(layer)

    def in_line(self, space: RowStatsWorkspace, tiling: Tiling | None = None) -> Callable[[], None]:
        """What a graph holds whose layers are measured one by one."""
        a = self.added

        def call() -> None:
            for layer, (q, keys) in enumerate(zip(self.q, self.keys, strict=True)):
                self.attend(layer)
                of_layer = LayerAccumulators(
                    a.counts[layer], a.sums[layer], a.rows[layer], a.nonfinite[layer], a.window_max[:, layer],
                    a.window_slot, a.bounds,
                )  # fmt: skip
                row_stats(
                    q, keys, self.table, self.starts, self.lens, self.rows, self.num_rows, self.params, of_layer,
                    space, queries=self.queries, tiling=tiling,
                )  # fmt: skip

        return call

    def kept(
        self, space: RowStatsWorkspace, room: int, tiling: Tiling | None = None, *, measured: bool = True
    ) -> Callable[[], None]:
        """Layers whose queries are copied, to where `room` rows fit; and, unless it is said, are measured together."""
        m, compiled = self.model, Compiled()
        kept = torch.zeros(room, m.layers, m.heads, m.head_size, dtype=torch.bfloat16, device=self.device)

        def call() -> None:
            for layer, (q, keys) in enumerate(zip(self.q, self.keys, strict=True)):
                self.attend(layer)
                row_keep(
                    q, self.rows, self.num_rows, kept[: self.batch, layer], like=keys, queries=self.queries,
                    compiled=compiled,
                )  # fmt: skip
            if measured:
                row_stats_layers(
                    kept, self.layers, self.places, self.table, self.starts, self.lens, self.rows, self.num_rows,
                    self.params, self.added, space, tiling=tiling,
                )  # fmt: skip

        return call

    def sums_of(self, call: Callable[[], None]) -> torch.Tensor:
        """[L, H, S] float64, that one call adds."""
        self.added.sums.zero_()
        self.added.rows.zero_()
        call()
        rows = self.added.rows[:, :, 1]
        if not (rows == self.batch).all():
            raise RuntimeError(f"each layer and head must have {self.batch} rows, got {rows.unique().tolist()}")
        return self.added.sums[:, :, 1].clone()


def ways_of(step: Step, *, quick: bool) -> list[tuple[Row, Callable[[], None]]]:
    """What is compared, by what it is; the first adds nothing."""
    room = next(room for room in ROOMS if room >= step.batch)
    two = step.workspace(2)
    ways: list[tuple[Row, Callable[[], None]]] = [
        ({"way": "attention"}, step.attention),
        ({"way": "in line", "programs_per_sm": 2}, step.in_line(two)),
        ({"way": "kept, not measured", "room": room}, step.kept(two, room, measured=False)),
        ({"way": "kept", "programs_per_sm": 2, "room": room}, step.kept(two, room)),
        ({"way": "kept", "programs_per_sm": 4, "room": room}, step.kept(step.workspace(4), room)),
    ]
    if room < MAX_ROWS:  # what it costs that more would have fitted
        ways.append(({"way": "kept", "programs_per_sm": 2, "room": MAX_ROWS}, step.kept(two, MAX_ROWS)))
    if not quick:
        for per_sm in (2, 3, 4):
            space = step.workspace(per_sm)
            for tiling in TILINGS:
                more: Row = {"programs_per_sm": per_sm, **asdict(tiling)}
                ways.append(({"way": "in line", **more}, step.in_line(space, tiling)))
                ways.append(({"way": "kept", "room": room, **more}, step.kept(space, room, tiling)))
    return ways


def check(step: Step, ways: list[tuple[Row, Callable[[], None]]]) -> None:
    """All that measure find the same; they are compiled afterwards.

    Raises:
        RuntimeError: they don't.
    """
    expected: torch.Tensor | None = None
    for what, call in ways:
        if str(what["way"]) not in ("in line", "kept"):
            call()
            continue
        sums = step.sums_of(call)
        expected = sums if expected is None else expected
        difference = float(((sums - expected).abs() / (1 + expected.abs())).max())
        if not difference < 1e-4:
            raise RuntimeError(f"{what} must add what the first way adds, got sums that are {difference:.1e} off")


def graph_of(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """That holds it once."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def times_us(graphs: list[torch.cuda.CUDAGraph]) -> list[list[float]]:
    """GPU times of the replays of each, in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for number in range(ROUNDS + 3):
        for graph, of_graph in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number >= 3:
                of_graph.append(begin.elapsed_time(end) * 1e3)
    return times


def measure(step: Step, copy: float, *, quick: bool) -> list[Row]:
    """All ways of one case."""
    copied_us = step.key_bytes / copy / 1e3
    case: Row = {"model": step.model.name, "batch": step.batch, "context": step.context}
    bounds: Row = {"bytes_us": round(copied_us, 1), "bound_us": round(1.25 * copied_us + 60, 1)}
    ways = ways_of(step, quick=quick)
    check(step, ways)
    plain, *others = times_us([graph_of(call) for _, call in ways])
    base = statistics.median(plain)
    result: list[Row] = [case | {"way": "attention", "time_us": round(base, 1)}]
    for (what, _), times in zip(ways[1:], others, strict=True):
        low, middle, high = (time_us - base for time_us in statistics.quantiles(times, n=4))
        added: Row = {"added_us": round(middle, 1), "low_us": round(low, 1), "high_us": round(high, 1)}
        result.append(case | what | {"time_us": round(middle + base, 1)} | added | bounds)
    for row in result:
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return result


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("few_rows.csv"))
    parser.add_argument("--quick", action="store_true", help="only the default tilings")
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    started, copy = time.perf_counter(), copy_gb_s()
    rows: list[Row] = []
    for case in CASES:
        rows += measure(Step(*case), copy, quick=args.quick)
        # After each case: what a run that is cut short has found is not lost.
        write_csv(args.csv, rows, args.commit)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
