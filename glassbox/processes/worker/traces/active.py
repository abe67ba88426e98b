"""A traced request while it runs: what it asked, what was measured of it so far, and its record.

Owns the memory of one trace. The step thread appends chunks, which are never changed afterwards; the export thread may
take a record at any time. Which requests are traced is decided in `tracker.py`, what a step measures in
`traced_step.py`.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.adapter.runner import RequestTokens
from glassbox.core.signal_table import MAX_KEPT_TOKENS, NUM_SINGULAR_VALUES
from glassbox.core.trace_arrays import SCORE_PARAMS, not_asked_for, row_nbytes, without_values
from glassbox.core.trace_options import PromptRows
from glassbox.processes.worker.traces.sums import SumSizes, TraceSums
from glassbox.store.trace_record import (
    MAX_ATTENTION_KEYS,
    RequestTrace,
    Status,
    TraceOptions,
    Why,
    external_id,
    joined_attention,
    no_attention,
)

# Bytes of a chunk beside its arrays: a Python object with some ten array headers.
_CHUNK_BYTES: Final = 1500
TOO_LONG_FOR_KEYS: Final = (
    f"queries and keys are not kept: signals on demand are for requests of at most {MAX_KEPT_TOKENS} tokens"
)


@dataclass(frozen=True)
class TraceHost:
    """The worker that traces.

    Attributes:
        engine, rank, model_name, instance: as in its snapshots.
        layers: global index of each observed layer, in the order of the accumulators.
        head_offset: global index of the first local head; num_heads: local ones; num_heads_total: of the model.
        max_model_len: most tokens of a sequence.
        head_size: the largest of the layers; 0 if it isn't known, and then no signal has queries or keys.
        knows_positions: the host is told in time which drafts of speculative decoding were kept.
        tokenizer, tokenizer_revision: folder or name of the model's tokenizer, empty if there is none.
        unobserved: why no request can be traced here; empty if requests can.
    """

    engine: str
    rank: int
    model_name: str
    instance: str
    layers: tuple[int, ...]
    head_offset: int
    num_heads: int
    num_heads_total: int
    max_model_len: int
    head_size: int = 0
    knows_positions: bool = True
    tokenizer: str = ""
    tokenizer_revision: str | None = None
    unobserved: str = ""


@dataclass
class Drafts:
    """The draft tokens of one request in one step; which of them are kept is known in the next one.

    Attributes:
        kept_to: position before which the step's tokens are the request's: that of the first draft until more is known.
    """

    kept_to: int


@dataclass(frozen=True)
class Chunk:
    """Rows of one request in one step.

    Attributes:
        arrays: the collected ones of core/trace_arrays.py, by name.
        attention: one float16 [L, H, keys] per row, empty if not asked for.
        drafts: some of the rows may be of draft tokens.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    attention: tuple[npt.NDArray[np.float16], ...] = ()
    drafts: Drafts | None = None

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """[n] rows whose tokens are the request's."""
        positions = self.arrays["positions"]
        return np.ones(len(positions), dtype=bool) if self.drafts is None else positions < self.drafts.kept_to


