"""`laplacian`: the largest eigenvalues of the in-degree Laplacian D_in - A of all tokens, D_in the column sums of A.

A is lower triangular, so they are the diagonal c_i - A_ii: the attention that a position receives from later ones.
Values: eigval_0 ... 9. They hold whatever the mask, soft cap, bias or learned sink.
Source: LapEigvals of one layer (Binkowski et al., EMNLP 2025, arXiv 2502.17598); dmaniloff/glassbox,
diagnostics/laplacian.py. Cost: streaming, from column sums and self_logprob. Needs the rows of all tokens.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, SignalValues, largest, not_kept, numbered, rows_missing, statistic
from glassbox.store.trace_record import RequestTrace

EIGENVALUES: Final = 10


def laplacian_values(received: Doubles, log_diagonal: Doubles) -> dict[str, Floats]:
    """By name.

    Args:
        received: [..., L tokens], column sums of A.
        log_diagonal: [..., L tokens], ln A_ii.
    """
    # The last token is seen by itself alone: its 0 must not become a rounding error below.
    return numbered("eigval", largest(np.maximum(received - np.exp(log_diagonal), 0), EIGENVALUES))


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if missing := rows_missing(trace):
        return SignalValues(refused=missing)
    tokens = len(trace.positions)
    if trace.received.shape[-1] < tokens:
        return SignalValues(refused=not_kept("received", "laplacian"))
    log_diagonal = np.moveaxis(statistic(trace, "self_logprob"), 0, -1)
    return SignalValues(by_place=laplacian_values(trace.received[..., :tokens].astype(np.float64), log_diagonal))
