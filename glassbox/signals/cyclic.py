"""`cyclic`: cyclic triples of the tournament in which token i beats token j if q_i . k_j > q_j . k_i.

Values: T_cyc = C(L, 3) - sum_i C(d_i, 2), d_i the number of tokens that i beats (Kendall). Of a tie the earlier token
wins; a difference within the rounding of float64 is a tie. Neither scale, soft cap, mask nor sink is part of it.
Source: dmaniloff/glassbox, diagnostics/cyclic_triangles.py.
Cost: on demand, O(L^2 D) a head, in the bounds of `on_demand.py`. Needs the rows of all tokens.
"""

from math import comb
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import LIMITS, Deadline, Limits, over_heads
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

_TILE: Final = 256


def out_degrees(head: KeptHead, deadline: Deadline) -> npt.NDArray[np.int64]:
    """How many tokens each one beats, [L].

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    tokens, size = head.queries.shape
    query_norms, key_norms = (np.linalg.norm(vectors, axis=1) for vectors in (head.queries, head.keys))
    rounding = size * np.finfo(np.float64).eps
    degrees = np.zeros(tokens, dtype=np.int64)
    for start in range(0, tokens, _TILE):
        deadline.check()
        stop = min(start + _TILE, tokens)
        lead = head.scores(start, stop) - head.scores_of_others(start, stop)
        bound = np.outer(query_norms[start:stop], key_norms) + np.outer(key_norms[start:stop], query_norms)
        later = np.arange(start, stop)[:, None] < np.arange(tokens)
        tie = np.abs(lead) <= rounding * bound
        degrees[start:stop] = np.where(tie, later, lead > 0).sum(axis=1)
    return degrees


def cyclic_triples(degrees: npt.NDArray[np.int64]) -> int:
    """T_cyc of a tournament with these out-degrees."""
    return comb(len(degrees), 3) - sum(comb(int(degree), 2) for degree in degrees)


def cyclic_values(head: KeptHead, deadline: Deadline, _: Limits) -> dict[str, float]:
    """Of one head, by name.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    return {"T_cyc": float(cyclic_triples(out_degrees(head, deadline)))}


def compute(trace: RequestTrace, limits: Limits = LIMITS) -> SignalValues:
    """See the module."""
    return over_heads(trace, "cyclic", cyclic_values, limits, attention=False, names=("T_cyc",))
