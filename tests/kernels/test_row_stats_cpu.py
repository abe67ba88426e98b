"""Both CPU measurements, in torch and in C++, equal the float64 reference, whatever the batch looks like."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_PHASE, ROW_PROMPT_LEN, ROW_QUERY, ROW_SLOT
from glassbox.core.statistics import INDEX, NUM_STATISTICS, STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.kernels.row_stats_cpu import LayerRows, RowPlan, plan_rows, row_stats_cpu
from glassbox.kernels.row_stats_native import KeyOrder, KeyPages, NativeLayer, NativeRows, NativeStep
from tests.kernels.row_lists import entry
from tests.kernels.tolerances import assert_two_oracles

NONFINITE = NUM_STATISTICS


class PlainReader:
    """A cache of plain pages, [num_blocks, Hkv, block, D], that lie as tokens x D or, like vLLM's,
    transposed."""

    def __init__(self, pages: Tensor, transposed: bool = False, key_scale: float = 1.0) -> None:
        self.key_scale = key_scale
        self.num_kv_heads = pages.shape[1]
        self.blocks_read = 0
        self._transposed = transposed
        self._pages = pages.transpose(2, 3).contiguous() if transposed else pages

    def read(self, block_ids: Tensor) -> Tensor:
        self.blocks_read += len(block_ids)
        pages = self._pages.index_select(0, block_ids)
        return pages.transpose(2, 3) if self._transposed else pages


@dataclass
class Batch:
    """A step's requests with their keys, and the rows to measure.

    `lengths`: (sequence length, query length, prompt length) per request; `rows`: (batch row, offset in its
    query).
    """

    lengths: list[tuple[int, int, int]]
    rows: list[tuple[int, int]]
    num_heads: int = 2
    num_kv_heads: int = 1
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    scale: float = 0.125
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    sink_tokens: int = 4
    local_window: int = 8
    gain: float = 1.0
    transposed: bool = False
    seed: int = 0
    slots: list[int] | None = None
    native: ClassVar[bool] = False
    q: Tensor = field(init=False)
    keys: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = sum(query for _, query, _ in self.lengths)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.q = (self.gain * normal(tokens, self.num_heads, self.head_size)).to(self.dtype)
        self.keys = [normal(n, self.num_kv_heads, self.head_size).to(self.dtype) for n, _, _ in self.lengths]
        self.slopes = 2.0 ** -torch.arange(1.0, self.num_heads + 1) if self.alibi else None
        self.learned = 3 * normal(self.num_heads) if self.sinks else None

    @property
    def starts(self) -> np.ndarray:
        return np.r_[0, np.cumsum([query for _, query, _ in self.lengths])].astype(np.int32)

    @property
    def positions(self) -> list[int]:
        return [self.lengths[b][0] - self.lengths[b][1] + offset for b, offset in self.rows]

    @property
    def row_list(self) -> np.ndarray:
        listed = [
            entry(self.starts[b] + offset, b, position, self.lengths[b][2])
            for (b, offset), position in zip(self.rows, self.positions, strict=True)
        ]
        rows = np.array(listed, dtype=np.int32).reshape(-1, NUM_ROW_COLUMNS)
        if self.slots is not None:
            rows[:, ROW_SLOT] = self.slots
        return rows

    @property
    def params(self) -> LayerParams:
        return LayerParams(self.scale, self.soft_cap, self.slopes, self.learned, self.window, self.chunk)

    def cache(self, order_seed: int | None = None) -> tuple[Tensor, np.ndarray]:
        """Pages in random order, NaN where no key stands, and the block table, wild beyond each sequence."""
        needed = [math.ceil(n / self.block_size) for n, _, _ in self.lengths]
        order = np.random.default_rng(self.seed if order_seed is None else order_seed).permutation(sum(needed) + 3)
        shape = (len(order), self.num_kv_heads, self.block_size, self.head_size)
        pages = torch.full(shape, math.nan, dtype=self.dtype)
        table = np.full((len(needed), max(needed, default=1) + 1), 10**9, dtype=np.int32)
        used = 0
        for b, (keys, count) in enumerate(zip(self.keys, needed, strict=True)):
            table[b, :count] = order[used : used + count]
            used += count
            for j, key in enumerate(keys):
                pages[table[b, j // self.block_size], :, j % self.block_size] = key
        return pages, table

    def plan(self, table: np.ndarray, **options: int) -> RowPlan:
        return plan_rows(
            self.row_list, self.starts, np.array([n for n, _, _ in self.lengths], dtype=np.int32), table,
            self.block_size, reach=self.params.reach, sink_tokens=self.sink_tokens,
            local_window=self.local_window, **options,
        )  # fmt: skip

    def measure(self, **options: int) -> Tensor:
        pages, table = self.cache()
        if self.native:
            return self.native_step(pages, table, transposed=self.transposed)
        return self.measured(PlainReader(pages, self.transposed), self.plan(table, **options))

    def measured(self, reader: PlainReader, plan: RowPlan) -> Tensor:
        """Statistics of the batch's only layer."""
        return row_stats_cpu([LayerRows.select(self.q, reader, plan, self.params)], plan)[0][0]

    def before(self, **options: int) -> Tensor | None:
        """Attention to the position before, of the batch's only layer."""
        pages, table = self.cache()
        if self.native:
            layer, _lying = self.native_layer(pages, transposed=False)
            step = NativeStep(self.native_rows(table), 1, self.num_heads, self.head_size)
            step.take(0, layer, self.q)
            found = step.previous()
            return None if found is None else torch.from_numpy(found[0])
        plan = self.plan(table, **options)
        rows = [LayerRows.select(self.q, PlainReader(pages), plan, self.params)]
        of_layers = row_stats_cpu(rows, plan)[1]
        return None if of_layers is None else of_layers[0]

    def native_rows(self, table: np.ndarray, asked: np.ndarray | None = None) -> NativeRows:
        return NativeRows(
            self.row_list, self.starts, np.array([n for n, _, _ in self.lengths], dtype=np.int32), table,
            self.block_size, reach=self.params.reach, sink_tokens=self.sink_tokens,
            local_window=self.local_window, asked=asked,
        )  # fmt: skip

    def key_pages(self, pages: Tensor, *, transposed: bool) -> tuple[KeyPages, Tensor]:
        """Where the kernel finds the keys, and the pages in that order, which must stay alive."""
        lying = pages.transpose(2, 3).contiguous() if transposed else pages
        by_token = np.arange(self.block_size * self.head_size).reshape(self.block_size, self.head_size)
        keys = KeyPages(
            dtype=pages.dtype,
            page_stride=lying.stride(0),
            head_stride=lying.stride(1),
            num_pages=len(lying),
            num_kv_heads=self.num_kv_heads,
            block_size=self.block_size,
            order=None if transposed else KeyOrder.of(by_token.T),
            scale=1.0,
            address=lying.data_ptr(),
        )
        return keys, lying

    def native_layer(self, pages: Tensor, *, transposed: bool, **changes: Any) -> tuple[NativeLayer, Tensor]:
        """The layer, and its pages as `key_pages` has them."""
        keys, lying = self.key_pages(pages, transposed=transposed)
        layer = NativeLayer(
            self.params, replace(keys, **changes), self.q.dtype, num_heads=self.num_heads, head_size=self.head_size
        )
        return layer, lying

    def native_step(self, pages: Tensor, table: np.ndarray, *, transposed: bool, **changes: Any) -> Tensor:
        layer, _lying = self.native_layer(pages, transposed=transposed, **changes)
        step = NativeStep(self.native_rows(table), 1, self.num_heads, self.head_size)
        step.take(0, layer, self.q)
        return torch.from_numpy(step.stats()[0])

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows = self.row_list
        return row_stats_ref(
            self.q[rows[:, ROW_QUERY].tolist()], self.keys, self.positions, request=rows[:, ROW_BATCH].tolist(),
            phase=rows[:, ROW_PHASE].tolist(), prompt_len=rows[:, ROW_PROMPT_LEN].tolist(), scale=self.scale,
            sliding_window=self.window, chunk_size=self.chunk, soft_cap=self.soft_cap, alibi_slopes=self.slopes,
            sinks=self.learned, sink_tokens=self.sink_tokens, local_window=self.local_window, dtype=dtype,
        )  # fmt: skip

    def magnitude(self) -> float:
        """Largest sum of |products| in a score, bias included."""
        q, k = self.q.double().abs(), torch.cat(self.keys).double().abs()
        q, k = (x[x.isfinite().all(-1)] for x in (q, k))
        products = q.reshape(-1, self.head_size) @ k.reshape(-1, self.head_size).T
        largest = self.scale * float(products.max()) if products.numel() else 0.0
        bias = 0.5 * max(n for n, _, _ in self.lengths) if self.alibi else 0.0
        sink = float(self.learned.abs().max()) if self.learned is not None else 0.0
        return max(1.0, largest + bias + sink)

    def check(self, **options: int) -> Tensor:
        return self.check_statistics(self.measure(**options))

    def check_statistics(self, actual: Tensor) -> Tensor:
        """Statistics that must be those of this batch; returns them."""
        longest = max(n for n, _, _ in self.lengths)
        assert_two_oracles(actual, self.reference(), self.reference(torch.float32), self.magnitude(), longest)
        return actual


