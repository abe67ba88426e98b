"""Which measurer fits the worker's device."""

from collections.abc import Callable
from typing import Any

import torch

from glassbox.core.errors import ErrorCounter
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import Measurer
from glassbox.measure.deferred import DeferredActions


def make_measurer(
    accumulators: Accumulators,
    local_layers: dict[str, int],
    *,
    sink_tokens: int,
    local_window: int,
    max_rows: int,
    head_size: int,
    query_dtype: torch.dtype,
    deferred: DeferredActions,
    is_piecewise: Callable[[], bool],
    errors: ErrorCounter,
) -> Measurer[Any]:
    """The measurer for the device of `accumulators`.

    Args:
        accumulators: of the observed layers, on the worker's device.
        local_layers: name of each observed layer -> its local layer, the index in the accumulators.
        sink_tokens, local_window: in tokens, see statistics.py.
        max_rows: largest row list; a GPU's buffers and graphs are made for it.
        head_size, query_dtype: of the layers, the largest head size; for the queries of traced rows.
        deferred: takes what waits for a GPU.
        is_piecewise: see `GraphNodes`.
        errors: counts what goes wrong.

    Raises:
        RuntimeError: no kernel measures on that device.
    """
    device = accumulators.counts.device.type
    if device == "cpu":
        from glassbox.measure.cpu_measurer import CpuMeasurer

        return CpuMeasurer(
            accumulators, local_layers, sink_tokens=sink_tokens, local_window=local_window, errors=errors
        )
    if device == "cuda":
        from glassbox.measure.gpu_measurer import GpuMeasurer

        return GpuMeasurer(
            accumulators,
            local_layers,
            sink_tokens=sink_tokens,
            local_window=local_window,
            max_rows=max_rows,
            head_size=head_size,
            query_dtype=query_dtype,
            deferred=deferred,
            is_piecewise=is_piecewise,
            errors=errors,
        )
    raise RuntimeError(f"glassbox has no kernel for {device} devices; the server runs unobserved")
