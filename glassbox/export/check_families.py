"""Metric families of the output checks: whether layers are right, and where something is wrong.

Owns their names, labels and values. What was checked is counted per layer, or for the whole model at detail model;
heads are never told apart but for the worst one, which has its label at every detail. What accuses a worker names its
rank and host: it exists only while something is wrong, so it is not part of `CHECK_SAMPLES`.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.output_checks import ERROR_RATIO_BUCKETS, KV_TENSORS, LayerState
from glassbox.core.statistics import PHASES
from glassbox.export.family import DETAIL_LABELS, Family, Series, define
from glassbox.store.merge import Detail, MergedEngine

_ERROR_RATIO: Final = define(
    "attention_output_error_ratio",
    "attention.output_error_ratio",
    "histogram",
    "1",
    "Error of served attention outputs in the worst head over the largest that rounding explains.",
    ("phase",),
    DETAIL_LABELS["layer"],
    ERROR_RATIO_BUCKETS,
)
_WORST_RATIO: Final = define(
    "attention_output_error_worst_ratio",
    "attention.output_error_worst_ratio",
    "gauge",
    "1",
    "Largest error of a layer's output in its last check over the largest that rounding explains, and in which head; "
    "above 1 it was not reproduced.",
    ("layer", "head"),
)
_WRONG: Final = define(
    "attention_output_wrong",
    "attention.output_wrong",
    "gauge",
    "1",
    "Only of layers whose served output was not reproduced: its error over the largest that rounding explains; "
    "infinite if it is not known.",
    ("layer", "head", "rank", "host"),
)
_NONFINITE_FIRST: Final = define(
    "nonfinite_first_layer",
    "nonfinite_first_layer",
    "gauge",
    "1",
    "Only while there are rows with a NaN or infinite score: index of the first layer that has some.",
    ("rank", "host"),
)
_KV_ERROR: Final = define(
    "kv_cache_quantization_error_ratio",
    "kv_cache.quantization_error_ratio",
    "gauge",
    "1",
    "Root mean square error of what the KV cache holds, over the root mean square of what was computed, in the last "
    "check.",
    ("layer", "tensor"),
)
_KV_SATURATED: Final = define(
    "kv_cache_saturated_ratio",
    "kv_cache.saturated_ratio",
    "gauge",
    "1",
    "Share of the elements in the KV cache that are the largest number of their type, in the last check.",
    ("layer", "tensor"),
)
_CERTIFIED: Final = define(
    "layers_certified",
    "layers_certified",
    "gauge",
    "{layer}",
    "Layers of the model whose attention output was reproduced on all ranks.",
)
CHECK_METRICS: Final = (
    _ERROR_RATIO,
    _WORST_RATIO,
    _WRONG,
    _NONFINITE_FIRST,
    _KV_ERROR,
    _KV_SATURATED,
    _CERTIFIED,
)
# Prometheus samples of one layer (or of the model at detail model) in which nothing is wrong: a histogram with _count
# and _sum in each phase, the worst ratio, and two numbers of K and of V.
CHECK_SAMPLES: Final = len(PHASES) * (len(ERROR_RATIO_BUCKETS) + 1 + 2) + 1 + 2 * len(KV_TENSORS)


def check_series(engine: MergedEngine, detail: Detail) -> Iterator[tuple[Family, Series]]:
    """All series of an engine's checks, each with its metric.

    A histogram exists from the first snapshot on, with zeros; what a check finds, from the layer's first check on.
    """
    for family, values in (
        (_ERROR_RATIO, _error_ratio(engine, detail)),
        (_WORST_RATIO, _worst_ratio(engine, detail)),
        (_WRONG, _wrong(engine, detail)),
        (_NONFINITE_FIRST, (((str(o.rank), o.host), float(o.layer)) for o in engine.nonfinite_origins)),
        (_KV_ERROR, _of_tensors(engine, engine.checks.kv_error, detail)),
        (_KV_SATURATED, _of_tensors(engine, engine.checks.kv_saturated, detail)),
        (_CERTIFIED, [((), float((engine.checks.state == LayerState.CERTIFIED).sum()))]),
    ):
        for labels, value in values:
            yield family, _series(engine, labels, value)


_Value = float | tuple[list[int], float]  # of a gauge; rows per bucket and sum of a histogram


def _series(engine: MergedEngine, labels: tuple[str, ...], value: _Value) -> Series:
    all_labels = (engine.model_name, engine.engine, *labels)
    if isinstance(value, tuple):
        counts, total = value
        return Series(all_labels, sum(counts), engine.start_time_s, tuple(counts), total)
    return Series(all_labels, value, engine.start_time_s)


def _error_ratio(engine: MergedEngine, detail: Detail) -> Iterator[tuple[tuple[str, ...], _Value]]:
    counts, sums = engine.checks.error_counts, engine.checks.error_sums
    names: list[tuple[str, ...]] = [(str(layer),) for layer in engine.layers]
    if detail == "model":
        counts, sums, names = counts.sum(axis=0, keepdims=True), sums.sum(axis=0, keepdims=True), [()]
    for p, phase in enumerate(PHASES):
        for k, name in enumerate(names):
            yield (phase.value, *name), (counts[k, p].tolist(), float(sums[k, p]))


def _shown(values: npt.NDArray[np.float32], detail: Detail) -> list[int]:
    """Positions of the known values; at detail model only of the largest one."""
    known = np.flatnonzero(~np.isnan(values))
    if detail == "model" and known.size:
        known = known[[values[known].argmax()]]
    return [int(at) for at in known]


def _worst_ratio(engine: MergedEngine, detail: Detail) -> Iterator[tuple[tuple[str, ...], float]]:
    ratios, heads = engine.checks.worst_ratio, engine.checks.worst_head
    for at in _shown(ratios, detail):
        yield (str(engine.layers[at]), str(heads[at])), float(ratios[at])


def _wrong(engine: MergedEngine, detail: Detail) -> Iterator[tuple[tuple[str, ...], float]]:
    wrong = list(engine.wrong)
    if detail == "model":  # the worst layer of each worker
        worst = {(one.rank, one.host): one for one in sorted(wrong, key=lambda one: one.ratio)}
        wrong = sorted(worst.values())
    for one in wrong:
        yield (str(one.layer), str(one.head), str(one.rank), one.host), one.ratio


def _of_tensors(
    engine: MergedEngine, values: npt.NDArray[np.float32], detail: Detail
) -> Iterator[tuple[tuple[str, ...], float]]:
    for t, tensor in enumerate(KV_TENSORS):
        for at in _shown(values[:, t], detail):
            yield (str(engine.layers[at]), tensor), float(values[at, t])
