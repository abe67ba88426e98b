"""The traces of one request on several ranks, as one.

Owns the rules by which ranks become one; which of them an array follows is said in `core/trace_arrays.py`. A record by
itself, and its file, is `trace_record.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core import trace_arrays
from glassbox.core.trace_arrays import NO_POSITION, Sizes, TraceArray, trace_array
from glassbox.store.trace_record import RequestTrace, joined_attention, no_attention

# Axes of which ranks may have more and less: a worker's file may be older, and one may have refused what others kept.
_LONGEST: Final = ("top_k", "position", "squared_position", "singular", "dim", "param")


def merge_ranks(traces: Sequence[RequestTrace]) -> RequestTrace:
    """One trace of a request's traces on the workers of its engine.

    Tensor-parallel ranks bring heads, pipeline stages layers. Rows are those that all of them have: while a request
    runs, one worker's file may be older. A place that no worker measured holds NaN, and no positions. The positions of
    `mean_topk` are chosen among those of the workers, and their mass is a lower bound with several.

    Raises:
        ValueError: `traces` is empty or of several requests.
    """
    if not traces:
        raise ValueError("traces must have at least one element, got none")
    if len({(trace.engine, trace.internal_id, trace.client) for trace in traces}) > 1:
        raise ValueError("traces must be of one request; merge each request by itself")
    if len(traces) == 1:
        return traces[0]
    # The lowest rank stands for heads that several hold (replicated ones).
    parts = sorted(traces, key=lambda t: (t.rank, t.layers, t.start_time_s, t.instance))
    positions = parts[0].positions
    for part in parts[1:]:
        positions = np.intersect1d(positions, part.positions)
    layers = tuple(sorted({layer for part in parts for layer in part.layers}))
    heads = tuple(sorted({head for part in parts for head in part.heads}))
    first = parts[0]
    sizes = {"token": len(positions), "layer": len(layers), "head": len(heads), "span": len(first.span_names)}
    for axis in _LONGEST:
        sizes[axis] = max(part.sizes[axis] for part in parts)
    merged = _Merged(parts, [np.searchsorted(part.positions, positions) for part in parts], layers, heads, sizes)
    ends = [part.end_time_s for part in parts]
    active = any(part.status == "active" for part in parts)
    return replace(
        first,
        status="active" if active else first.status,
        start_time_s=min(part.start_time_s for part in parts),
        end_time_s=None if active else max((end for end in ends if end is not None), default=None),
        num_generated=max(part.num_generated for part in parts),
        layers=layers,
        heads=heads,
        truncated=any(part.truncated for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        arrays=merged.arrays(),
    )


@dataclass(frozen=True)
class _Merged:
    """How the arrays of several workers become one.

    Attributes:
        parts: of the workers, the one that stands for the others first.
        takes: where the common rows stand in each of them.
        layers, heads: of all of them together.
        sizes: of the merged arrays.
    """

    parts: Sequence[RequestTrace]
    takes: Sequence[npt.NDArray[np.intp]]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    sizes: Sizes

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays of the table."""
        by_rule = {"places": self._at_places, "first": self._of_first}
        ruled = [array for array in trace_arrays.TRACE_ARRAYS if array.merge in by_rule]
        return {array.name: by_rule[array.merge](array) for array in ruled} | self._means() | self._attention()

    def _of_first(self, array: TraceArray) -> npt.NDArray[Any]:
        values = self.parts[0].arrays[array.name]
        return values[self.takes[0]] if array.by_token else values

    def _at_places(self, array: TraceArray) -> npt.NDArray[Any]:
        values = array.filled(self.sizes)
        for part, take in self._lowest_last():
            found = part.arrays[array.name]
            layers, heads = self._places(part)
            # Along all other axes a part that has less begins with the same.
            to: dict[str, Any] = {"token": np.arange(len(take)), "layer": layers, "head": heads}
            places = [to.get(axis, np.arange(n)) for axis, n in zip(array.axes, found.shape, strict=True)]
            values[np.ix_(*places)] = found[take] if array.by_token else found
        return values

    def _lowest_last(self) -> list[tuple[RequestTrace, npt.NDArray[np.intp]]]:
        return list(zip(self.parts, self.takes, strict=True))[::-1]

    def _places(self, part: RequestTrace) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        return np.searchsorted(self.layers, part.layers), np.searchsorted(self.heads, part.heads)

    def _means(self) -> dict[str, npt.NDArray[Any]]:
        """The k positions with most mass among those of the parts, each part weighted by its layers and heads."""
        places = np.array([len(part.layers) * len(part.heads) for part in self.parts], dtype=np.float64)
        weights = places / max(places.sum(), 1)
        found, mass = (trace_array(name).filled(self.sizes) for name in ("mean_topk_positions", "mean_topk_mass"))
        for t in range(len(found)):
            total: dict[int, float] = {}
            for part, take, weight in zip(self.parts, self.takes, weights, strict=True):
                keys, shares = part.mean_topk_positions[take[t]].tolist(), part.mean_topk_mass[take[t]].tolist()
                for key, share in zip(keys, shares, strict=True):
                    if key != NO_POSITION:
                        total[key] = total.get(key, 0.0) + weight * share
            best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[: found.shape[1]]
            for i, (key, share) in enumerate(best):
                found[t, i], mass[t, i] = key, share
        return {"mean_topk_positions": found, "mean_topk_mass": mass}

    def _attention(self) -> dict[str, npt.NDArray[Any]]:
        """Whole attention vectors, if all workers have them."""
        if not all(part.has_attention for part in self.parts):
            return no_attention()
        array, values = trace_array("attention_values"), []
        for t, row in enumerate(self.takes[0].tolist()):
            keys = self.parts[0].attention(row).shape[-1]
            whole = np.full((len(self.layers), len(self.heads), keys), array.fill, dtype=array.dtype)
            for part, take in self._lowest_last():
                whole[np.ix_(*self._places(part))] = part.attention(take[t])
            values.append(whole)
        return joined_attention(values, self.parts[0].attention_starts[self.takes[0]])
