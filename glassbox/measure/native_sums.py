"""Adding rows to accumulators on the CPU by the native kernel: by torch it takes half as long as measuring them."""

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from glassbox.core.statistics import NUM_BUCKETS, PHASES
from glassbox.kernels.row_stats_native import Sums, native_kernel
from glassbox.measure.accumulate import Accumulators


class NativeSums:
    """Accumulators on the CPU, to which the kernel adds.

    Args:
        accumulators: what `Accumulators.add` adds to as well, and under the same lock.

    Raises:
        NativeError, OSError: there is no kernel.
    """

    def __init__(self, accumulators: Accumulators) -> None:
        self._accumulators, self._add = accumulators, native_kernel().add
        self._sums: Final = Sums(
            counts=accumulators.counts.data_ptr(),
            sums=accumulators.sums.data_ptr(),
            rows=accumulators.rows.data_ptr(),
            nonfinite=accumulators.nonfinite.data_ptr(),
            bounds=accumulators.bounds.data_ptr(),
            places=accumulators.num_adapters * accumulators.num_heads,
            adapter_heads=accumulators.num_heads,
            phases=len(PHASES),
            buckets=NUM_BUCKETS,
        )

    def add(
        self,
        layers: Sequence[int],
        stats: NDArray[np.float32],
        phases: NDArray[np.int64],
        adapters: NDArray[np.int64] | None = None,
    ) -> None:
        """Add rows.

        Args:
            layers: N local layers, those of `stats`.
            stats: [N, R, H, NUM_STATISTICS + 1] of `kernels/row_stats_native.py`; NaN is "no value".
            phases: [R], index into PHASES of each row.
            adapters: [R], slot of each row; None is the first one's.

        Raises:
            ValueError: there is no place for a layer, a head or a slot; the kernel would write beyond the arrays.
        """
        sums, values = self._sums, np.ascontiguousarray(stats, dtype=np.float32)
        sums.num_layers, sums.num_rows, sums.heads = values.shape[:3]
        # Held here for as long as the kernel reads them.
        chosen = np.array(layers, dtype=np.int64)
        phase_of = np.ascontiguousarray(phases, dtype=np.int64)
        adapter_of = None if adapters is None else np.ascontiguousarray(adapters, dtype=np.int64)
        self._check(chosen, values.shape[2], adapter_of)
        sums.stats, sums.layers, sums.phase_of = values.ctypes.data, chosen.ctypes.data, phase_of.ctypes.data
        sums.adapters = None if adapter_of is None else adapter_of.ctypes.data
        with self._accumulators.lock:
            sums.maxima = self._accumulators.window.data_ptr()
            self._add(ctypes.addressof(sums))

    def _check(self, layers: NDArray[np.int64], heads: int, adapters: NDArray[np.int64] | None) -> None:
        largest = 0 if adapters is None else int(adapters.max(initial=0))
        has = self._accumulators
        if layers.max(initial=0) >= has.num_layers or heads > has.num_heads or largest >= has.num_adapters:
            raise ValueError(
                f"accumulators of {has.num_layers} layers, {has.num_heads} heads and {has.num_adapters} adapters must "
                f"have a place for each row, got layer {layers.max(initial=0)}, {heads} heads and adapter {largest}"
            )
