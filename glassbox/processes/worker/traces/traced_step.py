"""The traced rows of one step: what is measured of them beyond the sample, and how it gets to their traces.

Owns the buffers of a step. A measurer adds what it measured layer by layer; when the step is over, `commit` gives each
trace its part. It neither decides who is traced (`tracker.py`) nor measures (`backends/`, `kernels/`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glassbox.core.rows import ROW_SLOT
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.row_probe_cpu import NO_POSITION
from glassbox.measure.contract import AskedRows, LayersAnswer
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk
from glassbox.store.trace_record import MAX_ROW_KEYS


@dataclass(frozen=True)
class TracedRows:
    """Consecutive traced rows of one request.

    Attributes:
        trace: of the request.
        first: number of the first row among the step's traced rows.
        positions: int32 [n], in the sequence; phases: uint8 [n].
    """

    trace: ActiveTrace
    first: int
    positions: npt.NDArray[np.int32]
    phases: npt.NDArray[np.uint8]

    @property
    def numbers(self) -> slice:
        """Of these rows among the step's traced rows."""
        return slice(self.first, self.first + len(self.positions))


class TracedStep:
    """What is measured of traced requests in one step.

    Args:
        members: the rows, in the order of the row list.
        row_list: int32 [R, NUM_ROW_COLUMNS] of the step.
        indices: int64 [n], where the members' rows stand in `row_list`.
        num_layers, num_heads: of the worker.

    Attributes:
        num_slots: of a ring that has a slot for every row that ROW_SLOT gives one.
        local_layers: observed layers that some of the traces keep.
    """

    def __init__(
        self,
        members: Sequence[TracedRows],
        row_list: npt.NDArray[np.int32],
        indices: npt.NDArray[np.int64],
        num_layers: int,
        num_heads: int,
    ) -> None:
        self._members, self._indices = members, indices
        self._slots = row_list[indices, ROW_SLOT]
        # Slots are given out in order; rows for which there was no memory have one, too.
        self.num_slots = int(row_list[:, ROW_SLOT].max(initial=-1)) + 1
        self.local_layers = frozenset(n for member in members for n in member.trace.local_layers)
        self._stats = np.full((len(indices), num_layers, num_heads, NUM_STATISTICS + 1), np.nan, dtype=np.float32)
        self._probes = [_Probe(member, num_heads) for member in members if member.trace.options.probes]
        numbers = [np.arange(p.rows.numbers.start, p.rows.numbers.stop) for p in self._probes]
        self._probed_places = indices[np.concatenate(numbers)] if numbers else indices[:0]
        self._probed = row_list[self._probed_places]

    def add_stats(self, local_layers: Sequence[int], stats: npt.NDArray[np.float32]) -> None:
        """See contract.StepTraces."""
        self._stats[:, local_layers, : stats.shape[2]] = stats[:, self._indices].swapaxes(0, 1)

    def set_stats(self, ring: npt.NDArray[np.float32]) -> None:
        """See contract.StepTraces."""
        self._stats[...] = ring[self._slots]

    def asked(self) -> AskedRows | None:
        """All questions together; None if there are none. Answers go to `add_layers`."""
        if not self._probes:
            return None
        options = [probe.rows.trace.options for probe in self._probes for _ in probe.rows.positions]
        spans = np.zeros((len(options), max(len(one.spans) for one in options), 2), dtype=np.int32)
        for i, one in enumerate(options):
            for s, span in enumerate(one.spans):
                spans[i, s] = span.start, span.end
        chosen = np.zeros((len(options), *self._stats.shape[1:3]), dtype=bool)
        at = 0
        for probe in self._probes:
            trace, n = probe.rows.trace, len(probe.rows.positions)
            chosen[np.ix_(range(at, at + n), trace.local_layers, trace.head_columns)] = True
            at += n
        return AskedRows(
            rows=self._probed,
            places=self._probed_places,
            positions=np.concatenate([probe.rows.positions for probe in self._probes]),
            top_k=max(one.top_k for one in options),
            spans=spans,
            chosen=chosen,
            local_layers=frozenset(n for probe in self._probes for n in probe.rows.trace.local_layers),
            kept=tuple(i for i, one in enumerate(options) if one.rows),
        )

    def add_layers(self, answer: LayersAnswer, kept: Sequence[int]) -> None:
        """Keep what was found in some layers for `asked()`, whose `kept` is given back."""
        at = 0
        for probe in self._probes:
            n = len(probe.rows.positions)
            rows = [answer.rows[kept.index(i)] for i in range(at, at + n)] if probe.rows.trace.options.rows else []
            probe.add_layers(answer, slice(at, at + n), rows)
            at += n

    def commit(self) -> None:
        """Give every trace its rows."""
        probes = {id(probe.rows): probe for probe in self._probes}
        for member in self._members:
            trace = member.trace
            place = np.ix_(trace.local_layers, trace.head_columns)
            probe = probes.get(id(member)) or _Probe(member, 0)
            trace.append(probe.chunk(self._stats[member.numbers][:, place[0], place[1]]))


