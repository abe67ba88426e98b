"""A traced request as a JSON document: what the HTTP interface answers and what the records hold.

Owns the document's fields (for those of the trace's arrays see `core/trace_arrays.py`), the choice of layers, heads and
tokens, and its bounds. Without a choice it holds means, so that its size grows with the tokens and with layers x heads,
but not with their product; with one it adds the numbers of each token, layer and head chosen. NaN ("no value") is null.
It reads no file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import PHASES, STATISTICS
from glassbox.core.trace_arrays import PLACE, TraceArray, shown_along_tokens, shown_by_place
from glassbox.signals import request_signals
from glassbox.store.trace_directory import TraceSummary
from glassbox.store.trace_record import RequestTrace

# Kept rows shown without a choice of tokens; the newest ones.
MAX_TOKENS: Final = 4096
# Numbers of a chosen part: about 4 MB of JSON.
MAX_NUMBERS: Final = 500_000
# Token texts of a document; the last ones.
MAX_TEXTS: Final = 32_768
_DIGITS: Final = 6
_PLACE_AXES: Final = (PLACE.index("layer"), PLACE.index("head"))

Texts = Callable[[Sequence[int]], list[str]]


class SelectionError(ValueError):
    """A choice breaks its rule; the message says field, rule, value and remedy."""


@dataclass(frozen=True)
class Selection:
    """Which numbers of a trace are wanted one by one.

    Attributes:
        layers, heads: global indices; None is all.
        tokens: positions of the sequence, end exclusive; None is all.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    tokens: tuple[int, int] | None = None


def plain(values: npt.NDArray[Any]) -> list[Any]:
    """An array as nested lists for JSON: six significant digits, null for NaN and infinity."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    safe = np.where(finite & (array != 0), array, 1.0)
    scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(safe))))
    rounded = np.where(array == 0, 0.0, np.round(safe * scale) / scale)
    result = rounded.astype(object)
    result[~finite] = None
    nested: list[Any] = result.tolist()
    return nested


def mean(values: npt.NDArray[Any], axis: int | tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Mean over axes of the finite values; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    total = np.where(finite, values, 0.0).sum(axis=axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# By which it is known whether all ranks have written theirs.
_NOT_SHOWN: Final = frozenset({"chosen_layers", "instances", "runs"})


def summary(trace: TraceSummary) -> dict[str, Any]:
    """The line of a traced request in a list of them."""
    return {name: getattr(trace, name) for name in TraceSummary.__dataclass_fields__ if name not in _NOT_SHOWN}


def flat_signals(signals: Mapping[Any, Any], prefix: str = "") -> dict[str, float | None]:
    """Signals without nesting: `{"a": {"b": 1}}` is `{"a.b": 1}`; a value that is not finite is None."""
    flat: dict[str, float | None] = {}
    for name, value in signals.items():
        if isinstance(value, Mapping):
            flat |= flat_signals(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = float(value) if value is not None and np.isfinite(value) else None
    return flat


def document(
    trace: RequestTrace, texts: Texts | None = None, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A trace with its signals and means.

    Fields: those of RequestTrace that are no arrays; `signals`; `tokens`, lists along the kept rows, of the attention
    averaged over layers and heads; `places`, per phase and statistic [layer][head], averaged over the rows; `scores`,
    if they are given; with `texts` also `text`.

    Args:
        trace: of a request, merged over workers.
        texts: makes texts of token ids; None, or a trace without ids: the document holds no text.
        scores: of `TraceScores.document`.
    """
    rows = slice(max(len(trace.positions) - MAX_TOKENS, 0), None)
    shown: dict[str, Any] = {
        "request_id": trace.request_id,
        "internal_id": trace.internal_id,
        "engine": trace.engine,
        "model_name": trace.model_name,
        "requested_model": trace.requested_model,
        "adapter": trace.adapter,
        "client": trace.client,
        "why": trace.why,
        "status": trace.status,
        "start_time_s": trace.start_time_s,
        "end_time_s": trace.end_time_s,
        "prompt_len": trace.prompt_len,
        "num_generated": trace.num_generated,
        "num_rows": len(trace.positions),
        "truncated": trace.truncated,
        "notes": list(trace.notes),
        "traceparent": trace.traceparent,
        "options": _options(trace),
        "layers": list(trace.layers),
        "heads": list(trace.heads),
        "signals": finite(request_signals(trace)),
        "tokens": {"left_out": rows.start, **_tokens(trace, rows)},
        "places": {"axes": ["layer", "head"], **_places(trace)},
    }
    if scores is not None:
        shown["scores"] = scores
    if texts is not None and len(trace.token_ids):
        shown["text"] = _text(trace, texts)
    return shown


def _options(trace: RequestTrace) -> dict[str, Any]:
    return {
        "layers": trace.options.layers,
        "heads": trace.options.heads,
        "top_k": trace.options.top_k,
        "spans": {name: [int(a), int(b)] for name, (a, b) in zip(trace.span_names, trace.span_ranges, strict=True)},
        "rows": trace.options.attention,
        "prompt": trace.options.prompt,
        "signals": list(trace.options.signals),
        "respond": trace.options.respond,
    }


def finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(part) for part in value]
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return float(f"{number:.{_DIGITS}g}") if np.isfinite(number) else None


def _tokens(trace: RequestTrace, rows: slice) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for array in shown_along_tokens():
        values = trace.arrays[array.name][rows]
        _show(found, trace, array, mean(values, axis=_PLACE_AXES) if array.by_place else values)
    found["nonfinite"] = [bool(value > 0) for value in mean(trace.stats[rows][..., -1], axis=_PLACE_AXES)]
    return found


def _show(found: dict[str, Any], trace: RequestTrace, array: TraceArray, values: npt.NDArray[Any]) -> None:
    """Put an array's values into a part of the document: those along a last axis with names by these."""
    if "top_k" in array.axes and not trace.sizes["top_k"]:
        return
    names = _names(trace, array)
    *parents, field = array.field.split(".")
    for parent in parents:
        found = found.setdefault(parent, {})
    if array.labels:
        found[field] = [array.labels[value] for value in values]
    elif names is not None:
        found[field] = {name: _numbers(values[..., i]) for i, name in enumerate(names)}
    else:
        found[field] = _numbers(values)


def _names(trace: RequestTrace, array: TraceArray) -> tuple[str, ...] | None:
    """Of the parts of an array's last axis; None if they have none."""
    by_axis = {"statistic": tuple(statistic.name for statistic in STATISTICS), "span": trace.span_names}
    return by_axis.get(array.axes[-1])


def _numbers(values: npt.NDArray[Any]) -> list[Any]:
    exact: list[Any] = values.tolist() if np.issubdtype(values.dtype, np.integer) else plain(values)
    return exact


def _places(trace: RequestTrace) -> dict[str, Any]:
    found = {}
    for number, phase in enumerate(PHASES):
        stats = trace.stats[trace.phases == number]
        if len(stats):
            averaged = mean(stats, axis=0)
            found[phase.value] = {statistic.name: plain(averaged[..., s]) for s, statistic in enumerate(STATISTICS)}
    return found


def _text(trace: RequestTrace, texts: Texts) -> dict[str, Any]:
    # The page shows what was looked at, which is mostly the start of the prompt or near the end: the end is kept.
    first = max(len(trace.token_ids) - MAX_TEXTS, 0)
    return {"first_position": first, "tokens": texts(trace.token_ids[first:].tolist())}


def detail(trace: RequestTrace, chosen: Selection) -> dict[str, Any]:
    """The numbers of each chosen token, layer and head, as nested lists in the order of `axes`.

    Raises:
        SelectionError: a layer or head is not in the trace, or there would be more than `MAX_NUMBERS` numbers.
    """
    layers = pick("layers", chosen.layers, trace.layers)
    heads = pick("heads", chosen.heads, trace.heads)
    rows = np.arange(len(trace.positions))
    if chosen.tokens is not None:
        rows = rows[(trace.positions >= chosen.tokens[0]) & (trace.positions < chosen.tokens[1])]
    _check_size(trace, rows, len(layers) * len(heads))
    at = np.ix_(rows, np.asarray(layers), np.asarray(heads))
    shown: dict[str, Any] = {
        "axes": ["token", "layer", "head"],
        "layers": [trace.layers[index] for index in layers],
        "heads": [trace.heads[index] for index in heads],
    }
    for array in (*(array for array in shown_along_tokens() if array.axes == ("token",)), *shown_by_place()):
        _show(shown, trace, array, trace.arrays[array.name][at if array.by_place else rows])
    if trace.has_attention:
        shown["rows"] = [
            {
                "first_position": int(trace.attention_starts[t]),
                "attention": plain(trace.attention(t)[at[1][0], at[2][0]]),
            }
            for t in rows.tolist()
        ]
    return shown


def pick(field: str, wanted: tuple[int, ...] | None, there: tuple[int, ...]) -> list[int]:
    """Where the wanted indices stand among those of a trace; None is all of them.

    Raises:
        SelectionError: one is not among them.
    """
    if wanted is None:
        return list(range(len(there)))
    for index in wanted:
        if index not in there:
            named = ", ".join(map(str, there[:64])) + (", ..." if len(there) > 64 else "")
            raise SelectionError(f"{field} must be among those of the trace ({named}), got {index}; or use all")
    return [there.index(index) for index in wanted]


def _check_size(trace: RequestTrace, rows: npt.NDArray[np.int_], places: int) -> None:
    numbers = len(rows) * places * sum(_width(trace, array) for array in shown_by_place())
    if trace.has_attention and len(trace.layers) and len(trace.heads):
        keys = np.diff(trace.attention_offsets)[rows].sum() // (len(trace.layers) * len(trace.heads))
        numbers += int(keys) * places
    if numbers > MAX_NUMBERS:
        raise SelectionError(
            f"the answer must have at most {MAX_NUMBERS} numbers, got {numbers}; choose fewer layers and heads, or "
            "tokens=start:end"
        )


def _width(trace: RequestTrace, array: TraceArray) -> int:
    """Numbers that are shown of an array by layer and head in one of these places."""
    names = _names(trace, array)
    return len(names) if names is not None else math.prod(trace.arrays[array.name].shape[len(PLACE) :])
