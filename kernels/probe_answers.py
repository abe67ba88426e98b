"""What a probe is asked and what it finds in some layers: one description for every kernel that probes, and for whoever
asks and keeps the answers.

Owns the fields of both. The answers' types and what stands for "no value" are those of the trace's arrays of the same
names (`core/trace_arrays.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from glassbox.core.trace_arrays import collected, trace_array

Values = TypeVar("Values")
Moved = TypeVar("Moved")


@dataclass(frozen=True, slots=True, eq=False)
class Questions(Generic[Values]):
    """What is asked of R rows in L layers of H query heads, as tensors of the keys' device or as numpy's arrays.

    Attributes:
        positions: [R] on the host, of the rows in their sequences; the rows are in the order of the row list.
        top_k: most attended positions per head; 0 is none.
        spans: int32 [R, S, 2], (start, exclusive end) of position ranges whose mass is wanted; (0, 0) has none.
        chosen: bool [R, L, H], what is summed into `ProbeAnswers.chosen_sum`.
        kept_attention: numbers of the rows whose whole attention is wanted.
        max_attention_keys: most keys of it; of a longer row the last are kept.
        received: numbers of the rows whose attention is wanted in full, to be summed by position, ascending.
        queries: whether the rows' queries and own keys are wanted.
    """

    positions: Sequence[int]
    top_k: int
    spans: Values
    chosen: Values
    kept_attention: Sequence[int]
    max_attention_keys: int
    received: Sequence[int] = ()
    queries: bool = False

    @property
    def longest(self) -> int:
        """Keys up to the last of the positions."""
        return max(self.positions, default=-1) + 1

    def moved(self, move: Callable[[Values], Moved]) -> "Questions[Moved]":
        """The same with `move` applied to spans and chosen."""
        return Questions(
            self.positions,
            self.top_k,
            move(self.spans),
            move(self.chosen),
            self.kept_attention,
            self.max_attention_keys,
            self.received,
            self.queries,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ProbeAnswers(Generic[Values]):
    """What was asked of R rows in L layers of H query heads, as tensors of one device or as numpy's arrays.

    Attributes:
        topk_positions, topk_mass: int32 and float32 [R, L, H, k], by falling mass; NO_POSITION and 0 where there are
            fewer keys or the head's scores are not finite.
        span_mass: float32 [R, L, H, S]; NaN where scores are not finite.
        chosen_sum: float32 [R, longest row], attention summed over the chosen layers and heads, 0 behind a row's own
            position; NaN in a row one of whose chosen heads has scores that are not finite.
        attention: float16 [L, H, n] for each row of which all is kept, its last n keys up to its own position, 0 where
            a window hides them; NaN where scores are not finite.
        received: likewise float32 [L, H, position + 1] for each row of which it was wanted.
        queries: float32 [R, L, H, D] as the scores are made of them, but not scaled; None if they were not wanted.
        keys: float32 [R, L, Hkv, D], each row's own; None likewise.
    """

    topk_positions: Values
    topk_mass: Values
    span_mass: Values
    chosen_sum: Values
    attention: tuple[Values, ...]
    received: tuple[Values, ...] = ()
    queries: Values | None = None
    keys: Values | None = None

    def moved(self, move: Callable[[Values], Moved]) -> "ProbeAnswers[Moved]":
        """The same with `move` applied to each."""
        return ProbeAnswers(
            move(self.topk_positions),
            move(self.topk_mass),
            move(self.span_mass),
            move(self.chosen_sum),
            tuple(map(move, self.attention)),
            tuple(map(move, self.received)),
            None if self.queries is None else move(self.queries),
            None if self.keys is None else move(self.keys),
        )

    def by_array(self) -> dict[str, Values]:
        """Those that are arrays of a trace and were asked for, by name; [R, L, H, ...]."""
        found = {array.name: getattr(self, array.name, None) for array in collected()}
        return {name: values for name, values in found.items() if values is not None}


@dataclass(frozen=True, slots=True, eq=False)
class PromptAnswers(Generic[Values]):
    """Of consecutive rows of one request, N of them, in H chosen query heads of one layer.

    Attributes:
        stats: float32 [N, H, NUM_STATISTICS + 1], as the columns of core/statistics.py, and whether a score was not
            finite.
        previous_mass: float32 [N, H], attention to the position before the row's own; NaN where stats are, and in the
            row at position 0.
        span_mass: float32 [N, H, spans], of each span; NaN where stats are.
        received: float32 [H, keys up to the last row's], attention to each position, summed over the rows; NaN at
            positions that a row whose stats are NaN sees.
        received_squares: likewise the sum of its squares, each row's attention to itself left out; None if it was not
            asked for.
        group: query heads that share a KV head. The K KV heads of the chosen heads are `kv_heads(heads, group)`.
        query_gram: float64 [H, D, D], sum over the rows of q q^T, not scaled; None if it was not asked for.
        key_gram: float64 [K, D, D], likewise of the keys from `AskedPrompt.keys_from` to the last row's own.
        queries: float32 [N, H, D], not scaled; None if they were not asked for.
        keys: float32 [n, K, D], of the n positions that are in `key_gram`; None likewise.
        score_params: float32 [H, 4] as core/trace_arrays.SCORE_PARAMS; a scale of NaN says that the scores depend on
            more (ALiBi, chunked attention); None if queries and keys were not asked for.
    """

    stats: Values
    previous_mass: Values
    span_mass: Values
    received: Values
    group: int
    query_gram: Values | None = None
    key_gram: Values | None = None
    queries: Values | None = None
    keys: Values | None = None
    score_params: Values | None = None
    received_squares: Values | None = None

    def moved(self, move: Callable[[Values], Moved]) -> "PromptAnswers[Moved]":
        """The same with `move` applied to each."""

        def maybe(values: Values | None) -> Moved | None:
            return None if values is None else move(values)

        return PromptAnswers(
            move(self.stats),
            move(self.previous_mass),
            move(self.span_mass),
            move(self.received),
            self.group,
            maybe(self.query_gram),
            maybe(self.key_gram),
            maybe(self.queries),
            maybe(self.keys),
            maybe(self.score_params),
            maybe(self.received_squares),
        )


def kv_heads(heads: Sequence[int], group: int) -> list[int]:
    """The KV heads of some query heads, each once, ascending."""
    return sorted({head // group for head in heads})


def no_answers(asked: Questions[Tensor]) -> ProbeAnswers[Tensor]:
    """Answers to be filled in, on the questions' device: "no value" everywhere, and zeros in sums and whole vectors."""
    num_rows, num_layers, num_heads = asked.chosen.shape
    device = asked.chosen.device
    sizes = {"token": num_rows, "layer": num_layers, "head": num_heads, "top_k": asked.top_k}
    sizes["span"] = asked.spans.shape[1]

    def filled(name: str) -> Tensor:
        array = trace_array(name)
        shape: Any = array.shape(sizes)
        return torch.full(shape, array.fill, dtype=getattr(torch, array.dtype), device=device)

    lengths = [min(asked.positions[row] + 1, asked.max_attention_keys) for row in asked.kept_attention]
    dtype = getattr(torch, trace_array("attention_values").dtype)
    return ProbeAnswers(
        topk_positions=filled("topk_positions"),
        topk_mass=filled("topk_mass"),
        span_mass=filled("span_mass"),
        chosen_sum=torch.zeros(num_rows, asked.longest, device=device),
        attention=tuple(torch.zeros(num_layers, num_heads, n, dtype=dtype, device=device) for n in lengths),
        received=tuple(
            torch.zeros(num_layers, num_heads, asked.positions[row] + 1, device=device) for row in asked.received
        ),
    )