class _Probe:
    """Answers of one request's rows, collected over the layers; empty arrays for a request that asked nothing."""

    def __init__(self, rows: TracedRows, num_heads: int) -> None:
        trace, options = rows.trace, rows.trace.options
        n, k = len(rows.positions), options.top_k
        place = (len(trace.local_layers), len(trace.head_columns))
        self.rows = rows
        self._place = {local_layer: i for i, local_layer in enumerate(trace.local_layers)}
        self._topk_positions = np.full((n, *place, k), NO_POSITION, dtype=np.int32)
        self._topk_mass = np.zeros((n, *place, k), dtype=np.float32)
        self._span_mass = np.full((n, *place, len(options.spans)), np.nan, dtype=np.float32)
        lengths = rows.positions.tolist() if num_heads else []
        self._summed_places = 0
        self._sums = [np.zeros(position + 1) for position in lengths] if k else []
        self._rows = (
            [np.zeros((*place, min(position + 1, MAX_ROW_KEYS)), dtype=np.float16) for position in lengths]
            if options.rows
            else []
        )

    def add_layers(self, answer: LayersAnswer, mine: slice, rows: Sequence[npt.NDArray[np.float16]]) -> None:
        """Keep what was asked of some layers; `mine` are these rows among all that were asked, `rows` the kept ones."""
        group = [g for g, local_layer in enumerate(answer.local_layers) if local_layer in self._place]
        columns = [c for c in self.rows.trace.head_columns if c < answer.topk_mass.shape[2]]
        if not group or not columns:
            return
        own = [self._place[answer.local_layers[g]] for g in group]
        everywhere = range(len(self.rows.positions))
        to, of = np.ix_(everywhere, own, range(len(columns))), np.ix_(everywhere, group, columns)
        self._topk_positions[to] = answer.topk_positions[mine][of][..., : self._topk_mass.shape[-1]]
        self._topk_mass[to] = answer.topk_mass[mine][of][..., : self._topk_mass.shape[-1]]
        self._span_mass[to] = answer.span_mass[mine][of][..., : self._span_mass.shape[-1]]
        self._summed_places += len(own) * len(columns)
        if self._sums:
            for total, found in zip(self._sums, answer.chosen_sum[mine], strict=True):
                np.add(total, found[: len(total)], out=total)
        for row, keys in zip(self._rows, rows, strict=True):
            row[np.ix_(own, range(len(columns)))] = keys[np.ix_(group, columns)]

    def chunk(self, stats: npt.NDArray[np.float32]) -> Chunk:
        """Of these rows, with their statistics [n, L, H, NUM_STATISTICS + 1]."""
        k = self._topk_mass.shape[-1]
        mean_positions = np.full((len(stats), k), NO_POSITION, dtype=np.int32)
        mean_mass = np.zeros((len(stats), k), dtype=np.float32)
        places = max(self._summed_places, 1)
        for i, total in enumerate(self._sums):
            # A head without finite scores leaves no mean.
            if np.isfinite(total).all():
                best = np.argsort(-total, kind="stable")[:k]
                mean_positions[i, : len(best)], mean_mass[i, : len(best)] = best, total[best] / places
        return Chunk(
            positions=self.rows.positions,
            phases=self.rows.phases,
            stats=stats,
            topk_positions=self._topk_positions,
            topk_mass=self._topk_mass,
            mean_topk_positions=mean_positions,
            mean_topk_mass=mean_mass,
            span_mass=self._span_mass,
            rows=tuple(self._rows),
        )
