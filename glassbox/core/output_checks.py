"""THE tables of what the check of a layer's output finds: sums per row and head, sums per row and KV head, and what is
kept of them per layer.

Owns columns, buckets and states. A check takes a few rows of a step: the output that vLLM's kernel served is compared
with softmax(scores) V in float32, from the cache as glassbox reads it, and K and V as computed with what the cache gave
back. Kernels fill the sums, `measure` judges them, snapshots carry what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import PHASES

# Of one row and query head, float32. o: served output, r: reference in float32, e = o - r, c: how r moves when the
# products q.k grow by a factor (its derivative by the factor's logarithm), b_d: the largest |e_d| that rounding in the
# kernel's types explains (`kernels/output_rounding.py`). All sums are over the D elements; "noise" is what rounding
# makes on average.
OUTPUT_SUMS: Final = (
    "worst",  # max |e_d| / b_d
    "error2",  # sum e^2
    "noise2",  # what rounding makes of error2
    "norm2",  # sum r^2
    "gain_dot",  # sum e r
    "gain_noise2",  # what rounding makes of gain_dot^2
    "gain_shared",  # what it makes of gain_dot where it moves all weights alike, which no average over keys removes
    "scale_dot",  # sum e c; this and the next three are 0 where c is lost in float32's rounding
    "scale_norm2",  # sum c^2
    "scale_noise2",  # as of the gain
    "scale_shared",
    "nonfinite",  # NONFINITE_*; where it isn't 0 the others are 0
)
OUTPUT_SUM: Final = {name: column for column, name in enumerate(OUTPUT_SUMS)}

# Values of "nonfinite": what has an element that is not finite, or not in the output's type.
NONFINITE_BOTH: Final = 1  # nothing to compare
NONFINITE_OUTPUT: Final = 2  # the served output alone
NONFINITE_REFERENCE: Final = 3  # what its keys and values give alone

# Of one row and KV head, float32: the row's own K and V as computed, against what the cache holds of them.
KV_SUMS: Final = (
    "key_error2",  # sum (stored * scale - computed)^2
    "key_norm2",  # sum computed^2
    "key_saturated",  # elements stored as the largest number of their type
    "value_error2",
    "value_norm2",
    "value_saturated",
)
KV_SUM: Final = {name: column for column, name in enumerate(KV_SUMS)}

# Upper bounds of the error ratio's histogram: 1 is the largest error that rounding explains.
ERROR_RATIO_BUCKETS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 20.0, 100.0)
KV_TENSORS: Final = ("key", "value")


class LayerState(IntEnum):
    """Whether a layer's output was reproduced."""

    PENDING = 0  # not tried yet
    CERTIFIED = 1
    FAILED = 2  # it was not, and the layer is not observed any more


@dataclass(frozen=True, eq=False)
class LayerChecks:
    """What is known of the L layers of a worker, or of an engine.

    Attributes:
        state: int8 [L], LayerState.
        error_counts: int64 [L, 2, len(ERROR_RATIO_BUCKETS) + 1], checked rows by the error ratio of their worst head
            and by phase; not cumulative over the buckets.
        error_sums: float64 [L, 2], of these ratios.
        worst_ratio: float32 [L], largest ratio of the last check of the layer, NaN before the first.
        worst_head: int32 [L], global index of that head, -1 before the first.
        kv_error: float32 [L, 2], relative error of the cache by KV_TENSORS in the last check, sqrt(sum error^2 /
            sum norm^2); NaN if it is not known.
        kv_saturated: float32 [L, 2], share of elements at the end of their type's range; NaN if it is not known.
    """

    state: npt.NDArray[np.int8]
    error_counts: npt.NDArray[np.int64]
    error_sums: npt.NDArray[np.float64]
    worst_ratio: npt.NDArray[np.float32]
    worst_head: npt.NDArray[np.int32]
    kv_error: npt.NDArray[np.float32]
    kv_saturated: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shapes = _shapes(len(self.state))
        for name, (shape, _, _) in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(getattr(self, name).shape)}")

    @classmethod
    def nothing(cls, num_layers: int) -> "LayerChecks":
        """Before the first check."""
        arrays: dict[str, Any] = {
            name: np.full(shape, fill, dtype=dtype) for name, (shape, dtype, fill) in _shapes(num_layers).items()
        }
        return cls(**arrays)


def _shapes(num_layers: int) -> dict[str, tuple[tuple[int, ...], str, float]]:
    """Shape, type and "nothing" of each array."""
    phases, tensors = len(PHASES), len(KV_TENSORS)
    return {
        "state": ((num_layers,), "int8", LayerState.PENDING),
        "error_counts": ((num_layers, phases, len(ERROR_RATIO_BUCKETS) + 1), "int64", 0),
        "error_sums": ((num_layers, phases), "float64", 0),
        "worst_ratio": ((num_layers,), "float32", np.nan),
        "worst_head": ((num_layers,), "int32", -1),
        "kv_error": ((num_layers, tensors), "float32", np.nan),
        "kv_saturated": ((num_layers, tensors), "float32", np.nan),
    }


LAYER_CHECK_DTYPES: Final = {name: dtype for name, (_, dtype, _) in _shapes(0).items()}


@dataclass(frozen=True)
class Verdict:
    """Of one layer's rows in one check.

    Attributes:
        ratios: of each row the error ratio of its worst head, 1 is the largest error that rounding explains.
        ratio: the largest of everything that was tested: single rows, the mean square of all, a common factor of a
            head's output, a common factor of the layer's scores. Above 1 the layer was not reproduced.
        head: local index of the head that it belongs to.
        what: what differed and by how much, a sentence for the log; empty if nothing did.
    """

    ratios: Sequence[float]
    ratio: float
    head: int
    what: str = ""

    @property
    def reproduced(self) -> bool:
        """Whether the layer's output is what glassbox computes from what it reads."""
        return self.ratio <= 1
