"""Which layer non-finite rows come from: the first one, since everything behind it is spoiled as well."""

from typing import Final

import numpy as np
import numpy.typing as npt

# A layer is named as long as it had such rows within this many seconds.
_LATELY_S: Final = 60.0


class NonfiniteWatch:
    """Follows the cumulative counts of a worker.

    Args:
        layers: global index of each local layer, ascending.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._seen = np.zeros(len(layers), dtype=np.int64)
        self._last: tuple[int, float] | None = None

    def first(self, nonfinite: npt.NDArray[np.int64], now_s: float) -> int | None:
        """Global index of the first layer that had non-finite rows lately; None if none had.

        Args:
            nonfinite: [L, H, 2], cumulative.
            now_s: seconds, monotonic.
        """
        counts = nonfinite.sum((1, 2))
        new = np.flatnonzero(counts > self._seen)
        self._seen = counts
        if len(new):
            self._last = (self._layers[new[0]], now_s)
        if self._last is None or now_s - self._last[1] > _LATELY_S:
            return None
        return self._last[0]
