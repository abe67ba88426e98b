"""One view of all snapshots of a server.

Owns what several workers' snapshots mean together: tensor-parallel ranks bring heads, pipeline ranks bring
layers, and a worker that was restarted goes on counting where its predecessor stopped. The checks of layers'
outputs are `merged_checks.py`'s, how it is shown is `export/families.py`'s.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core.accumulator_arrays import ACCUMULATOR_ARRAYS, ARRAY, CUMULATIVE_ARRAYS, AccumulatorArrays
from glassbox.core.adapter_slots import BASE_MODEL, OTHER_ADAPTERS
from glassbox.core.counters import ENGINE_NUMBERS, EngineValue, MergeRule
from glassbox.core.output_checks import LayerChecks
from glassbox.store.merged_checks import NonfiniteOrigin, WrongLayer, merge_checks, nonfinite_origins, wrong_layers
from glassbox.store.snapshot import Snapshot, Totals

Detail = Literal["model", "layer", "head"]
DETAILS: Final[tuple[Detail, ...]] = ("model", "layer", "head")


@dataclass(frozen=True)
class LiveWorker:
    """A worker that runs, and what of the model it has.

    Attributes:
        rank, host: of the worker.
        layers: global indices of its observed layers, ascending.
        heads: global indices of its heads.
        time_s: Unix time of its snapshot.
    """

    rank: int
    host: str
    layers: tuple[int, ...]
    heads: range
    time_s: float


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedEngine(Totals):
    """All workers of one engine together; layers and heads are global.

    Its window_max is that of the live workers only.

    Attributes:
        num_heads, num_layers: of the model; num_heads is that of the layer that has most.
        layer_heads: of each layer.
        sampled_layers: those of the layers that live workers measure.
        workers: that run, by stage and rank. Of an engine over several nodes those of this one.
        checks: of the L layers; counts and sums of all workers, the rest of the live ones. A layer is CERTIFIED if it
            is on every live worker that has it, FAILED if it is on one.
        wrong: layers whose output was not reproduced, for each live worker.
        nonfinite_origins: where non-finite rows begin, for each rank and host that had some lately.
        by_adapter: the rows by LoRA adapter, over all layers and heads; None if they are not told apart.
        adapter_slots: how many there may come to be in `by_adapter`.
    """

    num_heads: int
    num_layers: int
    layer_heads: tuple[int, ...]
    sampled_layers: tuple[int, ...]
    workers: tuple[LiveWorker, ...]
    checks: LayerChecks
    wrong: tuple[WrongLayer, ...] = ()
    nonfinite_origins: tuple[NonfiniteOrigin, ...] = ()
    by_adapter: "Aggregate | None" = None
    adapter_slots: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Aggregate(AccumulatorArrays):
    """The arrays of an engine at one detail: instead of [L, H] they begin with [K], K = 1, layers, or layers x heads.

    Attributes:
        labels: K tuples: (), (layer,), or (layer, head), global indices as text. Of `MergedEngine.by_adapter`, which
            has no window maxima, (adapter,).
    """

    labels: tuple[tuple[str, ...], ...]


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


def _age(snapshot: Snapshot) -> tuple[float, float, str]:
    """The larger, the newer."""
    return snapshot.time_s, snapshot.start_time_s, snapshot.instance


class _Workers:
    """The snapshots of one engine, and where they stand.

    Attributes:
        all: sorted by rank. places: by pipeline stage and rank, workers that followed each other.
        live: the newest of each place. newest: of all.
    """

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        # Instance order makes ties and float sums independent of the order in which the files were listed.
        self.all = sorted(snapshots, key=lambda s: (s.rank, s.start_time_s, s.instance))
        self.places: dict[tuple[int, int], list[Snapshot]] = {}
        for stage, snapshot in zip(_stages(self.all), self.all, strict=True):
            self.places.setdefault((stage, snapshot.rank), []).append(snapshot)
        self.live = {place: max(group, key=_age) for place, group in self.places.items()}
        self.newest = max(self.live.values(), key=_age)


def _merge_engine(snapshots: Iterable[Snapshot]) -> MergedEngine:
    workers = _Workers(snapshots)
    layers = tuple(sorted({layer for snapshot in workers.all for layer in snapshot.layers}))
    heads = max(snapshot.num_heads_total for snapshot in workers.all)
    return MergedEngine(
        model_name=workers.newest.model_name,
        engine=workers.newest.engine,
        layers=layers,
        num_heads=heads,
        num_layers=max(snapshot.num_layers_total for snapshot in workers.all),
        layer_heads=_layer_heads(workers.all, layers),
        sampled_layers=tuple(sorted({layer for live in workers.live.values() for layer in live.sampled_layers})),
        time_s=workers.newest.time_s,
        start_time_s=min(snapshot.start_time_s for snapshot in workers.all),
        numbers={entry.name: _RULES[entry.merge](workers, entry.name) for entry in ENGINE_NUMBERS},
        workers=tuple(sorted(map(_live_worker, workers.live.values()), key=lambda w: (w.layers, w.rank))),
        checks=merge_checks(layers, workers.all, workers.live.values()),
        wrong=wrong_layers(workers.live.values()),
        nonfinite_origins=nonfinite_origins(workers.live.values()),
        by_adapter=_merge_adapters(workers.all),
        adapter_slots=_adapter_slots(workers.all),
        **_merge_arrays(workers, layers, heads),
    )


def _layer_heads(workers: Iterable[Snapshot], layers: tuple[int, ...]) -> tuple[int, ...]:
    heads = dict.fromkeys(layers, 0)
    for worker in workers:
        for layer, offset, of_layer in zip(worker.layers, worker.head_offsets, worker.layer_heads, strict=True):
            heads[layer] = max(heads[layer], offset + of_layer)
    return tuple(heads.values())


def _live_worker(snapshot: Snapshot) -> LiveWorker:
    # Of the layer that has most.
    local = int(np.argmax(snapshot.layer_heads)) if snapshot.layers else None
    first = snapshot.head_offsets[local] if local is not None else 0
    heads = range(first, first + (snapshot.layer_heads[local] if local is not None else 0))
    return LiveWorker(snapshot.rank, snapshot.host, tuple(sorted(snapshot.layers)), heads, snapshot.time_s)


def _of(workers: Iterable[Snapshot], name: str) -> list[Any]:
    return [worker.numbers[name] for worker in workers]


def _joined(values: Sequence[Any], join: Callable[[Iterable[Any]], Any]) -> Any:
    """`join` (sum or max) of values; of those by label it is taken label by label."""
    if not isinstance(values[0], Mapping):
        return join(values)
    labels = sorted({label for value in values for label in value})
    return {label: join([value.get(label, 0) for value in values]) for label in labels}


def _largest_place(workers: _Workers, name: str) -> EngineValue:
    largest: EngineValue = _joined([_joined(_of(group, name), sum) for group in workers.places.values()], max)
    return largest


def _sum_of_stages(workers: _Workers, name: str) -> EngineValue:
    stages: dict[int, list[Snapshot]] = {}
    for (stage, _), worker in workers.live.items():
        stages.setdefault(stage, []).append(worker)
    total: EngineValue = _joined([_joined(_of(group, name), max) for group in stages.values()], sum)
    return total


# Each makes the engine's number of this name from its workers'.
_RULES: Final[Mapping[MergeRule, Callable[[_Workers, str], EngineValue]]] = {
    MergeRule.SUM: lambda workers, name: _joined(_of(workers.all, name), sum),
    MergeRule.LARGEST_PLACE: _largest_place,
    MergeRule.LARGEST_LIVE: lambda workers, name: _joined(_of(workers.live.values(), name), max),
    MergeRule.SUM_OF_STAGES: _sum_of_stages,
    MergeRule.ALL_LIVE: lambda workers, name: all(_of(workers.live.values(), name)),
    MergeRule.NEWEST: lambda workers, name: workers.newest.numbers[name],
}


def _merge_arrays(workers: _Workers, layers: tuple[int, ...], heads: int) -> dict[str, npt.NDArray[Any]]:
    """Put every snapshot (they are sorted by rank) at its layers and heads.

    Within a rank, the same head is a restarted worker: it adds up. Across ranks it is a replicated head, which both
    measured: the lowest rank stands for it, because rows count once per layer and head.
    """
    arrays = {name: entry.empty(len(layers), heads) for name, entry in ARRAY.items()}
    owner = np.full((len(layers), heads), -1, dtype=np.int64)  # rank whose numbers stand at [layer, head]
    live = {id(snapshot) for snapshot in workers.live.values()}
    for snapshot in workers.all:
        for local, offset, of_layer in _alike(snapshot):
            # Layer by layer: a copy of all of a large model's counts for each step of this took most of the time.
            for own, at in zip(local, np.searchsorted(layers, np.take(snapshot.layers, local)).tolist(), strict=True):
                those = slice(offset, offset + of_layer)
                mine = (owner[at, those] == -1) | (owner[at, those] == snapshot.rank)
                owner[at, those][mine] = snapshot.rank
                for entry in ACCUMULATOR_ARRAYS:
                    if entry.cumulative or id(snapshot) in live:
                        to, its = arrays[entry.name][at, those], getattr(snapshot, entry.name)[own, :of_layer]
                        if mine.all():
                            entry.combine(to, its, out=to)
                        else:
                            to[mine] = entry.combine(to[mine], its[mine])
    return arrays


def _adapter_slots(workers: Iterable[Snapshot]) -> int:
    return max((len(worker.by_adapter.rows) for worker in workers if worker.by_adapter is not None), default=0)


def _merge_adapters(workers: Sequence[Snapshot]) -> Aggregate | None:
    """Add up the rows of each adapter, by its name: workers may have met them in different orders.

    There are no more names than a worker has slots, those of the oldest workers first, so that a name which had a
    series keeps it.
    """
    slots = _adapter_slots(workers)
    if not slots:
        return None
    by_age = sorted(workers, key=lambda worker: worker.start_time_s)
    names = dict.fromkeys(name for worker in by_age for name in worker.adapters)
    labels = [BASE_MODEL, *list(names)[: slots - 2], OTHER_ADAPTERS]
    arrays = {name: entry.empty(len(labels)) for name, entry in ARRAY.items()}
    for worker in workers:
        if worker.by_adapter is None:
            continue
        places = {label: at for at, label in enumerate(labels)}
        own = (BASE_MODEL, *worker.adapters, OTHER_ADAPTERS)
        # The slots that have no name yet hold nothing, and the last one is the others'.
        used = [*range(len(own) - 1), len(worker.by_adapter.rows) - 1]
        at = [places.get(label, len(labels) - 1) for label in own]
        for name in CUMULATIVE_ARRAYS:
            np.add.at(arrays[name], at, getattr(worker.by_adapter, name)[used])
    return Aggregate(labels=tuple((label,) for label in labels), **arrays)


def _alike(snapshot: Snapshot) -> Iterator[tuple[list[int], int, int]]:
    """Layers of a snapshot that have the same heads: their local layers, the first head's index and their number."""
    alike: dict[tuple[int, int], list[int]] = {}
    for local, heads in enumerate(zip(snapshot.head_offsets, snapshot.layer_heads, strict=True)):
        alike.setdefault(heads, []).append(local)
    for (offset, of_layer), local_layers in alike.items():
        yield local_layers, offset, of_layer


def aggregate(engine: MergedEngine, detail: Detail) -> Aggregate:
    """Join an engine's arrays over what the detail does not tell apart (sums, and maxima of window_max)."""
    layers = [str(layer) for layer in engine.layers]
    axes: tuple[int, ...] = {"model": (0, 1), "layer": (1,), "head": ()}[detail]
    labels: dict[Detail, list[tuple[str, ...]]] = {
        "model": [()],
        "layer": [(layer,) for layer in layers],
        "head": [
            (layer, str(head)) for layer, heads in zip(layers, engine.layer_heads, strict=True) for head in range(heads)
        ],
    }
    places = len(labels[detail])
    arrays = {}
    for entry in ACCUMULATOR_ARRAYS:
        array = getattr(engine, entry.name)
        reduced = array[there(engine)] if detail == "head" else entry.reduce(array, axes)
        arrays[entry.name] = reduced.reshape(entry.shape(places))
    return Aggregate(labels=tuple(labels[detail]), **arrays)


def there(engine: MergedEngine) -> npt.NDArray[np.bool_]:
    """Which heads the layers have, bool [L, H]."""
    return np.arange(engine.num_heads) < np.array(engine.layer_heads, dtype=np.int64)[:, None]
