"""Exact reference of whole attention vectors and what is derived from them: float64, one row and one head at a time.

Owns the meaning of a traced request's top positions and span masses; `kernels/row_probe_cpu.py` is tested against it.
How a score is made is written in `row_stats.py`.
"""

import math

import torch
from torch import Tensor

from glassbox.kernels.reference.visible import first_visible


def row_probe_ref(
    q: Tensor,
    keys: Tensor,
    position: int,
    *,
    scale: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one row to every position up to its own.

    Args:
        q: query of the row, [Hq, D].
        keys: of its sequence, [n_total, Hkv, D]; Hq is a multiple of Hkv.
        position: own position of the row.
        scale, sliding_window, chunk_size, soft_cap, alibi_slopes, sinks: see `row_stats_ref`.

    Returns:
        float64 [Hq, position + 1]; 0 where a window hides a key, NaN in a head with a score that is not finite. Rows
        sum to 1, or to less with a learned sink.
    """
    num_heads = q.shape[0]
    group = num_heads // keys.shape[1]
    first = first_visible(position, sliding_window, chunk_size)
    j = torch.arange(first, position + 1)
    out = torch.zeros(num_heads, position + 1, dtype=torch.float64)
    for head in range(num_heads):
        raw = scale * (keys[first : position + 1, head // group].double() @ q[head].double())
        if not torch.isfinite(raw).all():
            out[head] = math.nan
            continue
        score = raw if soft_cap is None else soft_cap * torch.tanh(raw / soft_cap)
        if alibi_slopes is not None:
            score = score + alibi_slopes[head].double() * (j - position)
        log_z = torch.logsumexp(score, 0)
        if sinks is not None:
            log_z = torch.logaddexp(log_z, sinks[head].double())
        out[head, first:] = torch.exp(score - log_z)
    return out


def top_k_ref(attention: Tensor, k: int) -> tuple[list[int], list[float]]:
    """Positions and mass of the k largest of attention [n], by falling mass; fewer if n is less."""
    order = sorted(range(len(attention)), key=lambda j: -float(attention[j]))[:k]
    return order, [float(attention[j]) for j in order]


def span_mass_ref(attention: Tensor, start: int, end: int) -> float:
    """Mass of the positions start .. end - 1 of attention [n]; positions beyond it have none."""
    return float(attention[start:end].sum())
