"""Signals that need all queries and keys at once: which heads they are computed for, and when that ends.

Owns the bounds: tokens, places (layers x heads), time. A place that isn't computed has NaN, and `refused` says how many
there are, why and what to do. They are computed by whoever reads the trace, never by a worker.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from glassbox.core.signal_table import ON_DEMAND_SECONDS
from glassbox.signals.kept_head import KeptHead, kept_head
from glassbox.signals.values import Doubles, Floats, SignalValues, not_kept, rows_missing, statistic
from glassbox.store.trace_record import RequestTrace

# Of ln p on the diagonal, between the worker's kernel and what queries and keys give again; above the rounding of
# bfloat16 scores, below what a bias, or another mask, would do.
_SAME: Final = 0.05
_TINY: Final = 1e-300
_FEWER: Final = "ask for fewer with glassbox_layers and glassbox_heads"


@dataclass(frozen=True)
class Limits:
    """Of one signal of one request.

    Attributes:
        tokens: that a request may have.
        places: layers x heads that are computed, the first ones.
        seconds: after which no more work is begun.
        stored_bytes: of a matrix that is kept whole; above, it is made again by tiles each time it is applied.
        dense_tokens: up to which LAPACK solves, above it is Lanczos.
    """

    tokens: int = 16_384
    places: int = 256
    seconds: float = ON_DEMAND_SECONDS
    stored_bytes: int = 1 << 27
    dense_tokens: int = 256


LIMITS: Final = Limits()


class OutOfTimeError(Exception):
    """The deadline has passed."""


class NotSolvedError(Exception):
    """An iteration has not converged; the message says which."""


class Deadline:
    """The time by which a signal must have ended."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def check(self) -> None:
        """Raise OutOfTimeError if it has passed."""
        if time.monotonic() > self._at:
            raise OutOfTimeError


# Numbers of one head by name, or float64 [L tokens] of its rows; names that it leaves out are NaN.
OfHead = Callable[[KeptHead, Deadline, Limits], Mapping[str, float | Doubles]]


def over_heads(
    trace: RequestTrace,
    signal: str,
    of_head: OfHead,
    limits: Limits,
    *,
    attention: bool,
    names: tuple[str, ...],
) -> SignalValues:
    """Values of each head that the bounds allow.

    Args:
        trace: of the request.
        signal: its name, for what a refusal says.
        of_head: computes them.
        limits: the bounds.
        attention: True if it makes attention of queries and keys: heads for which that isn't what was measured (a bias,
            an unknown mask) have no value.
        names: of the numbers.
    """
    if refused := _refused(trace, signal, limits):
        return SignalValues(refused=refused)
    shape = trace.stats.shape[1:3]
    by_place: dict[str, Floats] = {name: np.full(shape, np.nan, dtype=np.float32) for name in names}
    deadline, skipped = Deadline(limits.seconds), _Skipped(limits)
    for place in np.ndindex(shape):
        if np.ravel_multi_index(place, shape) >= limits.places:
            skipped.over_places += 1
            continue
        head = kept_head(trace, *place)
        if head is None:
            skipped.not_finite += 1
        elif attention and not _is_what_was_measured(head, statistic(trace, "self_logprob")[(slice(None), *place)]):
            skipped.differ += 1
        else:
            try:
                deadline.check()
                for name, value in of_head(head, deadline, limits).items():
                    by_place[name][place] = value
            except OutOfTimeError:
                skipped.out_of_time += 1
            except (NotSolvedError, np.linalg.LinAlgError) as error:
                skipped.not_solved.append(str(error))
    return SignalValues(by_place=by_place, refused=skipped.in_words(int(np.prod(shape))))


def _refused(trace: RequestTrace, signal: str, limits: Limits) -> str:
    """Why nothing is computed; empty if something is."""
    if missing := rows_missing(trace):
        return missing
    if not trace.queries.shape[-1]:
        reason = f" ({'; '.join(trace.notes)})" if trace.notes else ""
        return not_kept("queries and keys", signal) + reason
    tokens = len(trace.positions)
    if tokens > limits.tokens:
        return f"{signal} is for at most {limits.tokens} tokens, got {tokens}; send a shorter prompt"
    return ""


@dataclass
class _Skipped:
    """Heads without values, by reason."""

    limits: Limits
    over_places: int = 0
    out_of_time: int = 0
    not_finite: int = 0
    differ: int = 0

    def __post_init__(self) -> None:
        self.not_solved: list[str] = []

    def in_words(self, places: int) -> str:
        reasons = (
            (self.over_places, f"are over the bound of {self.limits.places} layers x heads; {_FEWER}"),
            (self.out_of_time, f"were not done within {self.limits.seconds:g} s; {_FEWER}, or send a shorter prompt"),
            (self.not_finite, "have queries or keys that are not finite; glassbox check names the layers"),
            (self.differ, "have other attention than their queries and keys give: an unknown mask or bias; none helps"),
            (len(self.not_solved), f"did not converge ({', '.join(sorted(set(self.not_solved)))}); {_FEWER}"),
        )
        return ". ".join(f"{count} of {places} heads {why}" for count, why in reasons if count)


def _is_what_was_measured(head: KeptHead, log_diagonal: Doubles) -> bool:
    """Whether a few rows' own attention is what the worker measured, where it measured it."""
    if np.isnan(head.scale):
        return False
    rows = np.unique(np.linspace(0, head.tokens - 1, 8).astype(int))
    again = np.log([max(head.attention(row, row + 1)[0, -1], _TINY) for row in rows])
    there = np.maximum(log_diagonal[rows], np.log(_TINY))
    return bool(np.all(np.isnan(there) | (np.abs(again - there) <= _SAME * (1 + np.abs(there)))))
