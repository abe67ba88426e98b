"""Exact reference of the check of a row's output: float64, one head at a time.

Owns the meaning of every column of `glassbox.core.output_checks`; the fast kernels are tested against it. It is slow
and plain on purpose: each line is one formula of that table or of `kernels/output_rounding.py`. How a score is made is
written in `row_stats.py`.

Numbers that are not finite go through the formulas as they go through a kernel's: a key whose score is minus infinity
has no weight, any other one makes the head's output NaN.
"""

import math

import torch
from torch import Tensor

from glassbox.core.output_checks import (
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    NONFINITE_REFERENCE,
    OUTPUT_SUM,
    OUTPUT_SUMS,
)
from glassbox.kernels.output_rounding import (
    LARGE_VALUE,
    LOST,
    MEAN_SQUARE,
    PLACES,
    SCORE_ERROR,
    SUM_BOUND,
    SUM_NOISE,
    OutputRounding,
)
from glassbox.kernels.reference.visible import first_visible


def row_output_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    position: int,
    *,
    rounding: OutputRounding,
    scale: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Sums over the elements of one row's output.

    Args:
        q: query of the row, [Hq, D], with its quantisation factor in it.
        keys, values: of its sequence, [n_total, Hkv, D] and [n_total, Hkv, Dv], likewise; Hq is a multiple of Hkv.
        output: that was served, [Hq, Dv].
        position: own position of the row.
        rounding: of the kernel that served.
        scale, sliding_window, chunk_size, soft_cap, alibi_slopes, sinks: see `row_stats_ref`.

    Returns:
        float64 [Hq, len(OUTPUT_SUMS)].
    """
    num_heads = q.shape[0]
    group = num_heads // keys.shape[1]
    first = first_visible(position, sliding_window, chunk_size)
    j = torch.arange(first, position + 1)
    out = torch.zeros(num_heads, len(OUTPUT_SUMS), dtype=torch.float64)
    for head in range(num_heads):
        k = keys[first : position + 1, head // group].double()
        raw = scale * (k @ q[head].double())
        v = values[first : position + 1, head // group].double()
        score, growth = raw, raw  # growth: derivative of the score by the logarithm of a factor of q.k
        if soft_cap is not None:
            score = soft_cap * torch.tanh(raw / soft_cap)
            growth = torch.where(raw.isinf(), 0.0, raw / torch.cosh(raw / soft_cap) ** 2)
        if alibi_slopes is not None:
            score = score + alibi_slopes[head].double() * (j - position)
        of_keys = torch.logsumexp(score, 0)
        log_z = of_keys if sinks is None else torch.logaddexp(of_keys, sinks[head].double())
        p, share = torch.exp(score - log_z), torch.exp(score - of_keys)
        uncancelled = scale * q[head].double().norm() * k.norm(dim=1).nan_to_num(0, 0) / math.sqrt(q.shape[1])
        out[head] = _sums(
            p, v, _weighted(p, growth), output[head].double(), rounding,
            score_size=max(1.0, float(_weighted(share, score.abs()).sum()), float(_weighted(share, uncancelled).sum())),
            shared=_shared(score, rounding), of_sink=float(1 - torch.exp(of_keys - log_z)), soft_cap=soft_cap or 0.0,
        )  # fmt: skip
    return out


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0 whatever x is."""
    return torch.where(p == 0, 0.0, p * x)


def _shared(score: Tensor, u: OutputRounding) -> float:
    """t: share of the weights' sum that rounding them adds or takes at most."""
    if not u.lost_bits:
        return 0.0
    power = torch.ceil(score.max() * math.log2(math.e))
    p = torch.exp2(score * math.log2(math.e) - power)
    moved = 0.0
    for place in PLACES:
        x = p * place
        # To 24 - lost_bits significant bits.
        step = torch.exp2(torch.floor(torch.log2(x)) - 23 + u.lost_bits)
        rounded = torch.where(x > 0, torch.round(x / step) * step, 0.0)
        moved = max(moved, abs(float((rounded - x).sum() / place)))
    return moved / float(p.sum())


