"""One view of all snapshots of a server.

Owns what several workers' snapshots mean together: tensor-parallel ranks bring heads, pipeline ranks bring
layers, and a worker that was restarted goes on counting where its predecessor stopped. How it is shown is
`export/families.py`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, PHASES
from glassbox.store.snapshot import Snapshot

Detail = Literal["model", "layer", "head"]
DETAILS: Final[tuple[Detail, ...]] = ("model", "layer", "head")


@dataclass(frozen=True, eq=False)
class MergedEngine:
    """All workers of one engine together; cumulative since `start_time_s`.

    With L = len(layers) and H = num_heads, both global; phases in the order of PHASES; units as in
    `Snapshot`.

    Attributes:
        counts: int64 [L, H, 2, S, B]; sums: float64 [L, H, 2, S]; rows, nonfinite: int64 [L, H, 2].
        window_max: float32 [L, H, 2], of the live workers only; -inf if none.
    """

    model_name: str
    engine: str
    layers: tuple[int, ...]
    num_heads: int
    num_layers: int
    time_s: float
    start_time_s: float
    steps: int
    sampled_steps: int
    dropped_rows: dict[str, int]
    errors: dict[str, int]
    overhead_seconds: float
    sample_rate: float
    layers_observed: int
    layers_bypassed: int
    reload_successful: bool
    reload_timestamp_s: float
    build: dict[str, str]
    trace_refused: dict[str, int]
    traced_requests: dict[str, int]
    traced_requests_active: int
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    window_max: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The arrays of an engine at one detail: K = 1, layers, or layers x heads, with the label values of each.

    Attributes:
        labels: K tuples: (), (layer,), or (layer, head), global indices as text.
        counts: int64 [K, 2, S, B]; sums: float64 [K, 2, S]; rows, nonfinite: int64 [K, 2].
        window_max: float32 [K, 2].
    """

    labels: tuple[tuple[str, ...], ...]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    window_max: npt.NDArray[np.float32]


def merge(snapshots: Iterable[Snapshot]) -> list[MergedEngine]:
    """One merged view per (model_name, engine), in natural order; that of the snapshots does not matter."""
    groups: dict[tuple[str, str], list[Snapshot]] = {}
    for snapshot in snapshots:
        groups.setdefault((snapshot.model_name, snapshot.engine), []).append(snapshot)
    return [_merge_engine(groups[key]) for key in sorted(groups, key=_natural)]


def _natural(key: tuple[str, str]) -> list[tuple[int, int, str]]:
    """Sort key under which engine 10 comes after engine 9."""
    parts = [part for text in key for part in (*re.split(r"(\d+)", text), "")]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _stages(snapshots: Sequence[Snapshot]) -> list[int]:
    """Pipeline stage of each snapshot: those that share a layer share one; -1 for those without layers."""
    stage_of_layer: dict[int, int] = {}
    for number, snapshot in enumerate(snapshots):
        joined = {stage_of_layer[layer] for layer in snapshot.layers if layer in stage_of_layer}
        for layer, stage in stage_of_layer.items():
            if stage in joined:
                stage_of_layer[layer] = number
        stage_of_layer.update(dict.fromkeys(snapshot.layers, number))
    return [stage_of_layer[snapshot.layers[0]] if snapshot.layers else -1 for snapshot in snapshots]


def _merge_engine(snapshots: list[Snapshot]) -> MergedEngine:
    # Instance order makes ties and float sums independent of the order in which the files were listed.
    snapshots = sorted(snapshots, key=lambda s: (s.rank, s.start_time_s, s.instance))
    places: dict[tuple[int, int], list[Snapshot]] = {}
    for stage, snapshot in zip(_stages(snapshots), snapshots, strict=True):
        places.setdefault((stage, snapshot.rank), []).append(snapshot)
    live = {place: max(group, key=lambda s: (s.time_s, s.start_time_s, s.instance)) for place, group in places.items()}
    newest = max(live.values(), key=lambda s: (s.time_s, s.start_time_s, s.instance))
    layers = tuple(sorted({layer for snapshot in snapshots for layer in snapshot.layers}))
    heads = max(snapshot.num_heads_total for snapshot in snapshots)
    return MergedEngine(
        model_name=newest.model_name,
        engine=newest.engine,
        layers=layers,
        num_heads=heads,
        num_layers=max(snapshot.num_layers_total for snapshot in snapshots),
        time_s=newest.time_s,
        start_time_s=min(snapshot.start_time_s for snapshot in snapshots),
        steps=max(sum(s.steps for s in group) for group in places.values()),
        sampled_steps=max(sum(s.sampled_steps for s in group) for group in places.values()),
        dropped_rows=_sum_counts(snapshot.dropped_rows for snapshot in snapshots),
        errors=_sum_counts(snapshot.errors for snapshot in snapshots),
        overhead_seconds=max(sum(s.overhead_seconds for s in group) for group in places.values()),
        sample_rate=max(snapshot.sample_rate for snapshot in live.values()),
        layers_observed=_per_stage(live, "layers_observed"),
        layers_bypassed=_per_stage(live, "layers_bypassed"),
        reload_successful=all(snapshot.reload_successful for snapshot in live.values()),
        reload_timestamp_s=max(snapshot.reload_timestamp_s for snapshot in live.values()),
        build=dict(newest.build),
        trace_refused=_most_counts(places.values(), "trace_refused"),
        traced_requests=_most_counts(places.values(), "traced_requests"),
        traced_requests_active=max(snapshot.traced_requests_active for snapshot in live.values()),
        **_merge_arrays(snapshots, {id(s) for s in live.values()}, layers, heads),
    )


