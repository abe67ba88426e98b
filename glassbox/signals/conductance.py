"""Cheeger conductance of the bipartite graph of a matrix, by a sweep cut along its second singular vectors.

Rows and columns of M are the nodes, M_ij the weight of the edge between row i and column j. Nodes are taken in the
order of (u_2, v_2); of each first part S of them the conductance is cut(S) / min(vol(S), vol(rest)), and the smallest
is the estimate: it is between the true one and Cheeger's bound sqrt(2 (1 - sigma_2)) for M scaled on both sides.
Source: dmaniloff/glassbox, cheeger.py.
"""

from typing import Final

import numpy as np

from glassbox.signals.operators import AttentionOperator
from glassbox.signals.values import Doubles

_EMPTY: Final = 1e-12


def sweep_conductance(operator: AttentionOperator, left: Doubles, right: Doubles) -> float:
    """Smallest conductance of the sweep, 0..1.

    Args:
        operator: M, not negative.
        left, right: [L], its second singular vectors.

    Raises:
        OutOfTimeError: of the operator.
    """
    tokens = operator.tokens
    order = np.argsort(np.concatenate([left, right]), kind="stable")
    rank = np.empty(2 * tokens, dtype=np.intp)
    rank[order] = np.arange(2 * tokens)
    # An edge is cut from the place of its first node to that of its second.
    change = np.zeros(2 * tokens)
    for start, _, rows in operator.tiles():
        row, column = np.nonzero(rows)
        ends = np.stack([rank[start + row], rank[tokens + column]])
        weights = rows[row, column]
        change += np.bincount(ends.min(axis=0), weights, minlength=2 * tokens)
        change -= np.bincount(ends.max(axis=0), weights, minlength=2 * tokens)
    volume = np.cumsum(np.concatenate([operator.row_sums, operator.column_sums])[order])
    smaller = np.minimum(volume, volume[-1] - volume)
    some = smaller > _EMPTY
    if not some.any():
        return 1.0
    return float(np.clip((np.cumsum(change)[some] / smaller[some]).min(), 0, 1))
