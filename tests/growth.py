"""What glassbox does at any size of model, traffic and server: each part as an action that a bench can time and a test
can count.

Snapshots, accumulators, traces and keys are made up; all that an action runs is what a server runs.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from starlette.datastructures import QueryParams
from torch import Tensor

from glassbox.adapter.runner import Batch as RunnerBatch
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.core.trace_options import TraceOptions
from glassbox.export.families import build_families
from glassbox.export.family_source import FamilySource
from glassbox.export.page import render, text
from glassbox.kernels.row_stats_native import KeyPages
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import BatchTables, Forward, MeasuredLayers, StepLayers
from glassbox.measure.cpu_measurer import CpuMeasurer
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.sampling import RowSampler
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.store.merge import Detail, merge
from glassbox.store.metrics_page import open_page, write_page
from glassbox.store.snapshot import Snapshot, SnapshotReader, write_snapshot
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_ranks import merge_ranks
from glassbox.store.trace_record import read_trace, write_trace
from glassbox.web.live_snapshot import snapshot_answer
from glassbox.web.matrices import between
from glassbox.web.selection import parse_snapshot, parse_stream
from glassbox.web.stream import Feed, Moment
from tests.export_samples import changed, make_snapshot
from tests.kernels.test_row_stats_cpu import Batch, PlainReader
from tests.trace_samples import make_host, make_trace, new_request, scheduled_step

CONFIG: Final = GlassboxConfig.model_validate({"export": {"prometheus": {"detail": "head", "max_series": 10_000_000}}})

# What is timed; it may return how many bytes it made.
Action = Callable[[], object]


def folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glassbox-growth-")))


def quiet() -> ErrorCounter:
    return ErrorCounter(logging.getLogger("glassbox.bench"))


# A measured step


class Layer:
    """A layer whose keys lie in pages as vLLM's on a CPU do; see contract.PackedLayer."""

    def __init__(self, name: str, batch: Batch, keys: KeyPages, pages: Tensor) -> None:
        self.name, self.params = name, batch.params
        self._block_size, self._keys, self._pages = batch.block_size, keys, pages

    def block_size(self, kv_cache: Tensor) -> int:
        return self._block_size

    def reader(self, kv_cache: Tensor) -> PlainReader:
        return PlainReader(self._pages, transposed=True)

    value_reader = reader

    def pages(self, kv_cache: Tensor) -> KeyPages:
        return self._keys


