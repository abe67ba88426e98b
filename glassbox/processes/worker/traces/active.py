"""A traced request while it runs: what it asked, what was measured of it so far, and its record.

Owns the memory of one trace. The step thread appends chunks, which are never changed afterwards; the export thread may
take a record at any time. Which requests are traced is decided in `tracker.py`, what a step measures in
`traced_step.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.adapter.runner import RequestTokens
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.store.trace_record import MAX_ROW_KEYS, RequestTrace, Status, TraceOptions, Why, external_id

# Bytes of a chunk beside its arrays: a Python object with some ten array headers.
_CHUNK_BYTES: Final = 1500


@dataclass(frozen=True)
class TraceHost:
    """The worker that traces.

    Attributes:
        engine, rank, model_name, instance: as in its snapshots.
        layers: global index of each observed layer, in the order of the accumulators.
        head_offset: global index of the first local head; num_heads: local ones; num_heads_total: of the model.
        max_model_len: most tokens of a sequence.
        tokenizer, tokenizer_revision: folder or name of the model's tokenizer, empty if there is none.
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
    tokenizer: str = ""
    tokenizer_revision: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows of one request in one step; shapes as in RequestTrace.

    Attributes:
        rows: one float16 [L, H, keys] per row, empty if not asked for.
    """

    positions: npt.NDArray[np.int32]
    phases: npt.NDArray[np.uint8]
    stats: npt.NDArray[np.float32]
    topk_positions: npt.NDArray[np.int32]
    topk_mass: npt.NDArray[np.float32]
    mean_topk_positions: npt.NDArray[np.int32]
    mean_topk_mass: npt.NDArray[np.float32]
    span_mass: npt.NDArray[np.float32]
    rows: tuple[npt.NDArray[np.float16], ...] = ()


_JOINED: Final = tuple(field.name for field in fields(Chunk) if field.name != "rows")


class ActiveTrace:
    """One traced request on this worker.

    Args:
        host: the worker.
        internal_id: vLLM's id.
        why: it is traced.
        options: that it gave.
        traceparent: that came with it.
        sampling_params: vLLM's.
        prompt_len: tokens.
        local_layers: which of the worker's observed layers are kept, ascending.
        head_columns: which of its heads are kept, ascending.

    Attributes:
        nbytes: of what is kept so far.
        truncated: nothing more is kept.
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
        sampling_params: Any = None,
        prompt_len: int,
        local_layers: tuple[int, ...],
        head_columns: tuple[int, ...],
    ) -> None:
        self.internal_id, self.request_id = internal_id, external_id(internal_id)
        self.why, self.options, self.prompt_len = why, options, prompt_len
        self.sampling_params = sampling_params
        self.local_layers, self.head_columns = local_layers, head_columns
        self.nbytes = self.num_generated = self.version = 0
        self.truncated = False
        self.status: Status = "active"
        self.tokens: RequestTokens | None = None
        self._host, self._traceparent = host, traceparent
        self._start_time_s = time.time()
        self._end_time_s: float | None = None
        self._chunks: list[Chunk] = []

    def row_nbytes(self, position: int) -> int:
        """Bytes that a row at `position` takes."""
        options, places = self.options, len(self.local_layers) * len(self.head_columns)
        numbers = places * (NUM_STATISTICS + 1 + 2 * options.top_k + len(options.spans)) + 2 * options.top_k + 2
        return 4 * numbers + (2 * places * min(position + 1, MAX_ROW_KEYS) if options.rows else 0)

    def reserve(self, positions: Sequence[int], limit: int) -> bool:
        """Whether rows at `positions` may be kept within `limit` bytes; if not, nothing is kept from now on."""
        needed = sum(self.row_nbytes(position) for position in positions) + _CHUNK_BYTES
        if self.nbytes + needed > limit:
            self.truncated = True
            self.version += 1
            return False
        self.nbytes += needed
        return True

    def append(self, chunk: Chunk) -> None:
        """Keep a chunk for which `reserve` had room."""
        self._chunks.append(chunk)
        self.num_generated = max(self.num_generated, int(chunk.positions[-1]) + 2 - self.prompt_len)
        self.version += 1

    def end(self, status: Status, num_generated: int | None = None) -> None:
        """The request is gone.

        Args:
            status: finished, aborted or lost.
            num_generated: tokens, if they are known exactly.
        """
        if num_generated is not None:
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
        joined = self._join(chunks)
        # A position computed again (after a preemption, or a rejected draft) counts as it was the last time.
        _, last = np.unique(joined["positions"][::-1], return_index=True)
        keep = len(joined["positions"]) - 1 - last
        if ended is not None:
            # Rejected drafts at the very end were never computed again.
            keep = keep[joined["positions"][keep] < self.prompt_len + max(self.num_generated - 1, 0)]
        arrays = {name: values[keep] for name, values in joined.items()}
        rows = [row for chunk in chunks for row in chunk.rows]
        kept = [rows[i] for i in keep.tolist()] if self.options.rows else []
        offsets = np.concatenate([[0], np.cumsum([row.size for row in kept], dtype=np.int64)]).astype(np.int64)
        host, spans = self._host, self.options.spans
        return RequestTrace(
            request_id=self.request_id,
            internal_id=self.internal_id,
            engine=host.engine,
            rank=host.rank,
            model_name=host.model_name,
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
            truncated=self.truncated,
            span_names=tuple(span.name for span in spans),
            span_ranges=np.array([(span.start, span.end) for span in spans], dtype=np.int32).reshape(-1, 2),
            row_values=np.concatenate([row.ravel() for row in kept]) if kept else np.zeros(0, dtype=np.float16),
            row_offsets=offsets if self.options.rows else offsets[:0],
            row_starts=np.maximum(arrays["positions"] + 1 - MAX_ROW_KEYS, 0)
            if self.options.rows
            else np.zeros(0, dtype=np.int32),
            token_ids=self._token_ids(),
            **arrays,
        )

    def _join(self, chunks: tuple[Chunk, ...]) -> dict[str, np.ndarray]:
        if not chunks:
            chunks = (self._empty(),)
        return {name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in _JOINED}

    def _empty(self) -> Chunk:
        place, k = (len(self.local_layers), len(self.head_columns)), self.options.top_k
        return Chunk(
            positions=np.zeros(0, dtype=np.int32),
            phases=np.zeros(0, dtype=np.uint8),
            stats=np.zeros((0, *place, NUM_STATISTICS + 1), dtype=np.float32),
            topk_positions=np.zeros((0, *place, k), dtype=np.int32),
            topk_mass=np.zeros((0, *place, k), dtype=np.float32),
            mean_topk_positions=np.zeros((0, k), dtype=np.int32),
            mean_topk_mass=np.zeros((0, k), dtype=np.float32),
            span_mass=np.zeros((0, *place, len(self.options.spans)), dtype=np.float32),
        )

    def _token_ids(self) -> npt.NDArray[np.int32]:
        tokens = self.tokens
        if tokens is None or tokens.prompt is None:
            return np.zeros(0, dtype=np.int32)
        # list() copies in one step, so a list that the step thread appends to is safe to read.
        ids = np.array([*tokens.prompt, *list(tokens.generated)], dtype=np.int32)
        # -1: the runner has not read all of them back.
        return ids[:0] if (ids < 0).any() else ids
