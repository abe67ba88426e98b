"""The plan of a step's row statistics on the CPU: what all its layers have in common.

Owns which blocks are read for which rows in which run (a tile), which columns a row doesn't see, and what
each column counts in which sum. It never sees a query or a key; `row_stats_cpu.py` does.

Work is cut into tiles: requests of like length together, long ones over runs of keys. So one long request
doesn't make 63 short ones pay for its length, and no temporary grows with the context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from glassbox.core.rows import ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_PROMPT_LEN, ROW_QUERY, ROW_SLOT

# Float32 numbers of one tile's keys: 4 MB. Tiles of a quarter of that cost more calls, of twice that more
# cache misses (64 requests x 2000 keys and 1 x 131072, 2-core AVX-512 server, 2026-11).
KEY_BUDGET: Final = 1 << 20
_SCORE_BUDGET: Final = 1 << 20
# Keys of padding that cost as much time as the calls of one more tile, in float32 numbers.
_PADDING_BUDGET: Final = 1 << 18
# Weights of all tiles that are kept for a step's later layers, in float32 numbers; others are made per layer.
_WEIGHT_BUDGET: Final = 1 << 22
# Rows of one request in one tile; more than this read their keys more than once.
_MAX_ROWS_PER_ITEM: Final = 64
# Sums over key columns: see `column_weights`.
SINK, LOCAL, CONTEXT, GENERATED, DISTANCE = range(5)
NUM_WEIGHTS: Final = 5


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of key blocks for some requests of like length: one matrix product.

    Attributes:
        block_ids: int64 [items * blocks].
        keys: number of key columns, blocks * block_size.
        hidden: (first column, end column, mask) where some row doesn't see a key; mask bool [R', 1, end -
        first]. own: column of each row's own key, clamped, int64 [R', 1, 1].
        own_here: is the row's own key in this tile, bool [R', 1].
        before, before_here: likewise of the key at the position before it.
        base: position of column 0 for each row, int64 [R', 1].
        weights: of `SINK` .. `DISTANCE` per column, float32 [R', NUM_WEIGHTS, keys]; None if over the budget.
    """

    block_ids: Tensor
    keys: int
    hidden: tuple[tuple[int, int, Tensor], ...]
    own: Tensor
    own_here: NDArray[np.bool_]
    before: Tensor
    before_here: NDArray[np.bool_]
    base: Tensor
    weights: Tensor | None


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of like length, with all their tiles.

    Attributes:
        items, rows_per_item: R' = items * rows_per_item, padded with copies of an item's last row.
        row_index: which of `RowPlan.query_index` each is, int64 [R'].
        rows: index into the row list of the real rows among R', and `real` where they stand in R'.
        position, prompt_len: int64 [R', 1].
    """

    items: int
    rows_per_item: int
    row_index: Tensor
    rows: NDArray[np.int64]
    real: NDArray[np.int64]
    position: Tensor
    prompt_len: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class _Items:
    """Items of a group: runs of rows of one request, int64 [items] each.

    Attributes:
        start, count: of their rows in the sorted row list.
        low, length: first block that some row sees, and number of blocks.
        rows_per_item: `count` padded to one number.
    """

    start: NDArray[np.int64]
    count: NDArray[np.int64]
    low: NDArray[np.int64]
    length: NDArray[np.int64]
    rows_per_item: int

    @property
    def index(self) -> NDArray[np.int64]:
        """Of R' = items * rows_per_item rows in the sorted list; an item's last row pads it."""
        within = np.minimum(np.arange(self.rows_per_item), self.count[:, None] - 1)
        return (self.start[:, None] + within).ravel()


class RowPlan:
    """What all layers of a step with the same block table and reach have in common; see `plan_rows`.

    Attributes:
        num_rows: R.
        query_index: of the rows, by request and then by query; int64 [R].
        row_index: where in the row list each of `query_index` stands, int64 [R].
        own_blocks, own_slots: where in the cache each of `query_index` has its own key, int64 [R].
        reach, sink_tokens, local_window: as given to `plan_rows`.
        inverse_log_n: 1 / ln n, 0 if n is 1; float32 [R, 1], as all of these.
        num_keys: n.
        num_context, num_generated: visible keys of the prompt and after it, at least 1.
        decode: is the row a decode row; bool [R, 1].
        slotted: has the row a trace slot; bool [R, 1]. has_slots: has one of them.
        sees_before: does it see the key at the position before its own; bool [R, 1].
        without_before: its attention to that key if it doesn't see it: 0, and NaN where there is no such position.
    """

    def __init__(
        self,
        *,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        lens: NDArray[np.int32],
        table: NDArray[np.int32],
        block_size: int,
        reach: int | None,
        sink_tokens: int,
        local_window: int,
        key_budget: int,
    ) -> None:
        """See `plan_rows`."""
        # Sorted by request, then by query: an item's rows stand together.
        order = np.lexsort((rows[:, ROW_QUERY], rows[:, ROW_BATCH]))
        listed = rows[order].astype(np.int64)
        query, batch = listed[:, ROW_QUERY], listed[:, ROW_BATCH]
        position = lens[batch].astype(np.int64) - starts[batch + 1] + query
        if ((query < starts[batch]) | (query >= starts[batch + 1]) | (position < 0)).any():
            raise ValueError("every row must be a token of its request, got a query index outside of its batch row")
        first = _first_visible(position, reach)
        self.num_rows: Final = len(rows)
        self.query_index: Final = torch.from_numpy(query.copy())
        self.row_index: Final = torch.from_numpy(order)
        self.own_blocks: Final = torch.from_numpy(table[batch, position // block_size].astype(np.int64))
        self.own_slots: Final = torch.from_numpy(position % block_size)
        self.reach: Final = reach
        self.sink_tokens: Final = sink_tokens
        self.local_window: Final = local_window
        self._listed, self._order, self._position, self._first = listed, order, position, first
        self._table, self._block_size, self._key_budget = table, block_size, key_budget
        self._kept_weights = 0
        self._groups: dict[tuple[int, int], tuple[Group, ...]] = {}

        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        n = (position - first + 1)[inverse, None]
        context = np.clip((listed[:, ROW_PROMPT_LEN] - first)[inverse, None], 0, n)
        log_n = np.log(n.astype(np.float64))
        self.inverse_log_n: Final = np.divide(1.0, log_n, out=np.zeros_like(log_n), where=n > 1).astype(np.float32)
        self.num_keys: Final = n.astype(np.float32)
        self.num_context: Final = np.maximum(context, 1).astype(np.float32)
        self.num_generated: Final = np.maximum(n - context, 1).astype(np.float32)
        self.decode: Final = (listed[inverse, ROW_PHASE, None] & ROW_DECODE) == ROW_DECODE
        self.slotted: Final = listed[inverse, ROW_SLOT, None] >= 0
        self.has_slots: Final = bool(self.slotted.any())
        self.sees_before: Final = n > 1
        self.without_before: Final = np.where(position[inverse, None] > 0, 0.0, np.nan).astype(np.float32)

    def lowest(self, row: int) -> int:
        """The first position that a row of the row list sees."""
        return int(self._first[np.flatnonzero(self._order == row)[0]])

    def groups(self, num_heads: int, key_numbers: int) -> tuple[Group, ...]:
        """The step's work, cut to the size of a layer and kept for other layers of that size.

        Args:
            num_heads: query heads.
            key_numbers: numbers of one token's keys, Hkv * D.
        """
        size = (num_heads, key_numbers)
        if size not in self._groups:
            self._groups[size] = tuple(self._cut(num_heads, key_numbers))
        return self._groups[size]

    def layers_at_once(self, num_heads: int, key_numbers: int, *, whole: bool = False) -> int:
        """How many layers of a size are measured in the same torch calls, at least 1.

        The calls cost more than the arithmetic when rows are few; and no temporary may grow with the number of layers.

        Args:
            num_heads, key_numbers: as `groups` takes them.
            whole: whether the scores of all tiles of a row are held at once.
        """
        scores = []
        for group in self.groups(num_heads, key_numbers):
            keys = [tile.keys for tile in group.tiles]
            rows = group.items * group.rows_per_item
            scores.append(rows * (sum(keys) if whole else max(keys)) * max(num_heads, NUM_WEIGHTS))
        return max(1, _SCORE_BUDGET // max(scores)) if scores else 1

    def workspace(self, group: Group, key_numbers: int, num_layers: int) -> Tensor:
        """Scratch for the widened keys of each tile of a group: those of one layer, or of more that fit the budget.

        One for all tiles and layers: fresh memory costs more than the arithmetic (page faults).

        Args:
            group: of this plan.
            key_numbers: numbers of one token's keys, Hkv * D.
            num_layers: not more than these are needed.

        Returns:
            float32 [layers * items * keys of the largest tile, Hkv * D].
        """
        keys = group.items * max(tile.keys for tile in group.tiles)
        layers = max(1, min(num_layers, self._key_budget // (keys * key_numbers)))
        return torch.empty(layers * keys, key_numbers)

    def weights(self, group: Group, tile: Tile) -> Tensor:
        """Column weights of a tile, float32 [R', NUM_WEIGHTS, keys], kept or made."""
        if tile.weights is not None:
            return tile.weights
        return column_weights(
            tile.base,
            group.position,
            group.prompt_len,
            keys=tile.keys,
            sink_tokens=self.sink_tokens,
            local_window=self.local_window,
        )

    def _cut(self, num_heads: int, key_numbers: int) -> Iterator[Group]:
        """Groups of items (an item is a run of rows of one request), of like row count and length."""
        if not len(self._order):
            return
        batch = self._listed[:, ROW_BATCH]
        index = np.arange(len(batch))
        new_request = np.r_[True, batch[1:] != batch[:-1]]
        in_request = index - np.maximum.accumulate(np.where(new_request, index, 0))
        start = np.flatnonzero(in_request % _MAX_ROWS_PER_ITEM == 0)
        count = np.diff(np.r_[start, len(batch)])
        low = np.minimum.reduceat(self._first, start) // self._block_size
        length = np.maximum.reduceat(self._position, start) // self._block_size - low + 1
        page_numbers = self._block_size * key_numbers
        padding_pages = min(_PADDING_BUDGET, self._key_budget // 4) // page_numbers
        padded_rows = 1 << np.ceil(np.log2(count)).astype(np.int64)
        for rows_per_item in np.unique(padded_rows).tolist():
            items = np.flatnonzero(padded_rows == rows_per_item)
            items = items[np.argsort(-length[items], kind="stable")]
            # Longest first; each group takes as many more as its padding and its tile's size allow.
            total = np.r_[0, np.cumsum(length[items])]
            score_pages = max(1, _SCORE_BUDGET // (rows_per_item * num_heads * self._block_size))
            tile_pages = min(max(1, self._key_budget // page_numbers), score_pages)
            begin = 0
            while begin < len(items):
                longest = int(length[items[begin]])
                more = np.arange(1, len(items) - begin + 1)
                padding = more * longest - (total[begin + 1 :] - total[begin])
                fits = (padding <= padding_pages) & (more * longest <= tile_pages)
                end = begin + max(1, int(np.count_nonzero(fits)))
                chosen = items[begin:end]
                items_here = _Items(
                    start[chosen], count[chosen], low[chosen], length[chosen], rows_per_item=rows_per_item
                )
                yield self._group(items_here, tile_pages)
                begin = end

    def _group(self, items: _Items, tile_pages: int) -> Group:
        """The work of some items, in tiles of at most `tile_pages` blocks (at least one per item)."""
        num_blocks = int(items.length.max())
        step = max(1, tile_pages // len(items.start))
        real = np.flatnonzero(np.arange(items.rows_per_item) < items.count[:, None])
        index = items.index
        return Group(
            items=len(items.start),
            rows_per_item=items.rows_per_item,
            row_index=torch.from_numpy(index),
            rows=self._order[index[real]],
            real=real,
            position=torch.from_numpy(self._position[index, None]),
            prompt_len=torch.from_numpy(self._listed[index, ROW_PROMPT_LEN][:, None]),
            tiles=tuple(self._tile(items, at, min(step, num_blocks - at)) for at in range(0, num_blocks, step)),
        )

    def _tile(self, items: _Items, at: int, num_blocks: int) -> Tile:
        """Blocks `at` .. `at + num_blocks` of each item; shorter items repeat their last block, hidden."""
        index = items.index
        columns = np.minimum(at + np.arange(num_blocks), items.length[:, None] - 1) + items.low[:, None]
        block_ids = self._table[self._listed[items.start, ROW_BATCH][:, None], columns].astype(np.int64)
        keys = num_blocks * self._block_size
        base = np.repeat((items.low + at) * self._block_size, items.rows_per_item)[:, None]
        position, first = self._position[index, None], self._first[index, None]
        own = position - base
        weights = None
        if self._kept_weights + len(index) * NUM_WEIGHTS * keys <= _WEIGHT_BUDGET:
            self._kept_weights += len(index) * NUM_WEIGHTS * keys
            weights = column_weights(
                torch.from_numpy(base),
                torch.from_numpy(position),
                torch.from_numpy(self._listed[index, ROW_PROMPT_LEN][:, None]),
                keys=keys,
                sink_tokens=self.sink_tokens,
                local_window=self.local_window,
            )
        return Tile(
            block_ids=torch.from_numpy(block_ids.ravel()),
            keys=keys,
            hidden=_hidden_columns(np.clip(first - base, 0, keys), np.clip(own + 1, 0, keys), keys),
            own=torch.from_numpy(np.clip(own, 0, keys - 1)[:, :, None]),
            own_here=(own >= 0) & (own < keys),
            before=torch.from_numpy(np.clip(own - 1, 0, keys - 1)[:, :, None]),
            before_here=(own >= 1) & (own <= keys),
            base=torch.from_numpy(base),
            weights=weights,
        )


def _first_visible(position: NDArray[np.int64], reach: int | None) -> NDArray[np.int64]:
    """Position of the first key that each row sees."""
    if reach is None:
        return np.zeros_like(position)
    return np.maximum(position - reach + 1, 0) if reach > 0 else position // -reach * -reach


def _hidden_columns(begin: NDArray[np.int64], end: NDArray[np.int64], keys: int) -> tuple[tuple[int, int, Tensor], ...]:
    """The columns that not all rows see, as (first, end, mask [R', 1, end - first]).

    Masking costs five times what adding costs, so only the edges are masked (0.55 ns a score, AVX-512).
    """
    head, tail = int(begin.max()), int(end.min())
    spans = ((0, head), (tail, keys)) if head < tail else ((0, keys),)
    hidden = []
    for lo, hi in spans:
        if lo == hi:
            continue
        column = np.arange(lo, hi)
        mask = (column < begin) | (column >= end)
        hidden.append((lo, hi, torch.from_numpy(mask[:, None, :])))
    return tuple(hidden)


def column_weights(
    base: Tensor, position: Tensor, prompt_len: Tensor, *, keys: int, sink_tokens: int, local_window: int
) -> Tensor:
    """What each key column counts in each sum, float32 [R', NUM_WEIGHTS, keys].

    Distances are integers below 2^24, so exact.
    """
    j = torch.arange(keys) + base
    distance = position - j
    weights = torch.empty(len(base), NUM_WEIGHTS, keys)
    weights[:, SINK] = j < sink_tokens
    weights[:, LOCAL] = distance < local_window
    weights[:, CONTEXT] = j < prompt_len
    weights[:, GENERATED] = j >= prompt_len
    weights[:, DISTANCE] = distance
    return weights


def plan_rows(
    rows: NDArray[np.int32],
    query_start_loc: ArrayLike,
    seq_lens: ArrayLike,
    block_table: ArrayLike,
    block_size: int,
    *,
    reach: int | None = None,
    sink_tokens: int = 4,
    local_window: int = 128,
    key_budget: int = KEY_BUDGET,
) -> RowPlan:
    """Plans the measurement of a step's rows, once for all layers that share these arguments.

    Args:
        rows: the row list, int32 [R, NUM_ROW_COLUMNS]; see `core/rows.py`.
        query_start_loc: [B + 1].
        seq_lens: [B].
        block_table: [B, max_blocks]; entries beyond a sequence are not looked at.
        block_size: tokens of a block.
        reach: of the layers, see `LayerParams.reach`.
        sink_tokens: leading positions that count as sink.
        local_window: trailing positions that count as local.
        key_budget: float32 numbers of a tile's keys, which bounds every temporary.

    Raises:
        ValueError: a row is no token of its request.
    """
    return RowPlan(
        rows=rows,
        starts=np.asarray(query_start_loc),
        lens=np.asarray(seq_lens),
        table=np.asarray(block_table),
        block_size=block_size,
        reach=reach,
        sink_tokens=sink_tokens,
        local_window=local_window,
        key_budget=key_budget,
    )
