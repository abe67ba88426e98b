"""How the cost of each part of glassbox grows with the model, the traffic and the server.

    python -m tests.bench.bench_growth [--only step --only page] [--rounds 5] [--csv docs/data/growth_cpu.csv]

A case is one part and one dimension: the part (tests/growth.py) is run at some sizes of it, all else as it was, and
timed in CPU time. Its exponent is the slope of log time over log size between the three largest sizes; of the rounds
the middle one, the lowest and the highest. 1 is linear; what outgrows a cache on its way there shows a little more. At
the end (--only large) stands what a model of 126 layers of 128 heads costs, with the memory of processes of their own.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from starlette.datastructures import QueryParams

from glassbox.config.load import GlassboxConfig
from glassbox.core.accumulator_arrays import ARRAY
from glassbox.export.families import build_families
from glassbox.export.family_source import FamilySource
from glassbox.export.page import render, text
from glassbox.export.prometheus import PrometheusCollector
from glassbox.store.merge import Detail, merge
from glassbox.store.metrics_page import FORMATS, write_page
from glassbox.store.snapshot import SnapshotReader, write_snapshot
from glassbox.web.live_snapshot import snapshot_answer
from glassbox.web.matrices import between
from glassbox.web.selection import parse_snapshot, parse_stream
from glassbox.web.stream import Feed, Moment
from tests.bench.bench_row_stats_cpu import revision, write_csv
from tests.export_samples import changed
from tests.growth import (
    CONFIG,
    Action,
    accumulate,
    accumulators_of,
    copy,
    families,
    frame,
    merged,
    own_port,
    page,
    ranks_of,
    read,
    row_list,
    scrape,
    snapshot_json,
    snapshot_of,
    step,
    trace_list,
    trace_merge,
    trace_read,
    trace_write,
    tracker,
    write,
)

ROOT: Final = Path(__file__).resolve().parents[2]
LARGE: Final = (126, 128)
# Of the fit: the largest sizes of a case, where fixed costs no longer hide how it grows.
FITTED: Final = 3
# CPU seconds of one sample, and of all samples of a size in a round.
SAMPLE_S: Final = 0.004
BUDGET_S: Final = 0.12

# Takes a size and where to put what is to be closed afterwards.
Make = Callable[[int, ExitStack], Action]


@dataclass(frozen=True)
class Case:
    """One part and one dimension.

    Attributes:
        base: what the other dimensions are.
    """

    part: str
    dimension: str
    sizes: tuple[int, ...]
    base: str
    make: Make


def grown(make: Callable[..., Action], dimension: str, *more: Any, **base: int) -> Make:
    return lambda size, stack: make(stack, *more, **{**base, dimension: size})


def _cases() -> Iterator[Case]:
    """All of them; sizes are powers of two, so that the slope between neighbours can be seen."""

    def of(
        part: str, make: Callable[..., Action], base: str, *more: Any, **dimensions: tuple[int, ...]
    ) -> Iterator[Case]:
        for dimension, sizes in dimensions.items():
            yield Case(part, dimension, sizes, base, grown(make, dimension, *more))

    layers, heads = (8, 16, 32, 64, 128), (8, 16, 32, 64, 128)
    yield from of(
        "step", step, "16 layers, 16 heads, 16 rows, 512 keys", layers=layers, heads=heads,
        rows=(8, 16, 32, 64, 128), context=(128, 256, 512, 1024, 2048, 4096),
    )  # fmt: skip
    yield from of(
        "row list", row_list, "256 requests, 256 rows, 1024 tokens", requests=(64, 128, 256, 512, 1024, 2048),
        rows=(64, 128, 256, 512, 1024), context=(1024, 4096, 16384, 65536),
    )  # fmt: skip
    yield from of(
        "accumulate", accumulate, "32 layers, 32 heads, 32 rows", layers=layers, heads=heads,
        rows=(8, 16, 32, 64, 128), adapters=(1, 2, 4, 8, 16, 32),
    )  # fmt: skip
    yield from of("snapshot copy", copy, "32 layers, 32 heads", layers=layers, heads=heads)
    yield from of("snapshot write", write, "32 layers, 32 heads", layers=layers, heads=heads)
    yield from of("snapshot read", read, "32 layers, 32 heads", layers=layers, heads=heads, ranks=(1, 2, 4, 8, 16))
    yield from of(
        "merge", merged, "32 layers, 32 heads", layers=layers, heads=heads, ranks=(1, 2, 4, 8, 16, 32),
        engines=(1, 2, 4, 8, 16),
    )  # fmt: skip
    for detail in ("model", "layer", "head"):
        sizes = {"layers": layers, "heads": heads, "engines": (1, 2, 4, 8)}
        yield from of(f"families, {detail}", families, "16 layers, 16 heads", detail, **sizes)
        yield from of(f"page, {detail}", page, "16 layers, 16 heads", detail, **sizes)
    for format in FORMATS:
        name = f"own port, {format}"
        yield from of(name, own_port, "16 layers, 16 heads", format, layers=layers, heads=heads, engines=(1, 2, 4, 8))
    yield from of("scrape", scrape, "16 layers, 16 heads", layers=layers, heads=heads)
    yield from of("live page, frame", frame, "32 layers, 32 heads", layers=layers, heads=heads)
    yield from of("live page, all", snapshot_json, "32 layers, 32 heads", layers=layers, heads=heads)
    yield from of(
        "trace step",
        tracker,
        "64 requests, 4 layers, 4 heads",
        requests=(16, 32, 64, 128, 256, 512),
        layers=layers,
        heads=heads,
    )
    rows = (32, 64, 128, 256, 512)
    yield from of("trace write", trace_write, "16 layers, 16 heads, 64 rows", layers=layers, heads=heads, rows=rows)
    yield from of("trace read", trace_read, "16 layers, 16 heads, 64 rows", layers=layers, heads=heads, rows=rows)
    yield from of("trace merge", trace_merge, "16 layers, 64 heads, 64 rows", ranks=(1, 2, 4, 8, 16), rows=rows)
    yield from of("trace list", trace_list, "", traces=(64, 128, 256, 512))


CASES: Final = tuple(_cases())


def cpu_s(action: Action, budget_s: float = BUDGET_S) -> float:
    """The least CPU time of a run; other work on the machine can only add to it."""
    times: list[float] = []
    begun, number = time.process_time(), 1
    while len(times) < 3 or (time.process_time() - begun < budget_s and len(times) < 50):
        before = time.process_time()
        for _ in range(number):
            action()
        took = time.process_time() - before
        if not times and took < SAMPLE_S and number < 1000:
            number *= max(2, math.ceil(SAMPLE_S / max(took, 1e-6)))
            continue
        times.append(took / number)
        if took > budget_s and len(times) >= 2:
            break
    return min(times)


@dataclass(frozen=True)
class Grown:
    """What was found of a case.

    Attributes:
        seconds: of each size, the least of all rounds; sizes_bytes: that it made, 0 if it makes none.
        exponents: of each round.
    """

    case: Case
    seconds: tuple[float, ...]
    made: tuple[int, ...]
    exponents: tuple[float, ...]

    @property
    def exponent(self) -> float:
        return statistics.median(self.exponents)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log time over log size between the largest sizes, least squares."""
    x, y = np.log(sizes[-FITTED:]), np.log(seconds[-FITTED:])
    return float(np.polyfit(x, y, 1)[0])


