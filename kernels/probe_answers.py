"""What a probe finds in some layers: one description for every kernel that probes, and for whoever keeps the answers.

Owns the answers' fields. Their types and what stands for "no value" are those of the trace's arrays of the same names
(`core/trace_arrays.py`).
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
    """

    topk_positions: Values
    topk_mass: Values
    span_mass: Values
    chosen_sum: Values
    attention: tuple[Values, ...]

    def moved(self, move: Callable[[Values], Moved]) -> "ProbeAnswers[Moved]":
        """The same with `move` applied to each."""
        return ProbeAnswers(
            move(self.topk_positions),
            move(self.topk_mass),
            move(self.span_mass),
            move(self.chosen_sum),
            tuple(map(move, self.attention)),
        )

    def by_array(self) -> dict[str, Values]:
        """Those that are arrays of a trace, by name; [R, L, H, ...]."""
        return {array.name: getattr(self, array.name) for array in collected() if hasattr(self, array.name)}


def no_answers(
    positions: Sequence[int],
    num_layers: int,
    num_heads: int,
    *,
    top_k: int,
    num_spans: int,
    kept_attention: Sequence[int],
    max_attention_keys: int,
    device: torch.device | str = "cpu",
) -> ProbeAnswers[Tensor]:
    """Answers to be filled in: "no value" everywhere, and zeros in sums and whole vectors.

    Args:
        positions: of the rows in their sequences.
        top_k, num_spans, kept_attention, max_attention_keys: what is asked, see `row_probe_cpu`.
        device: of the tensors.
    """
    sizes = {"token": len(positions), "layer": num_layers, "head": num_heads, "top_k": top_k, "span": num_spans}

    def filled(name: str) -> Tensor:
        array = trace_array(name)
        shape: Any = array.shape(sizes)
        return torch.full(shape, array.fill, dtype=getattr(torch, array.dtype), device=device)

    lengths = [min(positions[row] + 1, max_attention_keys) for row in kept_attention]
    dtype = getattr(torch, trace_array("attention_values").dtype)
    return ProbeAnswers(
        topk_positions=filled("topk_positions"),
        topk_mass=filled("topk_mass"),
        span_mass=filled("span_mass"),
        chosen_sum=torch.zeros(len(positions), max(positions, default=-1) + 1, device=device),
        attention=tuple(torch.zeros(num_layers, num_heads, n, dtype=dtype, device=device) for n in lengths),
    )
