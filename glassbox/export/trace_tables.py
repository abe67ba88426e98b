"""Traced requests as tables, by pyarrow (extra `tables`): what `glassbox.capture` and `glassbox.client` give.

Owns the tables' columns; which arrays they show is said in `core/trace_arrays.py`. Every number is the trace's own,
NaN ("no value") is null.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glassbox.core import trace_arrays
from glassbox.core.statistics import NUM_STATISTICS, PHASES, STATISTICS
from glassbox.core.trace_arrays import PLACE, Axis, TraceArray
from glassbox.export.trace_document import mean
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class TraceTables:
    """The tables. In each `request` and `sample` say of which trace a line is: its prompt's index, and its answer's.

    Attributes:
        tokens: request, sample, position, phase, token_id (null where the text isn't kept), and as means over layers
            and heads a column per statistic, nonfinite (some head's), previous_mass.
        rows: request, sample, position, phase, layer, head, a column per statistic, nonfinite, previous_mass.
        top_k: request, sample, position, phase, layer, head, rank (from 0), key (position), mass; layer and head are
            null for the attention averaged over all chosen ones.
        spans: request, sample, position, phase, layer, head, span, mass.
        attention: request, sample, position, phase, layer, head, first_key (position), attention (list of float).
    """

    tokens: "pa.Table"
    rows: "pa.Table"
    top_k: "pa.Table"
    spans: "pa.Table"
    attention: "pa.Table"


def trace_tables(traces: Sequence[Sequence[RequestTrace]], user: str, first_sample: int = 0) -> TraceTables:
    """The tables of some traces.

    Args:
        traces: of each prompt, one per answer.
        user: who needs them, for the error.
        first_sample: number of each prompt's first one.

    Raises:
        ImportError: pyarrow is missing.
    """
    pa = pyarrow(user)
    kinds = {"tokens": _tokens, "rows": _rows, "top_k": _top_k, "spans": _spans, "attention": _attention}
    places = [
        _Places(pa, request, sample, trace)
        for request, of_prompt in enumerate(traces)
        for sample, trace in enumerate(of_prompt, start=first_sample)
    ]
    tables = {
        name: pa.concat_tables([make(one) for one in places]) if places else pa.table({})
        for name, make in kinds.items()
    }
    return TraceTables(**tables)


def pyarrow(user: str) -> Any:
    """The package.

    Args:
        user: who needs it, for the error.

    Raises:
        ImportError: it is missing; the message says how to get it.
    """
    try:
        import pyarrow as found
    except ImportError as error:
        raise ImportError(f"{user} needs pyarrow; pip install 'vllm-glassbox[tables]'") from error
    return found


class _Places:
    """Row, layer and head of each line of a table of one trace, `repeat` lines for each."""

    def __init__(self, pa: Any, request: int, sample: int, trace: RequestTrace) -> None:
        self.pa, self.request, self.sample, self.trace = pa, request, sample, trace

    def columns(self, repeat: int = 1) -> dict[str, Any]:
        trace = self.trace
        shape = (len(trace.positions), len(trace.layers), len(trace.heads), repeat)

        def along(values: Any, axis: int, dtype: Any = np.int32) -> Any:
            index = [None] * 4
            array = np.asarray(values, dtype=dtype)[
                tuple(slice(None) if a == axis else None for a in range(len(index)))
            ]
            return np.broadcast_to(array, shape).ravel()

        return {
            **self.common(int(np.prod(shape)), along(trace.positions, 0), along(trace.phases, 0)),
            "layer": self.pa.array(along(trace.layers, 1)),
            "head": self.pa.array(along(trace.heads, 2)),
        }

    def columns_along(self, axes: tuple[Axis, ...]) -> dict[str, Any]:
        """A column for each array along these axes that has one."""
        arrays = [array for array in trace_arrays.TRACE_ARRAYS if array.axes == axes and array.column]
        return {array.column: self.numbers(array) for array in arrays}

    def numbers(self, array: TraceArray) -> Any:
        """All numbers of an array, one after the other; NaN is null."""
        return self.pa.array(self.trace.arrays[array.name].ravel(), from_pandas=True)

    def common(self, lines: int, positions: Any, phases: Any) -> dict[str, Any]:
        pa = self.pa
        names = pa.array([str(phase) for phase in PHASES])
        return {
            "request": pa.array(np.full(lines, self.request, dtype=np.int32)),
            "sample": pa.array(np.full(lines, self.sample, dtype=np.int32)),
            "position": pa.array(positions),
            "phase": pa.DictionaryArray.from_arrays(pa.array(phases, type=pa.int8()), names).cast(pa.string()),
        }


def _tokens(places: _Places) -> "pa.Table":
    pa, trace = places.pa, places.trace
    rows, axes = len(trace.positions), (PLACE.index("layer"), PLACE.index("head"))
    stats = mean(trace.stats, axis=axes)
    ids = np.full(rows, -1, dtype=np.int32)
    known = trace.positions < len(trace.token_ids)
    ids[known] = trace.token_ids[trace.positions[known]]
    return pa.table(
        {
            **places.common(rows, trace.positions, trace.phases),
            "token_id": pa.array(ids, mask=~known),
            **{statistic.name: pa.array(stats[:, i], from_pandas=True) for i, statistic in enumerate(STATISTICS)},
            "nonfinite": pa.array(stats[:, NUM_STATISTICS] > 0),
            **{
                array.name: pa.array(mean(trace.arrays[array.name], axis=axes), from_pandas=True)
                for array in trace_arrays.TRACE_ARRAYS
                if array.axes == PLACE
            },
        }
    )


def _rows(places: _Places) -> "pa.Table":
    pa, stats = places.pa, places.trace.stats.reshape(-1, NUM_STATISTICS + 1)
    values = {
        statistic.name: pa.array(stats[:, i], from_pandas=True)  # NaN is "no value"
        for i, statistic in enumerate(STATISTICS)
    }
    alike = {array.name: places.numbers(array) for array in trace_arrays.TRACE_ARRAYS if array.axes == PLACE}
    return pa.table({**places.columns(), **values, "nonfinite": pa.array(stats[:, NUM_STATISTICS] > 0), **alike})


def _top_k(places: _Places) -> "pa.Table":
    pa, trace = places.pa, places.trace
    k, rows = trace.topk_mass.shape[-1], len(trace.positions)
    lines = rows * k
    nothing = pa.nulls(lines, pa.int32())
    mean = places.common(lines, np.repeat(trace.positions, k), np.repeat(trace.phases, k))
    ranks = np.arange(k, dtype=np.int32)
    of_mean = {"rank": np.tile(ranks, rows), **places.columns_along(("token", "top_k"))}
    found = {
        "rank": np.tile(ranks, rows * len(trace.layers) * len(trace.heads)),
        **places.columns_along((*PLACE, "top_k")),
    }
    table = pa.concat_tables(
        [pa.table({**mean, "layer": nothing, "head": nothing, **of_mean}), pa.table({**places.columns(k), **found})]
    )
    return table.filter(pa.compute.greater_equal(table["key"], 0))


def _spans(places: _Places) -> "pa.Table":
    pa, trace = places.pa, places.trace
    count = len(trace.span_names)
    lines = trace.span_mass.size // max(count, 1)
    names = pa.array(list(trace.span_names) * lines, type=pa.string())
    return pa.table({**places.columns(count), "span": names, **places.columns_along((*PLACE, "span"))})


def _attention(places: _Places) -> "pa.Table":
    pa, trace = places.pa, places.trace
    lines = len(trace.positions) * len(trace.layers) * len(trace.heads)
    columns = places.columns()
    if not trace.has_attention:
        columns = {name: column.slice(0, 0) for name, column in columns.items()}
        lines = 0
    heads = len(trace.layers) * len(trace.heads)
    starts = np.repeat(trace.attention_starts, heads)
    lengths = np.diff(trace.attention_offsets) // max(heads, 1)
    offsets = np.concatenate([[0], np.cumsum(np.repeat(lengths, heads))]).astype(np.int64)
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(trace.attention_values.astype(np.float32)))
    return pa.table({**columns, "first_key": pa.array(starts[:lines]), "attention": lists})
