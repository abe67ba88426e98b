"""Snapshots for tests of the exporting side: consistent in themselves, every number different from its neighbours."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import yaml

from glassbox.core.accumulator_arrays import ARRAY
from glassbox.core.output_checks import ERROR_RATIO_BUCKETS, KV_TENSORS, LayerChecks, LayerState
from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, PHASES, STATISTICS, Phase
from glassbox.store.snapshot import Snapshot, Totals

# Of the files of a multiprocess directory.
OWNER: Final = "0123456789abcdef"


def make_snapshot(
    *,
    seed: int = 0,
    layers: tuple[int, ...] = (0, 1),
    head_offset: int = 0,
    heads: int = 2,
    total_heads: int | None = None,
    **changes: Any,
) -> Snapshot:
    """A worker's snapshot with random counts that obey counts = rows - nonfinite (lookback: decode rows only).

    Sums are multiples of 1/4, so that they add up exactly in any order.
    """
    rng = np.random.default_rng(seed)
    shape = (len(layers), heads, len(PHASES))
    rows = rng.integers(5, 100, size=shape)
    nonfinite = rng.integers(0, 5, size=shape)
    share = rng.dirichlet(np.ones(NUM_BUCKETS), size=(*shape, NUM_STATISTICS))
    counts = rng.multinomial((rows - nonfinite)[..., None], share)
    sums = rng.integers(0, 400, size=(*shape, NUM_STATISTICS)) / 4
    for s, statistic in enumerate(STATISTICS):
        if statistic.decode_only:
            prefill = PHASES.index(Phase.PREFILL)
            counts[:, :, prefill, s] = 0
            sums[:, :, prefill, s] = 0.0
        if statistic.upper is not None and statistic.upper <= 0:
            sums[..., s] *= -1
    numbers: dict[str, Any] = {
        "steps": 1000,
        "sampled_steps": 10,
        "dropped_rows": {"max_rows": 3},
        "errors": {"sampler": 1},
        "trace_refused": {"max_active": 2},
        "traces_dropped": 0,
        "trace_skipped_steps": 0,
        "watched_delay_seconds": 0.0,
        "traced_requests": {"opt_in": 3, "sampled": 0},
        "traced_requests_active": 1,
        "overhead_seconds": 0.125,
        "sample_rate": 0.01,
        "layers_observed": len(layers),
        "layers_bypassed": {"backend": 1},
        "canary_rows": {"reproduced": 20, "failed": 0},
        "start_seconds": {"register": 0.25, "kernels": 1.5},
        "reload_successful": True,
        "reload_timestamp_s": 1_700_000_000.5,
        "build": {"version": "0.1.0", "vllm_version": "0.32.0", "backend": "CPU_ATTN"},
    }
    snapshot = Snapshot(
        instance=f"i{seed}",
        time_s=1_700_000_100.0,
        start_time_s=1_700_000_000.0,
        model_name="tiny/model",
        engine="0",
        rank=0,
        layers=layers,
        layer_heads=(heads,) * len(layers),
        head_offsets=(head_offset,) * len(layers),
        sampled_layers=layers,
        num_heads_total=heads if total_heads is None else total_heads,
        num_layers_total=4,
        host="gpu-7",
        interval_s=5.0,
        first_nonfinite_layer=None,
        checks=make_checks(len(layers), seed=seed, first_head=head_offset, heads=heads),
        numbers=numbers,
        counts=counts,
        sums=sums,
        rows=rows,
        nonfinite=nonfinite,
        window_max=(rng.integers(-40, 80, size=shape) / 4).astype(np.float32),
    )
    return changed(snapshot, **changes)


def make_checks(layers: int, *, seed: int = 0, first_head: int = 0, heads: int = 2, **changes: Any) -> LayerChecks:
    """Checks of certified layers: every number different, sums multiples of 1/4; `changes` are arrays or a number."""
    rng = np.random.default_rng(seed + 1)
    counts = rng.integers(0, 50, size=(layers, len(PHASES), len(ERROR_RATIO_BUCKETS) + 1))
    found = {
        "state": np.full(layers, LayerState.CERTIFIED, dtype=np.int8),
        "error_counts": counts,
        "error_sums": rng.integers(0, 80, size=(layers, len(PHASES))) / 4,
        "worst_ratio": rng.uniform(0.1, 0.9, size=layers).astype(np.float32),
        "worst_head": rng.integers(first_head, first_head + heads, size=layers, dtype=np.int32),
        "kv_error": rng.uniform(0.02, 0.03, size=(layers, len(KV_TENSORS))).astype(np.float32),
        "kv_saturated": rng.uniform(0, 0.001, size=(layers, len(KV_TENSORS))).astype(np.float32),
    }
    for name, value in changes.items():
        found[name] = np.broadcast_to(np.asarray(value, dtype=found[name].dtype), found[name].shape).copy()
    return LayerChecks(**found)


T = TypeVar("T", bound=Totals)


def changed(totals: T, **changes: Any) -> T:
    """A copy in which engine numbers, such as `steps`, and other fields have other values."""
    numbers = {name: changes.pop(name) for name in tuple(changes) if name in totals.numbers}
    return replace(totals, numbers={**totals.numbers, **numbers}, **changes)


def of_layers(snapshot: Snapshot, some: Any, **changes: Any) -> Snapshot:
    """The snapshot of a worker that has some of the layers (an index of numpy: a slice, a list) alone."""

    def chosen(of_each: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(np.array(of_each)[some].tolist())

    return changed(
        snapshot,
        layers=chosen(snapshot.layers),
        layer_heads=chosen(snapshot.layer_heads),
        head_offsets=chosen(snapshot.head_offsets),
        sampled_layers=chosen(snapshot.layers),
        checks=LayerChecks(**{name: array[some] for name, array in vars(snapshot.checks).items()}),
        **{name: getattr(snapshot, name)[some] for name in ARRAY},
        **changes,
    )


def split_heads(snapshot: Snapshot, at: int) -> tuple[Snapshot, Snapshot]:
    """The snapshots of two tensor-parallel ranks that together measured what `snapshot` says."""
    first = {name: getattr(snapshot, name)[:, :at] for name in ARRAY}
    second = {name: getattr(snapshot, name)[:, at:] for name in ARRAY}
    empty: dict[str, int] = {}
    counted_once = LayerChecks(
        **{
            **vars(snapshot.checks),
            "error_counts": np.zeros_like(snapshot.checks.error_counts),
            "error_sums": np.zeros_like(snapshot.checks.error_sums),
        }
    )
    return (
        changed(snapshot, instance="tp0", rank=0, layer_heads=(at,) * len(snapshot.layers), **first),
        changed(
            snapshot,
            instance="tp1",
            rank=1,
            layer_heads=tuple(heads - at for heads in snapshot.layer_heads),
            head_offsets=tuple(offset + at for offset in snapshot.head_offsets),
            **second,
            dropped_rows=empty,
            errors=empty,
            canary_rows=empty,
            checks=counted_once,
        ),
    )


def write_config(path: Path, **export: Any) -> Path:
    """A configuration file with an `export` section; replaced by rename as editors do."""
    temporary = path.with_suffix(".new")
    temporary.write_text(yaml.safe_dump({"export": {"interval_s": 0.2, **export}}))
    temporary.replace(path)
    return path


def logged(records: list[logging.LogRecord]) -> list[str]:
    """Messages in order, each record once: pytest catches those of glassbox's logger there and at the root."""
    return [record.getMessage() for record in {id(record): record for record in records}.values()]


@contextmanager
def limited_file_size(limit: int) -> Iterator[None]:
    """Within it, any file of this process that grows beyond `limit` bytes fails, as on a full disk.

    For single calls only: pytest's own output may be a file, which it writes to between a test and its teardown.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
