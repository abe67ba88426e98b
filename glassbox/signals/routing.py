"""`routing`: the attention A of all tokens with its columns made alike, M = A D_K^(-1/2), D_K the column sums of A.

Values: `spectrum.py`, of M's largest singular values; sigma2, the second; phi_hat, `conductance.py`; G, Gamma, C as in
`asymmetry.py`, but of M, and curl_ratio = C / (G + 1e-10); sigma2_asym, the second singular value of M_asym;
commutator_norm = ||[M_sym, M_asym]||_F / ||M||_F. A single token has no second singular value. phi_hat means little
where the second and third singular values are alike: their vectors are arbitrary then.
A is made of kept queries and keys, with scale, soft cap, window and learned sink of the layer; a head with anything
else (a bias) has no value. Source: dmaniloff/glassbox, diagnostics/routing.py and hodge.py.
Cost: on demand, O(L^2) to O(L^3) a head, in the bounds of `on_demand.py`. Above `Limits.stored_bytes` commutator_norm
is an estimate (+-5 %). Needs the rows of all tokens.
"""

from typing import Final

import numpy as np

from glassbox.signals.conductance import sweep_conductance
from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import LIMITS, Deadline, Limits, over_heads
from glassbox.signals.operators import (
    SPECTRAL_NAMES,
    AttentionOperator,
    hodge_split,
    leading_triples,
    received,
    spectral_values,
)
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

NAMES: Final = (*SPECTRAL_NAMES, "phi_hat", "G", "Gamma", "C", "curl_ratio")


def routing_values(head: KeptHead, deadline: Deadline, limits: Limits) -> dict[str, float]:
    """Of one head, by name.

    Raises:
        NotSolvedError, OutOfTimeError: a value is not found.
    """
    sums = received(head, deadline)
    operator = AttentionOperator(head, deadline, limits, np.where(sums > 0, sums, np.inf) ** -0.5)
    if not operator.square_sum:
        return {}  # a learned sink takes everything
    left, values, right = leading_triples(operator, limits)
    several = len(values) > 1
    return {
        **spectral_values(operator, values, limits),
        **hodge_split(operator),
        "phi_hat": sweep_conductance(operator, left[:, 1], right[:, 1]) if several else float("nan"),
    }


def compute(trace: RequestTrace, limits: Limits = LIMITS) -> SignalValues:
    """See the module."""
    return over_heads(trace, "routing", routing_values, limits, attention=True, names=NAMES)