def _sums(
    p: Tensor,  # [n]
    v: Tensor,  # [n, D]
    growth: Tensor,  # [n], of the scores, times p
    o: Tensor,  # [D]
    u: OutputRounding,
    *,
    score_size: float,
    of_sink: float,
    shared: float,
    soft_cap: float,
) -> Tensor:
    """Of one head, [len(OUTPUT_SUMS)]."""
    out = torch.zeros(len(OUTPUT_SUMS), dtype=torch.float64)
    r = p @ v
    output_bad = not bool(o.isfinite().all())
    reference_bad = not bool((r.abs() < u.output_limit).all())
    if output_bad or reference_bad:
        both = output_bad and reference_bad
        code = NONFINITE_BOTH if both else NONFINITE_OUTPUT if output_bad else NONFINITE_REFERENCE
        out[OUTPUT_SUM["nonfinite"]] = code
        return out
    e = o - r
    c = growth @ v - growth.sum() * r
    a = p @ v.abs()
    q2 = (p**2 * (v**2).sum(1)).sum()

    m = score_size
    score_error = SCORE_ERROR * max(m, soft_cap)
    tanh = u.tanh if soft_cap else 0.0
    x = score_error + (2 * u.operand + tanh) * m
    small = LARGE_VALUE * len(p) * u.weight_step * (v**2).mean().sqrt()
    b = u.output * o.abs() + u.output_step + (2 * u.weight + u.operand + 2 * x + SUM_BOUND) * a + small
    y2 = (score_error / 4) ** 2 + (u.operand * m / 2) ** 2 + (tanh * m / 2) ** 2
    f2 = MEAN_SQUARE * (u.weight**2 + u.operand**2) + y2
    h = (SUM_NOISE + math.sqrt(y2) * of_sink) * a + small + u.output_step

    def noise2(w: Tensor) -> Tensor:
        """Of sum e w."""
        rounded = MEAN_SQUARE * u.output**2 * ((o * w) ** 2).sum()
        return f2 * q2 * (w**2).sum() + rounded + (h @ w.abs()) ** 2

    out[OUTPUT_SUM["worst"]] = torch.where(e == 0, 0.0, e.abs() / b).max()
    out[OUTPUT_SUM["error2"]] = (e**2).sum()
    out[OUTPUT_SUM["noise2"]] = f2 * q2 + MEAN_SQUARE * u.output**2 * (o**2).sum() + (h**2).sum()
    out[OUTPUT_SUM["norm2"]] = (r**2).sum()
    out[OUTPUT_SUM["gain_dot"]] = e @ r
    out[OUTPUT_SUM["gain_noise2"]] = noise2(r)
    out[OUTPUT_SUM["gain_shared"]] = shared * (a @ r.abs())
    if (c**2).sum() > (LOST * score_error) ** 2 * q2:
        out[OUTPUT_SUM["scale_dot"]] = e @ c
        out[OUTPUT_SUM["scale_norm2"]] = (c**2).sum()
        out[OUTPUT_SUM["scale_noise2"]] = noise2(c)
        out[OUTPUT_SUM["scale_shared"]] = shared * (a @ c.abs())
    return out


def kept_kv_ref(stored: Tensor, scale: float, computed: Tensor, largest: float | None) -> Tensor:
    """Sums over the elements of one row's own K or V in one KV head.

    Args:
        stored: numbers in the cache, [D], and `scale` that makes K or V of them.
        computed: what was to be stored, [D].
        largest: number of the cache's type if that is FP8, else None.

    Returns:
        float64 [3]: error2, norm2 and saturated, as KV_SUMS has them.
    """
    error = stored.double() * scale - computed.double()
    saturated = 0 if largest is None else int((stored.double().abs() == largest).sum())
    return torch.stack([(error**2).sum(), (computed.double() ** 2).sum(), torch.tensor(saturated).double()])
