"""THE table of a traced request's arrays: name, axes, type, what stands for "no value", merging, and where it is shown.

Owns what is kept of a traced request beside its header, and how many bytes that takes. A worker's chunks, the trace
file, the merge of ranks, the JSON document, the records and the tables of `glassbox.capture` derive from it; no other
module lists these arrays. How the numbers are made is known in `kernels/`, what a request may ask `trace_options.py`.

Axes are named, and sized by whoever knows the request: token (kept rows, T), layer (L), head (H), top_k (k), span (S),
key (positions that a kept row attends to), kept_token and offset (T and T + 1 if whole attention vectors are kept, else
0), id (tokens whose ids are known), generated (generated tokens). 0 unless asked for (`core/signal_table.py`): position
(of the sequence, to the last measured row's), squared_position (likewise), singular, dim (of a head) and param. The
axes in `FIXED` are of one size always.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.core.signal_table import ON_REQUEST
from glassbox.core.statistics import NUM_STATISTICS, PHASES

Axis = Literal[
    "token",
    "layer",
    "head",
    "statistic",
    "top_k",
    "span",
    "bound",
    "key",
    "kept_token",
    "offset",
    "id",
    "position",
    "squared_position",
    "singular",
    "dim",
    "param",
    "generated",
]
Sizes = Mapping[str, int]
FIXED: Final[Sizes] = {"statistic": NUM_STATISTICS + 1, "bound": 2}
# Of an array with numbers of each kept row, layer and head.
PLACE: Final[tuple[Axis, ...]] = ("token", "layer", "head")
# Along the axis `param`, where it is not 0.
SCORE_PARAMS: Final = ("scale", "soft_cap", "window", "sink")
# Fills up where there are fewer positions than asked for.
NO_POSITION: Final = -1

# How the ranks of one request become one: `places`, each at its own layers and heads; `first`, the lowest rank's for
# all; `own`, a rule of its own in `store/trace_ranks.py`. Of arrays along `token` the rows that all ranks have remain.
Merge = Literal["places", "first", "own"]


@dataclass(frozen=True)
class TraceArray:
    """One array.

    Attributes:
        name: of the array, in RequestTrace and in the trace file.
        axes: in order. An array along `token` is collected row by row while the request runs; one along `key` has rows
            of different lengths, and is kept flat, one row after the other.
        dtype: of numpy and of torch.
        merge: how ranks become one.
        meaning: of its numbers.
        fill: stands for "no value".
        field: of the JSON document and the records, nested ones joined by a dot; empty if they don't show it. Arrays
            by layer and head are shown where places are chosen (`detail`), the others along the `tokens`; those along
            nothing but `token` in both.
        averaged: an array by layer and head is shown along the `tokens`, too, as its mean over layers and heads.
        labels: of an array of indices, what is shown for each.
        column: of the tables of `glassbox.capture` that have a line for each top_k or span.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: str
    merge: Merge
    meaning: str
    fill: float = 0
    field: str = ""
    averaged: bool = False
    labels: tuple[str, ...] = ()
    column: str = ""

    @property
    def by_token(self) -> bool:
        """True if it is collected row by row."""
        return self.axes[0] == "token"

    @property
    def by_place(self) -> bool:
        """True if it has numbers of each layer and head."""
        return self.axes[: len(PLACE)] == PLACE

    @property
    def ragged(self) -> bool:
        """True if its rows are of different lengths."""
        return "key" in self.axes

    def shape(self, sizes: Sizes) -> tuple[int | None, ...]:
        """Of a whole array; None is any number."""
        return (None,) if self.ragged else tuple(FIXED.get(axis, sizes.get(axis)) for axis in self.axes)

    def filled(self, sizes: Sizes) -> npt.NDArray[Any]:
        """An array without values; axes of any size are empty."""
        return np.full(tuple(size or 0 for size in self.shape(sizes)), self.fill, dtype=self.dtype)

    def row_nbytes(self, sizes: Sizes) -> int:
        """Bytes of one of its rows."""
        return math.prod({**FIXED, **sizes}[axis] for axis in self.axes[1:]) * np.dtype(self.dtype).itemsize


