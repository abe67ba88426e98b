"""An attention layer as a kernel serves it, with its roundings and, if asked, with a fault; and its check on the CPU.

The kernel is the usual one: blocks of keys, a running maximum, weights that are rounded to the queries' type, float32
sums of weights (before they are rounded) and of weighted values, an output in the queries' type.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.output_rounding import FP8_TYPES, OutputRounding
from glassbox.kernels.row_output_cpu import row_output_cpu
from glassbox.kernels.row_plan import RowPlan, plan_rows
from glassbox.kernels.row_stats_cpu import LayerRows
from tests.kernels.row_lists import entry

PAGE = 16
TILE = 64


class PagesReader:
    """A cache of pages [num_blocks, Hkv, block, D] of any type, FP8 as it is stored."""

    def __init__(self, pages: Tensor, key_scale: float = 1.0) -> None:
        self.key_scale, self.num_kv_heads, self._pages = key_scale, pages.shape[1], pages

    def read(self, block_ids: Tensor) -> Tensor:
        # torch can't index FP8 on a CPU
        stored = self._pages.view(torch.uint8) if self._pages.dtype in FP8_TYPES else self._pages
        return stored.index_select(0, block_ids).view(self._pages.dtype)


@dataclass
class Layer:
    """One layer and a decode row of each of some requests.

    Attributes:
        lengths: keys of each request.
        spread: standard deviation of the scores.
        learned_sinks: their mean; they scatter by 1.
        sink: by how much the first key's score is above the others'; its value is a tenth of theirs.
        common: size of what all values have in common, relative to their own part.
    """

    lengths: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    size: int = 64
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    kv_scales: tuple[float, float] = (1.0, 1.0)
    spread: float = 2.0
    sink: float = 4.0
    common: float = 0.3
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    learned_sinks: float | None = None
    seed: int = 0
    q: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.scale = self.size**-0.5
        rows = len(self.lengths)
        # A direction of the keys of a KV head that all its queries have: along it lies what makes the sink.
        along = torch.nn.functional.normalize(normal(self.kv_heads, self.size), dim=-1)
        group = self.heads // self.kv_heads
        size = self.size**0.25
        q = self.spread * normal(rows, self.heads, self.size) + size * along.repeat_interleave(group, 0)
        self.q = q.to(self.dtype)
        self.computed = []
        for n in self.lengths:
            k = normal(n, self.kv_heads, self.size)
            k[0] = self.sink * self.size**0.25 * along
            v = normal(n, self.kv_heads, self.size) + self.common * normal(self.kv_heads, self.size)
            v[0] *= 0.1
            self.computed.append((k.to(self.dtype), v.to(self.dtype)))
        kv = self.kv_dtype or self.dtype
        self.keys = [(k.float() / self.kv_scales[0]).to(kv) for k, _ in self.computed]
        self.values = [(v.float() / self.kv_scales[1]).to(kv) for _, v in self.computed]
        slopes = 2.0 ** -torch.arange(1.0, self.heads + 1) if self.alibi else None
        learned = None if self.learned_sinks is None else self.learned_sinks + normal(self.heads)
        self.params = LayerParams(self.scale, self.soft_cap, slopes, learned, self.window)

    def served(
        self,
        *,
        shift: int = 0,
        other: int = 0,
        window: int | None = -1,
        scale: float = 1.0,
        capped: bool = True,
        with_sink: bool = True,
        gain: float = 1.0,
        gained_head: int = 0,
        exact_weights: bool = False,
        rounded_kv: bool = False,
        parts: tuple[int, ...] = (),
    ) -> Tensor:
        """Output [R, H, D] in the queries' type.

        Args:
            shift: slots by which keys and values are read too late; what is read behind the last ones is stale.
            other: the row reads the keys of the request that comes so many later.
            window: -1 is the layer's.
            scale: factor of the scores.
            capped, with_sink: whether the soft cap and the learned sinks are used.
            gain: factor of the output of `gained_head`.
            exact_weights: leave them in float32.
            rounded_kv: round what an FP8 cache gives, with its scale, to the queries' type.
            parts: where the keys are cut into parts, whose outputs are rounded and then merged.
        """
        window = self.window if window == -1 else window
        out = []
        for row, n in enumerate(self.lengths):
            of = (row + other) % len(self.lengths)
            k, v = (
                x.float() * factor for x, factor in zip((self.keys[of], self.values[of]), self.kv_scales, strict=True)
            )
            if rounded_kv:
                k, v = k.to(self.dtype).float(), v.to(self.dtype).float()
            k, v = (torch.cat([x[shift:], x[n // 2 :][:shift]]) for x in (k, v))
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
            s = torch.einsum("hd,nhd->hn", self.q[row].float(), k) * (scale * self.scale)
            age = (len(k) - 1 - torch.arange(len(k))).float()
            if self.soft_cap and capped:
                s = self.soft_cap * torch.tanh(s / self.soft_cap)
            if self.params.alibi_slopes is not None:
                s = s - self.params.alibi_slopes[:, None] * age
            if window is not None:
                s[:, age >= window] = -math.inf
            sinks = self.params.sinks if with_sink else None
            done = [
                self._flash(some, of_some, None if begin else sinks, exact_weights)
                for begin, some, of_some in zip(
                    (0, *parts), s.tensor_split(parts, 1), v.tensor_split(parts, 0), strict=True
                )
            ]
            if not parts:
                out.append(done[0][0])
                continue
            weights = torch.softmax(torch.stack([log_z for _, log_z in done]), 0)
            rounded = torch.stack([output.to(self.dtype).float() for output, _ in done])
            out.append((weights[..., None] * rounded).sum(0))
        output = torch.stack(out)
        output[:, gained_head] *= gain
        return output.to(self.dtype)

    def _flash(self, s: Tensor, v: Tensor, sinks: Tensor | None, exact_weights: bool) -> tuple[Tensor, Tensor]:
        """Output and ln Z, float32 [H, D] and [H], of scores [H, n] and values [n, H, D]."""
        highest = torch.full((self.heads,), -math.inf) if sinks is None else sinks.clone()
        z = torch.zeros(self.heads) if sinks is None else torch.ones(self.heads)
        total = torch.zeros(self.heads, self.size)
        for begin in range(0, s.shape[1], TILE):
            of_tile, values = s[:, begin : begin + TILE], v[begin : begin + TILE]
            now = torch.maximum(highest, of_tile.amax(-1))
            safe = torch.where(now == -math.inf, 0.0, now)
            decay, p = torch.exp(highest - safe), torch.exp(of_tile - safe[:, None])
            highest = now
            z = z * decay + p.sum(-1)
            p = p if exact_weights else p.to(self.dtype).float()
            total = total * decay[:, None] + torch.einsum("hn,nhd->hd", p, values)
        return total / z[:, None], highest + torch.log(z)

    @property
    def roundoff(self) -> float:
        return OutputRounding.of(self.dtype, self.dtype, fp8_cache=self.kv_dtype in FP8_TYPES, on_gpu=False).unit

    def plan(self) -> tuple[RowPlan, np.ndarray]:
        """Of all rows, and the block table."""
        needed = [-(-n // PAGE) for n in self.lengths]
        order = np.random.default_rng(self.seed).permutation(sum(needed))
        table = np.full((len(needed), max(needed)), 10**9, dtype=np.int32)
        for b, count in enumerate(needed):
            table[b, :count] = order[sum(needed[:b]) :][:count]
        rows = np.array([entry(b, b, n - 1, 1) for b, n in enumerate(self.lengths)], dtype=np.int32)
        starts = np.arange(len(self.lengths) + 1, dtype=np.int32)
        return plan_rows(rows, starts, np.array(self.lengths), table, PAGE, reach=self.window), table

    def pages(self, tensors: list[Tensor], table: np.ndarray) -> Tensor:
        """Of tensors [n, Hkv, D]; NaN where nothing was written."""
        blocks = sum(-(-n // PAGE) for n in self.lengths)
        pages = torch.full((blocks, self.kv_heads, PAGE, self.size), math.nan)
        for b, x in enumerate(tensors):
            for page, part in zip(table[b].tolist(), x.float().split(PAGE), strict=False):
                pages[page, :, : len(part)] = part.transpose(0, 1)
        return pages.to(tensors[0].dtype)

    def check(
        self, output: Tensor, *, reader: type[PagesReader] = PagesReader, factor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Sums [R, H, C] and of K and V [R, Hkv, C] of a served output [R, H, D].

        Args:
            output: of any type.
            reader: of K and V.
            factor: of what it reads, beside the cache's own.
        """
        plan, table = self.plan()
        k, v = (
            reader(self.pages(x, table), factor * scale)
            for x, scale in zip((self.keys, self.values), self.kv_scales, strict=True)
        )
        layer = LayerRows.select(self.q, k, plan, self.params)
        kept = torch.stack([torch.stack([k[-1], v[-1]]) for k, v in self.computed])
        sums, of_kv = row_output_cpu(
            [layer], [v], output[None][:, plan.query_index], plan, kept[None][:, plan.query_index]
        )
        assert of_kv is not None
        return sums[:, 0], of_kv[:, 0]
