"""Row statistics on the CPU: a few batched torch calls over the visible keys of the sampled rows.

Owns the measurement of layers of one kind. It does not know how a cache is laid out (a `KeyReader` does), nor how a
step's work is cut (`row_plan.py`), nor where rows come from. The meaning of each number stands in
`glassbox.core.statistics`, its exact form in `reference/row_stats.py`.

Each tile normalises its own softmax, so all its sums are means over at most some thousand keys, which float32
holds well; what spans tiles is merged in float64. So precision doesn't depend on the length of the context.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.row_plan import DISTANCE, NUM_WEIGHTS, Group, RowPlan, Tile, plan_rows

__all__ = [
    "HIDDEN",
    "KeyReader",
    "LayerRows",
    "RowPlan",
    "per_head",
    "plan_rows",
    "row_stats_cpu",
    "scaled_queries",
    "tile_scores",
]

# Stands for "invisible": below every score, and finite so that 0 * (HIDDEN - m) is 0, not NaN.
HIDDEN: Final = -1e38

# Partial results of a tile; the sums over weighted columns come last, in the order of `row_plan`.
_MAX, _TOP, _ENERGY, _SQUARES, _OWN, _OVERFLOW, _PREVIOUS, _SUMS = range(8)
_SINK, _LOCAL, _CONTEXT, _GENERATED, _DISTANCE = range(_SUMS, _SUMS + NUM_WEIGHTS)
_NUM_PARTIAL: Final = _SUMS + NUM_WEIGHTS


class KeyReader(Protocol):
    """Reads keys of one layer. Key = number read * `key_scale`."""

    @property
    def key_scale(self) -> float: ...

    @property
    def num_kv_heads(self) -> int: ...

    def read(self, block_ids: Tensor) -> Tensor:
        """Of blocks int64 [N]: [N, Hkv, block, D], any float dtype, possibly strided."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The planned rows of one layer.

    Attributes:
        queries: [R, Hq, D] in the order of `RowPlan.query_index`, any float dtype.
        reader: of the layer's keys.
        params: of the layer.
    """

    queries: Tensor
    reader: KeyReader
    params: LayerParams

    @classmethod
    def select(cls, q: Tensor, reader: KeyReader, plan: RowPlan, params: LayerParams) -> Self:
        """The rows of a plan; a copy, so `q` ([T, Hq, D], the queries of the step) may be written afterwards.

        Raises:
            ValueError: the plan was made for another reach.
        """
        if params.reach != plan.reach:
            raise ValueError(
                f"reach of a plan must be its layers', {params.reach}, got {plan.reach}; plan the rows of such layers "
                "separately"
            )
        return cls(q.index_select(0, plan.query_index), reader, params)

    @property
    def num_heads(self) -> int:
        """Query heads, Hq."""
        return self.queries.shape[1]

    @property
    def key_numbers(self) -> int:
        """Numbers of one token's keys, Hkv * D."""
        return self.reader.num_kv_heads * self.queries.shape[2]

    @property
    def kind(self) -> Hashable:
        """Layers of one kind can be measured together."""
        params = self.params
        biases = (params.alibi_slopes is None, params.sinks is None)
        return (self.queries.shape, self.queries.dtype, self.reader.num_kv_heads, params.soft_cap, *biases)


