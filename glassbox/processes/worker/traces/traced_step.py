"""The traced rows of one step: what is measured of them beyond the sample, and how it gets to their traces.

Owns the buffers of a step. A measurer adds what it measured layer by layer; when the step is over, `commit` gives each
trace its part. It neither decides who is traced (`tracker.py`) nor measures (`measure/`, `kernels/`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.rows import ROW_DECODE, ROW_SLOT
from glassbox.core.trace_arrays import trace_array, without_values
from glassbox.kernels.probe_answers import ProbeAnswers, PromptAnswers
from glassbox.measure.contract import AskedPrompt, AskedRows, LayeredRows
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk, Drafts
from glassbox.processes.worker.traces.sums import SummedRow
from glassbox.store.trace_record import MAX_ATTENTION_KEYS

# Note of a trace that lacks rows of a whole prompt.
NOT_MEASURED: Final = "rows of the prompt are missing in some layers: they could not be measured, see the worker's log"


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

    @property
    def summed(self) -> npt.NDArray[np.bool_]:
        """[n] rows that enter the request's sums: not those of a prompt of which all rows do by themselves."""
        trace = self.trace
        if trace.sums is None or trace.prompt == "sampled":
            return np.full(len(self.positions), trace.sums is not None)
        return (self.phases & ROW_DECODE) == ROW_DECODE


@dataclass(frozen=True)
class TracedPrompt:
    """All rows of one request's prompt in a step.

    Attributes:
        trace: of the request.
        asked: which rows, and what of them.
    """

    trace: ActiveTrace
    asked: AskedPrompt


