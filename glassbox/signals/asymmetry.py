"""`asymmetry`: how far the attention P of all tokens is from a symmetric one, P_asym = (P - P^T) / 2.

Values: G = ||P_asym||_F / ||P||_F; its Hodge split G^2 = Gamma^2 + C^2 into a part that is a gradient, Gamma^2 =
(2 ||r||^2 / L) / ||P||_F^2 with r = P_asym 1, and the circulating rest C; by token (`row_norm`) ||P_asym[i, :]|| /
||P||_F, whose squares add up to G^2.
P is lower triangular, so P_ij and P_ji are never both there but on the diagonal, where they cancel. Hence 4
||P_asym[i, :]||^2 is what row i gives to earlier positions, squared, and what position i receives from later rows,
squared: the former from effective_keys and self_logprob, the latter (`received_squares`) summed by the worker. Gamma
needs the column sums of P, too. All this holds for every mask, soft cap and bias, and with a learned sink, which takes
a part of every row: its logit is given, or follows from what is missing of all rows together; then rows and columns
must have the same sum of squares, else there is no value.
Under a causal mask G is largely that of a triangle: compare requests of about equal length.
Source: dmaniloff/glassbox, diagnostics/asymmetry.py. Cost: streaming. Needs the rows of all tokens.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, SignalValues, not_kept, row_sums, rows_missing, statistic
from glassbox.store.trace_record import RequestTrace

# Of the whole: by how much the squares of rows and of columns may differ, where a sink's logit was found from the rows.
_SAME: Final = 2e-4


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
    given_squares: Doubles, received_squares: Doubles, log_diagonal: Doubles, received: Doubles, sums: Doubles
) -> tuple[dict[str, Floats], Floats]:
    """G, Gamma and C; and `row_norm`, [L tokens, ...].

    Args:
        given_squares: [L tokens, ...], sum_{j<i} P_ij^2.
        received_squares: [L tokens, ...], sum_{k>i} P_ki^2.
        log_diagonal: [L tokens, ...], ln P_ii.
        received: [L tokens, ...], column sums.
        sums: [L tokens, ...], row sums.
    """
    off_diagonal = received_squares.sum(axis=0)
    whole = off_diagonal + np.exp(2 * log_diagonal).sum(axis=0)
    asymmetric = off_diagonal / 2
    # Two tokens make no circle: all of it is gradient, and the difference would be the root of a rounding error.
    gradient = 2 * (((sums - received) / 2) ** 2).sum(axis=0) / len(sums) if len(sums) > 2 else asymmetric
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = {"G": asymmetric / whole, "Gamma": gradient / whole, "C": (asymmetric - gradient) / whole}
        of_rows = np.sqrt((given_squares + received_squares) / (4 * whole)).astype(np.float32)
    return {name: np.sqrt(np.maximum(square, 0)).astype(np.float32) for name, square in squares.items()}, of_rows


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if missing := rows_missing(trace):
        return SignalValues(refused=missing)
    tokens = len(trace.positions)
    for array in ("received", "received_squares"):
        if getattr(trace, array).shape[-1] < tokens:
            return SignalValues(refused=not_kept(array, "asymmetry"))
    received, received_squares = (
        np.moveaxis(sums[..., :tokens].astype(np.float64), -1, 0) for sums in (trace.received, trace.received_squares)
    )
    log_diagonal = statistic(trace, "self_logprob")
    sums, inferred = row_sums(trace)
    given_squares = below_diagonal(statistic(trace, "effective_keys"), log_diagonal, sums)
    whole = received_squares.sum(axis=0) + np.exp(2 * log_diagonal).sum(axis=0)
    differ = inferred & ~(np.abs(given_squares.sum(axis=0) - received_squares.sum(axis=0)) <= _SAME * whole)
    sums[:, differ] = given_squares[:, differ] = received_squares[:, differ] = np.nan
    values, row_norm = asymmetry_values(given_squares, received_squares, log_diagonal, received, sums)
    refused = ""
    if differ.any():
        refused = (
            f"{int(differ.sum())} of {differ.size} heads have rows and columns that don't add up to the same: rows are "
            "missing from the sums (glassbox check names errors), or a learned sink takes nearly all of them"
        )
    return SignalValues(by_place=values, by_token={"row_norm": row_norm}, refused=refused)
