"""The check of rows' outputs on the CPU: softmax(scores) V in float32 from the cache against the output served.

Owns the measurement of a few rows in layers of one kind, after a step. Scores are those of `row_stats_cpu.py`; what the
sums mean stands in `glassbox.core.output_checks` and, exactly, in `reference/row_output.py`; what rounding explains in
`output_rounding.py`. Whether an output was reproduced is `glassbox/measure/verdict.py`'s to say.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glassbox.core.output_checks import (
    KV_SUM,
    KV_SUMS,
    KV_TENSORS,
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    NONFINITE_REFERENCE,
    OUTPUT_SUM,
    OUTPUT_SUMS,
)
from glassbox.kernels.output_rounding import (
    FP8_TYPES,
    LARGE_VALUE,
    LOST,
    MEAN_SQUARE,
    PLACES,
    SCORE_ERROR,
    SUM_BOUND,
    SUM_NOISE,
    OutputRounding,
)
from glassbox.kernels.row_plan import DISTANCE, Group, RowPlan, Tile
from glassbox.kernels.row_stats_cpu import HIDDEN, KeyReader, LayerRows, per_head, scaled_queries, tile_scores


def row_output_cpu(
    layers: Sequence[LayerRows],
    values: Sequence[KeyReader],
    outputs: Tensor,
    plan: RowPlan,
    kept_kv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums over the elements of the planned rows' outputs, and of their own K and V, in some layers.

    A reader of an FP8 cache that doesn't return an FP8 type says with an attribute `largest` which number it returns
    for the largest of the stored type.

    Memory: some times the rows' scores, layers x H x keys float32, for the rows of requests of like length at once.

    Args:
        layers: L of one kind, best `plan.layers_at_once(..., whole=True)` of them.
        values: readers of each layer's V, [N, Hkv, block, Dv]; V = number read * `key_scale`.
        outputs: that were served, [L, R, H, Dv], of float32, float16 or bfloat16; rows in the order of
            `plan.query_index`, as the queries of `layers`.
        plan: of the R checked rows alone.
        kept_kv: K and V of the rows' own tokens as computed, [L, R, 2, Hkv, D], in the same order, or None.

    Returns:
        float32 [R, L, H, len(OUTPUT_SUMS)] and, with `kept_kv`, float32 [R, L, Hkv, len(KV_SUMS)]; rows in the order
        of the row list.

    Raises:
        ValueError: the layers are of several kinds, or values and outputs are not of these layers and rows.
    """
    num_layers, num_heads = len(layers), layers[0].num_heads
    if len(values) != num_layers or outputs.shape[:3] != (num_layers, plan.num_rows, num_heads):
        raise ValueError(
            f"values and outputs must be of {num_layers} layers, {plan.num_rows} rows and {num_heads} heads, got "
            f"{len(values)} values and outputs {list(outputs.shape)}; pass those of the same rows and layers"
        )
    reader = layers[0].reader
    fp8_cache = _largest(reader, reader.read(plan.own_blocks[:1]).dtype) is not None
    rounding = OutputRounding.of(layers[0].queries.dtype, outputs.dtype, fp8_cache=fp8_cache, on_gpu=False)
    queries = scaled_queries(layers)
    sums = torch.zeros(plan.num_rows, num_layers, num_heads, len(OUTPUT_SUMS))
    for group in plan.groups(num_heads, layers[0].key_numbers):
        found = _Attention(queries, layers, values, group, plan, rounding.lost_bits)
        real = torch.from_numpy(group.real)
        served = outputs.index_select(1, group.row_index).float()
        of_group = found.sums(served, rounding, layers[0].params.soft_cap or 0.0)
        sums[torch.from_numpy(group.rows)] = of_group.index_select(1, real).transpose(0, 1)
    return sums, None if kept_kv is None else _kv_sums(layers, values, plan, kept_kv)


