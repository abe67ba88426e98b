"""The traced rows of one step: what is measured of them beyond the sample, and how it gets to their traces.

Owns the buffers of a step. A measurer adds what it measured layer by layer; when the step is over, `commit` gives each
trace its part. It neither decides who is traced (`tracker.py`) nor measures (`measure/`, `kernels/`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glassbox.core.rows import ROW_SLOT
from glassbox.core.trace_arrays import trace_array, without_values
from glassbox.kernels.probe_answers import ProbeAnswers
from glassbox.measure.contract import AskedRows
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk, Drafts
from glassbox.store.trace_record import MAX_ATTENTION_KEYS


@dataclass(frozen=True)
class TracedRows:
    """Consecutive traced rows of one request.

    Attributes:
        trace: of the request.
        first: number of the first row among the step's traced rows.
        positions: int32 [n], in the sequence; phases: uint8 [n].
        drafts: some of the rows may be of draft tokens.
    """

    trace: ActiveTrace
    first: int
    positions: npt.NDArray[np.int32]
    phases: npt.NDArray[np.uint8]
    drafts: Drafts | None = None

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
        self._stats = trace_array("stats").filled({"token": len(indices), "layer": num_layers, "head": num_heads})
        self._probes = [_Probe(member) for member in members if member.trace.options.probes]
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
        """All questions together; None if there are none. Answers go to `add_answers`."""
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
            kept_attention=tuple(i for i, one in enumerate(options) if one.attention),
        )

    def add_answers(self, local_layers: Sequence[int], answers: ProbeAnswers[npt.NDArray]) -> None:
        """See contract.StepTraces."""
        at = kept = 0
        for probe in self._probes:
            n = len(probe.rows.positions)
            wanted = n if probe.rows.trace.options.attention else 0
            probe.add_answers(local_layers, answers, slice(at, at + n), answers.attention[kept : kept + wanted])
            at, kept = at + n, kept + wanted

    def commit(self) -> None:
        """Give every trace its rows."""
        probes = {id(probe.rows): probe for probe in self._probes}
        for member in self._members:
            trace = member.trace
            place = np.ix_(trace.local_layers, trace.head_columns)
            probe = probes.get(id(member)) or _Probe(member)
            trace.append(probe.chunk(self._stats[member.numbers][:, place[0], place[1]]))


class _Probe:
    """Answers of one request's rows, collected over the layers; no values for a request that asked nothing."""

    def __init__(self, rows: TracedRows) -> None:
        trace, options = rows.trace, rows.trace.options
        self.rows = rows
        self._place = {local_layer: i for i, local_layer in enumerate(trace.local_layers)}
        self._arrays = without_values({"token": len(rows.positions), **trace.sizes})
        positions = rows.positions.tolist()
        self._summed_places = 0
        self._sums = [np.zeros(position + 1) for position in positions] if options.top_k else []
        place = (len(trace.local_layers), len(trace.head_columns))
        lengths = [min(position + 1, MAX_ATTENTION_KEYS) for position in positions] if options.attention else []
        self._attention = [np.full((*place, length), np.nan, dtype=np.float16) for length in lengths]

    def add_answers(
        self,
        local_layers: Sequence[int],
        answers: ProbeAnswers[npt.NDArray],
        mine: slice,
        attention: Sequence[npt.NDArray[np.float16]],
    ) -> None:
        """Keep what was asked of some layers.

        Args:
            local_layers: which.
            answers: of all rows that were asked; mine: these rows among them.
            attention: whole vectors of these rows, if they are wanted.
        """
        group = [g for g, local_layer in enumerate(local_layers) if local_layer in self._place]
        columns = [c for c in self.rows.trace.head_columns if c < answers.topk_mass.shape[2]]
        if not group or not columns:
            return
        own = [self._place[local_layers[g]] for g in group]
        everywhere = range(len(self.rows.positions))
        to, of = np.ix_(everywhere, own, range(len(columns))), np.ix_(everywhere, group, columns)
        for name, found in answers.by_array().items():
            # Others may have asked for more top positions and spans.
            self._arrays[name][to] = found[mine][of][..., : self._arrays[name].shape[-1]]
        self._summed_places += len(own) * len(columns)
        if self._sums:
            for total, summed in zip(self._sums, answers.chosen_sum[mine], strict=True):
                np.add(total, summed[: len(total)], out=total)
        for kept, values in zip(self._attention, attention, strict=True):
            kept[np.ix_(own, range(len(columns)))] = values[np.ix_(group, columns)]

    def chunk(self, stats: npt.NDArray[np.float32]) -> Chunk:
        """Of these rows, with their statistics [n, L, H, NUM_STATISTICS + 1]."""
        arrays = self._arrays | {"positions": self.rows.positions, "phases": self.rows.phases, "stats": stats}
        mean_positions, mean_mass = arrays["mean_topk_positions"], arrays["mean_topk_mass"]
        for i, total in enumerate(self._sums):
            # A head without finite scores leaves no mean, nor does a probe that failed.
            if self._summed_places and np.isfinite(total).all():
                best = np.argsort(-total, kind="stable")[: mean_mass.shape[1]]
                mean_positions[i, : len(best)], mean_mass[i, : len(best)] = best, total[best] / self._summed_places
        return Chunk(arrays, tuple(self._attention), self.rows.drafts)
