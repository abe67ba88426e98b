"""A part of a traced request: some of its layers, heads and tokens, as a trace of its own.

Owns cutting. Along which axes an array is cut is said in `core/trace_arrays.py`.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core import trace_arrays
from glassbox.core.trace_arrays import TraceArray
from glassbox.export.trace_document import Selection, pick
from glassbox.store.trace_record import RequestTrace, joined_attention, no_attention

# Cut row by row, since the rows have different lengths.
_WHOLE_ROWS: Final = tuple(no_attention())


def part_of(trace: RequestTrace, chosen: Selection) -> RequestTrace:
    """The trace with the chosen layers, heads and rows alone. Means over layers and heads stay what they were.

    Raises:
        SelectionError: a layer or head is not in the trace.
    """
    layers = pick("layers", chosen.layers, trace.layers)
    heads = pick("heads", chosen.heads, trace.heads)
    tokens = np.arange(len(trace.positions))
    if chosen.tokens is not None:
        tokens = tokens[(trace.positions >= chosen.tokens[0]) & (trace.positions < chosen.tokens[1])]
    at: dict[str, Any] = {"token": tokens, "layer": layers, "head": heads}
    arrays = {
        array.name: _cut(trace, array, at) for array in trace_arrays.TRACE_ARRAYS if array.name not in _WHOLE_ROWS
    }
    return replace(
        trace,
        layers=tuple(trace.layers[index] for index in layers),
        heads=tuple(trace.heads[index] for index in heads),
        arrays=arrays | _whole_rows(trace, at),
    )


def _cut(trace: RequestTrace, array: TraceArray, at: dict[str, Any]) -> npt.NDArray[Any]:
    values = trace.arrays[array.name]
    for number, axis in enumerate(array.axes):
        if axis in at and values.shape[number]:
            values = values.take(at[axis], axis=number)
    return values


def _whole_rows(trace: RequestTrace, at: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    if not trace.has_attention:
        return {name: trace.arrays[name] for name in _WHOLE_ROWS}
    rows = [trace.attention(t)[np.ix_(at["layer"], at["head"])] for t in at["token"].tolist()]
    return joined_attention(rows, trace.attention_starts[at["token"]])
