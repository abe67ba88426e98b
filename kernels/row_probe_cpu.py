"""Full attention rows on the CPU, and what traced requests ask of them: top positions, span masses, the rows.

Owns the measurement of one layer, for the few rows whose requests asked for more than statistics. Scores are those of
`row_stats_cpu.py`, its exact form stands in `reference/row_probe.py`. Which rows, and what becomes of the result, is
`glassbox/trace_step.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox.kernels.row_plan import Group, RowPlan
from glassbox.kernels.row_stats_cpu import HIDDEN, KeyReader, LayerParams, LayerRows, tile_scores

NO_POSITION: Final = -1


@dataclass(frozen=True, slots=True)
class RowQuestion:
    """What is asked of one row.

    Attributes:
        top_k: most attended positions per head.
        spans: (start, exclusive end) of position ranges whose mass is wanted.
        heads: local heads whose attention is summed into `RowAnswer.head_sum`; None is all.
        row: whether the whole row is wanted.
    """

    top_k: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    heads: tuple[int, ...] | None = None
    row: bool = False


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """Of one row in one layer; H query heads, positions first .. own (n of them).

    Attributes:
        first: position of the first key that the arrays over keys hold; what is before it has no attention.
        topk_positions, topk_mass: [H, k], by falling mass; NO_POSITION and 0 where there are fewer keys or the head's
            scores are not finite.
        span_mass: [H, S]; NaN where scores are not finite, as in the two below.
        head_sum: [n], attention summed over the chosen heads.
        row: [H, n], None if not asked for.
    """

    first: int
    topk_positions: NDArray[np.int32]
    topk_mass: NDArray[np.float32]
    span_mass: NDArray[np.float32]
    head_sum: NDArray[np.float32]
    row: NDArray[np.float32] | None


def row_probe_cpu(
    q: Tensor, reader: KeyReader, plan: RowPlan, params: LayerParams, questions: Sequence[RowQuestion]
) -> list[RowAnswer]:
    """Attention of the planned rows in one layer, softmax over their visible keys (and a learned sink).

    Memory: a row's scores, H x keys float32, for the rows of requests of like length at once.

    Args:
        q: queries of the step, [T, Hq, D], any float dtype.
        reader: of the layer's keys.
        plan: of the probed rows alone.
        params: of the layer.
        questions: one per planned row, in the order of the row list.

    Raises:
        ValueError: the plan was made for another sliding window, or for another number of rows.
    """
    if len(questions) != plan.num_rows:
        raise ValueError(
            f"a plan must be for {len(questions)} rows, got {plan.num_rows}; plan the probed rows by themselves"
        )
    layer = LayerRows.select(q, reader, plan, params)
    scaled = layer.queries.float() * (params.scale * reader.key_scale)
    answers: dict[int, RowAnswer] = {}
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for group in plan.groups(layer.num_heads, layer.key_numbers):
            scores, bad = _group_scores(scaled.index_select(0, group.row_index), layer, group, plan)
            of_group = [questions[row] for row in group.rows.tolist()]
            real = torch.from_numpy(group.real)
            _answer(answers, group, scores[real], bad[real], params, of_group)
    return [answers[row] for row in range(plan.num_rows)]


def _group_scores(queries: Tensor, layer: LayerRows, group: Group, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Scores [R', Hq, keys of all tiles], and whether one of a row's is not finite, [R', Hq]."""
    wide = plan.workspace(group, layer.key_numbers, 1)
    parts, overflow = [], torch.zeros(queries.shape[:2])
    for tile in group.tiles:
        weights = plan.weights(group, tile)
        scores, of_tile = tile_scores(queries[None], [layer], group, tile, weights=weights, wide=wide)
        parts.append(scores[0])
        overflow += of_tile[0] if isinstance(of_tile, Tensor) else of_tile
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    # 0 * x is NaN unless x is finite.
    return joined, ((joined * 0.0).sum(-1) + overflow).isnan()


def _answer(
    answers: dict[int, RowAnswer],
    group: Group,
    scores: Tensor,  # [R, Hq, keys] of the real rows
    bad: Tensor,  # [R, Hq]
    params: LayerParams,
    questions: Sequence[RowQuestion],
) -> None:
    p = torch.softmax(scores, -1)
    if params.sinks is not None:
        # The share of the softmax that goes to keys: Zk / (Zk + e^sink).
        p *= torch.sigmoid(torch.logsumexp(scores, -1) - params.sinks.detach().float()).unsqueeze(-1)
    p.masked_fill_(bad.unsqueeze(-1), torch.nan)
    k = min(max(question.top_k for question in questions), p.shape[-1])
    # Of the scores, not of p: an invisible key must not stand before a visible one whose p is 0, too.
    best, column = torch.topk(scores, k, dim=-1)
    there = (best > HIDDEN / 2) & ~bad.unsqueeze(-1)
    base = group.tiles[0].base[torch.from_numpy(group.real)]  # [R, 1]
    positions = torch.where(there, column + base.unsqueeze(-1), NO_POSITION).to(torch.int32).numpy()
    mass = torch.where(there, p.gather(-1, column), 0.0).numpy()
    attention, own = p.numpy(), group.position[torch.from_numpy(group.real)][:, 0].tolist()
    for i, (row, first, question) in enumerate(zip(group.rows.tolist(), base[:, 0].tolist(), questions, strict=True)):
        keys = attention[i, :, : own[i] - first + 1]
        chosen = keys if question.heads is None else keys[list(question.heads)]
        answers[row] = RowAnswer(
            first=first,
            topk_positions=_fitted(positions[i], question.top_k, NO_POSITION),
            topk_mass=_fitted(mass[i], question.top_k, 0),
            span_mass=_span_mass(keys, first, question.spans),
            head_sum=chosen.sum(axis=0, dtype=np.float32),
            row=keys if question.row else None,
        )


def _fitted(values: NDArray, k: int, empty: float) -> NDArray:
    """The first k columns of [H, columns], filled up with `empty` if there are fewer."""
    missing = k - values.shape[1]
    return values[:, :k] if missing <= 0 else np.pad(values, ((0, 0), (0, missing)), constant_values=empty)


def _span_mass(attention: NDArray[np.float32], first: int, spans: tuple[tuple[int, int], ...]) -> NDArray[np.float32]:
    """[H, S] of attention [H, n] to the positions from `first` on."""
    out = np.empty((len(attention), len(spans)), dtype=np.float32)
    for s, (start, end) in enumerate(spans):
        out[:, s] = attention[:, max(start - first, 0) : max(end - first, 0)].sum(axis=-1)
        out[np.isnan(attention[:, 0]), s] = np.nan
    return out