@pytest.fixture(scope="module", params=["torch", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests of a module that imports this run with each."""
    Batch.native = request.param == "native"
    yield
    Batch.native = False


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to five requests in prefill, chunked prefill or decode, with any of their tokens as rows."""
    lengths, rows = [], []
    for b in range(draw(st.integers(1, 5))):
        n = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64, 100]))
        query = draw(st.one_of(st.just(1), st.integers(1, n)))
        lengths.append((n, query, draw(st.integers(1, n))))
        rows += [(b, x) for x in draw(st.lists(st.integers(0, query - 1), max_size=10, unique=True))]
    num_kv_heads = draw(st.integers(1, 3))
    return Batch(
        lengths,
        draw(st.permutations(rows)),
        num_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_size=draw(st.sampled_from([64, 80, 128])),
        block_size=draw(st.sampled_from([16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        scale=draw(st.sampled_from([0.125, 1.0])),
        **draw(st.sampled_from([{}, {"window": 1}, {"window": 7}, {"window": 40}, {"chunk": 1}, {"chunk": 9}])),
        soft_cap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        sink_tokens=draw(st.sampled_from([0, 1, 4])),
        local_window=draw(st.sampled_from([1, 8, 128])),
        gain=draw(st.sampled_from([0.0, 1.0, 20.0])),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


class TestBefore:
    """Attention of rows with a trace slot to the position before their own."""

    @pytest.mark.parametrize(
        "options", [{}, {"window": 1}, {"window": 9}, {"chunk": 16}, {"soft_cap": 3.0, "alibi": True, "sinks": True}]
    )
    @pytest.mark.parametrize("budget", [1 << 20, 1])
    def test_is_the_references(self, options: dict[str, Any], budget: int) -> None:
        """In one tile or many; 0 where a window hides it, NaN at position 0 and in rows without a slot."""
        batch = Batch(
            [(40, 40, 40), (97, 1, 50), (33, 17, 33), (200, 3, 60)],
            [(0, 0), (0, 1), (0, 16), (0, 39), (1, 0), (2, 0), (2, 16), (3, 0), (3, 2)], num_heads=4, num_kv_heads=2,
            **options,
        )  # fmt: skip
        batch.slots = [-1 if row == 6 else row for row in range(9)]
        batch.q[batch.starts[3] + 2, 1] = math.nan  # of the last row
        found = batch.before(key_budget=budget)
        expected = torch.full((9, 4), math.nan, dtype=torch.float64)
        for row, position in enumerate(batch.positions):
            attention = row_probe_ref(
                batch.q[batch.row_list[row, ROW_QUERY]], batch.keys[batch.rows[row][0]], position, scale=batch.scale,
                sliding_window=batch.window, chunk_size=batch.chunk, soft_cap=batch.soft_cap,
                alibi_slopes=batch.slopes, sinks=batch.learned,
            )  # fmt: skip
            if position and row != 6:
                expected[row] = attention[:, -2]
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    def test_nobody_is_traced(self) -> None:
        """Then it isn't computed."""
        assert Batch([(5, 1, 3)], [(0, 0)]).before() is None


class TestAgainstReference:
    @given(batch=batches(), budget=st.sampled_from([1 << 20, 1 << 12, 1]))
    def test_any_batch(self, batch: Batch, budget: int) -> None:
        """Any mix of requests, heads, dtypes and layer options, in one tile or many, gives the reference."""
        actual = batch.measure(key_budget=budget)
        assert actual.shape == (len(batch.rows), batch.num_heads, NUM_STATISTICS + 1)
        assert actual.dtype == torch.float32
        if batch.rows:
            batch.check(key_budget=budget)

    @given(batch=batches())
    def test_ranges(self, batch: Batch) -> None:
        """Every statistic lies in the range that the table gives."""
        actual = batch.measure()
        for statistic in STATISTICS:
            values = actual[..., INDEX[statistic.name]]
            values = values[~values.isnan()]
            assert statistic.lower is None or (values >= statistic.lower).all(), statistic.name
            assert statistic.upper is None or (values <= statistic.upper).all(), statistic.name

    @pytest.mark.parametrize("batch_rows", [[], [(0, 0)]])
    def test_empty_and_single(self, batch_rows: list[tuple[int, int]]) -> None:
        """No row gives an empty tensor; one row works."""
        batch = Batch([(5, 1, 3)], batch_rows)
        assert batch.measure().shape == (len(batch_rows), 2, NUM_STATISTICS + 1)

    @pytest.mark.parametrize("phase_prompt", [1, 2])
    def test_single_key(self, phase_prompt: int) -> None:
        """A row that sees only itself: entropy 0, one key, all mass on it, no distance."""
        got = Batch([(1, 1, phase_prompt)], [(0, 0)]).check()[0, 0]
        for name, expected in {
            "entropy_ratio": 0, "effective_keys": 1, "top1_ratio": 1, "sink_ratio": 1, "local_ratio": 1,
            "distance_tokens": 0, "self_logprob": 0,
        }.items():  # fmt: skip
            assert got[INDEX[name]] == expected, name

    def test_equal_scores(self) -> None:
        """Equal scores are the uniform distribution: entropy 1, n effective keys, distance (n - 1) / 2."""
        got = Batch([(37, 1, 20)], [(0, 0)], gain=0.0).check()[0, 0]
        assert got[INDEX["entropy_ratio"]].item() == pytest.approx(1, abs=1e-6)
        assert got[INDEX["effective_keys"]].item() == pytest.approx(37, rel=1e-6)
        assert got[INDEX["distance_tokens"]].item() == pytest.approx(18, rel=1e-6)
        assert got[INDEX["lookback_ratio"]].item() == pytest.approx(0.5, rel=1e-6)

    @pytest.mark.parametrize("options", [{}, {"sinks": True}, {"alibi": True}, {"window": 20}])
    @pytest.mark.parametrize("budget", [1 << 20, 1])
    def test_huge_scores(self, options: dict, budget: int) -> None:
        """Scores of 10^4 neither overflow nor lose the small differences from the maximum."""
        batch = Batch([(100, 4, 50), (40, 1, 40)], [(0, 0), (0, 3), (1, 0)], gain=1e4, **options)
        assert batch.magnitude() > 1e4
        assert batch.check(key_budget=budget).isfinite()[..., INDEX["max_logit"]].all()

    @pytest.mark.parametrize("soft_cap", [None, 30.0])
    def test_all_scores_far_below_zero(self, soft_cap: float | None) -> None:
        """Where every visible score is -10^7, hidden columns still count for nothing."""
        batch = Batch([(40, 1, 20), (23, 1, 5)], [(0, 0), (1, 0)], gain=1e6, soft_cap=soft_cap)
        batch.q.abs_()
        for keys in batch.keys:
            keys.abs_().neg_()
        batch.check()
        batch.check(key_budget=1)

    def test_sink_far_above_keys(self) -> None:
        """A learned sink that takes everything leaves masses 0 and shapes whole."""
        batch = Batch([(20, 1, 10)], [(0, 0)], sinks=True)
        batch.learned = torch.tensor([200.0, -200.0])
        got = batch.check()[0]
        assert got[0, INDEX["top1_ratio"]] == 0
        assert got[0, INDEX["entropy_ratio"]] == pytest.approx(got[1, INDEX["entropy_ratio"]].item(), abs=0.5)
        assert got[0, INDEX["self_logprob"]] < -100

    def test_one_long_among_short(self) -> None:
        """A long request doesn't make short ones pay for its length: their pages are read once."""
        lengths = [(3000, 1, 2000)] + [(20, 1, 10)] * 20
        batch = Batch(lengths, [(b, 0) for b in range(21)], num_kv_heads=1, head_size=64)
        batch.check()
        pages, table = batch.cache()
        reader = PlainReader(pages)
        batch.measured(reader, batch.plan(table, key_budget=1 << 16))
        assert reader.blocks_read <= 188 + 20 * 2 + 20

    @pytest.mark.parametrize("num_heads", [1, 128])
    def test_tiles_are_bounded(self, num_heads: int) -> None:
        """No tile holds more than 4 MB of widened keys or of scores, however long or many the requests are."""
        lengths = [(131_072, 1, 5), *[(4000, 300, 300)] * 5, *[(100, 1, 5)] * 200]
        rows = [(0, 0), *[(b, x) for b in range(1, 6) for x in range(60)], *[(b, 0) for b in range(6, 206)]]
        starts = np.r_[0, np.cumsum([query for _, query, _ in lengths])]
        listed = np.array([entry(starts[b] + x, b, x, lengths[b][2]) for b, x in rows], dtype=np.int32)
        table = np.zeros((len(lengths), 131_072 // 32), dtype=np.int32)
        plan = plan_rows(listed, starts, np.array([n for n, _, _ in lengths]), table, 32)
        groups = plan.groups(num_heads, 8 * 128)
        assert sorted(np.concatenate([group.rows for group in groups]).tolist()) == list(range(len(rows)))
        layers = plan.layers_at_once(num_heads, 8 * 128)
        for group in groups:
            for tile in group.tiles:
                assert 4 * group.items * tile.keys * 8 * 128 <= 4 << 20
                assert 4 * layers * group.items * group.rows_per_item * num_heads * tile.keys <= 4 << 20
                assert tile.weights is None or tile.weights.nbytes <= 16 << 20
                assert plan.workspace(group, 8 * 128, 32).nbytes <= 4 << 20

    def test_window_reads_only_its_blocks(self) -> None:
        """With a sliding window only blocks that some row sees are read."""
        batch = Batch([(1000, 1, 500)], [(0, 0)], window=20)
        pages, table = batch.cache()
        reader = PlainReader(pages)
        batch.measured(reader, batch.plan(table))
        assert reader.blocks_read == 2

    @pytest.mark.parametrize("num_keys", [131_072])
    def test_long_context(self, num_keys: int) -> None:
        """131072 keys over many tiles keep the precision of one short row."""
        batch = Batch([(num_keys, 3, num_keys - 2)], [(0, 0), (0, 2)], num_heads=2, block_size=128, gain=2.0)
        batch.check(key_budget=1 << 19)

    def test_key_scale(self) -> None:
        """Keys of a reader are its numbers times `key_scale`."""
        batch = Batch([(30, 1, 10)], [(0, 0)])
        pages, table = batch.cache()
        got = batch.measured(PlainReader(pages / 4, key_scale=4.0), batch.plan(table))
        assert torch.allclose(got, batch.measure(), rtol=1e-5, atol=1e-6)

    def test_many_rows_of_one_request(self) -> None:
        """More rows of one request than one tile takes give the same as one by one."""
        Batch([(150, 150, 150)], [(0, x) for x in range(150)], num_heads=1).check()

    def test_row_outside_its_request_is_an_error(self) -> None:
        """A query index outside of its batch row is refused by name."""
        batch = Batch([(10, 2, 5)], [(0, 0)])
        with pytest.raises(ValueError, match="every row must be a token of its request"):
            plan_rows(
                np.array([entry(5, 0, 0, 5)], dtype=np.int32), batch.starts, np.array([10]), np.zeros((1, 1)),
                16,
            )  # fmt: skip

    def test_plan_of_another_window_is_an_error(self) -> None:
        """A plan can't be used for layers of another sliding window."""
        batch = Batch([(10, 1, 5)], [(0, 0)])
        pages, table = batch.cache()
        plan = batch.plan(table)
        batch.window = 4
        with pytest.raises(ValueError, match="reach of a plan must be its layers', 4, got None"):
            batch.measured(PlainReader(pages), plan)


class TestNonfinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["q", "k"])
    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    @pytest.mark.parametrize("budget", [1 << 20, 1])
    def test_flagged(self, value: float, where: str, soft_cap: float | None, budget: int) -> None:
        """NaN or infinity in q or in a visible key marks exactly the rows and heads that see it."""
        batch = Batch(
            [(40, 5, 20), (30, 1, 30)], [(0, 0), (0, 4), (1, 0)],
            num_heads=4, num_kv_heads=2, soft_cap=soft_cap, alibi=True,
        )  # fmt: skip
        expected = torch.zeros(3, 4)
        if where == "q":
            batch.q[0, 1, 7] = value
            expected[0, 1] = 1
        else:
            # Row 0 stands at position 35 and doesn't see key 38; row 1 at 39 does.
            batch.keys[0][38, 1, 7] = value
            expected[1, 2:] = 1
        actual = batch.check(key_budget=budget)
        assert torch.equal(actual[..., NONFINITE], expected)
        assert actual[..., :NONFINITE][expected.bool()].isnan().all()

    def test_all_keys_infinite(self) -> None:
        """A row of which every score is minus infinity is nonfinite too."""
        batch = Batch([(16, 1, 16)], [(0, 0)], num_heads=1)
        batch.q.fill_(1.0)
        batch.keys[0].fill_(-math.inf)
        assert batch.check()[0, 0, NONFINITE] == 1


class TestMerge:
    @given(batch=batches())
    def test_tiles_merge_to_the_whole(self, batch: Batch) -> None:
        """Runs of one block each, merged, equal one run over all keys."""
        whole, pieces = batch.measure(key_budget=1 << 22), batch.measure(key_budget=1)
        assert torch.allclose(whole, pieces, rtol=2e-4, atol=2e-5 * batch.magnitude(), equal_nan=True)


class TestLayersTogether:
    @given(batch=batches(), budget=st.sampled_from([1 << 20, 1]), transposed=st.lists(st.booleans(), max_size=3))
    def test_each_is_measured_as_if_alone(self, batch: Batch, budget: int, transposed: list[bool]) -> None:
        """Layers with their own queries, keys, scales, slopes and sinks, over one block table."""
        layers = [batch]
        for n, turned in enumerate(transposed, 1):
            layers.append(replace(batch, seed=batch.seed + n, scale=batch.scale / (1 + n), transposed=turned))
        _, table = batch.cache()
        plan = batch.plan(table, key_budget=budget)
        rows = []
        for n, layer in enumerate(layers):
            pages, same = layer.cache(order_seed=batch.seed)
            assert (same == table).all()
            reader = PlainReader(pages * 2**n, layer.transposed, key_scale=2.0**-n)
            rows.append(LayerRows.select(layer.q, reader, plan, layer.params))
        for layer, actual in zip(layers, row_stats_cpu(rows, plan)[0], strict=True):
            layer.check_statistics(actual)

    def test_of_several_kinds_are_refused(self) -> None:
        """Layers with and without a soft cap have no calls in common."""
        batch = Batch([(20, 1, 10)], [(0, 0)])
        pages, table = batch.cache()
        plan = batch.plan(table)
        rows = [
            LayerRows.select(batch.q, PlainReader(pages), plan, replace(batch.params, soft_cap=cap))
            for cap in (None, 5.0)
        ]
        with pytest.raises(ValueError, match="layers measured together must be of one kind"):
            row_stats_cpu(rows, plan)

    @pytest.mark.parametrize(("rows", "least", "most"), [(1, 30, 194), (8, 20, 24), (300, 20, 24)])
    def test_as_many_as_have_room_for_scores(self, rows: int, least: int, most: int) -> None:
        """All of a small model for one row, fewer for many, whose tiles are bounded by their keys: 4 MB of scores."""
        batch = Batch([(600, 1, 600)] * rows, [(b, 0) for b in range(rows)], num_heads=9, num_kv_heads=3, block_size=32)
        _, table = batch.cache()
        assert least <= batch.plan(table).layers_at_once(9, 3 * 64) <= most

    @pytest.mark.parametrize(("keys", "layers"), [(60, 30), (600, 8), (6000, 1)])
    def test_keys_of_as_many_as_the_cache_holds(self, keys: int, layers: int) -> None:
        """4 MB of widened keys, or one layer's."""
        batch = Batch([(keys, 1, keys)], [(0, 0)], num_heads=9, num_kv_heads=3, block_size=32)
        _, table = batch.cache()
        plan = batch.plan(table)
        (group,) = plan.groups(9, 3 * 64)
        per_layer = sum(tile.keys for tile in group.tiles) if layers > 1 else max(tile.keys for tile in group.tiles)
        assert plan.workspace(group, 3 * 64, 30).shape == (layers * per_layer, 3 * 64)


class TestReference:
    """The reference itself, against torch.softmax and torch.distributions."""

    @given(seed=st.integers(0, 99), n=st.sampled_from([2, 5, 40]))
    def test_probabilities_and_entropy(self, seed: int, n: int) -> None:
        """Masses are sums of torch.softmax; the entropy is that of torch.distributions.Categorical."""
        batch = Batch([(n, 1, max(1, n // 2))], [(0, 0)], num_heads=3, seed=seed, sink_tokens=2, local_window=3)
        got = batch.reference()[0]
        for head in range(3):
            logits = 0.125 * (batch.keys[0][:, 0].double() @ batch.q[0, head].double())
            p = torch.softmax(logits, 0)
            prompt = max(1, n // 2)
            c, g = p[:prompt].mean(), p[prompt:].mean()
            expected = {
                "entropy_ratio": Categorical(logits=logits).entropy() / math.log(n),
                "effective_keys": 1 / (p**2).sum(),
                "max_logit": logits.max(),
                "top1_ratio": p.max(),
                "sink_ratio": p[:2].sum(),
                "local_ratio": p[-3:].sum(),
                "distance_tokens": (p * torch.arange(n - 1, -1, -1)).sum(),
                "self_logprob": p[-1].log(),
                "lookback_ratio": c / (c + g),
            }
            for name, value in expected.items():
                assert got[head, INDEX[name]].item() == pytest.approx(float(value), rel=1e-11, abs=1e-12), name

    def test_learned_sink_is_one_more_score(self) -> None:
        """With a learned sink, masses are those of a softmax over keys and sink; shapes ignore it."""
        batch = Batch([(9, 1, 9)], [(0, 0)], num_heads=1, sinks=True)
        assert batch.learned is not None
        logits = 0.125 * (batch.keys[0][:, 0].double() @ batch.q[0, 0].double())
        p = torch.softmax(torch.cat([logits, batch.learned.double()]), 0)[:-1]
        got = batch.reference()[0, 0]
        assert got[INDEX["top1_ratio"]].item() == pytest.approx(float(p.max()), rel=1e-12)
        assert got[INDEX["sink_ratio"]].item() == pytest.approx(float(p[:4].sum()), rel=1e-12)
        entropy = float(Categorical(logits=logits).entropy()) / math.log(9)
        assert got[INDEX["entropy_ratio"]].item() == pytest.approx(entropy, rel=1e-12)

    def test_window_and_prefill(self) -> None:
        """A window of 3 sees three keys, the own included; a prefill row has no lookback."""
        batch = Batch([(10, 10, 10)], [(0, 5)], num_heads=1, window=3)
        logits = 0.125 * (batch.keys[0][3:6, 0].double() @ batch.q[5, 0].double())
        got = batch.reference()[0, 0]
        assert got[INDEX["top1_ratio"]].item() == pytest.approx(float(torch.softmax(logits, 0).max()), rel=1e-12)
        assert got[INDEX["lookback_ratio"]].isnan()
        assert got[INDEX["sink_ratio"]].item() == pytest.approx(float(torch.softmax(logits, 0)[0]), rel=1e-12)

    def test_decode_without_visible_prompt(self) -> None:
        """A decode row whose window holds no prompt key looks back 0."""
        batch = Batch([(30, 1, 5)], [(0, 0)], window=8)
        assert (batch.check()[..., INDEX["lookback_ratio"]] == 0).all()
