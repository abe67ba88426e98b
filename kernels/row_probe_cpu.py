"""Whole attention vectors on the CPU, and what traced requests ask of them: top positions, span masses, the vectors.

Owns the measurement of a few rows in layers of one kind, for requests that asked for more than statistics. Scores are
those of `row_stats_cpu.py`, the exact form of what is done with them stands in `reference/row_probe.py`. Which rows,
and what becomes of the answers, is `glassbox/processes/worker/traces/traced_step.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glassbox.core.trace_arrays import NO_POSITION
from glassbox.kernels.probe_answers import ProbeAnswers, Questions, no_answers
from glassbox.kernels.row_plan import Group, RowPlan
from glassbox.kernels.row_stats_cpu import HIDDEN, LayerRows, per_head, scaled_queries, tile_scores


def row_probe_cpu(layers: Sequence[LayerRows], plan: RowPlan, asked: Questions[Tensor]) -> ProbeAnswers[Tensor]:
    """Attention of the planned rows in some layers: softmax over their visible keys (and a learned sink).

    Memory: a few times the rows' scores, layers x H x keys float32, for the rows of requests of like length at once.

    Args:
        layers: L of one kind, best `plan.layers_at_once(..., whole=True)` of them.
        plan: of the R probed rows alone.
        asked: of these rows and layers.

    Raises:
        ValueError: the layers are of several kinds, or the plan is for another number of rows.
    """
    positions = asked.positions
    if len(positions) != plan.num_rows:
        raise ValueError(
            f"a plan must be for {len(positions)} rows, got {plan.num_rows}; plan the probed rows by themselves"
        )
    num_heads = layers[0].num_heads
    queries = scaled_queries(layers)
    answers = no_answers(asked)
    for group in plan.groups(num_heads, layers[0].key_numbers):
        real, rows = torch.from_numpy(group.real), torch.from_numpy(group.rows)
        scores, bad = _group_scores(queries.index_select(1, group.row_index), layers, group, plan)
        if len(real) < scores.shape[1]:
            scores, bad = scores.index_select(1, real), bad.index_select(1, real)
        attention = torch.softmax(scores, -1)
        sinks = per_head(layer.params.sinks for layer in layers)
        if sinks is not None:
            # The share of the softmax that goes to keys: Zk / (Zk + e^sink).
            attention *= torch.sigmoid(torch.logsumexp(scores, -1) - sinks).unsqueeze(-1)
        base = group.tiles[0].base[real]  # [rows, 1]
        _fill_top(answers, scores, attention, bad, rows, base)
        attention.masked_fill_(bad.unsqueeze(-1), 0.0)
        _fill_sums(answers, attention, bad, rows, base, positions, asked.chosen[rows])
        attention.masked_fill_(bad.unsqueeze(-1), torch.nan)
        _fill_spans(answers, attention, rows, base, asked.spans[rows])
        for out, row in zip(answers.attention, asked.kept_attention, strict=True):
            for i in (rows == row).nonzero().flatten().tolist():
                _fill_attention(out, attention[:, i], int(base[i]), positions[row])
        for out, row in zip(answers.received, asked.received, strict=True):
            for i in (rows == row).nonzero().flatten().tolist():
                seen = slice(plan.lowest(row), positions[row] + 1)
                out[..., seen] = attention[:, i, :, seen.start - int(base[i]) : seen.stop - int(base[i])]
    return answers


def _group_scores(queries: Tensor, layers: Sequence[LayerRows], group: Group, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Scores [L, R', H, keys of all tiles], and whether one of a row's is not finite, [L, R', H]."""
    wide = plan.workspace(group, layers[0].key_numbers, len(layers))
    parts, overflow = [], torch.zeros(queries.shape[:3])
    for tile in group.tiles:
        scores, of_tile = tile_scores(queries, layers, group, tile, weights=plan.weights(group, tile), wide=wide)
        parts.append(scores)
        overflow += of_tile
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    # 0 * x is NaN unless x is finite.
    return joined, ((joined * 0.0).sum(-1) + overflow).isnan()


def _fill_top(
    answers: ProbeAnswers[Tensor], scores: Tensor, attention: Tensor, bad: Tensor, rows: Tensor, base: Tensor
) -> None:
    k = min(answers.topk_mass.shape[-1], scores.shape[-1])
    if not k:
        return
    # Of the scores, not of the attention: an invisible key must not stand before a visible one whose share is 0, too.
    best, column = torch.topk(scores, k, dim=-1)
    there = (best > HIDDEN / 2) & ~bad.unsqueeze(-1)
    position = torch.where(there, column + base.unsqueeze(-1), NO_POSITION).to(torch.int32)
    answers.topk_positions[rows, :, :, :k] = position.transpose(0, 1)
    answers.topk_mass[rows, :, :, :k] = torch.where(there, attention.gather(-1, column), 0.0).transpose(0, 1)


def _fill_sums(
    answers: ProbeAnswers[Tensor],
    attention: Tensor,  # [L, rows, H, keys], 0 in bad heads
    bad: Tensor,
    rows: Tensor,
    base: Tensor,
    positions: Sequence[int],
    chosen: Tensor,  # [rows, L, H]
) -> None:
    weights = chosen.transpose(0, 1).float().unsqueeze(2)  # [L, rows, 1, H]
    total = torch.matmul(weights, attention).sum((0, 2))  # [rows, keys]
    total.masked_fill_((chosen.transpose(0, 1) & bad).any(-1).any(0).unsqueeze(-1), torch.nan)
    for of_row, row, first in zip(total, rows.tolist(), base[:, 0].tolist(), strict=True):
        answers.chosen_sum[row, first : positions[row] + 1] = of_row[: positions[row] + 1 - first]
        if of_row[0].isnan():
            answers.chosen_sum[row] = torch.nan


def _fill_spans(answers: ProbeAnswers[Tensor], attention: Tensor, rows: Tensor, base: Tensor, spans: Tensor) -> None:
    j = torch.arange(attention.shape[-1]) + base  # [rows, keys]
    inside = (j.unsqueeze(-1) >= spans[:, None, :, 0]) & (j.unsqueeze(-1) < spans[:, None, :, 1])
    # [L, rows, H, keys] @ [rows, keys, S]; attention is 0 where a row sees no key.
    answers.span_mass[rows] = torch.matmul(attention, inside.float()).transpose(0, 1)


def _fill_attention(out: Tensor, attention: Tensor, first: int, position: int) -> None:
    """The last keys of one row, [L, H, n], from attention [L, H, keys] to the positions from `first` on."""
    keys = attention[..., : position + 1 - first][..., -out.shape[-1] :]
    out[..., out.shape[-1] - keys.shape[-1] :] = keys
    out.masked_fill_(attention[..., :1].isnan(), torch.nan)
