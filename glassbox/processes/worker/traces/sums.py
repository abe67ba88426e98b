"""What is summed over all rows of one traced request: attention by position, and products of queries and of keys.

Owns these sums and the keys that are kept beside them. The step thread adds the rows of a step, the export thread takes
a copy at any time. Prompt rows are certain when they come; those of generated tokens are not: they may be drafts, or be
computed beyond the request's end. So the latest of them wait by themselves until they are known to stay.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from glassbox.core.signal_table import NUM_SINGULAR_VALUES
from glassbox.core.trace_arrays import SCORE_PARAMS
from glassbox.kernels.probe_answers import PromptAnswers, kv_heads

# Steps after which a row stays: a step is queued before the end of the one before it is known, and drafts are verified
# with the next one.
_CERTAIN_AFTER: Final = 4
# Rows whose products are summed at once: by themselves each would take as long as all of them.
_ROWS_AT_ONCE: Final = 32
# Room for so many more positions is made at once.
_ROOM: Final = 512
# Products of larger heads take more time and memory than what they are for.
MAX_GRAM_HEAD_SIZE: Final = 256


class KeptTo(Protocol):
    """Position before which a step's tokens are the request's, as far as is known."""

    kept_to: int


@dataclass(frozen=True)
class SumSizes:
    """Of one trace on one worker.

    Attributes:
        layers, heads: L and H.
        head_size: D, the largest of the layers; the numbers of smaller ones are filled up with 0.
        received, grams, kept, squares: what there is of the four; squares only beside received.
    """

    layers: int
    heads: int
    head_size: int
    received: bool
    grams: bool
    kept: bool
    squares: bool = False

    @property
    def fixed_nbytes(self) -> int:
        """Bytes whatever the request's length: sums of products, and the vectors that wait for them."""
        vectors = 2 * self.layers * self.heads * self.head_size
        return vectors * (8 * self.head_size + 4 * _ROWS_AT_ONCE) if self.grams else 0

    @property
    def nbytes_per_position(self) -> int:
        """Bytes that a position adds: to the sums and to the rows that wait for them, and its key."""
        places = self.layers * self.heads
        sums = (8 + 4 * _CERTAIN_AFTER) * self.received + 8 * self.squares
        return places * (sums + 4 * self.head_size * self.kept)


@dataclass(frozen=True, eq=False)
class SummedRow:
    """What one row of a generated token adds.

    Attributes:
        position: of it.
        received: float32 [L, H, position + 1], its attention; NaN at a place without an answer; None if not asked.
        queries, keys: float32 [L, H, D], its query and its own key; None likewise.
        drafts: it may be of a draft token.
    """

    position: int
    received: npt.NDArray[np.float32] | None
    queries: npt.NDArray[np.float32] | None
    keys: npt.NDArray[np.float32] | None
    drafts: KeptTo | None