def _sum_counts(counts: Iterable[object]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for key, value in dict(count).items():  # type: ignore[call-overload]
            total[key] = total.get(key, 0) + int(value)
    return dict(sorted(total.items()))


def _most_counts(places: Iterable[Sequence[Snapshot]], name: str) -> dict[str, int]:
    """All workers of an engine see the same requests: of each count the largest, restarts of a worker summed."""
    most: dict[str, int] = {}
    for group in places:
        for key, value in _sum_counts(getattr(snapshot, name) for snapshot in group).items():
            most[key] = max(most.get(key, 0), value)
    return dict(sorted(most.items()))


def _per_stage(live: dict[tuple[int, int], Snapshot], name: str) -> int:
    """Tensor-parallel ranks see the same layers, pipeline stages different ones."""
    stages: dict[int, int] = {}
    for (stage, _), snapshot in live.items():
        stages[stage] = max(stages.get(stage, 0), int(getattr(snapshot, name)))
    return sum(stages.values())


def _merge_arrays(
    snapshots: Sequence[Snapshot], live: set[int], layers: tuple[int, ...], heads: int
) -> dict[str, npt.NDArray]:
    """Put every snapshot (sorted by rank) at its layers and heads.

    Within a rank, the same head is a restarted worker: it adds up. Across ranks it is a replicated head,
    which both
    measured: the lowest rank stands for it, because rows count once per layer and head.
    """
    base = (len(layers), heads, len(PHASES))
    counts = np.zeros((*base, NUM_STATISTICS, NUM_BUCKETS), dtype=np.int64)
    sums = np.zeros((*base, NUM_STATISTICS), dtype=np.float64)
    rows = np.zeros(base, dtype=np.int64)
    nonfinite = np.zeros(base, dtype=np.int64)
    window_max = np.full(base, -np.inf, dtype=np.float32)
    owner = np.full(base[:2], -1, dtype=np.int64)  # rank whose numbers stand at [layer, head]
    for snapshot in snapshots:
        if not snapshot.layers:
            continue
        at = np.ix_(
            np.searchsorted(layers, snapshot.layers),
            np.arange(snapshot.head_offset, snapshot.head_offset + snapshot.rows.shape[1]),
        )
        mine = (owner[at] == -1) | (owner[at] == snapshot.rank)
        owner[at] = np.where(mine, snapshot.rank, owner[at])
        counts[at] += snapshot.counts * mine[..., None, None, None]
        sums[at] += np.where(mine[..., None, None], snapshot.sums, 0.0)
        rows[at] += snapshot.rows * mine[..., None]
        nonfinite[at] += snapshot.nonfinite * mine[..., None]
        if id(snapshot) in live:
            window_max[at] = np.maximum(window_max[at], np.where(mine[..., None], snapshot.window_max, -np.inf))
    return {"counts": counts, "sums": sums, "rows": rows, "nonfinite": nonfinite, "window_max": window_max}


def aggregate(engine: MergedEngine, detail: Detail) -> Aggregate:
    """Sum an engine's arrays over what the detail does not tell apart (maximum for window_max)."""
    num_layers, num_heads = engine.rows.shape[:2]
    if detail == "head":
        pairs = [(str(layer), str(head)) for layer in engine.layers for head in range(num_heads)]
        flat = {
            name: getattr(engine, name).reshape(num_layers * num_heads, *getattr(engine, name).shape[2:])
            for name in ("counts", "sums", "rows", "nonfinite", "window_max")
        }
        return Aggregate(labels=tuple(pairs), **flat)
    axes = (1,) if detail == "layer" else (0, 1)
    summed = {name: getattr(engine, name).sum(axis=axes) for name in ("counts", "sums", "rows", "nonfinite")}
    largest = engine.window_max.max(axis=axes, initial=-np.inf)
    if detail == "layer":
        return Aggregate(labels=tuple((str(layer),) for layer in engine.layers), window_max=largest, **summed)
    return Aggregate(labels=((),), window_max=largest[None], **{name: a[None] for name, a in summed.items()})
