"""Metric families: what is exported, neutral to how.

Owns the kinds, labels and values of all metrics: those of the statistics come from `core/statistics.py`, those of an
engine from `core/counters.py`, those of the output checks from `check_families.py`, those of probes and signals from
`score_families.py`, those of the server's own life from `liveness.py`, and the few others per layer and head are named
here. Prometheus, OTLP and the multiprocess files are written from the same families, so they cannot
differ. It does no input or output.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from glassbox.config.model import MAX_SERIES
from glassbox.core.counters import ENGINE_NUMBERS, EngineNumber
from glassbox.core.statistics import INDEX, NUM_BUCKETS, PHASES, STATISTICS, Phase, Statistic
from glassbox.export.check_families import CHECK_METRICS, CHECK_SAMPLES, check_series
from glassbox.export.family import (
    DETAIL_LABELS,
    ENGINE_LABELS,
    Family,
    JoinedSeries,
    Kind,
    Series,
    SeriesTable,
    at_detail,
    define,
    from_to,
)
from glassbox.export.liveness import LIVENESS_METRICS
from glassbox.export.score_families import SCORE_METRICS, score_series, score_series_count
from glassbox.signals.drift_watch import COMPARED, Drift, EngineKey
from glassbox.store.merge import Aggregate, Detail, MergedEngine, aggregate, there
from glassbox.store.score_totals import ScoreTotals

_COARSER: Final[dict[Detail, Detail]] = {"head": "layer", "layer": "model"}

# Per engine, phase and detail, next to the histograms of the statistics.
_WINDOW_MAX: Final = define(
    "attention_max_logit_window_max",
    "attention.max_logit_window_max",
    "gauge",
    "1",
    "Largest attention score (scaled, before softmax) among the rows of the current window.",
    ("phase",),
    DETAIL_LABELS["head"],
)
_ROWS: Final = define(
    "attention_rows_total",
    "attention.rows",
    "counter",
    "{row}",
    "Attention rows measured; a row is one query token in one layer and one head.",
    ("phase",),
    DETAIL_LABELS["head"],
)
_NONFINITE: Final = define(
    "attention_nonfinite_rows_total",
    "attention.nonfinite_rows",
    "counter",
    "{row}",
    "Measured attention rows with a NaN or infinite score.",
    ("phase",),
    DETAIL_LABELS["head"],
)
# Per worker.
_WORKER: Final = define(
    "worker_info",
    "worker_info",
    "gauge",
    "1",
    "Always 1; for each worker that is exported from here, its tensor-parallel rank, its host, and the first and last "
    "of its observed layers and of its heads.",
    ("rank", "host", "layers", "heads"),
)
# Per engine, phase, statistic and detail; only with a baseline.
_DRIFT_PSI: Final = define(
    "attention_drift_psi",
    "attention.drift_psi",
    "gauge",
    "1",
    "Population stability index of a statistic's recent rows against the baseline; of the worst head.",
    ("phase", "statistic"),
    DETAIL_LABELS["head"],
)
_DRIFT_SHIFT: Final = define(
    "attention_drift_mean_shift",
    "attention.drift_mean_shift",
    "gauge",
    "1",
    "Mean of a statistic's recent rows minus the baseline's, in standard deviations; of the head that moved most.",
    ("phase", "statistic"),
    DETAIL_LABELS["head"],
)


def _of_engine(entry: EngineNumber) -> Family:
    kind: Kind = "gauge" if entry.kind == "info" else entry.kind
    return define(entry.metric, entry.otel_name, kind, entry.unit, entry.help, entry.labels)


def _histogram(statistic: Statistic) -> Family:
    return Family(
        name=statistic.metric,
        otel_name=f"glassbox.attention.{statistic.name}",
        kind="histogram",
        help=statistic.meaning,
        unit=statistic.unit,
        label_names=(*ENGINE_LABELS, "phase"),
        detail_labels=DETAIL_LABELS["head"],
        bounds=statistic.buckets,
    )


def by_adapter(statistic: Statistic) -> Family:
    """The histogram of a statistic by LoRA adapter."""
    return define(
        f"adapter_attention_{statistic.name}",
        f"adapter.attention.{statistic.name}",
        "histogram",
        statistic.unit,
        f"By LoRA adapter, over all layers and heads: {statistic.meaning}",
        ("phase", "adapter"),
        bounds=statistic.buckets,
    )


# Per engine, phase and LoRA adapter; only with `adapters.max`.
_ADAPTER_ROWS: Final = define(
    "adapter_attention_rows_total",
    "adapter.attention.rows",
    "counter",
    "{row}",
    "Attention rows measured, by LoRA adapter, over all layers and heads.",
    ("phase", "adapter"),
)
_ADAPTER_NONFINITE: Final = define(
    "adapter_attention_nonfinite_rows_total",
    "adapter.attention.nonfinite_rows",
    "counter",
    "{row}",
    "Measured attention rows with a NaN or infinite score, by LoRA adapter, over all layers and heads.",
    ("phase", "adapter"),
)
_EXPORTED: Final = tuple(statistic for statistic in STATISTICS if statistic.exported)
_HISTOGRAMS: Final = tuple(_histogram(statistic) for statistic in _EXPORTED)
_ADAPTER_HISTOGRAMS: Final = tuple(map(by_adapter, _EXPORTED))
_BY_ADAPTER: Final = (*_ADAPTER_HISTOGRAMS, _ADAPTER_ROWS, _ADAPTER_NONFINITE)
_BY_DETAIL: Final = (*_HISTOGRAMS, _WINDOW_MAX, _ROWS, _NONFINITE, _DRIFT_PSI, _DRIFT_SHIFT)
_OF_ENGINE: Final = {entry.name: _of_engine(entry) for entry in ENGINE_NUMBERS}
# Every metric, without series; labels as at detail `model`. Docs and dashboards are checked against it.
METRICS: Final = (
    *_BY_DETAIL,
    *_BY_ADAPTER,
    *CHECK_METRICS,
    *SCORE_METRICS,
    *_OF_ENGINE.values(),
    _WORKER,
    *LIVENESS_METRICS,
)


def build_families(
    engines: Sequence[MergedEngine],
    detail: Detail,
    errors: Mapping[str, int] | None = None,
    drift: Mapping[EngineKey, Drift] | None = None,
    scores: ScoreTotals | None = None,
) -> list[Family]:
    """All families of a server that have a series.

    At details model and layer a series exists from the first snapshot on, with zeros, so that `rate()` sees
    the first increase; at detail head only heads with measured rows have series. lookback_ratio has none in
    prefill, and drift has one only where there are enough rows to compare.

    Args:
        engines: from `merge`.
        detail: of the attention metrics; see `effective_detail`.
        errors: of the exporting side, by stage. They belong to no engine and are added to the first one's.
        drift: from the baseline, of the engines that can be compared.
        scores: of traced requests, None if none was scored.
    """
    parts: dict[str, list[Sequence[Series]]] = {family.name: [] for family in METRICS}
    for engine in engines:
        part = aggregate(engine, detail)
        places = _Places(engine, part, detail)
        for statistic in _EXPORTED:
            parts[statistic.metric].append(_histogram_series(places, statistic))
        for family, found in _adapter_series(engine):
            parts[family.name].append(found)
        numbers = ((_WINDOW_MAX, part.window_max), (_ROWS, part.rows), (_NONFINITE, part.nonfinite))
        for family, values in numbers:
            parts[family.name].append(_number_series(places, values))
        if compared := (drift or {}).get((engine.model_name, engine.engine)):
            parts[_DRIFT_PSI.name].append(tuple(_drift_series(engine, places, compared.psi, detail)))
            parts[_DRIFT_SHIFT.name].append(tuple(_drift_series(engine, places, compared.shift, detail)))
        for family, one in check_series(engine, detail):
            parts[family.name].append((one,))
        for family, one in score_series(engine, scores) if scores is not None else ():
            parts[family.name].append((one,))
        parts[_WORKER.name].append(tuple(_worker_series(engine)))
    for number, engine in enumerate(engines):
        for family, labels, value in _engine_values(engine, (errors or {}) if number == 0 else {}):
            all_labels = (engine.model_name, engine.engine, *labels)
            parts[family.name].append((Series(all_labels, value, engine.start_time_s),))
    series = {name: JoinedSeries(found) for name, found in parts.items()}
    return [at_detail(family, detail, series[family.name]) for family in METRICS if series[family.name]]


class _Places:
    """Where an engine has series: phase by phase all places of an aggregate, at detail head those with measured rows.

    Attributes:
        part: the aggregate.
        start_time_s: of the engine.
    """

    def __init__(self, engine: MergedEngine, part: Aggregate, detail: Detail) -> None:
        self.part, self.start_time_s = part, engine.start_time_s
        rows, columns, labels = [], [], []
        for p, phase in enumerate(PHASES):
            its = np.flatnonzero(part.rows[:, p]) if detail == "head" else np.arange(len(part.labels))
            first = (engine.model_name, engine.engine, phase.value)
            rows.append(its)
            columns.append(np.full(len(its), p))
            labels.append([(*first, *part.labels[k]) for k in its.tolist()])
        # Tables of many families share these.
        self._all = np.concatenate(rows), np.concatenate(columns), [one for of_phase in labels for one in of_phase]
        decode = PHASES.index(Phase.DECODE)
        self._decode = rows[decode], columns[decode], labels[decode]

    def of(self, decode_only: bool = False) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], list[tuple[str, ...]]]:
        """Row, phase column and label values of each."""
        return self._decode if decode_only else self._all


def _histogram_series(places: _Places, statistic: Statistic) -> SeriesTable:
    column = INDEX[statistic.name]
    k, p, labels = places.of(statistic.decode_only)
    counts = places.part.counts[k, p, column]
    sums = None if statistic.signed else places.part.sums[k, p, column]
    return SeriesTable(labels, counts.sum(axis=-1), places.start_time_s, counts, sums)


def _number_series(places: _Places, values: npt.NDArray[Any]) -> SeriesTable:
    k, p, labels = places.of()
    numbers = values[k, p]
    shown = np.flatnonzero(numbers != -np.inf)  # no row in the window: nothing to show
    if len(shown) < len(labels):
        labels, numbers = [labels[at] for at in shown.tolist()], numbers[shown]
    return SeriesTable(labels, numbers, places.start_time_s)


def _adapter_series(engine: MergedEngine) -> Iterator[tuple[Family, SeriesTable]]:
    part = engine.by_adapter
    if part is None:
        return
    # Zeros are shown, as at the details model and layer.
    places = _Places(engine, part, "model")
    for family, statistic in zip(_ADAPTER_HISTOGRAMS, _EXPORTED, strict=True):
        yield family, _histogram_series(places, statistic)
    yield _ADAPTER_ROWS, _number_series(places, part.rows)
    yield _ADAPTER_NONFINITE, _number_series(places, part.nonfinite)


def _drift_series(engine: MergedEngine, places: _Places, values: npt.NDArray[Any], detail: Detail) -> Iterator[Series]:
    """Of values [L, H, 2, E]: at a coarser detail than head the one that is farthest from 0."""
    by_place = values  # [K, heads of a place, 2, E]
    if detail == "model":
        by_place = values.reshape(1, -1, *values.shape[2:])
    elif detail == "head":
        by_place = values[there(engine)][:, None]
    known = np.where(np.isnan(by_place), 0.0, by_place)
    worst = np.take_along_axis(known, np.abs(known).argmax(axis=1)[:, None], axis=1)[:, 0]
    numbers = np.where(np.isnan(by_place).all(axis=1), np.nan, worst).tolist()
    rows, columns, all_labels = places.of()
    for k, p, labels in zip(rows.tolist(), columns.tolist(), all_labels, strict=True):
        for e, statistic in enumerate(COMPARED):
            if not math.isnan(numbers[k][p][e]):
                where = (*labels[: len(ENGINE_LABELS) + 1], statistic.name, *labels[len(ENGINE_LABELS) + 1 :])
                yield Series(where, numbers[k][p][e], engine.start_time_s)


def _worker_series(engine: MergedEngine) -> Iterator[Series]:
    for worker in engine.workers:
        places = (from_to(worker.layers), from_to(worker.heads))
        labels = (engine.model_name, engine.engine, str(worker.rank), worker.host, *places)
        yield Series(labels, 1, engine.start_time_s)


def _engine_values(engine: MergedEngine, errors: Mapping[str, int]) -> Iterator[tuple[Family, tuple[str, ...], float]]:
    """Values of the metrics per engine, with the values of their own labels; `errors` are added to the engine's."""
    for entry in ENGINE_NUMBERS:
        family, number = _OF_ENGINE[entry.name], cast(Any, engine.numbers[entry.name])
        if entry.kind == "info":
            yield family, tuple(number.get(label, "") for label in entry.labels), 1
        elif entry.labels:
            more = errors if entry.name == "errors" else {}
            for value in sorted({*entry.values, *number, *more}):
                yield family, (value,), number.get(value, 0) + more.get(value, 0)
        else:
            yield family, (), int(number) if entry.holds is bool else number


