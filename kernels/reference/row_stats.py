"""Exact reference of the row statistics: float64, one row and one head at a time.

Owns the meaning of every number in `glassbox.core.statistics.STATISTICS`; the fast kernels are tested against it.
It is slow and plain on purpose: each line is one formula of that table.

How a score is made, found by comparing the output of vLLM's CPU kernel (`cpu_attention_with_kv_cache`, vLLM
0.32) with the softmax of each candidate (tests/integration/test_cpu_cache.py repeats the comparison):

    raw_j = scale * q.k_j
    s_j   = soft_cap * tanh(raw_j / soft_cap) + slope * (j - i)

The soft cap comes before ALiBi's bias; the bias is zero at the row's own key and negative before it (slope >
0). A sliding window of W lets row i see the keys max(0, i - W + 1) .. i, its own included. A learned sink is
one more score, without a key, in the softmax.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glassbox.core.rows import ROW_DECODE
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.kernels.reference.visible import first_visible


def row_stats_ref(
    q: Tensor,
    keys: Sequence[Tensor],
    position: Sequence[int],
    *,
    request: Sequence[int],
    phase: Sequence[int],
    prompt_len: Sequence[int],
    scale: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    sink_tokens: int = 4,
    local_window: int = 128,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Statistics of attention rows, as `glassbox.core.statistics` defines them.

    Args:
        q: queries of the rows, [R, Hq, D].
        keys: of each request all keys of its sequence, [n_total, Hkv, D]; Hq is a multiple of Hkv.
        position: own position of each row in its sequence, [R].
        request: index into `keys` of each row, [R].
        phase: ROW_DECODE of a decode row, 0 of a prefill row, [R].
        prompt_len: tokens of the prompt of each row's request, [R].
        scale: factor of q.k.
        sliding_window: visible keys of a row, its own included; None is all.
        chunk_size: a row sees the keys of its own chunk of so many positions alone; None is no chunks.
        soft_cap: bound of the scores by tanh; None is no bound.
        alibi_slopes: [Hq], or None.
        sinks: score of the learned sink, [Hq], or None.
        sink_tokens: leading positions of the sequence that count as sink.
        local_window: trailing visible keys that count as local.
        dtype: of the arithmetic; float32 makes it the same-dtype oracle of the tests.

    Returns:
        [R, Hq, NUM_STATISTICS + 1] in `dtype`; the last column is 1 where a visible raw score is NaN or
        infinite, and then the others are NaN. `lookback_ratio` is NaN on prefill rows.
    """
    num_rows, num_heads, _ = q.shape
    out = torch.full((num_rows, num_heads, NUM_STATISTICS + 1), math.nan, dtype=dtype)
    for row in range(num_rows):
        i = position[row]
        first = first_visible(i, sliding_window, chunk_size)
        row_keys = keys[request[row]]
        group = num_heads // row_keys.shape[1]
        j = torch.arange(first, i + 1)
        for head in range(num_heads):
            visible = row_keys[first : i + 1, head // group].to(dtype)
            raw = scale * (visible @ q[row, head].to(dtype))
            out[row, head, NUM_STATISTICS] = float(not torch.isfinite(raw).all())
            if not torch.isfinite(raw).all():
                continue
            score = raw if soft_cap is None else soft_cap * torch.tanh(raw / soft_cap)
            if alibi_slopes is not None:
                score = score + alibi_slopes[head].to(dtype) * (j - i)
            sink = None if sinks is None else sinks[head].to(dtype)
            prompt = prompt_len[row] if phase[row] == ROW_DECODE else None
            out[row, head, :NUM_STATISTICS] = _one_row(
                score, j, i, sink=sink, prompt_len=prompt, sink_tokens=sink_tokens, local_window=local_window
            )
    return out


def _one_row(
    score: Tensor,
    j: Tensor,
    i: int,
    *,
    sink: Tensor | None,
    prompt_len: int | None,
    sink_tokens: int,
    local_window: int,
) -> Tensor:
    """The statistics of one row in one head, [NUM_STATISTICS].

    Args:
        score: of the visible keys, after soft cap and bias, [n].
        j: positions of the visible keys, [n].
        i: own position of the row, the last of `j`.
        sink: score of the learned sink, or None.
        prompt_len: of a decode row; None on a prefill row.
    """
    n = len(score)
    m = score.max()
    weight = torch.exp(score - m)
    zk = weight.sum()
    # ln Z by logaddexp: e^(sink - m) overflows where the sink is far above every key.
    log_z = torch.log(zk) if sink is None else torch.logaddexp(torch.log(zk), sink - m)
    p = torch.exp(score - m - log_z)
    share = weight / zk

    out = torch.full((NUM_STATISTICS,), math.nan, dtype=score.dtype)
    entropy = torch.log(zk) - (weight * (score - m)).sum() / zk
    out[INDEX["entropy_ratio"]] = entropy / math.log(n) if n > 1 else 0.0
    out[INDEX["effective_keys"]] = zk**2 / (weight**2).sum()
    out[INDEX["max_logit"]] = m
    out[INDEX["top1_ratio"]] = torch.exp(-log_z)
    out[INDEX["sink_ratio"]] = p[j < sink_tokens].sum()
    out[INDEX["local_ratio"]] = p[j > i - local_window].sum()
    out[INDEX["distance_tokens"]] = (share * (i - j)).sum()
    out[INDEX["self_logprob"]] = score[-1] - m - log_z
    if prompt_len is not None:
        # The ratio of two means of p is the same with the shares of the keys, which never are all zero.
        context = _mean_or_zero(share[j < prompt_len])
        generated = _mean_or_zero(share[j >= prompt_len])
        out[INDEX["lookback_ratio"]] = context / (context + generated)
    return out


def _mean_or_zero(x: Tensor) -> Tensor:
    return x.mean() if len(x) else x.sum()
