"""`selfattn`: the diagonal of the attention A of all tokens.

Values: attn_diag_logmean = mean ln A_ii, the score of LLM-Check (Sriramanan et al., NeurIPS 2024); eigval_0 ... 9, the
ten largest A_ii, which are eigenvalues of a causal A. They hold whatever the mask, soft cap, bias or learned sink.
Source: dmaniloff/glassbox, diagnostics/selfattn.py. Cost: streaming, from self_logprob. Needs the rows of all tokens.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, SignalValues, largest, numbered, rows_missing, statistic
from glassbox.store.trace_record import RequestTrace

EIGENVALUES: Final = 10


def diagonal_values(log_diagonal: Doubles) -> dict[str, Floats]:
    """By name.

    Args:
        log_diagonal: [L tokens, ...], ln A_ii.
    """
    mean = log_diagonal.mean(axis=0)
    return {
        "attn_diag_logmean": np.where(np.isfinite(mean), mean, np.nan).astype(np.float32),
        **numbered("eigval", largest(np.moveaxis(np.exp(log_diagonal), 0, -1), EIGENVALUES)),
    }


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if missing := rows_missing(trace):
        return SignalValues(refused=missing)
    return SignalValues(by_place=diagonal_values(statistic(trace, "self_logprob")))