def samples_per_place(with_drift: bool = False) -> int:
    """Prometheus samples of the statistics' metrics for one engine and one (layer, head) or whatever the detail
    shows.

    A histogram has a sample per bucket, and `_count` and `_sum` unless its values may be negative; with a baseline a
    statistic has an index and a shift as well.
    """
    total = 0
    for statistic in STATISTICS:
        if statistic.exported:
            phases = 1 if statistic.decode_only else len(PHASES)
            total += phases * (NUM_BUCKETS + (0 if statistic.signed else 2) + (2 if with_drift else 0))
    return total + 3 * len(PHASES)  # window_max, rows and nonfinite


def series_count(detail: Detail, layer_heads: Sequence[int], with_drift: bool = False) -> int:
    """Prometheus samples of the metrics of one engine's layers and heads, checks included, when every series exists.

    What exists only while something is wrong comes on top: at most a sample per layer and rank, and one per rank.

    Args:
        detail: model, layer or head.
        layer_heads: query heads, of all ranks, of each observed layer.
        with_drift: whether there is a baseline to compare with, which brings further series.
    """
    places = {"model": 1, "layer": len(layer_heads), "head": sum(layer_heads)}[detail]
    checked = 1 if detail == "model" else len(layer_heads)
    return places * samples_per_place(with_drift) + checked * CHECK_SAMPLES


