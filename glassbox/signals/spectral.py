"""`spectral`: the largest singular values of S = Q K^T of all tokens, neither scaled nor masked.

The worker takes them from two running Gram matrices: they are the square roots of the eigenvalues of (Q^T Q)(K^T K).
A scale would only multiply them; soft cap, window, bias and learned sink are no part of S.

Values: `spectrum.py`, of the RANK largest. Source: dmaniloff/glassbox, diagnostics/spectral.py.
Cost: streaming. Needs the rows of all tokens: those from the prefix cache have no q.
"""

from typing import Final

import numpy as np

from glassbox.signals.spectrum import RANK, spectrum_values
from glassbox.signals.values import Doubles, SignalValues, not_kept, rows_missing
from glassbox.store.trace_record import RequestTrace

# Share of the largest one below which a singular value is the root of a rounding error: eigenvalues of Gram matrices in
# float64 have 16 digits.
_ROUNDING: Final = 1e-7


def leading(singular_values: Doubles, tokens: int) -> Doubles:
    """The first RANK of singular values [..., N]; NaN for those that a matrix of so few tokens doesn't have."""
    found = singular_values[..., :RANK].astype(np.float64)
    found = np.where(found <= _ROUNDING * found[..., :1], 0, found)
    return np.where(np.arange(found.shape[-1]) < tokens, found, np.nan)


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if missing := rows_missing(trace):
        return SignalValues(refused=missing)
    if not trace.singular_values.shape[-1]:
        return SignalValues(refused=not_kept("singular_values", "spectral"))
    return SignalValues(by_place=spectrum_values(leading(trace.singular_values, len(trace.positions))))