def row_stats_cpu(layers: Sequence[LayerRows], plan: RowPlan) -> tuple[Tensor, Tensor | None]:
    """Statistics of the planned rows in some layers, as `glassbox.core.statistics` defines them.

    Scores of magnitude 1e38 and more count as overflow (nonfinite).

    Args:
        layers: N of one kind, best `plan.layers_at_once` of them: a torch call costs the same for all as for one.
        plan: of the step.

    Returns:
        float32 [N, R, Hq, NUM_STATISTICS + 1]; the last column is 1 where a visible raw score is NaN or
        infinite, and then the others are NaN. `lookback_ratio` is NaN on prefill rows. Beside it float32 [N, R, Hq],
        the attention of each row to the position before its own, NaN in rows without a trace slot; None if no row has
        one.

    Raises:
        ValueError: the layers are of several kinds.
    """
    queries = scaled_queries(layers)
    num_layers, num_heads, key_numbers = len(layers), layers[0].num_heads, layers[0].key_numbers
    partial = np.empty((_NUM_PARTIAL, num_layers, plan.num_rows, num_heads), dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        for group in plan.groups(num_heads, key_numbers):
            of_group = queries.index_select(1, group.row_index)
            wide = plan.workspace(group, key_numbers, num_layers)
            done = [_measure(of_group, layers, group, tile, plan=plan, wide=wide) for tile in group.tiles]
            merged = done[0] if len(done) == 1 else _merge(np.stack(done), group.tiles)
            partial[:, :, group.rows] = merged[:, :, group.real]
        stats, before = _finish(partial, plan, layers)
        return torch.from_numpy(stats), None if before is None else torch.from_numpy(before)


def scaled_queries(layers: Sequence[LayerRows]) -> Tensor:
    """Queries of the layers times scale and key scale, float32 [N, R, Hq, D].

    Raises:
        ValueError: the layers are of several kinds.
    """
    if any(layer.kind != layers[0].kind for layer in layers[1:]):
        raise ValueError(
            f"layers measured together must be of one kind, got {[layer.kind for layer in layers]}; "
            "measure them separately"
        )
    factors = torch.tensor([layer.params.scale * layer.reader.key_scale for layer in layers])
    return torch.stack([layer.queries for layer in layers]).float().mul_(factors.view(-1, 1, 1, 1))


def _measure(
    queries: Tensor,  # [N, R', Hq, D] float32, scaled
    layers: Sequence[LayerRows],
    group: Group,
    tile: Tile,
    *,
    plan: RowPlan,
    wide: Tensor,  # of `RowPlan.workspace`
) -> NDArray[np.float32]:
    """Partial results of one tile, [_NUM_PARTIAL, N, R', Hq]."""
    weights = plan.weights(group, tile)
    scores, overflow = tile_scores(queries, layers, group, tile, weights=weights, wide=wide)
    out = torch.empty(_NUM_PARTIAL, *scores.shape[:3])
    out[_OVERFLOW] = overflow
    torch.amax(scores, -1, out=out[_MAX])
    scores.sub_(out[_MAX].unsqueeze(-1))
    # torch's softmax has a faster exponential than torch.exp (10 against 29 us for 8 x 9 x 320 on one core).
    share = torch.softmax(scores, -1)
    torch.amax(share, -1, out=out[_TOP])
    torch.linalg.vecdot(share, scores, out=out[_ENERGY])
    torch.linalg.vecdot(share, share, out=out[_SQUARES])
    own = tile.own.expand(*scores.shape[:3], 1)
    torch.gather(scores, 3, own, out=out[_OWN].unsqueeze(-1))
    if plan.has_slots:
        before = tile.before.expand(*scores.shape[:3], 1)
        torch.gather(share, 3, before, out=out[_PREVIOUS].unsqueeze(-1))
    # [R', W, keys] @ [N, R', keys, Hq]
    out[_SUMS:].copy_(torch.matmul(weights, share.transpose(2, 3)).permute(2, 0, 1, 3))
    return out.numpy()


def tile_scores(
    queries: Tensor,
    layers: Sequence[LayerRows],
    group: Group,
    tile: Tile,
    *,
    weights: Tensor,
    wide: Tensor,
) -> tuple[Tensor, Tensor | float]:
    """Scores of a tile after soft cap, bias and masks.

    Args:
        queries: [N, R', Hq, D] float32, times scale and key scale.
        layers: N of one kind.
        group, tile: of the plan.
        weights: of the tile's columns, as `RowPlan.weights` gives them.
        wide: scratch that `RowPlan.workspace` gave.

    Returns:
        [N, R', Hq, keys] float32, HIDDEN where a row does not see a key, and what is NaN [N, R', Hq] where the soft
        cap hides that a raw score is not finite, else 0.
    """
    params = layers[0].params
    scores = _scores(queries, [layer.reader for layer in layers], group, tile, wide)
    _hide(scores, tile)
    overflow: Tensor | float = 0.0
    if params.soft_cap is not None:
        # tanh makes an infinite score finite: look at the raw ones.
        least, most = scores.aminmax(dim=-1)
        overflow = (most - most) + (least - least)
        scores.div_(params.soft_cap).tanh_().mul_(params.soft_cap)
        _hide(scores, tile)
    slopes = per_head(layer.params.alibi_slopes for layer in layers)
    if slopes is not None:
        scores.addcmul_(slopes.unsqueeze(-1), weights[:, DISTANCE, None, :], value=-1)
    return scores, overflow


def per_head(of_heads: Iterable[Tensor | None]) -> Tensor | None:
    """float32 [N, 1, Hq] of what layers of one kind have per head, [Hq] each; None if they have nothing."""
    there = [values.detach().float() for values in of_heads if values is not None]
    return torch.stack(there).unsqueeze(1) if there else None


def _scores(queries: Tensor, readers: Sequence[KeyReader], group: Group, tile: Tile, wide: Tensor) -> Tensor:
    """float32 [N, R', Hq, keys] of queries [N, R', Hq, D] and the tile's keys in N layers."""
    num_layers, num_rows, num_heads, head_size = queries.shape
    per_item, keys, num_kv_heads = group.rows_per_item, tile.keys, readers[0].num_kv_heads
    scores = torch.empty(num_layers, num_rows, num_heads, keys)
    # As many layers as the workspace holds: keys are multiplied while they are in the processor's cache.
    at_once = len(wide) // (group.items * keys)
    for begin in range(0, num_layers, at_once):
        some = readers[begin : begin + at_once]
        joined = _join_keys(some, group, tile, wide)
        items = len(some) * group.items
        grouped = queries[begin : begin + at_once].view(items, per_item, num_kv_heads, -1, head_size).transpose(1, 2)
        # [items * Hkv, rows * G, D] @ [items * Hkv, D, keys]
        left = grouped.reshape(items * num_kv_heads, -1, head_size)
        out = scores[begin : begin + at_once]
        if per_item == 1:
            torch.bmm(left, joined, out=out.view(items * num_kv_heads, -1, keys))
        else:
            product = torch.bmm(left, joined).view(items, num_kv_heads, per_item, -1, keys)
            out.view(items, per_item, num_kv_heads, -1, keys).copy_(product.transpose(1, 2))
    return scores


def _join_keys(readers: Sequence[KeyReader], group: Group, tile: Tile, wide: Tensor) -> Tensor:
    """The tile's keys in some layers, float32 [layers * items * Hkv, D, keys], in the workspace."""
    joined = wide
    # One pass widens the keys and joins the blocks, in the order in which a page (of the first layer) lies.
    for n, reader in enumerate(readers):
        pages = reader.read(tile.block_ids)
        _, num_kv_heads, block_size, head_size = pages.shape
        pages = pages.view(group.items, -1, num_kv_heads, block_size, head_size)
        if n == 0:
            by_token = pages.stride(-1) == 1
            inner = (pages.shape[1], block_size, head_size) if by_token else (head_size, pages.shape[1], block_size)
            wide = wide[: len(readers) * group.items * tile.keys].view(len(readers), group.items, num_kv_heads, *inner)
            matrices = len(readers) * group.items * num_kv_heads
            joined = wide.view(matrices, -1, head_size).mT if by_token else wide.view(matrices, head_size, -1)
        wide[n].copy_(pages.transpose(1, 2) if by_token else pages.permute(0, 2, 4, 1, 3))
    return joined


def _hide(scores: Tensor, tile: Tile) -> None:
    for first, end, mask in tile.hidden:
        scores[..., first:end].masked_fill_(mask, HIDDEN)


def _merge(parts: NDArray[np.float32], tiles: tuple[Tile, ...]) -> NDArray[np.float32]:
    """Merges partial results of runs of keys, [C, _NUM_PARTIAL, N, R', Hq] -> [_NUM_PARTIAL, N, R', Hq].

    A run of which a row sees nothing has maximum `HIDDEN`, so its share of the whole is exactly 0.
    """
    whole = parts.astype(np.float64)
    highest = whole[:, _MAX].max(axis=0)
    shift = whole[:, _MAX] - highest
    # Sum of e^(s - highest) of each run, then its share of all.
    mass = np.exp(shift) / whole[:, _TOP]
    total = mass.sum(axis=0)
    share = mass / total
    merged = np.empty(parts.shape[1:], dtype=np.float32)
    merged[_MAX] = highest
    merged[_TOP] = 1 / total
    merged[_ENERGY] = (share * (whole[:, _ENERGY] + shift)).sum(axis=0)
    merged[_SQUARES] = (share * share * whole[:, _SQUARES]).sum(axis=0)
    here = np.stack([tile.own_here for tile in tiles])[:, None]
    merged[_OWN] = np.where(here, whole[:, _OWN] + shift, 0.0).sum(axis=0)
    merged[_OVERFLOW] = whole[:, _OVERFLOW].sum(axis=0)
    before_here = np.stack([tile.before_here for tile in tiles])[:, None]
    merged[_PREVIOUS] = np.where(before_here, share * whole[:, _PREVIOUS], 0.0).sum(axis=0)
    merged[_SUMS:] = (share[:, None] * whole[:, _SUMS:]).sum(axis=0)
    return merged


def _finish(
    partial: NDArray[np.float32], plan: RowPlan, layers: Sequence[LayerRows]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Statistics [N, R, Hq, NUM_STATISTICS + 1] and attention to the position before, of partial results
    [_NUM_PARTIAL, N, R, Hq].

    In numpy: its calls on arrays of this size take a fifth of torch's.
    """
    out = np.empty((*partial.shape[1:], NUM_STATISTICS + 1), dtype=np.float32)
    log_zk = -np.log(partial[_TOP])
    log_z, kept = log_zk, np.float32(1)
    sinks = per_head(layer.params.sinks for layer in layers)
    if sinks is not None:
        log_z = np.logaddexp(log_zk, sinks.numpy() - partial[_MAX])
        kept = np.exp(log_zk - log_z)
    entropy = (log_zk - partial[_ENERGY]) * plan.inverse_log_n
    context = partial[_CONTEXT] / plan.num_context
    generated = partial[_GENERATED] / plan.num_generated
    # Rounding may step over a range's end by one ulp or so.
    out[..., INDEX["entropy_ratio"]] = np.clip(entropy, 0, 1)
    out[..., INDEX["effective_keys"]] = np.clip(1 / partial[_SQUARES], 1, plan.num_keys)
    out[..., INDEX["max_logit"]] = partial[_MAX]
    out[..., INDEX["top1_ratio"]] = np.exp(-log_z)
    out[..., INDEX["sink_ratio"]] = np.minimum(partial[_SINK] * kept, 1)
    out[..., INDEX["local_ratio"]] = np.minimum(partial[_LOCAL] * kept, 1)
    out[..., INDEX["distance_tokens"]] = np.maximum(partial[_DISTANCE], 0)
    out[..., INDEX["self_logprob"]] = np.minimum(partial[_OWN] - log_z, 0)
    out[..., INDEX["lookback_ratio"]] = np.where(plan.decode, context / (context + generated), np.nan)
    # Any NaN or infinity among a row's scores makes its energy NaN: 0 * -inf, inf - inf.
    bad = np.isnan(partial[_ENERGY] + partial[_OVERFLOW])
    out[bad] = np.nan
    out[..., NUM_STATISTICS] = bad
    if not plan.has_slots:
        return out, None
    before = np.where(plan.sees_before, partial[_PREVIOUS] * kept, plan.without_before)
    before[bad | ~plan.slotted] = np.nan
    return out, before