class TraceSums:
    """The sums of one trace.

    Args:
        sizes: of them.

    Attributes:
        keys_to: position behind the last key that was asked for.
    """

    def __init__(self, sizes: SumSizes) -> None:
        self.sizes = sizes
        self.keys_to = 0
        self._lock = threading.Lock()
        place = (sizes.layers, sizes.heads)
        # Positions up to the last row's; what lies behind is room.
        self._end = 0
        # The attention that positions receive, and its squares from later ones, by array of the trace.
        names = [name for name, there in (("received", sizes.received), ("received_squares", sizes.squares)) if there]
        self._received = {name: np.zeros((*place, 0)) for name in names}
        gram = (*place, sizes.head_size, sizes.head_size) if sizes.grams else (*place, 0, 0)
        self._query_gram, self._key_gram = np.zeros(gram), np.zeros(gram)
        self._keys = np.full((0, *place, sizes.head_size), np.nan, dtype=np.float32)
        self._params = np.full((*place, len(SCORE_PARAMS)), np.nan, dtype=np.float32)
        self._has_key = np.zeros(0, dtype=bool)
        # By the number of the step that they came with, and rows whose products are not summed yet.
        self._waiting: list[tuple[int, SummedRow]] = []
        self._products: list[SummedRow] = []
        self._step = 0

    def add_prompt(
        self, end: int, keys_from: int, found: Sequence[tuple[int, Sequence[int], PromptAnswers[Any]]]
    ) -> None:
        """Add consecutive rows of a prompt.

        Args:
            end: position behind the last one.
            keys_from: position of the first key that was asked for.
            found: (layer among those of the trace, heads local to the worker, answers of these) of each that answered.
        """
        with self._lock:
            self._make_room(end)
            self._end = max(self._end, end)
            self._has_key[keys_from:end] = True
            unanswered = np.ones((self.sizes.layers, self.sizes.heads), dtype=bool)
            for layer, heads, answers in found:
                unanswered[layer, : len(heads)] = False
                self._add_answers(layer, heads, answers, keys_from)
            # Later positions are not seen by these rows.
            for sums in self._received.values():
                sums[unanswered, :end] = np.nan
            self._query_gram[unanswered] = np.nan

    def _add_answers(self, layer: int, heads: Sequence[int], answers: PromptAnswers[Any], keys_from: int) -> None:
        columns = slice(0, len(heads))
        for name, sums in self._received.items():
            added = getattr(answers, name)
            sums[layer, columns, : answers.received.shape[1]] += np.nan if added is None else added
        groups = kv_heads(heads, answers.group)
        shared = [groups.index(head // answers.group) for head in heads]
        if self.sizes.grams:
            if answers.query_gram is None or answers.key_gram is None:
                self._query_gram[layer] = np.nan
            else:
                size = answers.query_gram.shape[-1]
                self._query_gram[layer, columns, :size, :size] += answers.query_gram
                self._key_gram[layer, columns, :size, :size] += answers.key_gram[shared]
        if self.sizes.kept and answers.keys is not None:
            end = keys_from + len(answers.keys)
            self._keys[keys_from:end, layer, columns] = 0
            self._keys[keys_from:end, layer, columns, : answers.keys.shape[-1]] = answers.keys[:, shared]
            self._params[layer, columns] = answers.score_params

    def drop_keys(self) -> None:
        """Keep none from now on."""
        with self._lock:
            self.sizes = replace(self.sizes, kept=False)
            self._keys = self._keys[:0].copy()

    def add_rows(self, rows: Sequence[SummedRow]) -> None:
        """Add rows of a step, each of its own position, whose keys before their own were asked for."""
        with self._lock:
            self._step += 1
            again = {row.position for row in rows}
            self._waiting = [(step, row) for step, row in self._waiting if row.position not in again]
            # What comes again counts once.
            self._waiting += [(self._step, row) for row in rows if row.position >= self._end]
            certain = [row for step, row in self._waiting if step <= self._step - _CERTAIN_AFTER]
            self._waiting = [(step, row) for step, row in self._waiting if step > self._step - _CERTAIN_AFTER]
            for row in certain:
                if row.drafts is None or row.position < row.drafts.kept_to:
                    self._add_row(row)
            if len(self._products) >= _ROWS_AT_ONCE:
                self._sum_products()

    def _add_row(self, row: SummedRow) -> None:
        self._make_room(row.position + 1)
        self._end = max(self._end, row.position + 1)
        _add_attention(self._received, row)
        if row.queries is not None:
            self._has_key[row.position] = True
            if self.sizes.grams:
                self._products.append(row)
            if self.sizes.kept:
                self._keys[row.position] = row.keys

    def _make_room(self, end: int) -> None:
        if end > len(self._has_key):
            self._has_key = np.append(self._has_key, np.zeros(end + _ROOM - len(self._has_key), dtype=bool))
        for name, sums in self._received.items():
            if end > sums.shape[2]:
                self._received[name] = np.zeros((*sums.shape[:2], end + _ROOM))
                self._received[name][..., : self._end] = sums[..., : self._end]
        if self.sizes.kept and end > len(self._keys):
            longer = np.full((end + _ROOM, *self._keys.shape[1:]), np.nan, dtype=np.float32)
            longer[: self._end] = self._keys[: self._end]
            self._keys = longer

    def _sum_products(self) -> None:
        rows, self._products = self._products, []
        if rows:
            self._query_gram += _gram([row.queries for row in rows])
            self._key_gram += _gram([row.keys for row in rows])

    def arrays(self, end: int, before: int | None) -> tuple[dict[str, npt.NDArray[Any]], int]:
        """The arrays of a trace that are made of the sums, and at how many positions they lack the key.

        Args:
            end: behind the last row that the trace shows.
            before: rows at this position and behind it don't count, for they lie beyond the request's end; None if that
                isn't known yet.
        """
        with self._lock:
            self._sum_products()
            kept = [
                row
                for _, row in self._waiting
                if (row.drafts is None or row.position < row.drafts.kept_to)
                and row.position < (end if before is None else min(end, before))
            ]
            shown = min(end, self._end)
            has_key = np.zeros(end, dtype=bool)
            has_key[:shown] = self._has_key[:shown]
            received = {name: np.zeros((*sums.shape[:2], end)) for name, sums in self._received.items()}
            for name, sums in self._received.items():
                received[name][..., :shown] = sums[..., :shown]
            query_gram, key_gram = self._query_gram.copy(), self._key_gram.copy()
            keys = np.full((end if self.sizes.kept else 0, *self._keys.shape[1:]), np.nan, dtype=np.float32)
            keys[:shown] = self._keys[:shown]
            params = self._params.copy()
        for row in kept:
            _add_attention(received, row)
            if row.queries is not None:
                has_key[row.position] = True
                if self.sizes.kept:
                    keys[row.position] = row.keys
        with_products = [row for row in kept if row.queries is not None]
        if self.sizes.grams and with_products:
            query_gram += _gram([row.queries for row in with_products])
            key_gram += _gram([row.keys for row in with_products])
        found: dict[str, npt.NDArray[Any]] = {name: sums.astype(np.float32) for name, sums in received.items()}
        if self.sizes.grams:
            found["singular_values"] = singular_values(query_gram, key_gram)
        if self.sizes.kept:
            found |= {"keys": keys, "score_params": params}
        return found, int((~has_key).sum()) if self.sizes.grams or self.sizes.kept else 0


def _add_attention(sums: Mapping[str, npt.NDArray[np.float64]], row: SummedRow) -> None:
    """Add a row's attention to `received`, and its squares to `received_squares`, where there are these."""
    if row.received is None:
        return
    if "received" in sums:
        sums["received"][..., : row.position + 1] += row.received
    if "received_squares" in sums:
        # What it gives itself is known from its own statistics.
        sums["received_squares"][..., : row.position] += row.received[..., :-1].astype(np.float64) ** 2


def _gram(rows: Sequence[Any]) -> npt.NDArray[np.float64]:
    """Sum of x x^T of rows [L, H, D]: [L, H, D, D]."""
    columns = np.stack(rows, axis=-1).astype(np.float64)  # [L, H, D, n]
    return np.asarray(columns @ columns.swapaxes(-1, -2))


def singular_values(query_gram: npt.NDArray[np.float64], key_gram: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The largest singular values of Q K^T, falling, of Q^T Q and K^T K, [..., D, D] each.

    They are the roots of the eigenvalues of (Q^T Q)(K^T K), which are those of R (Q^T Q) R with R R = K^T K: symmetric,
    so that no rounding makes them complex. Values below about 1e-8 of the largest are rounding.

    Returns:
        float32 [..., NUM_SINGULAR_VALUES]; 0 where D is smaller.
    """
    out = np.zeros((*query_gram.shape[:-2], NUM_SINGULAR_VALUES), dtype=np.float32)
    bad = np.asarray(~(np.isfinite(query_gram) & np.isfinite(key_gram)).all((-1, -2)))
    query_gram, key_gram = (np.where(bad[..., None, None], 0.0, gram) for gram in (query_gram, key_gram))
    values, vectors = np.linalg.eigh(key_gram)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ vectors.swapaxes(-1, -2)
    found = np.linalg.eigvalsh(root @ query_gram @ root)[..., ::-1][..., :NUM_SINGULAR_VALUES]
    out[..., : found.shape[-1]] = np.sqrt(np.maximum(found, 0))
    out[bad] = np.nan
    return out
