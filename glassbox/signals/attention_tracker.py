"""`tracker`: the spectrum of the attention A of all tokens.

Values: `spectrum.py`, of A's largest singular values; sigma2, the second; sigma2_asym, that of (A - A^T) / 2;
commutator_norm = ||[A_sym, A_asym]||_F / ||A||_F. A single token has no second singular value.
How A is made, and the bounds: as `routing.py`. Source: dmaniloff/glassbox, diagnostics/tracker.py.
Cost: on demand, O(L^2) to O(L^3) a head. Needs the rows of all tokens.
"""

from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import LIMITS, Deadline, Limits, over_heads
from glassbox.signals.operators import SPECTRAL_NAMES, AttentionOperator, leading_triples, spectral_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace


def tracker_values(head: KeptHead, deadline: Deadline, limits: Limits) -> dict[str, float]:
    """Of one head, by name.

    Raises:
        NotSolvedError, OutOfTimeError: a value is not found.
    """
    operator = AttentionOperator(head, deadline, limits)
    if not operator.square_sum:
        return {}  # a learned sink takes everything
    return spectral_values(operator, leading_triples(operator, limits)[1], limits)


def compute(trace: RequestTrace, limits: Limits = LIMITS) -> SignalValues:
    """See the module."""
    return over_heads(trace, "tracker", tracker_values, limits, attention=True, names=SPECTRAL_NAMES)
