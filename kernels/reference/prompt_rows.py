"""Exact reference of what is known of rows beside their statistics: float64, one row at a time.

Owns the meaning of the attention to the row before, and of the attention that positions receive; how attention is made
is written in `row_probe.py`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def previous_mass_ref(attention: Tensor) -> Tensor:
    """Attention to the position before the row's own, [H], of its [H, position + 1]; the first row has none."""
    return attention[:, -2] if attention.shape[1] > 1 else torch.full_like(attention[:, 0], math.nan)


def received_ref(rows: Sequence[Tensor], first_visible: Sequence[int]) -> Tensor:
    """Attention that each position receives from rows of a sequence.

    Args:
        rows: attention of each, [H, position + 1], in any order; at least one.
        first_visible: the first key that each sees. Of a row whose scores are not finite nothing is known at the keys
            from there on.

    Returns:
        float64 [H, n] up to the last of the rows.
    """
    total = torch.zeros(rows[0].shape[0], max(row.shape[1] for row in rows), dtype=torch.float64)
    for row, first in zip(rows, first_visible, strict=True):
        total[:, first : row.shape[1]] += row[:, first:]
    return total


def received_squares_ref(rows: Sequence[Tensor], first_visible: Sequence[int]) -> Tensor:
    """As `received_ref`, of the squares, and without what each row gives its own position."""
    total = torch.zeros(rows[0].shape[0], max(row.shape[1] for row in rows), dtype=torch.float64)
    for row, first in zip(rows, first_visible, strict=True):
        total[:, first : row.shape[1] - 1] += row[:, first:-1] ** 2
    return total
