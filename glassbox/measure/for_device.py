"""Which measurer fits the worker's device."""

from collections.abc import Callable
from typing import Any

import torch

from glassbox.core.errors import ErrorCounter
from glassbox.measure.contract import MeasuredLayers, Measurer
from glassbox.measure.deferred import DeferredActions


def make_measurer(
    layers: MeasuredLayers,
    *,
    max_rows: int,
    head_size: int,
    query_dtype: torch.dtype,
    deferred: DeferredActions,
    is_piecewise: Callable[[], bool],
    errors: ErrorCounter,
) -> Measurer[Any]:
    """The measurer for the device of the accumulators.

    Args:
        layers: what is measured.
        max_rows: largest row list; a GPU's buffers and graphs are made for it.
        head_size, query_dtype: of the layers, the largest head size; for the queries of traced rows.
        deferred: takes what waits for a GPU.
        is_piecewise: see `GraphNodes`.
        errors: counts what goes wrong.

    Raises:
        RuntimeError: no kernel measures on that device.
    """
    device = layers.accumulators.counts.device.type
    if device == "cpu":
        from glassbox.measure.cpu_measurer import CpuMeasurer

        return CpuMeasurer(layers, errors=errors)
    if device == "cuda":
        from glassbox.measure.gpu_measurer import GpuMeasurer

        return GpuMeasurer(
            layers,
            max_rows=max_rows,
            head_size=head_size,
            query_dtype=query_dtype,
            deferred=deferred,
            is_piecewise=is_piecewise,
            errors=errors,
        )
    raise RuntimeError(f"glassbox has no kernel for {device} devices; the server runs unobserved")
