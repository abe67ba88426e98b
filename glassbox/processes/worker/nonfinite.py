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
        self._seen = self._measured = np.zeros(len(layers), dtype=np.int64)
        # When each layer's newest rows were such ones; never, if they are finite.
        self._spoiled_s = np.full(len(layers), -np.inf)
        self._last: tuple[int, float] | None = None

    def first(self, nonfinite: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], now_s: float) -> int | None:
        """Global index of the first layer that had non-finite rows lately; None if none had.

        A layer that was not measured since is taken to be as it was: layers may take turns.

        Args:
            nonfinite, rows: [L, H, 2], cumulative.
            now_s: seconds, monotonic.
        """
        counts, measured = nonfinite.sum((1, 2)), rows.sum((1, 2))
        self._spoiled_s[measured > self._measured] = -np.inf
        self._spoiled_s[counts > self._seen] = now_s
        self._seen, self._measured = counts, measured
        lately = np.flatnonzero(now_s - self._spoiled_s <= _LATELY_S)
        if len(lately):
            self._last = (self._layers[lately[0]], float(self._spoiled_s[lately].max()))
        if self._last is None or now_s - self._last[1] > _LATELY_S:
            return None
        return self._last[0]