class _Attention:
    """What the rows of a group attend to in some layers: all that their sums are made of.

    Attributes:
        reference: sum p v, float32 [L, R', H, Dv].
        growth: its derivative by the logarithm of a factor of q.k.
        magnitude: sum p |v|.
        squares: sum p^2 |v|^2, [L, R', H].
        score_size, value_size: M and v of `output_rounding.py`, [L, R', H].
        of_sink: a learned sink's share of the softmax, [L, R', H], or 0.
        shared: t of `output_rounding.py`, [L, R', H], or 0.
        num_keys: visible, [R', 1].
    """

    def __init__(
        self,
        queries: Tensor,
        layers: Sequence[LayerRows],
        values: Sequence[KeyReader],
        group: Group,
        plan: RowPlan,
        lost_bits: int,
    ) -> None:
        scores, growth = _scores(queries.index_select(1, group.row_index), layers, group, plan)
        seen = scores > HIDDEN / 2
        p = torch.softmax(scores, -1)
        mean_score = torch.where(p > 0, scores.abs(), 0.0).mul_(p).sum(-1)
        self.shared = _shared(scores, lost_bits)
        # Growth relative to that of the largest weight: what all keys have in common must cancel exactly.
        top = growth.gather(-1, scores.argmax(-1, keepdim=True))
        growth = torch.where(p == 0, 0.0, growth - top).mul_(p)
        self.num_keys = torch.from_numpy(plan.num_keys)[plan.row_index[group.row_index]]
        of_keys = _over_keys(p, [layer.reader for layer in layers], group)
        uncancelled = of_keys * queries.index_select(1, group.row_index).norm(dim=-1) / math.sqrt(queries.shape[-1])
        self.score_size = torch.maximum(mean_score, uncancelled).clamp_min_(1.0)
        factors = torch.tensor([reader.key_scale for reader in values]).view(-1, 1, 1, 1)
        of_values = _over_values(p, growth, seen, values, group)
        self.reference, self.growth, self.magnitude = (x.mul_(factors) for x in of_values[:3])
        self.magnitude.abs_()
        self.squares, squares = (x.mul_(factors.squeeze(-1) ** 2) for x in of_values[3:])
        self.value_size = (squares / (self.num_keys * self.reference.shape[-1])).sqrt_()
        mean_growth = growth.sum(-1, keepdim=True)
        self.of_sink = torch.zeros(())
        sinks = per_head(layer.params.sinks for layer in layers)
        if sinks is not None:
            of_keys = torch.logsumexp(scores, -1)
            share = torch.sigmoid(of_keys - sinks).unsqueeze(-1)
            for of_all in (self.reference, self.growth, self.magnitude):
                of_all.mul_(share)
            self.squares *= share.squeeze(-1) ** 2
            # The weights sum to less than 1, so what was taken off all keys does not cancel.
            self.of_sink = torch.sigmoid(sinks - of_keys)
            mean_growth = mean_growth * share - top * self.of_sink.unsqueeze(-1)
        self.growth -= mean_growth * self.reference

    def sums(self, served: Tensor, rounding: OutputRounding, soft_cap: float) -> Tensor:
        """Of outputs [L, R', H, Dv] float32: float32 [L, R', H, len(OUTPUT_SUMS)]."""
        r, c, a, o = self.reference, self.growth, self.magnitude, served
        bad_output = ~o.isfinite().all(-1)
        bad_reference = ~(r.abs() < rounding.output_limit).all(-1)
        e = o - r
        m = self.score_size
        score_error = SCORE_ERROR * m.clamp_min(soft_cap)
        tanh = rounding.tanh if soft_cap else 0.0
        small = (LARGE_VALUE * rounding.weight_step * self.num_keys * self.value_size).unsqueeze(-1)
        per_weight = 2 * (score_error + (2 * rounding.operand + tanh) * m)
        per_weight = per_weight + (2 * rounding.weight + rounding.operand + SUM_BOUND)
        b = rounding.output * o.abs() + rounding.output_step + per_weight.unsqueeze(-1) * a + small
        y2 = (score_error / 4) ** 2 + ((rounding.operand / 2) ** 2 + (tanh / 2) ** 2) * m**2
        f2 = (y2 + MEAN_SQUARE * (rounding.weight**2 + rounding.operand**2)) * self.squares
        h = (SUM_NOISE + y2.sqrt() * self.of_sink).unsqueeze(-1) * a + small + rounding.output_step
        rounded2 = MEAN_SQUARE * rounding.output**2

        def noise2(w: Tensor, w2: Tensor) -> Tensor:
            """Of sum e w, [L, R', H]."""
            return f2 * w2 + rounded2 * (o * w).square().sum(-1) + (h * w.abs()).sum(-1) ** 2

        norm2, growth2 = r.square().sum(-1), c.square().sum(-1)
        of_names = {
            "worst": torch.where(e == 0, 0.0, e.abs() / b).amax(-1),
            "error2": e.square().sum(-1),
            "noise2": f2 + rounded2 * o.square().sum(-1) + h.square().sum(-1),
            "norm2": norm2,
            "gain_dot": (e * r).sum(-1),
            "gain_noise2": noise2(r, norm2),
            "gain_shared": self.shared * (a * r.abs()).sum(-1),
        }
        known = growth2 > (LOST * score_error) ** 2 * self.squares
        of_growth = {"dot": (e * c).sum(-1), "norm2": growth2, "noise2": noise2(c, growth2)}
        of_growth["shared"] = self.shared * (a * c.abs()).sum(-1)
        of_names |= {f"scale_{name}": torch.where(known, value, 0.0) for name, value in of_growth.items()}
        out = torch.empty(*o.shape[:3], len(OUTPUT_SUMS))
        for name, value in of_names.items():
            out[..., OUTPUT_SUM[name]] = torch.where(bad_output | bad_reference, 0.0, value)
        code = torch.where(bad_reference, NONFINITE_REFERENCE, 0)
        code = torch.where(bad_output, torch.where(bad_reference, NONFINITE_BOTH, NONFINITE_OUTPUT), code)
        out[..., OUTPUT_SUM["nonfinite"]] = code.float()
        return out


