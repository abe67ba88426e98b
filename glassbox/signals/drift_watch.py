"""How far the heads are from the baseline now: the most recent rows of each engine against the baseline's file.

Owns reading the file again when it or the configuration changed, the window of most recent rows, and the comparison
per head. The formulas are `drift.py`, the file is `baseline.py`, how it is shown is `export/families.py`. Called
where families are built, thus by whoever exports, never by a worker.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.config.load import BaselineConfig, GlassboxConfig, StatisticsConfig
from glassbox.core.accumulator_arrays import narrowed
from glassbox.core.files import FileVersion, own_version
from glassbox.core.logs import get_logger
from glassbox.core.statistics import INDEX, NUM_BUCKETS, STATISTICS, Statistic
from glassbox.signals.baseline import Baseline, BaselineError, load_baseline
from glassbox.signals.drift import bucket_midpoints, population_stability_index, standardised_mean_difference
from glassbox.store.merge import MergedEngine

logger = get_logger(__name__)

COMPARED: Final[tuple[Statistic, ...]] = tuple(statistic for statistic in STATISTICS if statistic.exported)
# Of no overlap at all. A head that never varies makes it infinite, which no dashboard can scale.
LARGEST_SHIFT: Final = 10.0
_COLUMNS: Final = [INDEX[statistic.name] for statistic in COMPARED]
_MIDPOINTS: Final = tuple(bucket_midpoints(statistic) for statistic in COMPARED)
# Older states that are kept per window, besides the newest: at 80 layers of 64 heads each is some megabytes.
_STATES: Final = 4

EngineKey = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Drift:
    """Of one engine, with L and H as its arrays have them and E = len(COMPARED); NaN where too few rows are known.

    Attributes:
        psi: float64 [L, H, 2, E], population stability index.
        shift: float64 [L, H, 2, E], standardised mean difference, within +-LARGEST_SHIFT; above 0 if the mean rose.
    """

    psi: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def expected_counts(baseline: Baseline, layers: Sequence[int]) -> npt.NDArray[np.int64]:
    """The baseline's rows per bucket at these layers (global indices), int64 [L, H, 2, E, B]; 0 where it has none."""
    expected = np.zeros((len(layers), *baseline.counts.shape[1:3], len(COMPARED), NUM_BUCKETS), dtype=np.int64)
    place = {layer: k for k, layer in enumerate(baseline.layers)}
    for k, layer in enumerate(layers):
        if layer in place:
            expected[k] = baseline.counts[place[layer]][:, :, _COLUMNS]
    return expected


def compare(expected: npt.NDArray[np.int64], recent: npt.NDArray[np.int64], min_rows: int) -> Drift:
    """Recent rows against expected ones, head by head.

    Args:
        expected: of `expected_counts`.
        recent: int64 [L, H, 2, E, B], rows per bucket.
        min_rows: that a head must have on either side.
    """
    shape = recent.shape[:-1]
    enough = (expected.sum(axis=-1) >= min_rows) & (recent.sum(axis=-1) >= min_rows)
    psi, shift = np.full(shape, np.nan), np.full(shape, np.nan)
    for e, midpoints in enumerate(_MIDPOINTS):
        at = enough[..., e]
        before, now = expected[:, :, :, e][at], recent[:, :, :, e][at]
        psi[..., e][at] = population_stability_index(before, now)
        moved = standardised_mean_difference(before, now, midpoints)
        shift[..., e][at] = np.clip(moved, -LARGEST_SHIFT, LARGEST_SHIFT)
    return Drift(psi, shift)


class RecentRows:
    """The rows of the last `window_s` seconds of an engine, from its cumulative counts.

    A few older states are kept, at least a quarter of the window apart; the difference is taken to the newest one that
    is at least a window old. So a window may be up to a quarter longer, and longer still if nobody looks.
    """

    def __init__(self, engine: MergedEngine, window_s: float) -> None:
        # (time, counts); no counts: zeros.
        self._states: deque[tuple[float, npt.NDArray[np.unsignedinteger] | None]] = deque()
        self._shape = (engine.layers, engine.num_heads)
        if engine.time_s - engine.start_time_s <= window_s:
            self._states.append((engine.start_time_s, None))

    def fits(self, engine: MergedEngine) -> bool:
        """False if the engine's counts can't go on from those seen: other layers, or fewer rows than before."""
        if (engine.layers, engine.num_heads) != self._shape:
            return False
        newest = self._states[-1][1] if self._states else None
        return newest is None or int(newest.sum(dtype=np.int64)) <= int(engine.counts[:, :, :, _COLUMNS].sum())

    def update(self, engine: MergedEngine, window_s: float) -> npt.NDArray[np.int64]:
        """Rows per bucket of the window that ends now, int64 [L, H, 2, E, B]."""
        now, counts = engine.time_s, engine.counts[:, :, :, _COLUMNS]
        states = self._states
        # The newest one gives way unless it is far from one of its neighbours (after it there may have been a pause).
        apart_s = window_s / _STATES
        if len(states) > 1 and states[-1][0] - states[-2][0] < apart_s and now - states[-1][0] < apart_s:
            states.pop()
        states.append((now, narrowed(counts)))
        while len(states) > 1 and now - states[1][0] >= window_s:
            states.popleft()
        oldest = states[0][1]
        return counts if oldest is None else counts - oldest.astype(np.int64)


