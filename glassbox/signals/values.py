"""What a signal says of one request: its numbers, or in words why there are none.

Owns the container and what all signals take from a trace in the same way: whether its rows are whole, and the sum of
each row. The formulas are in the module of each signal, which signals there are in `registry.py`.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import INDEX
from glassbox.store.trace_record import RequestTrace

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Places of the parameters of a layer's scores along the last axis of `score_params`.
SCALE, SOFT_CAP, WINDOW, SINK = range(4)
# Share of the rows' mass that may be missing from the attention received before it is taken for a learned sink: above
# the rounding of a float32 sum over a hundred thousand rows.
_LOST_MASS: Final = 5e-4


@dataclass(frozen=True, eq=False)
class SignalValues:
    """Values of one signal, by name. NaN is "no value".

    Attributes:
        by_place: float32 [L, H], a number of each layer and head of the trace.
        by_token: float32 [T, L, H], of each of its rows, too.
        of_request: one number each.
        refused: empty, or what has no value and why (which bound), and the remedy; the values that are there are right.
    """

    by_place: dict[str, Floats] = field(default_factory=dict)
    by_token: dict[str, Floats] = field(default_factory=dict)
    of_request: dict[str, float] = field(default_factory=dict)
    refused: str = ""


def rows_missing(trace: RequestTrace) -> str:
    """Empty if the trace has the rows of all its tokens, from the first one on; else which it lacks, and the remedy."""
    rows = len(trace.positions)
    if not rows:
        return "no row of the request was measured; is its model observed?"
    tokens = int(trace.positions[-1]) + 1
    if trace.truncated:  # then the last ones may be missing, too; the last generated token never has a row
        tokens = max(tokens, trace.prompt_len + trace.num_generated - 1)
    if rows == tokens:
        return ""
    return (
        f"rows of {tokens - rows} of {tokens} tokens are missing (sampled, from the prefix cache, or over a limit), "
        "and this needs all of them; ask with glassbox_prompt: all"
    )


def not_kept(array: str, signal: str) -> str:
    """The refusal where a trace lacks an array that is kept for those that ask."""
    return f"this request was traced without {array}; name {signal} in its glassbox_signals"


def statistic(trace: RequestTrace, name: str) -> Doubles:
    """One column of the statistics, [T, L, H]."""
    return trace.stats[..., INDEX[name]].astype(np.float64)


def row_sums(trace: RequestTrace) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Attention of each row to all keys: 1, less what a learned sink takes.

    A sink of logit b takes top1_ratio e^(b - max_logit) of a row. With the parameters of the scores b is known. Else it
    follows from what is missing of all rows together: their number less what the positions received.

    Returns:
        [T, L, H], NaN in heads that received more than the rows gave; and bool [L, H], the heads of which b followed.
    """
    log_taken = np.log(statistic(trace, "top1_ratio")) - statistic(trace, "max_logit")  # less b
    missing = len(log_taken) - trace.received.sum(axis=-1, dtype=np.float64)
    inferred = ~(np.abs(missing) <= _LOST_MASS * len(log_taken))
    most = log_taken.max(axis=0)
    sink = np.where(inferred, np.log(missing) - most - np.log(np.exp(log_taken - most).sum(axis=0)), -np.inf)
    if trace.score_params.size:
        known = ~np.isnan(trace.score_params[..., SCALE])
        given = trace.score_params[..., SINK].astype(np.float64)
        sink, inferred = np.where(known, np.where(np.isnan(given), -np.inf, given), sink), inferred & ~known
    return 1 - np.exp(log_taken + sink), inferred


def finite_mean(values: Floats) -> float:
    """Mean of the values that are finite; NaN if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if known.size else float("nan")


def largest(values: Doubles, count: int) -> Doubles:
    """The `count` largest of values [..., N] by falling size, [..., count]; NaN where there are fewer.

    A NaN among the values makes all of them NaN.
    """
    found = -np.sort(-values, axis=-1)[..., :count]
    found = np.where(np.isnan(values).any(axis=-1, keepdims=True), np.nan, found)
    short = count - found.shape[-1]
    return np.pad(found, [*[(0, 0)] * (found.ndim - 1), (0, short)], constant_values=np.nan)


def numbered(name: str, values: Doubles) -> dict[str, Floats]:
    """Values [..., N] as N arrays `name_0`, `name_1`, ..."""
    return {f"{name}_{i}": values[..., i].astype(np.float32) for i in range(values.shape[-1])}