def step(_: ExitStack, *, layers: int = 16, heads: int = 16, rows: int = 16, context: int = 512) -> Action:
    """A decode step of so many requests, each of which has one row, measured and added to the accumulators."""
    batch = Batch(
        [(context, 1, context // 2)] * rows, [(b, 0) for b in range(rows)], num_heads=heads,
        num_kv_heads=max(heads // 8, 1), block_size=128, transposed=True,
    )  # fmt: skip
    pages, table = batch.cache()
    keys, lying = batch.key_pages(pages, transposed=True)
    tables = BatchTables(
        torch.from_numpy(table),
        torch.from_numpy(batch.starts),
        torch.tensor([n for n, _, _ in batch.lengths], dtype=torch.int32),
        object(),
    )
    all_layers = [Layer(f"layer{n}", batch, keys, pages) for n in range(layers)]
    names = {layer.name: n for n, layer in enumerate(all_layers)}
    measurer = CpuMeasurer(MeasuredLayers(Accumulators(layers, heads), names, 4, 128), errors=quiet())
    forward, row_list, every = Forward(batch.q, None, None, None), batch.row_list, frozenset(range(layers))

    def action() -> None:
        measurer.begin(row_list, StepLayers(every, every), None, None)
        for layer in all_layers:
            measurer.after_attention(layer, forward, lying, tables)
        measurer.finish()

    return action


def row_list(_: ExitStack, *, requests: int = 256, rows: int = 256, context: int = 1024) -> Action:
    """Choosing rows: half of the requests decode, the others are in their prompts."""
    sampler = RowSampler(rows, 8)
    scheduled = np.where(np.arange(requests) % 2, 1, context // 4)
    computed = np.where(np.arange(requests) % 2, context, context // 2)
    prompt, starts = np.full(requests, context), np.r_[0, np.cumsum(scheduled)]
    return lambda: sampler.select(scheduled, computed, prompt, starts)


def accumulate(_: ExitStack, *, layers: int = 32, heads: int = 32, rows: int = 32, adapters: int = 1) -> Action:
    accumulators = Accumulators(layers, heads, num_adapters=adapters)
    stats = torch.rand(layers, rows, heads, NUM_STATISTICS + 1)
    stats[..., NUM_STATISTICS] = 0
    slots = torch.arange(rows) % adapters if adapters > 1 else None
    return lambda: accumulators.add(torch.arange(layers), stats, torch.arange(rows) % 2, slots)


# A worker's snapshot


def accumulators_of(layers: int, heads: int) -> Accumulators:
    accumulators = Accumulators(layers, heads)
    for first in range(0, layers, 32):  # in parts: the statistics of a large step are no part of what is measured
        some = torch.arange(first, min(first + 32, layers))
        stats = torch.rand(len(some), 16, heads, NUM_STATISTICS + 1)
        stats[..., NUM_STATISTICS] = 0
        accumulators.add(some, stats, torch.arange(16) % 2)
    return accumulators


def copy(_: ExitStack, *, layers: int = 32, heads: int = 32) -> Action:
    return accumulators_of(layers, heads).copy


def snapshot_of(layers: int, heads: int, **changes: Any) -> Snapshot:
    return make_snapshot(layers=tuple(range(layers)), heads=heads, num_layers_total=layers, **changes)


def write(stack: ExitStack, *, layers: int = 32, heads: int = 32) -> Action:
    run_dir, snapshot = folder(stack), snapshot_of(layers, heads)
    return lambda: write_snapshot(run_dir, snapshot).stat().st_size


# The exporter


def ranks_of(layers: int, heads: int, ranks: int) -> list[Snapshot]:
    """Of so many tensor-parallel ranks, which have as many heads of the model each."""
    each = heads // ranks
    return [
        snapshot_of(layers, each, head_offset=rank * each, total_heads=heads, rank=rank, instance=f"r{rank}", seed=rank)
        for rank in range(ranks)
    ]


def read(stack: ExitStack, *, layers: int = 32, heads: int = 32, ranks: int = 1) -> Action:
    run_dir = folder(stack)
    for snapshot in ranks_of(layers, heads, ranks):
        write_snapshot(run_dir, snapshot)
    return lambda: SnapshotReader(run_dir, named=True).read()


def merged(_: ExitStack, *, layers: int = 32, heads: int = 32, ranks: int = 1, engines: int = 1) -> Action:
    snapshots = [
        replace(one, engine=str(engine)) for engine in range(engines) for one in ranks_of(layers, heads, ranks)
    ]
    return lambda: merge(snapshots)


def engines_of(layers: int, heads: int, engines: int) -> list[Any]:
    one = snapshot_of(layers, heads)
    return merge([replace(one, engine=str(engine)) for engine in range(engines)])


def families(_: ExitStack, detail: Detail, *, layers: int = 16, heads: int = 16, engines: int = 1) -> Action:
    found = engines_of(layers, heads, engines)
    return lambda: build_families(found, detail)


def page(stack: ExitStack, detail: Detail, *, layers: int = 16, heads: int = 16, engines: int = 1) -> Action:
    """The page of vLLM's port, written to its file."""
    run_dir, found = folder(stack), build_families(engines_of(layers, heads, engines), detail)

    def action() -> int:
        write_page(run_dir, render(found), 1.0)
        return (run_dir / "metrics.page").stat().st_size

    return action


def own_port(_: ExitStack, format: Any, *, layers: int = 16, heads: int = 16, engines: int = 1) -> Action:
    """The answer of glassbox's own port, made at each scrape, at detail head."""
    found = build_families(engines_of(layers, heads, engines), "head")
    return lambda: sum(map(len, text([(found, {})], format)))


def scrape(stack: ExitStack, *, layers: int = 16, heads: int = 16) -> Action:
    """The page's bytes, as an API server hands them out, at detail head."""
    run_dir = folder(stack)
    write_page(run_dir, render(build_families(engines_of(layers, heads, 1), "head")), 1.0)

    def action() -> int:
        shown, size = open_page(run_dir), 0
        for at, length in shown.ranges("text"):
            for start in range(at, at + length, 1 << 17):
                size += len(shown.read(start, min(1 << 17, at + length - start)))
        shown.close()
        return size

    return action


# The live page


def source_of(stack: ExitStack, layers: int, heads: int) -> FamilySource:
    run_dir = folder(stack)
    write_snapshot(run_dir, snapshot_of(layers, heads))
    source = FamilySource(run_dir, lambda: CONFIG)
    source.merged()
    return source


def frame(stack: ExitStack, *, layers: int = 32, heads: int = 32) -> Action:
    """An event of the stream: one statistic over the last interval."""
    source = source_of(stack, layers, heads)
    (old,) = source.merged().engines
    new = changed(old, time_s=old.time_s + 5, **{name: 2 * getattr(old, name) for name in ("counts", "rows", "sums")})
    feed, selection = Feed(source), parse_stream(QueryParams(""))
    numbers = iter(range(1 << 30))
    return lambda: len(feed.frame(Moment(next(numbers), (new,), (between(old, new),)), selection))


def snapshot_json(stack: ExitStack, *, layers: int = 32, heads: int = 32) -> Action:
    """All that was measured, as JSON."""
    source = source_of(stack, layers, heads)
    return lambda: len(snapshot_answer(source, parse_snapshot(QueryParams(""))))


# Traces


def active_trace(layers: int, heads: int, rows: int) -> ActiveTrace:
    """A running request with one row of each step."""
    host = make_host(layers=tuple(range(layers)), num_heads=heads, max_model_len=1 << 20)
    trace = ActiveTrace(
        host, "cmpl-1-0-00000001", why="opt_in", options=TraceOptions(), traceparent=None, prompt_len=8,
        local_layers=tuple(range(layers)), head_columns=tuple(range(heads)),
    )  # fmt: skip
    place = (layers, heads)
    rng = np.random.default_rng(0)
    stats = rng.random((1, *place, NUM_STATISTICS + 1), np.float32)
    empty = make_trace(
        layers=tuple(range(layers)), heads=tuple(range(heads)), positions=(8,), top_k=0, spans=(), attention=False
    )
    for position in range(8, 8 + rows):
        arrays = {
            name: empty.arrays[name]
            for name in ("span_mass", "topk_positions", "topk_mass", "mean_topk_positions", "mean_topk_mass", "queries")
        }
        arrays |= {
            "positions": np.array([position], dtype=np.int32),
            "phases": np.ones(1, dtype=np.uint8),
            "stats": stats,
            "previous_mass": stats[..., 0],
        }
        trace.append(Chunk(arrays))
    return trace


def trace_write(stack: ExitStack, *, layers: int = 16, heads: int = 16, rows: int = 64) -> Action:
    """The record of a running request, made and written."""
    directory, trace = traces_path(folder(stack)), active_trace(layers, heads, rows)
    return lambda: write_trace(directory, trace.record()).stat().st_size


def trace_read(stack: ExitStack, *, layers: int = 16, heads: int = 16, rows: int = 64) -> Action:
    path = write_trace(traces_path(folder(stack)), active_trace(layers, heads, rows).record())
    return lambda: read_trace(path)


def trace_merge(_: ExitStack, *, ranks: int = 4, rows: int = 64) -> Action:
    """The traces of tensor-parallel ranks as one; so many heads together."""
    record, each = active_trace(16, 64 // ranks, rows).record(), 64 // ranks
    parts = [replace(record, rank=rank, heads=tuple(range(rank * each, (rank + 1) * each))) for rank in range(ranks)]
    return lambda: merge_ranks(parts)


def trace_list(stack: ExitStack, *, traces: int = 64) -> Action:
    """The list of all traces, of which nothing has changed since the last look."""
    run_dir = folder(stack)
    for number in range(traces):
        one = make_trace(request_id=f"cmpl-{number}-0", attention=False)
        write_trace(traces_path(run_dir), replace(one, internal_id=f"cmpl-{number}-0-{number:08x}"))
    directory = TraceDirectory(run_dir)
    directory.summaries()
    return directory.summaries


def tracker(_: ExitStack, *, requests: int = 64, layers: int = 4, heads: int = 4) -> Action:
    """A worker's own work for the traced requests of a step, each of which has one row: whose they are, and where their
    numbers go. The traces stay as they are: nothing is committed."""
    host = make_host(layers=tuple(range(layers)), num_heads=heads, max_model_len=1 << 20)
    limits = {"max_active": requests, "max_active_mb": 4096, "max_trace_mb": 4096}
    config = GlassboxConfig.model_validate({"requests": {**limits, "opt_in": True}})
    found = RequestTracker(host, DeferredActions(quiet()))
    ids = tuple(f"cmpl-{number}-0-{number:08x}" for number in range(requests))
    arrivals = [new_request(one, 4, {"glassbox": "trace"}) for one in ids]
    of_all, runner = frozenset(range(layers)), object()
    found.begin_step(runner, scheduled_step(arrivals, dict.fromkeys(ids, 4)), config, of_all)  # type: ignore[arg-type]
    ones = np.ones(requests, dtype=np.int64)
    batch = RunnerBatch(
        req_ids=ids, num_scheduled=ones, num_computed=8 * ones, prompt_len=4 * ones, query_start=np.arange(requests + 1)
    )
    chosen, _left = RowSampler(requests, 8).select(
        ones, 8 * ones, 4 * ones, batch.query_start, traced=np.ones(requests, dtype=bool)
    )
    assert (chosen[:, ROW_SLOT] >= 0).all()
    later = scheduled_step(num_scheduled_tokens=dict.fromkeys(ids, 1))

    def action() -> None:
        found.begin_step(runner, later, config, of_all)  # type: ignore[arg-type]
        found.marks(ids)
        assert found.trace_rows(runner, batch, chosen, np.zeros(requests, dtype=np.int64)) is not None  # type: ignore[arg-type]

    return action
