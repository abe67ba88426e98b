"""Which measurer fits the worker's device."""

from typing import Any

from glassbox.core.errors import ErrorCounter
from glassbox.measure.contract import DeviceNeeds, MeasuredLayers, Measurer


def make_measurer(layers: MeasuredLayers, needs: DeviceNeeds, errors: ErrorCounter) -> Measurer[Any]:
    """The measurer for the device of the accumulators.

    Args:
        layers: what is measured.
        needs: what a GPU needs beside it.
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

        return GpuMeasurer(layers, needs, errors)
    raise RuntimeError(f"glassbox has no kernel for {device} devices; the server runs unobserved")