class ActiveTrace:
    """One traced request on this worker.

    Args:
        host: the worker.
        internal_id: vLLM's id.
        why: it is traced.
        options: that it gave.
        traceparent: that came with it.
        requested_model: its model by the name that the client asked for, None if that isn't known.
        adapter: name of its LoRA adapter, None if it has none.
        client: who asked, None if it isn't known.
        sampling_params: vLLM's.
        prompt_len: tokens.
        local_layers: which of the worker's observed layers are kept, ascending.
        head_columns: which of its heads are kept, ascending.

    Attributes:
        internal_id, why, options, prompt_len, client, sampling_params: as given.
        nbytes: of what is kept so far.
        truncated: nothing more is kept.
        thinned: rows of some steps were left out.
        prompt: which of the prompt's rows are measured; `sampled` once all are refused.
        prompt_to: position behind the last row of the prompt that was asked for as one of all.
        sums: of all rows, if it has any.
        status: see RequestTrace.
        num_generated: tokens so far, as far as the computed positions tell.
        tokens: of prompt and answer, if they are to be kept and the runner knows them.
        version: grows whenever a new record would differ.
    """

    def __init__(
        self,
        host: TraceHost,
        internal_id: str,
        *,
        why: Why,
        options: TraceOptions,
        traceparent: str | None,
        requested_model: str | None = None,
        adapter: str | None = None,
        client: str | None = None,
        sampling_params: Any = None,
        prompt_len: int,
        local_layers: tuple[int, ...],
        head_columns: tuple[int, ...],
    ) -> None:
        self.internal_id, self.request_id = internal_id, external_id(internal_id)
        self.why, self.options, self.prompt_len, self.client = why, options, prompt_len, client
        self.sampling_params = sampling_params
        self.local_layers, self.head_columns = local_layers, head_columns
        self.nbytes = self.num_generated = self.version = 0
        self.truncated = self.thinned = False
        self.prompt: PromptRows = options.prompt
        self.prompt_to = 0
        self._notes: tuple[str, ...] = ()
        self.status: Status = "active"
        self.tokens: RequestTokens | None = None
        self._host, self._traceparent = host, traceparent
        self._requested_model, self._adapter = requested_model or adapter or host.model_name, adapter
        self._start_time_s = time.time()
        self._end_time_s: float | None = None
        self._chunks: list[Chunk] = []
        # Of the latest step, until the next one.
        self._drafts: Drafts | None = None
        self.sums: TraceSums | None = None
        # Positions for whose sums there is room.
        self._reserved_to = 0
        self.keep(options.arrays)

    def keep(self, arrays: Collection[str]) -> None:
        """Before the first row: keep these of the arrays that are kept on request alone, whatever was asked."""
        wanted = SumSizes(
            layers=len(self.local_layers),
            heads=len(self.head_columns),
            head_size=self._host.head_size,
            received="received" in arrays,
            grams="singular_values" in arrays,
            kept="keys" in arrays,
            squares="received_squares" in arrays,
        )
        self.sums = TraceSums(wanted) if wanted.received or wanted.grams or wanted.kept else None
        self._dim = wanted.head_size if wanted.kept else 0
        # Looked up once: rows are reserved in every step.
        self._row_nbytes = row_nbytes({**self.sizes, "key": 0})
        self._key_nbytes = row_nbytes({**self.sizes, "key": 1}) - self._row_nbytes if self.options.attention else 0
        self.nbytes = wanted.fixed_nbytes

    def note(self, text: str) -> None:
        """Say what is missing of it, once."""
        if text not in self._notes:
            self._notes = (*self._notes, text)
            self.version += 1

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes of its arrays, but those along which it grows."""
        return {
            "layer": len(self.local_layers),
            "head": len(self.head_columns),
            "top_k": self.options.top_k,
            "span": len(self.options.spans),
            "dim": self._dim,
        }

    @property
    def probes(self) -> bool:
        """Whether the statistics of its rows are not enough."""
        return self.options.probes or self.sums is not None

    def whole_nbytes(self, num_rows: int) -> int:
        """Bytes that a prompt of so many rows takes when all of them are measured."""
        return self.nbytes + num_rows * (self._row_nbytes + self._position_nbytes) + _CHUNK_BYTES

    @property
    def _position_nbytes(self) -> int:
        return 0 if self.sums is None else self.sums.sizes.nbytes_per_position

    def row_nbytes(self, position: int) -> int:
        """Bytes that a row at `position` takes."""
        return self._row_nbytes + self._key_nbytes * min(position + 1, MAX_ATTENTION_KEYS)

    def reserve(self, positions: Sequence[int], limit: int, *, whole: bool = False) -> bool:
        """Whether rows at `positions` may be kept within `limit` bytes; if not, nothing is kept from now on.

        Args:
            whole: the whole attention of the rows is not kept even if it was asked for.
        """
        rows = len(positions) * self._row_nbytes if whole else sum(self.row_nbytes(position) for position in positions)
        reserved_to = max(self._reserved_to, max(positions, default=-1) + 1)
        needed = rows + (reserved_to - self._reserved_to) * self._position_nbytes + _CHUNK_BYTES
        if self.nbytes + needed > limit:
            self.truncate("requests.max_trace_mb or max_active_mb left no room for later rows")
            return False
        self.nbytes, self._reserved_to = self.nbytes + needed, reserved_to
        if self.sums is not None and self.sums.sizes.kept and reserved_to > MAX_KEPT_TOKENS:
            self.sums.drop_keys()
            self.note(TOO_LONG_FOR_KEYS)
        return True

    def truncate(self, why: str) -> None:
        """Keep nothing more."""
        self.truncated = True
        self.note(why)
        self.version += 1

    def skip(self) -> None:
        """A step's rows of this request are not measured."""
        self.thinned = True
        self.note("rows of some steps are missing: sampling.overhead_budget was spent")
        self.version += 1

    def append(self, chunk: Chunk) -> None:
        """Keep a chunk for which `reserve` had room."""
        self._chunks.append(chunk)
        kept = chunk.arrays["positions"][chunk.kept]
        if len(kept):
            self.num_generated = max(self.num_generated, int(kept[-1]) + 2 - self.prompt_len)
        self.version += 1

    def propose(self, position: int) -> Drafts:
        """A step's tokens from `position` on are drafts, until `verify` says which of them were kept."""
        self._drafts = Drafts(position)
        return self._drafts

    @property
    def has_drafts(self) -> bool:
        """Whether `verify` is to be told."""
        return self._drafts is not None

    def verify(self, num_generated: int) -> None:
        """After a step with drafts the request has so many tokens that were generated; the last one has no row yet."""
        if self._drafts is None:
            return
        self._drafts.kept_to = max(self._drafts.kept_to, self.prompt_len + num_generated - 1)
        self.num_generated = max(self.num_generated, num_generated)
        self._drafts = None
        self.version += 1

    def end(self, status: Status, num_generated: int | None = None) -> None:
        """The request is gone.

        Args:
            status: finished, aborted or lost.
            num_generated: tokens, if they are known exactly.
        """
        if num_generated is not None:
            self.verify(num_generated)
            self.num_generated = num_generated
        if self.tokens is not None:
            # vLLM's list may be used again; what is kept from here on is a copy.
            self.tokens = RequestTokens(self.tokens.prompt, list(self.tokens.generated), self.tokens.sampling_params)
        # In this order: whoever sees the end sees the status that goes with it.
        self.status = status
        self._end_time_s = time.time()
        self.version += 1

    def record(self) -> RequestTrace:
        """All that is known now; called from any thread."""
        ended = self._end_time_s
        chunks = tuple(self._chunks)
        joined = self._joined(chunks)
        kept = np.flatnonzero(np.concatenate([np.ones(0, dtype=bool), *(chunk.kept for chunk in chunks)]))
        # A position computed again after a preemption counts as it was the last time.
        _, last = np.unique(joined["positions"][kept][::-1], return_index=True)
        keep = kept[len(kept) - 1 - last]
        if ended is not None:
            # A step that was queued before the end was known computes a token more.
            keep = keep[joined["positions"][keep] < self.prompt_len + max(self.num_generated - 1, 0)]
        # Most keep all of their rows, in order: megabytes that need not be copied again.
        every = np.array_equal(keep, np.arange(len(joined["positions"])))
        arrays = joined if every else {name: values[keep] for name, values in joined.items()}
        arrays |= self._kept_attention([values for chunk in chunks for values in chunk.attention], keep, arrays)
        notes = list(self._notes)
        of_request = self._of_request(arrays["positions"], notes)
        if not of_request["keys"].shape[-1]:
            arrays["queries"] = arrays["queries"][..., :0]
        host, spans = self._host, self.options.spans
        return RequestTrace(
            request_id=self.request_id,
            internal_id=self.internal_id,
            engine=host.engine,
            rank=host.rank,
            model_name=host.model_name,
            requested_model=self._requested_model,
            adapter=self._adapter,
            client=self.client,
            instance=host.instance,
            why=self.why,
            status=self.status if ended is not None else "active",
            start_time_s=self._start_time_s,
            end_time_s=ended,
            prompt_len=self.prompt_len,
            num_generated=self.num_generated,
            traceparent=self._traceparent,
            layers=tuple(host.layers[local] for local in self.local_layers),
            heads=tuple(host.head_offset + column for column in self.head_columns),
            options=self.options,
            truncated=self.truncated or self.thinned,
            span_names=tuple(span.name for span in spans),
            arrays=arrays
            | of_request
            | {
                "span_ranges": np.array([(span.start, span.end) for span in spans], dtype=np.int32).reshape(-1, 2),
                "token_ids": self._token_ids(),
            },
            notes=tuple(notes),
        )

    def _of_request(self, positions: npt.NDArray[np.int32], notes: list[str]) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the whole request that are kept on request alone; says in `notes` what they lack."""
        sums = self.sums
        if sums is None:
            return not_asked_for(self.sizes)
        end = int(positions[-1]) + 1 if len(positions) else 0
        ended = self._end_time_s is not None
        found, without_key = sums.arrays(end, self.prompt_len + max(self.num_generated - 1, 0) if ended else None)
        if without_key:
            notes.append(f"the keys of {without_key} positions are missing: their steps were not measured")
        kept = "keys" in found
        without = np.flatnonzero(np.isnan(found["score_params"][..., 0]).all(1)) if kept and self.head_columns else ()
        if len(without):
            layers = ", ".join(str(self._host.layers[self.local_layers[i]]) for i in without)
            notes.append(
                f"queries and keys of layers {layers} don't make their attention (ALiBi, chunked attention, or no row "
                f"was measured), so signals on demand have no value there"
            )
        sizes = {
            **self.sizes,
            "position": end if "received" in found else 0,
            "squared_position": end if "received_squares" in found else 0,
            "singular": NUM_SINGULAR_VALUES if "singular_values" in found else 0,
            "dim": self._dim if kept else 0,
            "param": len(SCORE_PARAMS) if kept else 0,
        }
        return not_asked_for(sizes) | found

    def _joined(self, chunks: Sequence[Chunk]) -> dict[str, npt.NDArray[Any]]:
        # The empty ones give shapes and types to a trace without chunks.
        empty = without_values({"token": 0, **self.sizes})
        return {name: np.concatenate([none, *(chunk.arrays[name] for chunk in chunks)]) for name, none in empty.items()}

    def _kept_attention(
        self, collected: Sequence[npt.NDArray[np.float16]], keep: npt.NDArray[np.intp], arrays: Mapping[str, Any]
    ) -> dict[str, npt.NDArray[Any]]:
        if not self.options.attention:
            return no_attention()
        starts = np.maximum(arrays["positions"] + 1 - MAX_ATTENTION_KEYS, 0)
        return joined_attention([collected[i] for i in keep.tolist()], starts)

    def _token_ids(self) -> npt.NDArray[np.int32]:
        tokens = self.tokens
        if tokens is None or tokens.prompt is None:
            return np.zeros(0, dtype=np.int32)
        # list() copies in one step, so a list that the step thread appends to is safe to read.
        ids = np.array([*tokens.prompt, *list(tokens.generated)], dtype=np.int32)
        # -1: the runner has not read all of them back.
        return ids[:0] if (ids < 0).any() else ids
