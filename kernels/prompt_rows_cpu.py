"""Attention rows of a whole chunk of one request's prompt in one layer, on the CPU: statistics, shares, column sums.

Owns the measurement of consecutive rows, which see nearly the same keys: tiles of them are scored by one matrix product
a KV head, where `row_stats_cpu.py` plans rows of many requests. The statistics are those of
`glassbox/core/statistics.py`, their exact form and that of attention stand in `reference/row_stats.py` and
`reference/row_probe.py`. Which rows are asked for is `glassbox/processes/worker/traces/`'s.

A tile holds all keys that its rows see, so each row's softmax is made at once, and nothing is merged but the sums over
rows, in float64. What follows the product is done by the native kernel, a row after the other on one core, or by torch
on many cores and where there is no compiler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.core.trace_arrays import SCORE_PARAMS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.probe_answers import PromptAnswers, kv_heads
from glassbox.kernels.row_stats_cpu import HIDDEN, KeyReader
from glassbox.kernels.row_stats_native import ScoredTile

# Scores of a tile, in float32 numbers: 2 MB, what a core's own cache holds.
_TILE_SCORES: Final = 1 << 19
_MAX_TILE_ROWS: Final = 128
_MIN_TILE_ROWS: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class PromptChunk:
    """Consecutive rows of one request in one layer.

    Attributes:
        queries: [N, Hq, D], any float dtype.
        position: of the first row in its sequence.
        reader: of the layer's keys; block_ids: int64, the sequence's blocks; block_size: their tokens.
        params: of the layer.
    """

    queries: Tensor
    position: int
    reader: KeyReader
    block_ids: Tensor
    block_size: int
    params: LayerParams

    @property
    def end(self) -> int:
        """Behind the last row's position."""
        return self.position + len(self.queries)

    def lowest(self, position: int) -> int:
        """The first key that the row at a position sees."""
        reach = self.params.reach
        if reach is None:
            return 0
        return max(position - reach + 1, 0) if reach > 0 else position // -reach * -reach

    def keys(self, first: int, wanted: Sequence[int]) -> Tensor:
        """Keys of some KV heads from a position on, float32 [len(wanted), D, n] contiguous."""
        from_block = first // self.block_size
        pages = self.reader.read(self.block_ids[from_block : -(-self.end // self.block_size)])
        chosen = pages[:, list(wanted)] if len(wanted) < pages.shape[1] else pages
        skipped = first - from_block * self.block_size
        # [blocks, K, block, D] -> [K, D, blocks * block]
        joined = chosen.permute(1, 3, 0, 2).float().reshape(len(wanted), pages.shape[3], -1)
        keys = joined[:, :, skipped : skipped + self.end - first].contiguous()
        return keys if self.reader.key_scale == 1.0 else keys.mul_(self.reader.key_scale)


@dataclass(frozen=True, slots=True)
class PromptWishes:
    """What is asked of a chunk.

    Attributes:
        heads: query heads, ascending.
        spans: int32 [S, 2], (start, exclusive end) of positions.
        grams, kept, keys_from, squares: see contract.AskedPrompt.
        sink_tokens, local_window: of the statistics sink_ratio and local_ratio, in tokens.
    """

    heads: Sequence[int]
    spans: Tensor
    grams: bool = False
    kept: bool = False
    keys_from: int = 0
    sink_tokens: int = 4
    local_window: int = 128
    squares: bool = False


def prompt_rows_cpu(chunk: PromptChunk, asked: PromptWishes, *, native: bool = False) -> PromptAnswers[Tensor]:
    """Measure a chunk. Scores of magnitude 1e38 and more count as overflow (nonfinite), as in `row_stats_cpu`.

    Memory: beside the answers the sequence's keys in float32, and some MB.

    Args:
        native: whether the native kernel is there and to be used.

    Raises:
        ValueError: a head that the layer lacks is asked for.
    """
    num_rows, num_heads, _ = chunk.queries.shape
    if asked.heads and asked.heads[-1] >= num_heads:
        raise ValueError(f"heads must be below {num_heads}, got {asked.heads[-1]}; ask for those that the layer has")
    group = num_heads // chunk.reader.num_kv_heads
    if not asked.heads:  # another rank has those that were asked for
        return _Rows.empty(num_rows, 0, chunk.end, asked).answers(group)
    wanted = kv_heads(asked.heads, group)
    first = chunk.lowest(chunk.position)
    keys_from = min(asked.keys_from, chunk.end)
    base = min(first, keys_from) if asked.grams or asked.kept else first
    keys = chunk.keys(base, wanted)
    queries = chunk.queries[:, list(asked.heads)].float()
    rows = _Rows.empty(num_rows, len(asked.heads), chunk.end, asked)
    for k, kv_head in enumerate(wanted):
        of_group = [number for number, head in enumerate(asked.heads) if head // group == kv_head]
        _measure(chunk, asked, queries, keys[k], base, slice(of_group[0], of_group[-1] + 1), rows, native=native)
    if not (asked.grams or asked.kept):
        return rows.answers(group)
    new_keys = keys[:, :, keys_from - base :]
    return rows.answers(
        group,
        query_gram=_gram(queries.permute(1, 2, 0)) if asked.grams else None,
        key_gram=_gram(new_keys) if asked.grams else None,
        queries=queries if asked.kept else None,
        keys=new_keys.permute(2, 0, 1).contiguous() if asked.kept else None,
        score_params=score_params(chunk.params, asked.heads) if asked.kept else None,
    )


def score_params(params: LayerParams, heads: Sequence[int]) -> Tensor:
    """What makes attention of queries and keys of some heads, float32 [H, 4]; see `PromptAnswers`."""
    out = torch.zeros(len(heads), len(SCORE_PARAMS))
    out[:, 0] = params.scale if params.alibi_slopes is None and not params.chunk_size else torch.nan
    out[:, 1] = params.soft_cap or 0.0
    out[:, 2] = params.sliding_window or 0
    out[:, 3] = torch.nan if params.sinks is None else params.sinks.detach().float().cpu()[list(heads)]
    return out


def _gram(columns: Tensor) -> Tensor:
    """float64 [..., D, D] of [..., D, n]."""
    wide = columns.double()
    return wide @ wide.mT


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Numbers of all rows, as `PromptAnswers` has them."""

    stats: Tensor
    previous: Tensor
    span_mass: Tensor
    received: Tensor  # float64
    squares: Tensor | None  # likewise

    @classmethod
    def empty(cls, num_rows: int, num_heads: int, num_keys: int, asked: PromptWishes) -> "_Rows":
        return cls(
            torch.full((num_rows, num_heads, NUM_STATISTICS + 1), torch.nan),
            torch.full((num_rows, num_heads), torch.nan),
            torch.full((num_rows, num_heads, len(asked.spans)), torch.nan),
            torch.zeros(num_heads, num_keys, dtype=torch.float64),
            torch.zeros(num_heads, num_keys, dtype=torch.float64) if asked.squares else None,
        )

    def answers(self, group: int, **others: Tensor | None) -> PromptAnswers[Tensor]:
        squares = None if self.squares is None else self.squares.float()
        return PromptAnswers(
            self.stats, self.previous, self.span_mass, self.received.float(), group, received_squares=squares, **others
        )


def _measure(
    chunk: PromptChunk,
    asked: PromptWishes,
    queries: Tensor,  # [N, H, D]
    keys: Tensor,  # [D, n], of the positions from `base` on
    base: int,
    heads: slice,  # of H, those of one KV head
    rows: _Rows,
    *,
    native: bool,
) -> None:
    """Fill in all rows of the query heads that share a KV head."""
    scaled = (queries[:, heads] * chunk.params.scale).transpose(0, 1)  # [G, N, D]
    heads_here, num_rows, head_size = scaled.shape
    at = 0
    while at < num_rows:
        # About as many keys as the tile's last row sees, were it as large as it may be.
        seen = chunk.position + min(at + _MAX_TILE_ROWS, num_rows) - chunk.lowest(chunk.position + at)
        size = max(min(_TILE_SCORES // (heads_here * seen), _MAX_TILE_ROWS), _MIN_TILE_ROWS)
        part = slice(at, min(at + size, num_rows))
        first, end = chunk.position + part.start, chunk.position + part.stop
        lowest = chunk.lowest(first)
        of_tile = scaled[:, part].reshape(-1, head_size)
        scores = (of_tile @ keys[:, lowest - base : end - base]).view(heads_here, -1, end - lowest)
        fill = _fill_natively if native else _fill
        fill(chunk, asked, scores, first, lowest, (part, heads), rows)
        at = part.stop


def _fill_natively(
    chunk: PromptChunk,
    asked: PromptWishes,
    scores: Tensor,
    first: int,
    base: int,
    place: tuple[slice, slice],
    rows: _Rows,
) -> None:
    """As `_fill`."""
    params, heads = chunk.params, list(asked.heads[place[1]])
    slopes, sinks = (
        None if values is None else values.detach().float()[heads].numpy()
        for values in (params.alibi_slopes, params.sinks)
    )
    ScoredTile(
        scores=scores.numpy(),
        position=first,
        base=base,
        slopes=slopes,
        sinks=sinks,
        soft_cap=params.soft_cap,
        reach=params.reach,
        spans=asked.spans.numpy(),
        stats=rows.stats[place].numpy(),
        previous=rows.previous[place].numpy(),
        span_mass=rows.span_mass[place].numpy(),
        received=rows.received[place[1], base : base + scores.shape[2]].numpy(),
        squares=None if rows.squares is None else rows.squares[place[1], base : base + scores.shape[2]].numpy(),
        sink_tokens=asked.sink_tokens,
        local_window=asked.local_window,
    ).measure()


def _fill(
    chunk: PromptChunk,
    asked: PromptWishes,
    scores: Tensor,  # [G, M, n], raw; overwritten
    first: int,  # position of the first of M rows
    base: int,  # of the first of n keys, the last of which is the last row's own
    place: tuple[slice, slice],
    rows: _Rows,
) -> None:
    params, (_, num_rows, num_keys) = chunk.params, scores.shape
    positions = torch.arange(first, first + num_rows)
    lowest = torch.tensor([chunk.lowest(first + i) for i in range(num_rows)])
    overflow = _finish_scores(params, list(asked.heads[place[1]]), scores, positions, lowest, base)
    highest = scores.amax(-1)
    scores.sub_(highest.unsqueeze(-1))
    share = torch.softmax(scores, -1)
    energy = torch.linalg.vecdot(share, scores)
    log_zk = -torch.log(share.amax(-1))
    log_z = log_zk
    if params.sinks is not None:
        sinks = params.sinks.detach().float()[list(asked.heads[place[1]])]
        log_z = torch.logaddexp(log_zk, sinks[:, None] - highest)
    kept = torch.exp(log_zk - log_z)  # of the softmax, that goes to keys
    bad = torch.isnan(energy + overflow)
    n = (positions - lowest + 1).float()
    local, distance = _near_and_far(share, positions, base, asked.local_window)
    numbers = {
        "entropy_ratio": torch.where(n > 1, (log_zk - energy) / n.clamp(min=2).log(), 0.0).clamp(0, 1),
        "effective_keys": torch.minimum((1 / torch.linalg.vecdot(share, share)).clamp(min=1), n),
        "max_logit": highest,
        "top1_ratio": torch.exp(-log_z),
        "sink_ratio": (share[..., : max(asked.sink_tokens - base, 0)].sum(-1) * kept).clamp(max=1),
        "local_ratio": (local * kept).clamp(max=1),
        "distance_tokens": distance.clamp(min=0),
        "self_logprob": (torch.diagonal(scores, num_keys - num_rows, -2, -1) - log_z).clamp(max=0),
    }
    stats = rows.stats[place]
    for name, values in numbers.items():
        stats[..., INDEX[name]] = values.T
    stats[bad.T] = torch.nan
    stats[..., NUM_STATISTICS] = bad.T.float()
    _fill_masses(asked, share, kept, bad, (positions, lowest, base), place, rows)


def _finish_scores(
    params: LayerParams, heads: list[int], scores: Tensor, positions: Tensor, lowest: Tensor, base: int
) -> Tensor | float:
    """Raw scores become those that the softmax sees, HIDDEN where there is none.

    Returns:
        What is NaN [G, M] where the soft cap hides that a raw score is not finite, else 0.
    """
    hidden = _Hidden.of(positions, lowest, base)
    hidden.hide(scores)
    overflow: Tensor | float = 0.0
    if params.soft_cap is not None:
        least, most = scores.aminmax(dim=-1)  # tanh makes an infinite score finite
        overflow = (most - most) + (least - least)
        scores.div_(params.soft_cap).tanh_().mul_(params.soft_cap)
        hidden.hide(scores)
    if params.alibi_slopes is not None:
        ages = (positions[:, None] - torch.arange(base, base + scores.shape[2])).float()
        slopes = params.alibi_slopes.detach().float()[heads]
        scores.addcmul_(slopes.view(-1, 1, 1), ages, value=-1)
        hidden.hide(scores)
    return overflow


def _fill_masses(
    asked: PromptWishes,
    share: Tensor,  # [G, M, n]
    kept: Tensor,  # [G, M]
    bad: Tensor,  # [G, M]
    where: tuple[Tensor, Tensor, int],  # positions and lowest keys of the rows, position of the first key
    place: tuple[slice, slice],
    rows: _Rows,
) -> None:
    (num_heads, num_rows, num_keys), (positions, lowest, base) = share.shape, where
    if num_keys > num_rows:
        previous = torch.diagonal(share, num_keys - num_rows - 1, -2, -1) * kept
    else:  # the first of the rows doesn't see the key before its own
        previous = torch.zeros(num_heads, num_rows)
        previous[:, 1:] = torch.diagonal(share, -1, -2, -1)[:, : num_rows - 1] * kept[:, 1:]
    rows.previous[place] = previous.masked_fill(bad | (positions == 0), torch.nan).T
    if len(asked.spans):
        j = torch.arange(base, base + num_keys)[:, None]
        inside = ((j >= asked.spans[:, 0]) & (j < asked.spans[:, 1])).float()
        mass = (share @ inside) * kept.unsqueeze(-1)
        rows.span_mass[place] = mass.masked_fill(bad.unsqueeze(-1), torch.nan).transpose(0, 1)
    received = rows.received[place[1], base : base + num_keys]
    squares = None if rows.squares is None else rows.squares[place[1], base : base + num_keys]
    if bad.any():
        share = share.masked_fill(bad.unsqueeze(-1), 0.0)
        kept = kept.masked_fill(bad, 0.0)
        for head, row in bad.nonzero().tolist():
            seen = slice(int(lowest[row]) - base, int(positions[row]) + 1 - base)
            received[head, seen] = torch.nan
            if squares is not None:
                squares[head, seen.start : seen.stop - 1] = torch.nan
    received += torch.bmm(kept.unsqueeze(1), share).squeeze(1)
    if squares is not None:
        torch.diagonal(share, num_keys - num_rows, -2, -1).zero_()
        squares += torch.bmm(kept.square().unsqueeze(1), share.square()).squeeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Hidden:
    """Keys of a tile that its rows don't see: above the diagonal, and below the first key of each."""

    above: Tensor  # bool [M, M]
    below: Tensor | None  # bool [M, columns]

    @classmethod
    def of(cls, positions: Tensor, lowest: Tensor, base: int) -> "_Hidden":
        num_rows = len(positions)
        above = torch.ones(num_rows, num_rows, dtype=torch.bool).triu_(1)
        columns = int(lowest[-1]) - base
        below = torch.arange(base, base + columns) < lowest[:, None] if columns > 0 else None
        return cls(above, below)

    def hide(self, scores: Tensor) -> None:
        scores[..., -len(self.above) :].masked_fill_(self.above, HIDDEN)
        if self.below is not None:
            scores[..., : self.below.shape[1]].masked_fill_(self.below, HIDDEN)


def _near_and_far(share: Tensor, positions: Tensor, base: int, local_window: int) -> tuple[Tensor, Tensor]:
    """Share of the last `local_window` keys and mean distance of [G, M, n] shares, [G, M] each.

    The far keys' distance is that to the near ones and these' to the row, both of one sign: nothing cancels.
    """
    num_keys = share.shape[2]
    near = max(int(positions[0]) - local_window + 1 - base, 0)
    ages = positions[:, None] - torch.arange(base + near, base + num_keys)  # [M, keys]
    weights = torch.stack([(ages < local_window).float(), ages.clamp(min=0).float()], -1)  # [M, keys, 2]
    # [M, G, keys] @ [M, keys, 2]
    local, distance = torch.matmul(share[..., near:].transpose(0, 1), weights).permute(2, 1, 0)
    if near:
        steps = torch.stack([torch.arange(near, 0, -1).float(), torch.ones(near)], -1)
        to_near, mass = (share[..., :near] @ steps).unbind(-1)
        distance = distance + to_near + mass * (positions - base - near).float()
    return local, distance