TRACE_ARRAYS: Final[tuple[TraceArray, ...]] = (
    TraceArray(
        name="positions",
        axes=("token",),
        dtype="int32",
        merge="first",
        field="position",
        meaning="Position of each kept row in the sequence, ascending, so prefill rows come first. One that was "
        "computed again after a preemption stands there once.",
    ),
    TraceArray(
        name="phases",
        axes=("token",),
        dtype="uint8",
        merge="first",
        field="phase",
        labels=tuple(phase.value for phase in PHASES),
        meaning="Index into statistics.PHASES.",
    ),
    TraceArray(
        name="stats",
        axes=(*PLACE, "statistic"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        field="statistics",
        averaged=True,
        meaning="Columns as in statistics.py; the last is 1 where a score was not finite.",
    ),
    TraceArray(
        name="previous_mass",
        axes=PLACE,
        dtype="float32",
        merge="places",
        fill=math.nan,
        field="previous_mass",
        averaged=True,
        meaning="Attention to the position before the row's own; the first position has none.",
    ),
    TraceArray(
        name="span_mass",
        axes=(*PLACE, "span"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        field="spans",
        averaged=True,
        column="mass",
        meaning="Sum of the attention to the span's positions.",
    ),
    TraceArray(
        name="topk_positions",
        axes=(*PLACE, "top_k"),
        dtype="int32",
        merge="places",
        fill=NO_POSITION,
        field="top_k.position",
        column="key",
        meaning="Most attended positions, by falling mass.",
    ),
    TraceArray(
        name="topk_mass",
        axes=(*PLACE, "top_k"),
        dtype="float32",
        merge="places",
        field="top_k.mass",
        column="mass",
        meaning="Attention to these positions; 0 where there are fewer keys.",
    ),
    TraceArray(
        name="mean_topk_positions",
        axes=("token", "top_k"),
        dtype="int32",
        merge="own",
        fill=NO_POSITION,
        field="top_k.position",
        column="key",
        meaning="Most attended positions of the attention averaged over these layers and heads.",
    ),
    TraceArray(
        name="mean_topk_mass",
        axes=("token", "top_k"),
        dtype="float32",
        merge="own",
        field="top_k.mass",
        column="mass",
        meaning="Averaged attention to these positions.",
    ),
    TraceArray(
        name="attention_values",
        axes=(*PLACE, "key"),
        dtype="float16",
        merge="own",
        fill=math.nan,
        meaning="Whole attention vectors, row after row; RequestTrace.attention cuts them. Empty if not asked for.",
    ),
    TraceArray(
        name="attention_offsets",
        axes=("offset",),
        dtype="int64",
        merge="own",
        meaning="Where each row begins in attention_values, and where the last one ends.",
    ),
    TraceArray(
        name="attention_starts",
        axes=("kept_token",),
        dtype="int32",
        merge="own",
        meaning="Position of the first key kept of each row.",
    ),
    TraceArray(
        name="received",
        axes=("layer", "head", "position"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="Attention to each position, summed over the measured rows. Drafts that were not kept don't count.",
    ),
    TraceArray(
        name="received_squares",
        axes=("layer", "head", "squared_position"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="Squares of the attention to each position from later ones, summed over the measured rows.",
    ),
    TraceArray(
        name="singular_values",
        axes=("layer", "head", "singular"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="Largest singular values, falling, of Q K^T (neither scaled nor masked) of the measured rows and all "
        "keys; 0 where there are fewer.",
    ),
    TraceArray(
        name="queries",
        axes=(*PLACE, "dim"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="Query of each kept row after RoPE.",
    ),
    TraceArray(
        name="keys",
        axes=("position", "layer", "head", "dim"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="Key of each position after RoPE, repeated for the query heads that share it.",
    ),
    TraceArray(
        name="score_params",
        axes=("layer", "head", "param"),
        dtype="float32",
        merge="places",
        fill=math.nan,
        meaning="What makes attention of queries and keys: scale, soft cap (0 is none), window in keys (0 is none) and "
        "the logit of a learned sink (NaN is none). A scale of NaN: it depends on more (ALiBi, chunked attention).",
    ),
    TraceArray(
        name="logprobs",
        axes=("generated",),
        dtype="float32",
        merge="first",
        fill=math.nan,
        meaning="Log-probability of each generated token as the engine gave it, before any change by sampling "
        "parameters.",
    ),
    TraceArray(
        name="span_ranges",
        axes=("span", "bound"),
        dtype="int32",
        merge="first",
        meaning="Start and exclusive end of each span.",
    ),
    TraceArray(
        name="token_ids",
        axes=("id",),
        dtype="int32",
        merge="first",
        meaning="Of prompt and answer; empty without requests.include_text.",
    ),
)


def trace_array(name: str) -> TraceArray:
    """The array of a name."""
    return next(array for array in TRACE_ARRAYS if array.name == name)


def collected() -> tuple[TraceArray, ...]:
    """Those that are collected row by row and whose rows are of one length."""
    return tuple(array for array in TRACE_ARRAYS if array.by_token and not array.ragged)


def shown_along_tokens() -> tuple[TraceArray, ...]:
    """Those that the document shows along the tokens; of one by layer and head its mean over these."""
    shown = (array for array in TRACE_ARRAYS if array.field and array.by_token)
    return tuple(array for array in shown if array.averaged or not array.by_place)


def shown_by_place() -> tuple[TraceArray, ...]:
    """Those of which the document shows the numbers of each layer and head."""
    return tuple(array for array in TRACE_ARRAYS if array.field and array.by_place)


def without_values(sizes: Sizes) -> dict[str, npt.NDArray[Any]]:
    """The collected arrays of some rows of which nothing is known yet, by name.

    Args:
        sizes: of token, layer, head, top_k, span and dim.
    """
    return {array.name: array.filled(sizes) for array in collected()}


def not_asked_for(sizes: Sizes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a whole request that are kept on request alone, without values, by name.

    Args:
        sizes: of layer and head; what there is of the others.
    """
    arrays = (array for array in TRACE_ARRAYS if array.name in ON_REQUEST and not array.by_token)
    return {array.name: array.filled(sizes) for array in arrays}


def row_nbytes(sizes: Sizes) -> int:
    """Bytes that a row takes while its request runs.

    Args:
        sizes: of layer, head, top_k, span, dim and key; key is 0 if whole attention vectors are not kept.
    """
    return sum(array.row_nbytes(sizes) for array in TRACE_ARRAYS if array.by_token)
