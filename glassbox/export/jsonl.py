"""Window summaries as lines of JSON: what was measured since the line before.

Owns the difference between two merged views. Numbers are derived from the same histograms as the metrics, so a
quantile is interpolated in its bucket, never exact. How the file is rotated is `rotation.py`'s.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.core.histograms import quantiles
from glassbox.core.statistics import PHASES, STATISTICS
from glassbox.export.family import DETAIL_LABELS
from glassbox.export.rotation import BYTES_PER_MB, RotatingFile
from glassbox.store.merge import Aggregate, Detail, MergedEngine, aggregate


class WindowSummaries:
    """Turns consecutive merged views into one summary per engine and window.

    Args:
        skip_first: begin with the difference to the first view, not with everything up to it: for an exporter
            that takes over from another, which has written that.
    """

    def __init__(self, skip_first: bool = False) -> None:
        self._skip_first = skip_first
        self._last: dict[tuple[str, str], MergedEngine] = {}

    def copy(self) -> "WindowSummaries":
        """One that goes on from here by itself."""
        other = WindowSummaries(self._skip_first)
        other._last = dict(self._last)
        return other

    def summarize(self, engines: Sequence[MergedEngine], detail: Detail) -> list[dict[str, Any]]:
        """One JSON object per engine that measured rows since the call before.

        Keys: time, window_s (seconds), model_name, engine, detail, sample_rate, steps, sampled_steps, and
        places: one object per layer (and head) and phase with rows, nonfinite, max_logit_max, and per
        statistic count, mean, p50, p95, and the rows in each of its buckets. If LoRA adapters are told apart, also
        adapters: the like for each of them (`adapter`) and phase; their max_logit_max is not known.
        """
        lines = []
        for engine in engines:
            key = (engine.model_name, engine.engine)
            last = self._last.get(key)
            if last is not None and (engine.steps < last.steps or engine.rows.sum() < last.rows.sum()):
                last = None  # the run directory was emptied: everything in it is new
            first_seen = key not in self._last
            self._last[key] = engine
            if first_seen and self._skip_first:
                continue
            line = _summary(engine, last, detail)
            if line["places"]:
                lines.append(line)
        self._skip_first = False if engines else self._skip_first
        return lines


def _summary(engine: MergedEngine, last: MergedEngine | None, detail: Detail) -> dict[str, Any]:
    part = aggregate(engine, detail)
    window = _difference(part, aggregate(last, detail)) if last is not None else part
    since = last.time_s if last is not None else engine.start_time_s
    line = {
        "time": round(engine.time_s, 3),
        "window_s": round(engine.time_s - since, 3),
        "model_name": engine.model_name,
        "engine": engine.engine,
        "detail": detail,
        "sample_rate": engine.numbers["sample_rate"],
        "steps": engine.steps - (last.steps if last else 0),
        "sampled_steps": engine.sampled_steps - (last.sampled_steps if last else 0),
        "places": list(_places(window, lambda labels: _indices(detail, labels))),
    }
    if (apart := engine.by_adapter) is not None:
        before = last.by_adapter if last is not None else None
        came = apart if before is None else _difference(apart, before)
        line["adapters"] = list(_places(came, lambda labels: {"adapter": labels[0]}))
    return line


def _indices(detail: Detail, labels: tuple[str, ...]) -> dict[str, int]:
    return {name: int(label) for name, label in zip(DETAIL_LABELS[detail], labels, strict=True)}


def _difference(part: Aggregate, last: Aggregate) -> Aggregate:
    """What came since `last`; places that it did not have are new."""
    old = {labels: k for k, labels in enumerate(last.labels)}
    at = np.array([old.get(labels, -1) for labels in part.labels])

    def since(now: npt.NDArray[Any], then: npt.NDArray[Any]) -> Any:
        result = now.copy()
        result[at >= 0] -= then[at[at >= 0]]
        return result

    return replace(part, **{name: since(getattr(part, name), getattr(last, name)) for name in CUMULATIVE_ARRAYS})


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _places(window: Aggregate, named: Callable[[tuple[str, ...]], Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    median, high = (
        [quantiles(statistic, window.counts[:, :, s], q) for s, statistic in enumerate(STATISTICS)] for q in (0.5, 0.95)
    )
    for k, labels in enumerate(window.labels):
        for p, phase in enumerate(PHASES):
            if window.rows[k, p] <= 0:
                continue
            place: dict[str, Any] = {
                **named(labels),
                "phase": phase.value,
                "rows": int(window.rows[k, p]),
                "nonfinite": int(window.nonfinite[k, p]),
                "max_logit_max": _finite(float(window.window_max[k, p])),
                "statistics": {},
            }
            for s, statistic in enumerate(STATISTICS):
                counts = window.counts[k, p, s].tolist()
                if (count := sum(counts)) > 0:
                    place["statistics"][statistic.name] = {
                        "count": count,
                        "mean": _finite(float(window.sums[k, p, s]) / count),
                        "p50": float(median[s][k, p]),
                        "p95": float(high[s][k, p]),
                        "buckets": counts,
                    }
            yield place


class JsonlSink:
    """Writes the window summaries of a server to a file.

    Args:
        path: of the file; its directory is made if there is none.
        max_mb: size (in 10^6 bytes) at which it is rotated; `KEPT_FILES` older ones are kept.
        skip_first: see `WindowSummaries`.
    """

    def __init__(self, path: Path, max_mb: int, skip_first: bool = False) -> None:
        self._file = RotatingFile(path, max_mb * BYTES_PER_MB)
        self._summaries = WindowSummaries(skip_first)

    def write(self, engines: Sequence[MergedEngine], detail: Detail) -> None:
        """Append one line per engine that measured rows since the call before.

        Raises:
            OSError: if it cannot be written; the next window begins where this one does.
        """
        summaries = self._summaries.copy()
        lines = summaries.summarize(engines, detail)
        self._file.append([json.dumps(line, allow_nan=False, separators=(",", ":")) for line in lines])
        self._summaries = summaries
