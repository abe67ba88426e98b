"""What the checks of several workers say together about the layers of an engine, and whom they accuse.

Owns how `LayerChecks` of ranks and restarts become one: what was counted adds up over all workers, what is known of
now is that of the live ones, and of several findings the worst one stands. Which workers are live is `merge.py`'s.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glassbox.core.output_checks import LayerChecks, LayerState
from glassbox.store.snapshot import Snapshot


@dataclass(frozen=True, order=True)
class WrongLayer:
    """A layer whose output was not reproduced, on one worker.

    Attributes:
        layer, head: global indices; the head is the worst one, -1 if it is not known.
        rank, host: of the worker.
        ratio: its error over the largest that rounding explains; infinite if it is not known.
    """

    layer: int
    head: int
    rank: int
    host: str
    ratio: float


@dataclass(frozen=True, order=True)
class NonfiniteOrigin:
    """Where a worker's non-finite rows begin.

    Attributes:
        layer: global index of the first layer that had some lately; those after it inherit them.
        rank, host: of the worker.
    """

    layer: int
    rank: int
    host: str


def merge_checks(layers: Sequence[int], workers: Iterable[Snapshot], live: Iterable[Snapshot]) -> LayerChecks:
    """The checks of an engine.

    Args:
        layers: global indices of the engine's layers, ascending; those of every worker are among them.
        workers: all, those that were restarted too.
        live: those that run.
    """
    merged = LayerChecks.nothing(len(layers))
    for worker in workers:
        at = np.searchsorted(layers, worker.layers)
        merged.error_counts[at] += worker.checks.error_counts
        merged.error_sums[at] += worker.checks.error_sums
    having, certified = (np.zeros(len(layers), dtype=np.int64) for _ in range(2))
    for worker in live:
        at, checks = np.searchsorted(layers, worker.layers), worker.checks
        having[at] += 1
        certified[at] += checks.state == LayerState.CERTIFIED
        merged.state[at[checks.state == LayerState.FAILED]] = LayerState.FAILED
        worse = ~(checks.worst_ratio <= merged.worst_ratio[at]) & ~np.isnan(checks.worst_ratio)
        merged.worst_ratio[at[worse]] = checks.worst_ratio[worse]
        merged.worst_head[at[worse]] = checks.worst_head[worse]
        for name in ("kv_error", "kv_saturated"):
            largest: npt.NDArray[Any] = getattr(merged, name)
            largest[at] = np.fmax(largest[at], getattr(checks, name))  # a NaN counts only if both are
    whole = (having > 0) & (certified == having)
    merged.state[whole] = LayerState.CERTIFIED
    return merged


def wrong_layers(live: Iterable[Snapshot]) -> tuple[WrongLayer, ...]:
    """Every layer whose output was not reproduced, of every live worker, in order."""
    return tuple(sorted(wrong for worker in live for wrong in _wrong_of(worker)))


def _wrong_of(worker: Snapshot) -> Iterable[WrongLayer]:
    checks = worker.checks
    for local in np.flatnonzero(checks.state == LayerState.FAILED).tolist():
        ratio, head = float(checks.worst_ratio[local]), int(checks.worst_head[local])
        ratio = math.inf if math.isnan(ratio) else ratio
        yield WrongLayer(worker.layers[local], head, worker.rank, worker.host, ratio)


def nonfinite_origins(live: Iterable[Snapshot]) -> tuple[NonfiniteOrigin, ...]:
    """Where the non-finite rows of the live workers begin, the first layer of the model first.

    One per rank and host: of pipeline stages on one host the earliest.
    """
    found: dict[tuple[int, str], NonfiniteOrigin] = {}
    for worker in live:
        if worker.first_nonfinite_layer is not None:
            origin = NonfiniteOrigin(worker.first_nonfinite_layer, worker.rank, worker.host)
            found[origin.rank, origin.host] = min(origin, found.get((origin.rank, origin.host), origin))
    return tuple(sorted(found.values()))