def measure(case: Case, rounds: int) -> Grown:
    with ExitStack() as stack:
        actions = [case.make(size, stack) for size in case.sizes]
        made = [action() for action in actions]
        gc.collect()
        gc.freeze()
        try:
            found = [[cpu_s(action) for action in actions] for _ in range(rounds)]
        finally:
            gc.unfreeze()
    return Grown(
        case,
        tuple(min(of_size) for of_size in zip(*found, strict=True)),
        tuple(one if isinstance(one, int) else 0 for one in made),
        tuple(exponent(case.sizes, of_round) for of_round in found),
    )


# The large end, each in a process of its own, so that its peak of memory is its own


def resident_mb(name: str) -> float:
    """VmRSS, or VmHWM, its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1000


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def large_worker(run_dir: Path) -> Iterator[tuple[str, Action]]:
    layers, heads = LARGE
    accumulators = accumulators_of(layers, heads)
    yield "snapshot copy", accumulators.copy
    arrays = accumulators.copy()
    snapshot = replace(snapshot_of(layers, heads), **{name: getattr(arrays, name) for name in ARRAY})
    yield "snapshot write", lambda: write_snapshot(run_dir, snapshot).stat().st_size


def large_exporter(run_dir: Path, detail: Detail, ranks: int) -> Iterator[tuple[str, Action]]:
    settings = {"export": {"prometheus": {"detail": detail, "max_series": 10_000_000}}}
    config = GlassboxConfig.model_validate(settings)
    yield f"snapshot read, {ranks} ranks", lambda: SnapshotReader(run_dir, named=True).read()
    found = SnapshotReader(run_dir, named=True).read()
    yield f"merge, {ranks} ranks", lambda: merge(found)
    source = FamilySource(run_dir, lambda: config)
    engines = source.merged().engines
    yield f"families, {detail}", lambda: build_families(engines, detail)
    shown = source.view().families

    def written() -> int:
        write_page(run_dir, render(shown), 1.0)
        return (run_dir / "metrics.page").stat().st_size

    yield f"page, {detail}", written
    collector = PrometheusCollector(source)
    for format in FORMATS:
        yield f"own port, {format}, {detail}", partial(_length, collector, format)


def _length(collector: PrometheusCollector, format: Any) -> int:
    return sum(map(len, text([collector.shown()], format)))


def large_live_page(run_dir: Path) -> Iterator[tuple[str, Action]]:
    source = FamilySource(run_dir, lambda: CONFIG)
    (old,) = source.merged().engines
    new = changed(old, time_s=old.time_s + 5, **{name: 2 * getattr(old, name) for name in ("counts", "rows", "sums")})
    numbers, feed, selection = iter(range(1 << 30)), Feed(source), parse_stream(QueryParams(""))
    yield "live page, frame", lambda: len(feed.frame(Moment(next(numbers), (new,), (between(old, new),)), selection))
    yield "live page, all", lambda: len(snapshot_answer(source, parse_snapshot(QueryParams(""))))


def large(name: str, run_dir: Path) -> list[dict[str, Any]]:
    """What each of a process's actions costs at 126 layers of 128 heads; the peak of memory is above what was
    loaded before."""
    found = []
    parts: dict[str, Callable[[], Iterator[tuple[str, Action]]]] = {
        "worker": lambda: large_worker(run_dir),
        "live page": lambda: large_live_page(run_dir),
        **{
            f"exporter, {detail}, {ranks}": partial(large_exporter, run_dir, detail, ranks)  # type: ignore[arg-type]
            for detail, ranks in LARGE_EXPORTERS
        },
    }
    before = resident_mb("VmRSS")
    for part, action in parts[name]():
        forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        made = action()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resident_mb("VmHWM")
        cpu = min(cpu, cpu_s(action))
        found.append({
            "part": part, "seconds": cpu, "wall_s": wall, "bytes": made if isinstance(made, int) else 0,
            "peak_mb": peak - before,
        })  # fmt: skip
    return found


LARGE_EXPORTERS: Final = (("model", 1), ("layer", 1), ("head", 1), ("head", 8), ("head", 16))


def measure_large() -> Iterator[dict[str, Any]]:
    layers, heads = LARGE
    names = ["worker", "live page", *(f"exporter, {detail}, {ranks}" for detail, ranks in LARGE_EXPORTERS)]
    for name in names:
        with tempfile.TemporaryDirectory(prefix="glassbox-growth-") as directory:
            ranks = int(name.rpartition(", ")[2]) if "exporter" in name else 1
            for snapshot in ranks_of(layers, heads, ranks):
                write_snapshot(Path(directory), snapshot)
            command = [sys.executable, "-m", "tests.bench.bench_growth", "--large", name, "--run-dir", directory]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for row in json.loads(done.stdout):
            yield {"process": name, **row}


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, print the table, and write every point of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="parts whose names begin so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--large", help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.large is not None:
        print(json.dumps(large(options.large, options.run_dir)))
        return
    wanted = tuple(options.only) or ("",)
    lines = []
    print(f"{'part':<22}{'over':<10}{'sizes':>12}{'CPU ms':>20}{'exponent':>10}  lowest, highest")
    for case in CASES:
        if not case.part.startswith(wanted):
            continue
        found = measure(case, options.rounds)
        low, high = min(found.exponents), max(found.exponents)
        ends = f"{1000 * found.seconds[0]:.2f} .. {1000 * found.seconds[-1]:.2f}"
        sizes = f"{case.sizes[0]}..{case.sizes[-1]}"
        worse = "  <- worse than linear" if low > 1.15 else ""
        print(
            f"{case.part:<22}{case.dimension:<10}{sizes:>12}{ends:>20}{found.exponent:>10.2f}  {low:.2f}, {high:.2f}"
            f"{worse}",
            flush=True,
        )
        for size, seconds, made in zip(case.sizes, found.seconds, found.made, strict=True):
            of_case = [f"{value:.2f}" for value in (found.exponent, low, high)]
            lines.append(
                [case.part, case.dimension, str(size), f"{1000 * seconds:.4f}", str(made), "", *of_case, case.base]
            )
    if "large".startswith(wanted):
        layers, heads = LARGE
        for row in measure_large():
            print(
                f"{row['process']:<22}{row['part']:<30}{1000 * row['seconds']:>9.1f} ms CPU, "
                f"{1000 * row['wall_s']:.1f} ms, {row['bytes'] / 1e6:.2f} MB, {row['peak_mb']:.0f} MB of memory",
                flush=True,
            )
            lines.append([
                row["part"], "large", f"{layers}x{heads}", f"{1000 * row['seconds']:.4f}", str(row["bytes"]),
                f"{row['peak_mb']:.0f}", "", "", "", row["process"],
            ])  # fmt: skip
    if options.csv is not None:
        header = ["part", "dimension", "size", "cpu_ms", "bytes", "peak_mb", "exponent", "lowest", "highest", "of"]
        write_csv(options.csv, revision(), header, lines, "tests.bench.bench_growth")


if __name__ == "__main__":
    main()
