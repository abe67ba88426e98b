"""A source of merged snapshots that no server has measured: any size, a new snapshot at each look."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, PHASES, STATISTICS
from glassbox.export.family_source import FamilySource, Merged
from glassbox.store.merge import MergedEngine, merge
from tests.export_samples import changed, make_snapshot

_STEPS = 12  # different intervals, in turns
_SECONDS = 0.1


def _interval(layers: int, heads: int, number: int) -> dict[str, Any]:
    """Arrays of one interval: each head has its own level of each statistic, which drifts from interval to interval."""
    at_layer, at_head = np.meshgrid(np.linspace(0, 1, layers), np.linspace(0, 1, heads), indexing="ij")
    turn = 2 * np.pi * number / _STEPS
    rng = np.random.default_rng(7)
    level = 0.5 + 0.3 * np.sin(5 * at_layer + 2 * at_head + turn) + rng.uniform(-0.2, 0.2, (layers, heads))
    level = np.clip(level, 0.02, 0.98)[:, :, None, None] * np.linspace(0.7, 1, NUM_STATISTICS)
    level = np.broadcast_to(level, (layers, heads, len(PHASES), NUM_STATISTICS))
    buckets = np.arange(NUM_BUCKETS)
    weight = np.exp(-0.5 * ((buckets - level[..., None] * (NUM_BUCKETS - 1)) / 1.5) ** 2)
    counts = np.round(60 * weight / weight.sum(axis=-1, keepdims=True)).astype(np.int64)
    prefill_only_zero = [s for s, statistic in enumerate(STATISTICS) if statistic.decode_only]
    counts[:, :, 0, prefill_only_zero] = 0
    # One number of rows for all statistics: what rounding took or gave comes back in the fullest bucket.
    finite = 60
    total, fullest = counts.sum(axis=-1, keepdims=True), counts.argmax(axis=-1)[..., None]
    more = np.take_along_axis(counts, fullest, axis=-1) + np.where(total > 0, finite - total, 0)
    np.put_along_axis(counts, fullest, more, axis=-1)
    middles = np.array([np.concatenate(([statistic.buckets[0]], statistic.buckets)) for statistic in STATISTICS])
    rows = np.full((layers, heads, len(PHASES)), finite, dtype=np.int64)
    return {"counts": counts, "sums": (counts * middles).sum(axis=-1), "rows": rows, "nonfinite": np.zeros_like(rows)}


class SyntheticSource(FamilySource):
    """Cumulative snapshots of `layers` x `heads`; one more interval at each look.

    Args:
        layers, heads: of the model.
        config: of the moment; the default has the shortest interval there may be.
        start_time_s: Unix time of the first snapshot.
    """

    def __init__(
        self, layers: int, heads: int, config: GlassboxConfig | None = None, start_time_s: float = 1_700_000_000.0
    ) -> None:
        settings = config or GlassboxConfig.model_validate({"sample_rate": 1.0, "export": {"interval_s": 0.1}})
        super().__init__(Path("/nonexistent"), lambda: settings)
        shape = make_snapshot(layers=tuple(range(layers)), heads=heads, num_layers_total=layers, layers_bypassed={})
        self._engine: MergedEngine = replace(
            merge([shape])[0], start_time_s=start_time_s, time_s=start_time_s, **_interval(layers, heads, 0)
        )
        self._intervals = [_interval(layers, heads, number) for number in range(_STEPS)]
        self._looks = 0

    def versions(self) -> dict[str, tuple[int, int, int]]:
        """Another one each time."""
        self._looks += 1
        return {"worker-0-0-synthetic.npz": (0, self._looks, 0)}

    def merged(self) -> Merged:
        """One interval later than before."""
        old, new = self._engine, self._intervals[self._looks % _STEPS]
        self._engine = changed(
            old,
            time_s=old.time_s + _SECONDS,
            steps=old.steps + 40,
            sampled_steps=old.sampled_steps + 40,
            **{name: getattr(old, name) + array for name, array in new.items()},
        )
        return Merged(self.versions(), None, (self._engine,), has_first=True)
