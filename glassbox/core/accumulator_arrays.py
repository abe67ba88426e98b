"""The table of accumulator arrays: what is summed per layer, head and phase.

Owns of each array its axes, its type, and how two of them become one. Devices, files, merging and readers follow the
table; what the buckets and statistics are is `statistics.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, PHASES

Axis = Literal["phase", "statistic", "bucket"]
_LENGTHS: Final[dict[Axis, int]] = {"phase": len(PHASES), "statistic": NUM_STATISTICS, "bucket": NUM_BUCKETS}


@dataclass(frozen=True)
class AccumulatorArray:
    """An entry of the table.

    Attributes:
        axes: after those of the place, which are [L, H] (layers, heads) unless somebody has summed over them.
        dtype: as NumPy and torch name it.
        cumulative: it only grows, so that two add up and an earlier one can be subtracted. If False, the largest of
            the last window: of two the larger counts, and of a worker that is gone nothing.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: Literal["int64", "float64", "float32"]
    cumulative: bool = True

    @property
    def nothing(self) -> float:
        """Value of a place where nothing was measured."""
        return 0 if self.cumulative else -np.inf

    def shape(self, *places: int) -> tuple[int, ...]:
        """The array's shape for that many places, such as layers and heads."""
        return (*places, *(_LENGTHS[axis] for axis in self.axes))

    def empty(self, *places: int) -> npt.NDArray[Any]:
        """The array before anything was measured."""
        return np.full(self.shape(*places), self.nothing, dtype=self.dtype)

    def combine(
        self, first: npt.NDArray[Any], second: npt.NDArray[Any], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Two of equal shape as one; put into `out`, if that is given."""
        both: npt.NDArray[Any] = (np.add if self.cumulative else np.maximum)(first, second, out=out)
        return both

    def reduce(self, array: npt.NDArray[Any], axes: tuple[int, ...], keepdims: bool = False) -> npt.NDArray[Any]:
        """All that lies along `axes` as one."""
        if self.cumulative:
            return np.asarray(array.sum(axis=axes, keepdims=keepdims))
        return np.asarray(array.max(axis=axes, keepdims=keepdims, initial=-np.inf))


ACCUMULATOR_ARRAYS: Final = (
    AccumulatorArray("counts", ("phase", "statistic", "bucket"), "int64"),
    AccumulatorArray("sums", ("phase", "statistic"), "float64"),
    AccumulatorArray("rows", ("phase",), "int64"),
    AccumulatorArray("nonfinite", ("phase",), "int64"),
    AccumulatorArray("window_max", ("phase",), "float32", cumulative=False),
)
ARRAY: Final = {entry.name: entry for entry in ACCUMULATOR_ARRAYS}
CUMULATIVE_ARRAYS: Final = tuple(entry.name for entry in ACCUMULATOR_ARRAYS if entry.cumulative)


@dataclass(frozen=True, eq=False)
class AccumulatorArrays:
    """The arrays of the table on the host, with S = NUM_STATISTICS, B = NUM_BUCKETS and phases in the order of PHASES.

    Attributes:
        counts: int64 [L, H, 2, S, B], rows per bucket, not cumulative over the buckets.
        sums: float64 [L, H, 2, S], in the statistic's unit.
        rows: int64 [L, H, 2], measured rows, the nonfinite ones included.
        nonfinite: int64 [L, H, 2].
        window_max: float32 [L, H, 2], largest max_logit of the last minute, -inf if there was none.
    """

    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    window_max: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AdapterArrays:
    """The cumulative arrays over all layers and heads, by slot of LoRA adapters (`core/adapter_slots.py`); A slots.

    Attributes:
        counts: int64 [A, 2, S, B].
        sums: float64 [A, 2, S].
        rows, nonfinite: int64 [A, 2].
    """

    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MeasuredArrays(AccumulatorArrays):
    """All that a worker's accumulators hold.

    Attributes:
        by_adapter: of the rows by adapter; None if they are not told apart.
    """

    by_adapter: AdapterArrays | None


def check_shapes(owner: object, names: Iterable[str], *places: int) -> None:
    """See that the owner's arrays of these names have the shapes of the table.

    Raises:
        ValueError: one has not; names it.
    """
    for name in names:
        wanted, found = ARRAY[name].shape(*places), getattr(owner, name).shape
        if found != wanted:
            raise ValueError(f"{name} must have shape {list(wanted)}, got {list(found)}")


def narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Counts in the smallest unsigned type that holds them, a quarter of the file or an eighth; others as they are."""
    if not np.issubdtype(array.dtype, np.integer) or array.min(initial=0) < 0:
        return array
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