def _scores(queries: Tensor, layers: Sequence[LayerRows], group: Group, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Scores of all tiles, [L, R', H, keys], HIDDEN where a key is not visible, and their derivative by the logarithm
    of a factor of q.k."""
    params = layers[0].params
    wide = plan.workspace(group, layers[0].key_numbers, len(layers))
    slopes = per_head(layer.params.alibi_slopes for layer in layers)
    scores, growths = [], []
    for tile in group.tiles:
        weights = plan.weights(group, tile)
        of_tile, _ = tile_scores(queries, layers, group, tile, weights=weights, wide=wide)
        growth = of_tile
        if slopes is not None:
            growth = torch.addcmul(of_tile, slopes.unsqueeze(-1), weights[:, DISTANCE, None, :])
        if params.soft_cap is not None:
            # s = cap tanh(x), x = q.k / cap: q.k / cosh(x)^2. A tanh that is rounded to 1 no longer grows.
            tanh = growth / params.soft_cap
            slope = (1 - tanh.square()).clamp_min_(0.0)
            growth = torch.where(slope > 0, params.soft_cap * torch.atanh(tanh) * slope, 0.0)
        scores.append(of_tile)
        growths.append(growth)
    return torch.cat(scores, -1), torch.cat(growths, -1)


def _shared(scores: Tensor, lost_bits: int) -> Tensor:
    """t of `output_rounding.py`, [L, R', H], of scores [L, R', H, keys]."""
    if not lost_bits:
        return torch.zeros(())
    power = torch.ceil(scores.amax(-1, keepdim=True) * math.log2(math.e))
    p = torch.exp2(scores * math.log2(math.e) - power)
    moved = torch.zeros(scores.shape[:3])
    for place in PLACES:
        x = p * place
        # To nearest, half to even, in the bits of a float32.
        bits = x.view(torch.int32)
        odd = (bits >> lost_bits) & 1
        rounded = (bits + ((1 << (lost_bits - 1)) - 1) + odd) >> lost_bits << lost_bits
        moved = torch.maximum(moved, (rounded.view(torch.float32) - x).sum(-1).abs() / place)
    return moved / p.sum(-1)


def _over_keys(share: Tensor, readers: Sequence[KeyReader], group: Group) -> Tensor:
    """Sum of p |k| over the keys, float32 [L, R', H], of shares [L, R', H, keys] and keys as they are read."""
    _, num_rows, num_heads, _ = share.shape
    of_layers = []
    for n, reader in enumerate(readers):
        total, first = torch.zeros(num_rows, num_heads), 0
        for tile in group.tiles:
            norms = _joined(reader, tile, group).norm(dim=-1, keepdim=True)
            p = _by_matrix(share[n, ..., first : first + tile.keys], group, reader.num_kv_heads)
            # Slots that no key was written to hold anything.
            norms = torch.where(norms.isfinite(), norms, 0.0)
            total += _by_row(torch.bmm(p, norms), group, num_rows, num_heads).squeeze(-1)
            first += tile.keys
        of_layers.append(total)
    return torch.stack(of_layers)


def _over_values(
    share: Tensor, growth: Tensor, seen: Tensor, values: Sequence[KeyReader], group: Group
) -> tuple[Tensor, ...]:
    """Sums over the keys of p v, growth v, p |v|, float32 [L, R', H, Dv], of p^2 |v|^2 and |v|^2, [L, R', H], of the
    numbers as they are read.

    Args:
        share, growth: p and what v is weighted with for the derivative, [L, R', H, keys].
        seen: whether the row sees the key, [L, R', H, keys].
        values: of each layer.
        group: whose tiles make up the keys.
    """
    _, num_rows, num_heads, _ = share.shape
    of_layers = []
    for n, reader in enumerate(values):
        total: list[Tensor] = []
        first = 0
        for tile in group.tiles:
            v = _joined(reader, tile, group)
            columns = slice(first, first + tile.keys)
            p, g, visible = (
                _by_matrix(x[n, ..., columns].float(), group, reader.num_kv_heads) for x in (share, growth, seen)
            )
            finite = v.isfinite()
            spoiled: Tensor | None = None
            if not finite.all():
                # Slots that no key was written to hold anything; a row may not read them, not even times 0.
                spoiled = torch.bmm(visible, (~finite).float()) > 0
                v = torch.where(finite, v, 0.0)
            parts = [torch.bmm(p, v), torch.bmm(g, v), torch.bmm(p, v.abs())]
            squares = v.square().sum(-1, keepdim=True)
            parts += [torch.bmm(p.square(), squares), torch.bmm(visible, squares)]
            if spoiled is not None:
                parts[0] = parts[0].masked_fill(spoiled, torch.nan)
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
            first += tile.keys
        of_layers.append([_by_row(x, group, num_rows, num_heads) for x in total])
    *of_elements, weighted, plain = (torch.stack(of_all) for of_all in zip(*of_layers, strict=True))
    return *of_elements, weighted.squeeze(-1), plain.squeeze(-1)


def _joined(reader: KeyReader, tile: Tile, group: Group) -> Tensor:
    """What a reader gives of a tile, float32 [items * Hkv, keys, D]."""
    pages = reader.read(tile.block_ids)
    _, num_kv_heads, block_size, size = pages.shape
    of_items = pages.view(group.items, -1, num_kv_heads, block_size, size).transpose(1, 2)
    return of_items.reshape(group.items * num_kv_heads, -1, size).float()


def _by_matrix(x: Tensor, group: Group, num_kv_heads: int) -> Tensor:
    """[R', H, keys] as [items * Hkv, rows * G, keys]."""
    num_rows, num_heads, keys = x.shape
    grouped = x.reshape(group.items, num_rows // group.items, num_kv_heads, num_heads // num_kv_heads, keys)
    return grouped.transpose(1, 2).reshape(group.items * num_kv_heads, -1, keys)


def _by_row(x: Tensor, group: Group, num_rows: int, num_heads: int) -> Tensor:
    """[items * Hkv, rows * G, Dv] as [R', H, Dv]."""
    per_item, size = num_rows // group.items, x.shape[-1]
    grouped = x.view(group.items, len(x) // group.items, per_item, -1, size)
    return grouped.transpose(1, 2).reshape(num_rows, num_heads, size)


def _kv_sums(layers: Sequence[LayerRows], values: Sequence[KeyReader], plan: RowPlan, kept_kv: Tensor) -> Tensor:
    """float32 [R, L, Hkv, len(KV_SUMS)] of K and V as computed, [L, R, 2, Hkv, D] in the order of the queries."""
    num_layers, num_rows, _, num_kv_heads, _ = kept_kv.shape
    out = torch.empty(num_rows, num_layers, num_kv_heads, len(KV_SUMS))
    index = torch.arange(num_rows)
    for n, layer in enumerate(layers):
        for which, (name, reader) in enumerate(zip(KV_TENSORS, (layer.reader, values[n]), strict=True)):
            pages = reader.read(plan.own_blocks)
            stored = pages[index, :, plan.own_slots].float()  # [R, Hkv, D]
            computed = kept_kv[n, :, which].float()
            largest = _largest(reader, pages.dtype)
            saturated = torch.zeros(()) if largest is None else (stored.abs() == largest).float().sum(-1)
            of_names = {
                "error2": (stored * reader.key_scale - computed).square().sum(-1),
                "norm2": computed.square().sum(-1),
                "saturated": saturated,
            }
            for column, value in of_names.items():
                out[plan.row_index, n, :, KV_SUM[f"{name}_{column}"]] = value.expand(num_rows, num_kv_heads)
    return out


def _largest(reader: KeyReader, dtype: torch.dtype) -> float | None:
    """What a reader returns for the largest number of the stored type; None if that isn't FP8."""
    if dtype in FP8_TYPES:
        return torch.finfo(dtype).max
    return getattr(reader, "largest", None)
