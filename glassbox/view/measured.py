"""What one run measured, as arrays; means, quantiles and differences of it.

Owns the one form in which everything that looks from outside has a run, wherever it was read from. It does no
input or output.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.accumulator_arrays import ARRAY, CUMULATIVE_ARRAYS
from glassbox.core.histograms import quantiles
from glassbox.core.printable import printable
from glassbox.core.statistics import INDEX, PHASES, STATISTICS, Phase, Statistic
from glassbox.store.merge import DETAILS, Detail

Floats = npt.NDArray[np.float64]

_MAX_MESSAGE: Final = 1000
# The largest models have some 128 layers of 128 heads; more than twice as many are none, and gigabytes.
MAX_PLACES: Final = 1 << 15
_MAX_NAME: Final = 512
_MAX_SUM: Final = 1e200


class ViewError(ValueError):
    """What was asked for can't be read or shown. `str()` is one line with the remedy."""

    def __init__(self, message: str) -> None:
        # Of a name that a page or a file gives it has only the beginning.
        text = printable(" ".join(message.split()))
        super().__init__(text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}...")


@dataclass(frozen=True)
class Engines:
    """What is known of the engines beside attention. None: the source doesn't tell.

    Attributes:
        steps, sampled_steps: of all engines.
        sample_rate: the largest.
        overhead_s: seconds spent on measuring, of the slowest engine.
        dropped: rows by reason; errors: by stage.
        layers_observed, layers_bypassed: of one engine (for all reasons), the largest.
        layers_wrong: of all engines and ranks, those whose output was not reproduced.
        build: version, vllm_version, backend.
    """

    steps: float = 0.0
    sampled_steps: float = 0.0
    sample_rate: float | None = None
    overhead_s: float | None = None
    dropped: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] | None = None
    layers_observed: float | None = None
    layers_bypassed: float | None = None
    layers_wrong: int = 0
    build: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measured:
    """The attention of one run, all engines added.

    L = len(layers), H = len(heads), phases in the order of PHASES, S and B of `statistics`.

    Attributes:
        source: URL or file.
        model_name: as served.
        engine_names: those that were added.
        time_s: Unix time of the last number; window_s: seconds that the numbers cover, None if unknown.
        detail: model has the one layer and head None, layer the one head None.
        layers, heads: global indices, ascending.
        counts: [L, H, 2, S, B]; sums: [L, H, 2, S], NaN where none is exported; rows, nonfinite: [L, H, 2].
        window_max: [L, H, 2], largest score; -inf if unknown.
    """

    source: str
    model_name: str
    engine_names: tuple[str, ...]
    time_s: float
    window_s: float | None
    detail: Detail
    layers: tuple[int | None, ...]
    heads: tuple[int | None, ...]
    counts: Floats
    sums: Floats
    rows: Floats
    nonfinite: Floats
    window_max: Floats
    engines: Engines = Engines()

    def counts_of(self, statistic: Statistic, phase: Phase | None) -> Floats:
        """[L, H, B], rows per bucket; `phase` None is both."""
        counts = self.counts[:, :, :, INDEX[statistic.name]]
        return counts.sum(axis=2) if phase is None else counts[:, :, PHASES.index(phase)]

    def rows_of(self, phase: Phase | None) -> Floats:
        """[L, H], rows measured."""
        return self.rows.sum(axis=2) if phase is None else self.rows[:, :, PHASES.index(phase)]

    def mean(self, statistic: Statistic, phase: Phase | None) -> Floats:
        """[L, H]; NaN without rows, and for a statistic of which no sum is known."""
        sums = self.sums[:, :, :, INDEX[statistic.name]]
        total = sums.sum(axis=2) if phase is None else sums[:, :, PHASES.index(phase)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / self.counts_of(statistic, phase).sum(axis=-1)

    def quantile(self, statistic: Statistic, phase: Phase | None, q: float) -> Floats:
        """[L, H], interpolated in the buckets; NaN without rows."""
        return quantiles(statistic, self.counts_of(statistic, phase), q)

    def typical(self, statistic: Statistic, phase: Phase | None) -> Floats:
        """[L, H], the mean; for a statistic that may be negative (Prometheus has no sum of it) the median."""
        return self.quantile(statistic, phase, 0.5) if statistic.signed else self.mean(statistic, phase)

    def coarser(self, detail: Detail) -> "Measured":
        """The same at a coarser detail.

        Raises:
            ViewError: if that is finer than what there is.
        """
        if DETAILS.index(detail) > DETAILS.index(self.detail):
            raise ViewError(
                f"{self.source} has detail {self.detail}, {detail} is needed; "
                f"set export.prometheus.detail: {detail} in the server's YAML (takes effect within two seconds)"
            )
        if detail == self.detail:
            return self
        axes = (1,) if detail == "layer" else (0, 1)
        arrays: dict[str, Any] = {
            name: entry.reduce(getattr(self, name), axes, keepdims=True) for name, entry in ARRAY.items()
        }
        return replace(
            self,
            detail=detail,
            layers=self.layers if detail == "layer" else (None,),
            heads=(None,),
            **arrays,
        )

    def plus(self, other: "Measured") -> "Measured":
        """Both together, of the same detail: rows add up, of the largest score the larger counts.

        The time covered reaches from the earlier beginning to the later end.
        """
        layers, heads = places([*product(self.layers, self.heads), *product(other.layers, other.heads)])
        both = replace(self, layers=layers, heads=heads)
        mine, others = _arrays_at(self, both), _arrays_at(other, both)
        arrays: dict[str, Any] = {name: entry.combine(mine[name], others[name]) for name, entry in ARRAY.items()}
        end = max(self.time_s, other.time_s)
        begin = min(m.time_s - (m.window_s or 0.0) for m in (self, other))
        return replace(
            both,
            engine_names=tuple(sorted({*self.engine_names, *other.engine_names})),
            time_s=end,
            window_s=end - begin,
            engines=replace(
                self.engines if self.time_s > other.time_s else other.engines,
                steps=self.engines.steps + other.engines.steps,
                sampled_steps=self.engines.sampled_steps + other.engines.sampled_steps,
            ),
            **arrays,
        )

    def only(self, part: "Measured") -> "Measured":
        """Of a part of this run the numbers, at all layers and heads of the run."""
        return replace(part, layers=self.layers, heads=self.heads, **_arrays_at(part, self))

    def since(self, earlier: "Measured") -> "Measured":
        """What came after `earlier`, of the same source; all of it if the server began anew in between."""
        same = (self.model_name, self.detail) == (earlier.model_name, earlier.detail)
        then = _arrays_at(earlier, self) if same else {}
        steps = self.engines.steps - earlier.engines.steps
        if not same or steps < 0 or any(np.any(getattr(self, n) < then[n]) for n in ("rows", "counts")):
            return replace(self, window_s=None)
        return replace(
            self,
            window_s=self.time_s - earlier.time_s,
            engines=_engines_since(self.engines, earlier.engines),
            **{name: getattr(self, name) - then[name] for name in CUMULATIVE_ARRAYS},
        )


def exported_statistics(phase: Phase | None = None) -> list[Statistic]:
    """The statistics that have a histogram metric (and values in that phase), in the order of the table."""
    return [s for s in STATISTICS if s.exported and not (s.decode_only and phase == Phase.PREFILL)]


def find_statistic(name: str) -> Statistic:
    """A statistic by its name.

    Raises:
        ViewError: if there is none; names those that there are.
    """
    if name not in INDEX:
        raise ViewError(f"statistic must be one of {', '.join(INDEX)}, got {name!r}")
    return STATISTICS[INDEX[name]]


def empty_arrays(num_layers: int, num_heads: int) -> dict[str, Floats]:
    """The arrays of a `Measured` before anything is in them."""
    return {name: np.full(entry.shape(num_layers, num_heads), float(entry.nothing)) for name, entry in ARRAY.items()}


def places(keys: Iterable[tuple[int | None, int | None]]) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """Layers and heads, ascending, of (layer, head) pairs; without any, one place that stands for all.

    Raises:
        ViewError: there are more than MAX_PLACES.
    """
    pairs = set(keys) or {(None, None)}
    layers = sorted({layer for layer, _ in pairs}, key=_none_first)
    heads = sorted({head for _, head in pairs}, key=_none_first)
    if len(layers) * len(heads) > MAX_PLACES:
        raise ViewError(
            f"{len(layers)} layers of {len(heads)} heads are those of no model; is it a page or file of one?"
        )
    return tuple(layers), tuple(heads)


def checked_name(text: str) -> str:
    """A name that a page or a file gives, as it may be shown.

    Raises:
        ValueError: it is too long for one.
    """
    if len(text) > _MAX_NAME:
        raise ValueError(f"a name of {len(text)} characters")
    return printable(text)


def check_numbers(arrays: Mapping[str, Floats]) -> None:
    """Refuse counts that none can be.

    Raises:
        ValueError: a count is negative, infinite or no number; a sum would overflow if others are added.
    """
    for name in ("rows", "nonfinite", "counts"):
        if not (np.isfinite(arrays[name]).all() and (arrays[name] >= 0).all()):
            raise ValueError(f"{name} must be numbers from 0")
    sums = arrays["sums"]
    if (np.abs(sums[np.isfinite(sums)]) > _MAX_SUM).any():
        raise ValueError(f"sums must be at most {_MAX_SUM:g}")


def _none_first(index: int | None) -> int:
    return -1 if index is None else index


def _placed(values: Floats, of: Measured, like: Measured, fill: float) -> Floats:
    """An array of one run at the layers and heads of another; `fill` where it has none."""
    result = np.full((len(like.layers), len(like.heads), *values.shape[2:]), fill)
    rows = {layer: i for i, layer in enumerate(of.layers)}
    columns = {head: i for i, head in enumerate(of.heads)}
    to_rows = [i for i, layer in enumerate(like.layers) if layer in rows]
    to_columns = [i for i, head in enumerate(like.heads) if head in columns]
    source = np.ix_([rows[like.layers[i]] for i in to_rows], [columns[like.heads[i]] for i in to_columns])
    result[np.ix_(to_rows, to_columns)] = values[source]
    return result


def _arrays_at(run: Measured, like: Measured) -> dict[str, Any]:
    """All arrays of one run at the layers and heads of another."""
    return {name: _placed(getattr(run, name), run, like, fill=float(entry.nothing)) for name, entry in ARRAY.items()}


def _engines_since(now: Engines, then: Engines) -> Engines:
    def less(new: Mapping[str, float] | None, old: Mapping[str, float] | None) -> dict[str, float]:
        return {key: value - (old or {}).get(key, 0.0) for key, value in (new or {}).items()}

    overhead = None
    if now.overhead_s is not None and then.overhead_s is not None:
        overhead = now.overhead_s - then.overhead_s
    return replace(
        now,
        steps=now.steps - then.steps,
        sampled_steps=now.sampled_steps - then.sampled_steps,
        overhead_s=overhead,
        dropped=less(now.dropped, then.dropped),
        errors=None if now.errors is None else less(now.errors, then.errors),
    )