def adapter_series_count(slots: int) -> int:
    """Prometheus samples of one engine by LoRA adapter, once every slot of `core/adapter_slots.py` has been used."""
    return slots * (samples_per_place() - len(PHASES)) if slots > 1 else 0  # no window_max


def effective_detail(
    detail: Detail,
    max_series: int,
    engines: Sequence[MergedEngine],
    with_drift: bool = False,
    scores: ScoreTotals | None = None,
) -> tuple[Detail, str | None]:
    """`fitting_detail` for the engines of a server."""
    scored = 0 if scores is None or not scores.names else score_series_count(len(scores.names))
    besides = sum(scored + adapter_series_count(engine.adapter_slots) for engine in engines)
    return fitting_detail(detail, max_series, [engine.layer_heads for engine in engines], with_drift, besides)


def _fitting_settings(detail: Detail, used: Detail, max_series: int, needed: Callable[[Detail], int]) -> Iterator[str]:
    """What may be set so that nothing falls back."""
    if needed(detail) <= MAX_SERIES:
        yield f"raise max_series to {needed(detail)}"
    if needed(used) <= max_series:
        yield f"set detail to {used}"
    elif used != detail:
        yield f"set detail to {used} and max_series to {needed(used)}"


def fitting_detail(
    detail: Detail, max_series: int, shapes: Sequence[Sequence[int]], with_drift: bool = False, besides: int = 0
) -> tuple[Detail, str | None]:
    """The finest detail, at most the wanted one, that keeps a server within `max_series`.

    Args:
        shapes: query heads of each observed layer, for each engine.
        besides: series that the server has at every detail.

    Returns:
        The detail, and a warning for the log if it is not the wanted one (or if even `model` is too many).
    """

    def needed(at: Detail) -> int:
        return besides + sum(series_count(at, layer_heads, with_drift) for layer_heads in shapes)

    used = detail
    while needed(used) > max_series and used in _COARSER:
        used = _COARSER[used]
    if needed(detail) <= max_series:
        return detail, None
    result = f"using detail {used} with {needed(used)} series"
    if needed(used) > max_series:
        result += ", the coarsest there is"
    return used, (
        f"export.prometheus.max_series is {max_series}, but detail {detail} needs {needed(detail)} series; "
        f"{result}; {' or '.join(_fitting_settings(detail, used, max_series, needed))}"
    )