class TracedStep:
    """What is measured of traced requests in one step.

    Args:
        members: the rows, in the order of the row list.
        row_list: int32 [R, NUM_ROW_COLUMNS] of the step.
        indices: int64 [n], where the members' rows stand in `row_list`.
        num_layers, num_heads: of the worker.
        prompts: of which all rows are measured.
        prompt_rows: those of the row list that are these prompts' and no member's.

    Attributes:
        num_slots: of a ring that has a slot for every row that ROW_SLOT gives one.
        local_layers: observed layers that some of the traces keep.
        wanted: which rows are to be measured in which of these.
        prompts: what is asked of them; prompt_rows: as given.
    """

    def __init__(
        self,
        members: Sequence[TracedRows],
        row_list: npt.NDArray[np.int32],
        indices: npt.NDArray[np.int64],
        num_layers: int,
        num_heads: int,
        prompts: Sequence[TracedPrompt] = (),
        prompt_rows: Sequence[LayeredRows] = (),
    ) -> None:
        self._members, self._indices = members, indices
        self._of_prompts = [_Prompt(prompt) for prompt in prompts]
        self.prompts: Sequence[AskedPrompt] = [prompt.asked for prompt in prompts]
        self._slots = row_list[indices, ROW_SLOT]
        # Slots are given out in order; rows for which there was no memory have one, too.
        self.num_slots = int(row_list[:, ROW_SLOT].max(initial=-1)) + 1
        traces = [*(member.trace for member in members), *(prompt.trace for prompt in prompts)]
        self.local_layers = frozenset[int]().union(*{trace.local_layers for trace in traces})
        sizes = {"token": len(indices), "layer": num_layers, "head": num_heads}
        self._stats, self._previous = trace_array("stats").filled(sizes), trace_array("previous_mass").filled(sizes)
        self._probes = [_Probe(member) for member in members if member.trace.probes]
        numbers = [np.arange(p.rows.numbers.start, p.rows.numbers.stop) for p in self._probes]
        self._probed_places = indices[np.concatenate(numbers)] if numbers else indices[:0]
        self._probed = row_list[self._probed_places]
        self._probed_layers = frozenset[int]().union(*{probe.rows.trace.local_layers for probe in self._probes})
        self.wanted: Sequence[LayeredRows] = self._wanted()
        self.prompt_rows = prompt_rows

    def _wanted(self) -> list[LayeredRows]:
        """Rows of traces that keep the same layers together. Questions are asked of all probed rows at once."""
        by_layers: dict[tuple[int, ...], list[npt.NDArray[np.int64]]] = {}
        for member in self._members:
            by_layers.setdefault(member.trace.local_layers, []).append(self._indices[member.numbers])
        wanted = [LayeredRows(frozenset(layers), np.concatenate(places)) for layers, places in by_layers.items()]
        if len(by_layers) > 1 and self._probes:
            wanted.append(LayeredRows(self._probed_layers, self._probed_places))
        return wanted

    def add_stats(
        self,
        local_layers: Sequence[int],
        places: npt.NDArray[np.int64],
        stats: npt.NDArray[np.float32],
        previous_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """See contract.StepTraces."""
        measured = np.flatnonzero(np.isin(self._indices, places, assume_unique=True))
        rows = np.searchsorted(places, self._indices[measured])
        at = np.ix_(measured, np.asarray(local_layers), np.arange(stats.shape[2]))
        self._stats[at] = stats[:, rows].swapaxes(0, 1)
        if previous_mass is not None:
            self._previous[at] = previous_mass[:, rows].swapaxes(0, 1)

    def set_stats(
        self,
        local_layers: Sequence[int],
        ring: npt.NDArray[np.float32],
        previous_mass: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """See contract.StepTraces."""
        self._stats[:, local_layers] = ring[self._slots]
        if previous_mass is not None:
            self._previous[:, local_layers] = previous_mass[self._slots]

    def add_prompt(self, number: int, local_layer: int, answers: PromptAnswers[npt.NDArray]) -> None:
        """See contract.StepTraces."""
        self._of_prompts[number].add(local_layer, answers)

    def assemble_prompts(self) -> None:
        """See contract.StepTraces."""
        for prompt in self._of_prompts:
            prompt.assemble()

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
            local_layers=self._probed_layers,
            kept_attention=tuple(i for i, one in enumerate(options) if one.attention),
            received=tuple(np.flatnonzero(np.concatenate([probe.sums_attention for probe in self._probes])).tolist()),
            queries=any(probe.wants_queries for probe in self._probes),
        )

    def add_answers(self, local_layers: Sequence[int], answers: ProbeAnswers[npt.NDArray]) -> None:
        """See contract.StepTraces."""
        at = kept = summed = 0
        for probe in self._probes:
            n, num_summed = len(probe.rows.positions), int(probe.sums_attention.sum())
            wanted = n if probe.rows.trace.options.attention else 0
            whole = answers.attention[kept : kept + wanted], answers.received[summed : summed + num_summed]
            probe.add_answers(local_layers, answers, slice(at, at + n), *whole)
            at, kept, summed = at + n, kept + wanted, summed + num_summed

    def commit(self) -> None:
        """Give every trace its rows."""
        # Of a position that is measured both ways the row that was probed counts, which comes last.
        for prompt in self._of_prompts:
            prompt.commit()
        probes = {id(probe.rows): probe for probe in self._probes}
        for member in self._members:
            trace = member.trace
            layers, heads = np.ix_(trace.local_layers, trace.head_columns)
            probe = probes.get(id(member)) or _Probe(member)
            of_rows = (values[member.numbers][:, layers, heads] for values in (self._stats, self._previous))
            trace.append(probe.chunk(*of_rows))
            if trace.sums is not None:
                trace.sums.add_rows(probe.summed_rows())


class _Prompt:
    """Answers of one request's prompt, layer by layer."""

    def __init__(self, prompt: TracedPrompt) -> None:
        self._trace, self._asked = prompt.trace, prompt.asked
        self._place = {local_layer: i for i, local_layer in enumerate(prompt.trace.local_layers)}
        self._found: list[tuple[int, Sequence[int], PromptAnswers[npt.NDArray]]] = []
        self._chunk: Chunk | None = None
        self._unanswered = False

    def add(self, local_layer: int, answers: PromptAnswers[npt.NDArray]) -> None:
        heads = self._asked.heads[: answers.stats.shape[1]]
        self._found.append((self._place[local_layer], heads, answers))

    def assemble(self) -> None:
        """Make the chunk of the answers, and add them to the request's sums, if that wasn't done yet."""
        if self._chunk is not None:
            return
        trace, asked = self._trace, self._asked
        arrays = without_values({"token": asked.num_rows, **trace.sizes})
        arrays["positions"][:] = np.arange(asked.position, asked.num_keys)
        for layer, heads, answers in self._found:
            columns = slice(0, len(heads))
            arrays["stats"][:, layer, columns] = answers.stats
            arrays["previous_mass"][:, layer, columns] = answers.previous_mass
            arrays["span_mass"][:, layer, columns] = answers.span_mass
            if answers.queries is not None and trace.sizes["dim"]:
                _put_padded(arrays["queries"][:, layer, columns], answers.queries)
        none = np.zeros((len(trace.local_layers), len(trace.head_columns), 0), dtype=np.float16)
        if trace.sums is not None:
            trace.sums.add_prompt(asked.num_keys, asked.keys_from, self._found)
        self._unanswered = len(self._found) < len(asked.local_layers)
        self._found = []
        self._chunk = Chunk(arrays, (none,) * asked.num_rows if trace.options.attention else ())

    def commit(self) -> None:
        self.assemble()
        assert self._chunk is not None
        self._trace.append(self._chunk)
        if self._unanswered:
            self._trace.note(NOT_MEASURED)


def _put_padded(to: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32]) -> None:
    """Vectors [..., d] into [..., D]; zeros change no product."""
    to[..., : vectors.shape[-1]] = vectors
    to[..., vectors.shape[-1] :] = 0


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
        self.sums_attention = rows.summed & (trace.sums is not None and trace.sums.sizes.received)
        self.wants_queries = trace.sums is not None and (trace.sums.sizes.grams or trace.sums.sizes.kept)
        summed = [position for position, sums in zip(positions, self.sums_attention, strict=True) if sums]
        self._received = [np.full((*place, position + 1), np.nan, dtype=np.float32) for position in summed]
        vectors = (len(positions), *place, trace.sums.sizes.head_size) if self.wants_queries and trace.sums else None
        # Of queries and of keys.
        self._vectors = None if vectors is None else np.full((2, *vectors), np.nan, dtype=np.float32)

    def add_answers(
        self,
        local_layers: Sequence[int],
        answers: ProbeAnswers[npt.NDArray],
        mine: slice,
        attention: Sequence[npt.NDArray[np.float16]],
        received: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        """Keep what was asked of some layers.

        Args:
            local_layers: which.
            answers: of all rows that were asked; mine: these rows among them.
            attention: whole vectors of these rows, if they are wanted; received: likewise to be summed.
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
            if name != "queries":
                self._arrays[name][to] = found[mine][of][..., : self._arrays[name].shape[-1]]
        self._summed_places += len(own) * len(columns)
        if self._sums:
            for total, summed in zip(self._sums, answers.chosen_sum[mine], strict=True):
                np.add(total, summed[: len(total)], out=total)
        for kept, values in zip(self._attention, attention, strict=True):
            kept[np.ix_(own, range(len(columns)))] = values[np.ix_(group, columns)]
        for summed, attended in zip(self._received, received, strict=True):
            summed[np.ix_(own, range(len(columns)))] = attended[np.ix_(group, columns)]
        if self._vectors is not None and answers.queries is not None and answers.keys is not None:
            shared = answers.queries.shape[2] // answers.keys.shape[2]
            of_keys = np.ix_(everywhere, group, [column // shared for column in columns])
            for to_vectors, found in zip(
                self._vectors, (answers.queries[mine][of], answers.keys[mine][of_keys]), strict=True
            ):
                padded = np.zeros((*found.shape[:-1], to_vectors.shape[-1]), dtype=np.float32)
                padded[..., : found.shape[-1]] = found
                to_vectors[to] = padded

    def summed_rows(self) -> list[SummedRow]:
        """What these rows add to the request's sums."""
        rows, received = [], iter(self._received)
        for i in np.flatnonzero(self.rows.summed).tolist():
            rows.append(
                SummedRow(
                    position=int(self.rows.positions[i]),
                    received=next(received) if self.sums_attention[i] else None,
                    queries=None if self._vectors is None else self._vectors[0, i],
                    keys=None if self._vectors is None else self._vectors[1, i],
                    drafts=self.rows.drafts,
                )
            )
        return rows

    def chunk(self, stats: npt.NDArray[np.float32], previous_mass: npt.NDArray[np.float32]) -> Chunk:
        """Of these rows, with their statistics [n, L, H, NUM_STATISTICS + 1] and attention to the one before."""
        arrays = self._arrays | {"positions": self.rows.positions, "phases": self.rows.phases, "stats": stats}
        arrays["previous_mass"] = previous_mass
        if self._vectors is not None and self.rows.trace.sizes["dim"]:
            arrays["queries"] = self._vectors[0]
        mean_positions, mean_mass = arrays["mean_topk_positions"], arrays["mean_topk_mass"]
        for i, total in enumerate(self._sums):
            # A head without finite scores leaves no mean, nor does a probe that failed.
            if self._summed_places and np.isfinite(total).all():
                best = np.argsort(-total, kind="stable")[: mean_mass.shape[1]]
                mean_positions[i, : len(best)], mean_mass[i, : len(best)] = best, total[best] / self._summed_places
        return Chunk(arrays, tuple(self._attention), self.rows.drafts)
