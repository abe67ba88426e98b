"""`asymmetry`: how far the attention P of all tokens is from a symmetric one, P_asym = (P - P^T) / 2.

Values: G = ||P_asym||_F / ||P||_F; its Hodge split G^2 = Gamma^2 + C^2 into a part that is a gradient, Gamma^2 =
(2 ||r||^2 / L) / ||P||_F^2 with r = P_asym 1, and the circulating rest C; by token (`row_norm`) ||P_asym[i, :]|| /
||P||_F, whose squares add up to G^2.
P is lower triangular, so <P, P^T> = sum P_ii^2 and G^2 = (1 - sum P_ii^2 / sum P_ij^2) / 2. With that, sums along the
rows (effective_keys, self_logprob) and the column sums of P give G, Gamma and C; the norm of a token's row needs the
column sums of P^2, too, which only kept queries and keys give. They hold for every mask, soft cap and bias. A learned
sink takes a part of every row: with its logit (kept beside queries and keys) they are exact, without there is no value.
Under a causal mask G is largely that of a triangle: compare requests of about equal length.
Source: dmaniloff/glassbox, diagnostics/asymmetry.py. Cost: streaming. Needs the rows of all tokens.
"""

from typing import Final

import numpy as np

from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import LIMITS, Deadline, Limits, over_heads
from glassbox.signals.values import Doubles, Floats, SignalValues, not_kept, row_sums, rows_missing, statistic
from glassbox.store.trace_record import RequestTrace

_TILE: Final = 256


def below_diagonal(effective_keys: Doubles, log_diagonal: Doubles, sums: Doubles) -> Doubles:
    """sum_{j<i} P_ij^2 of each row, [L tokens, ...].

    The difference of squares loses its digits where nearly all of a row is on its diagonal; the rest of the row, which
    keeps them, bounds it from both sides.
    """
    diagonal = np.exp(log_diagonal)
    rest = np.where(sums == 1, -np.expm1(log_diagonal), sums - diagonal)
    rest = np.maximum(rest, 0)
    keys = np.arange(len(sums)).reshape(-1, *[1] * (sums.ndim - 1))
    least = rest**2 / np.maximum(keys, 1)
    return np.clip(sums**2 / effective_keys - diagonal**2, least, rest**2)


def asymmetry_values(
    effective_keys: Doubles, log_diagonal: Doubles, received: Doubles, sums: Doubles
) -> dict[str, Floats]:
    """G, Gamma and C.

    Args:
        effective_keys: [L tokens, ...], (row sum)^2 / row sum of squares.
        log_diagonal: [L tokens, ...], ln P_ii.
        received: [L tokens, ...], column sums.
        sums: [L tokens, ...], row sums.
    """
    off_diagonal = below_diagonal(effective_keys, log_diagonal, sums).sum(axis=0)
    whole = off_diagonal + np.exp(2 * log_diagonal).sum(axis=0)
    asymmetric = off_diagonal / 2
    # Two tokens make no circle: all of it is gradient, and the difference would be the root of a rounding error.
    gradient = 2 * (((sums - received) / 2) ** 2).sum(axis=0) / len(sums) if len(sums) > 2 else asymmetric
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = {"G": asymmetric / whole, "Gamma": gradient / whole, "C": (asymmetric - gradient) / whole}
    return {name: np.sqrt(np.maximum(square, 0)).astype(np.float32) for name, square in squares.items()}


def row_norms(head: KeptHead, deadline: Deadline, _: Limits) -> dict[str, Doubles]:
    """`row_norm` of one head, [L].

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    squares, whole = np.zeros(head.tokens), 0.0
    for start in range(0, head.tokens, _TILE):
        deadline.check()
        stop = min(start + _TILE, head.tokens)
        rows = head.attention(start, stop) ** 2
        whole += float(rows.sum())
        rows[np.arange(stop - start), np.arange(start, stop)] = 0
        squares[start:stop] += rows.sum(axis=1)
        squares[:stop] += rows.sum(axis=0)
    return {"row_norm": np.sqrt(squares / (4 * whole))}


def compute(trace: RequestTrace, limits: Limits = LIMITS) -> SignalValues:
    """See the module."""
    if missing := rows_missing(trace):
        return SignalValues(refused=missing)
    tokens = len(trace.positions)
    if trace.received.shape[-1] < tokens:
        return SignalValues(refused=not_kept("received", "asymmetry"))
    sums = row_sums(trace)
    received = np.moveaxis(trace.received[..., :tokens].astype(np.float64), -1, 0)
    values = asymmetry_values(statistic(trace, "effective_keys"), statistic(trace, "self_logprob"), received, sums)
    refused = []
    if unknown := int(np.isnan(sums).any(axis=0).sum()):
        refused.append(
            f"{unknown} heads have a learned sink of unknown strength: name routing in glassbox_signals, too, "
            "so that it is kept"
        )
    by_token = {}
    if trace.queries.shape[-1]:
        of_rows = over_heads(trace, "asymmetry", row_norms, limits, attention=True, row_names=("row_norm",))
        by_token = of_rows.by_token
        refused += [of_rows.refused] if of_rows.refused else []
    return SignalValues(by_place=values, by_token=by_token, refused=". ".join(refused))
