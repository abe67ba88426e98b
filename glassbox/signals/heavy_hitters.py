"""`heavy_hitters`: the positions that receive most attention, which KV eviction keeps (H2O, arXiv 2306.14048).

Values by falling attention: position_0 ... 9 and received_0 ... 9, the column sum c_j = sum_i A_ij over the measured
rows; top10_share, their part of all attention; rows_ratio, measured rows per token: below 1 the sums are of these rows
alone. Ties go to the earlier position. They hold whatever the mask, soft cap, bias or learned sink.
Cost: streaming, from column sums.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, SignalValues, largest, not_kept, numbered
from glassbox.store.trace_record import RequestTrace

POSITIONS: Final = 10


def heavy_hitter_values(received: Doubles) -> dict[str, Floats]:
    """By name.

    Args:
        received: [..., L tokens], column sums of A.
    """
    mass = largest(received, POSITIONS)
    order = np.argsort(-received, axis=-1, kind="stable")[..., :POSITIONS].astype(np.float64)
    short = POSITIONS - order.shape[-1]
    order = np.pad(order, [*[(0, 0)] * (order.ndim - 1), (0, short)], constant_values=np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nansum(mass, axis=-1) / received.sum(axis=-1)
    return {
        "top10_share": share.astype(np.float32),
        **numbered("position", np.where(np.isnan(mass), np.nan, order)),
        **numbered("received", mass),
    }


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if not trace.received.shape[-1]:
        return SignalValues(refused=not_kept("received", "heavy_hitters"))
    rows, tokens = len(trace.positions), trace.received.shape[-1]
    return SignalValues(
        by_place=heavy_hitter_values(trace.received.astype(np.float64)),
        of_request={"rows_ratio": rows / tokens},
    )