class DriftWatch:
    """The comparison of a server with its baseline, kept up to date.

    Attributes:
        expires_s: Unix time at which the first engine of the last comparison has been idle for a window.

    Args:
        on_error: called with each new reason why there is nothing to show, once until it changes.
    """

    def __init__(self, on_error: Callable[[str], None]) -> None:
        self._on_error = on_error
        self._version: tuple[Path, FileVersion | None] | None = None
        self._baseline: Baseline | None = None
        self._refused: set[str] = set()
        self._recent: dict[EngineKey, RecentRows] = {}
        # By the engine's layers; at 80 layers of 64 heads gathering it takes as long as the comparison.
        self._expected: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
        self.expires_s = math.inf

    @property
    def active(self) -> bool:
        """True if there is a baseline to compare with."""
        return self._baseline is not None

    def reload(self, config: BaselineConfig) -> object:
        """Read the file if it or its name changed; a `stat` if not.

        Returns:
            what changes whenever the result of `compare` may.
        """
        path = config.expanded_path
        version = None if path is None else (path, own_version(path))
        if version != self._version:
            self._version = version
            self._baseline = None
            self._refused.clear()
            self._expected.clear()
            if path is not None:
                self._load(path)
            if self._baseline is None:
                self._recent.clear()
        return (version, config.min_rows, config.window_s)

    def _load(self, path: Path) -> None:
        try:
            self._baseline = load_baseline(path, own=True)
        except BaselineError as error:
            self._on_error(str(error))
        else:
            logger.info("glassbox compares with the baseline %s (%s)", path, self._baseline.model_name)

    def compare(
        self, engines: Sequence[MergedEngine], config: GlassboxConfig, now_s: float
    ) -> Mapping[EngineKey, Drift]:
        """Drift of each engine that can be compared; none of those that were idle for longer than a window.

        Args:
            engines: merged snapshots of this moment.
            config: of this moment.
            now_s: Unix time.
        """
        settings = config.baseline
        found: dict[EngineKey, Drift] = {}
        self.expires_s = math.inf
        if self._baseline is None:
            return found
        for engine in engines:
            if not self._comparable(self._baseline, engine, config.statistics):
                continue
            key = (engine.model_name, engine.engine)
            if key not in self._recent or not self._recent[key].fits(engine):
                self._recent[key] = RecentRows(engine, settings.window_s)
            rows = self._recent[key].update(engine, settings.window_s)
            # What an idle engine's last rows said is no news of now.
            if (expires_s := engine.time_s + settings.window_s) >= now_s:
                if engine.layers not in self._expected:
                    self._expected[engine.layers] = expected_counts(self._baseline, engine.layers)
                found[key] = compare(self._expected[engine.layers], rows, settings.min_rows)
                self.expires_s = min(self.expires_s, expires_s)
        return found

    def _comparable(self, baseline: Baseline, engine: MergedEngine, statistics: StatisticsConfig) -> bool:
        problem = mismatch(baseline, engine, statistics)
        if problem is None:
            return True
        if problem not in self._refused:
            self._refused.add(problem)
            self._on_error(problem)
        return False


def mismatch(baseline: Baseline, engine: MergedEngine, statistics: StatisticsConfig) -> str | None:
    """Why an engine can't be compared with a baseline; None if it can."""
    remedy = "save one from a healthy run of this model with `glassbox baseline save`"
    layers = baseline.num_layers if baseline.num_layers is not None else engine.num_layers
    if (engine.num_layers, engine.num_heads) != (layers, baseline.num_heads) or max(baseline.layers) >= layers:
        ours = f"{engine.model_name} ({engine.num_layers} layers, {engine.num_heads} heads)"
        theirs = f"{baseline.model_name} ({max(layers, max(baseline.layers) + 1)} layers, {baseline.num_heads} heads)"
        return f"baseline.path must be a baseline of {ours}, got one of {theirs}; {remedy}"
    for name in ("sink_tokens", "local_window"):
        used, saved = getattr(statistics, name), getattr(baseline, name)
        if saved is not None and saved != used:
            return f"baseline.path must be a baseline with {name} {used}, got one with {saved}; {remedy}"
    return None
