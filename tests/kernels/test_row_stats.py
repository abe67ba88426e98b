"""The Triton kernel equals the float64 reference: in Triton's interpreter without a GPU, compiled with one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.rows import (
    ROW_ADAPTER_SHIFT,
    ROW_BATCH,
    ROW_DECODE,
    ROW_PHASE,
    ROW_PROMPT_LEN,
    ROW_QUERY,
    ROW_SLOT,
    ROW_UNCOUNTED,
)
from glassbox.core.statistics import INDEX, NUM_BUCKETS, NUM_STATISTICS, STATISTICS
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.reference.prompt_rows import previous_mass_ref
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, Tiling, row_stats
from tests.kernels import row_stats_cases as made
from tests.kernels.row_lists import entry
from tests.kernels.row_stats_cases import BASE, MIXED, Case, Inputs, Sequence, make_accumulators, make_inputs
from tests.kernels.tolerances import ORACLE_FACTOR, SUM_ROUNDING, assert_two_oracles, score_error

UNWRITTEN = -7.5
LATENT = replace(MIXED, heads=5, kv_heads=1, head_size=576, num_programs=1)
MAX_LOGIT = INDEX["max_logit"]

# The interpreter computes in numpy, which warns where the kernel means to reach infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Run:
    """A launch on a made case and what it left behind, on the CPU."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs | None = None,
        tiling: Tiling | None = None,
        ring: Tensor | None = None,
        accumulators: LayerAccumulators | None = None,
        **kept: Any,
    ) -> None:
        self.inputs = inputs or make_inputs(case, DEVICE)
        self.accumulators = accumulators or make_accumulators(case.heads, DEVICE)
        self.workspace = RowStatsWorkspace(DEVICE, case.max_rows, case.heads, case.num_programs)
        self.dense = torch.full((case.max_rows, case.heads, NUM_STATISTICS + 1), UNWRITTEN, device=DEVICE)
        self.ring, self.kept, self.tiling = ring, kept, tiling
        self.launch()

    def launch(self) -> None:
        i = self.inputs
        row_stats(
            i.q, i.k_cache, i.block_table, i.query_start_loc, i.seq_lens, i.rows, i.num_rows, i.params,
            self.accumulators, self.workspace, sink_tokens=i.sink_tokens, local_window=i.local_window, ring=self.ring,
            out=self.dense, tiling=self.tiling, **self.kept,
        )  # fmt: skip

    @property
    def out(self) -> Tensor:
        return self.dense.cpu()[: int(self.inputs.num_rows)]

    @property
    def phases(self) -> Tensor:
        return self.inputs.rows.cpu()[: int(self.inputs.num_rows), ROW_PHASE].long() & ROW_DECODE


def oracle(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The reference on a case; scales of quantised operands go into q and K."""
    p = inputs.params
    rows = inputs.rows.cpu()[: int(inputs.num_rows)]
    starts, lengths = inputs.query_start_loc.tolist(), inputs.seq_lens.tolist()
    batch = rows[:, ROW_BATCH].tolist()
    q = inputs.q.cpu().float().to(dtype)[rows[:, ROW_QUERY].long()]
    keys = [k.float().to(dtype) for k in inputs.keys]
    if p.q_scale is not None:
        q = q * p.q_scale.cpu().to(dtype)
    if p.k_scale is not None:
        keys = [k * p.k_scale.cpu().to(dtype).view(1, -1, 1) for k in keys]
    return row_stats_ref(
        q,
        keys,
        [lengths[b] - starts[b + 1] + token for token, b in zip(rows[:, ROW_QUERY].tolist(), batch, strict=True)],
        request=batch,
        phase=(rows[:, ROW_PHASE] & ROW_DECODE).tolist(),
        prompt_len=rows[:, ROW_PROMPT_LEN].tolist(),
        scale=p.scale,
        sliding_window=p.sliding_window,
        chunk_size=p.chunk_size,
        soft_cap=p.soft_cap,
        alibi_slopes=None if p.alibi_slopes is None else p.alibi_slopes.cpu(),
        sinks=None if p.sinks is None else p.sinks.cpu().float(),
        sink_tokens=inputs.sink_tokens,
        local_window=inputs.local_window,
        dtype=dtype,
    )


def magnitude(inputs: Inputs) -> float:
    """Largest sum over d of |scale * q_d * k_d|, plus the largest bias."""
    p = inputs.params
    rows = inputs.rows.cpu()[: int(inputs.num_rows), ROW_QUERY].long()
    q = inputs.q.cpu().double()[rows].nan_to_num(0, 0, 0).abs()
    largest = 0.0
    for k in inputs.keys:
        if len(k):
            heads = k.double().nan_to_num(0, 0, 0).abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
            largest = max(largest, float(torch.einsum("rhd,nhd->rhn", q, heads).max()))
    for factor in (p.q_scale, p.k_scale):
        largest *= 1.0 if factor is None else float(factor.max())
    longest = int(inputs.seq_lens.max())
    return p.scale * largest + (0.0 if p.alibi_slopes is None else float(p.alibi_slopes.max()) * longest)


def assert_equals_reference(run: Run) -> None:
    expected, same_dtype = oracle(run.inputs, torch.float64), oracle(run.inputs, torch.float32)
    most = int(run.inputs.seq_lens.max())
    assert_two_oracles(run.out, expected, same_dtype, magnitude(run.inputs), most)


def assert_previous_mass(run: Run, found: Tensor) -> None:
    """Attention of each row to the position before its own, [R, H]."""
    inputs, p = run.inputs, run.inputs.params
    masses = [INDEX["top1_ratio"], INDEX["sink_ratio"], INDEX["local_ratio"]]
    exact, same_dtype = oracle(inputs, torch.float64)[..., masses], oracle(inputs, torch.float32)[..., masses]
    error = 2 * score_error(magnitude(inputs)) + SUM_ROUNDING
    error += ORACLE_FACTOR * float((same_dtype.double() - exact).abs().nan_to_num().max())
    one, starts, lengths = torch.ones(1), inputs.query_start_loc.tolist(), inputs.seq_lens.tolist()
    q_scale, k_scale = (
        (one if factor is None else factor.cpu()).double().view(1, -1, 1) for factor in (p.q_scale, p.k_scale)
    )
    rows = inputs.rows.cpu()[: len(found), [ROW_QUERY, ROW_BATCH]].tolist()
    for of_row, (query, batch) in zip(found, rows, strict=True):
        attention = row_probe_ref(
            inputs.q.cpu()[query].double() * q_scale.view(-1, 1),
            inputs.keys[batch].double() * k_scale,
            lengths[batch] - starts[batch + 1] + query,
            scale=p.scale,
            sliding_window=p.sliding_window,
            chunk_size=p.chunk_size,
            soft_cap=p.soft_cap,
            alibi_slopes=None if p.alibi_slopes is None else p.alibi_slopes.cpu(),
            sinks=None if p.sinks is None else p.sinks.cpu(),
        )
        expected = previous_mass_ref(attention)
        torch.testing.assert_close(of_row.double(), expected, rtol=0, atol=error, equal_nan=True)


def bucketed(out: Tensor, phases: Tensor, accumulators: LayerAccumulators) -> Tensor:
    """Histogram counts [H, 2, S, B] of dense rows, one value at a time."""
    counts = torch.zeros(out.shape[1], 2, NUM_STATISTICS, NUM_BUCKETS, dtype=torch.int64)
    bounds = accumulators.bounds.cpu()
    for row, phase in zip(out, phases.tolist(), strict=True):
        for head, values in enumerate(row[:NUM_STATISTICS] if row.dim() == 1 else row):
            for s in range(NUM_STATISTICS):
                if not values[s].isnan():
                    counts[head, phase, s, int((values[s] > bounds[s]).sum())] += 1
    return counts


class Kept:
    """What is kept of rows beside their queries, and where it goes: one layer of rings, in the middle of wider ones."""

    def __init__(self, case: Case, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(case.dtype).to(DEVICE)  # noqa: E731
        tokens = len(make_inputs(case, DEVICE).q)
        self.output = normal(tokens, case.heads + 1, size + 8)[:, 1:, :size]
        # Of one projection, as vLLM has them.
        joined = normal(tokens, case.kv_heads, 2, case.head_size)
        self.key, self.value = joined[:, :, 0], joined[:, :, 1, :size]
        self.outputs = torch.full((5, 2, case.heads + 1, size + 8), UNWRITTEN, dtype=case.dtype, device=DEVICE)
        shape = (5, 2, 2, case.kv_heads + 1, case.head_size)
        self.kept_kv = torch.full(shape, UNWRITTEN, dtype=case.dtype, device=DEVICE)
        self.arguments = {
            "output": self.output,
            "outputs": self.outputs[:, 1, : case.heads, :size],
            "key": self.key,
            "value": self.value,
            "kept_kv": self.kept_kv[:, 1, :, : case.kv_heads],
        }

    def check(self, inputs: Inputs) -> None:
        """Slots of the inputs' rows hold their numbers, all else is as it was."""
        outputs, kept_kv = torch.full_like(self.outputs, UNWRITTEN), torch.full_like(self.kept_kv, UNWRITTEN)
        for query, slot in inputs.rows[: int(inputs.num_rows), [ROW_QUERY, ROW_SLOT]].tolist():
            if slot >= 0:
                outputs[slot, 1, : self.output.shape[1], : self.output.shape[2]] = self.output[query]
                if self.key.shape == self.value.shape:
                    kept_kv[slot, 1, 0, : self.key.shape[1]] = self.key[query]
                    kept_kv[slot, 1, 1, : self.key.shape[1]] = self.value[query]
        assert torch.equal(self.outputs, outputs)
        assert torch.equal(self.kept_kv, kept_kv)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """To the bit; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


class TestValues:
    @pytest.mark.parametrize("case", made.CASES, ids=lambda case: case.name)
    def test_every_statistic_is_as_near_to_float64_as_torch_is(self, case: Case) -> None:
        """Error <= 2 x float32 torch's error + rounding, NaN in the same places, for every feature; so has the
        attention to the position before."""
        inputs = make_inputs(case, DEVICE)
        count = int(inputs.num_rows)
        inputs.rows[:count, ROW_SLOT] = torch.arange(count, 0, -1, dtype=torch.int32)
        previous = torch.full((count + 1, 2, case.heads), UNWRITTEN, device=DEVICE)
        run = Run(case, inputs, previous=previous[:, 1])
        assert_equals_reference(run)
        assert (previous[:, 0] == UNWRITTEN).all()
        assert (previous[0] == UNWRITTEN).all()
        assert_previous_mass(run, previous[1:, 1].cpu().flip(0))

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
    @pytest.mark.parametrize("case", made.LARGE, ids=lambda case: case.name)
    def test_long_and_many_rows(self, case: Case) -> None:
        """The same over the whole GPU."""
        run = Run(case)
        assert_equals_reference(run)
        assert torch.equal(run.accumulators.counts.cpu(), bucketed(run.out, run.phases, run.accumulators))

    @pytest.mark.parametrize("case", made.TILE_CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("tiling", [Tiling(32, 4, 3), Tiling(128, 4, 3), Tiling(64, 4, 3, 168)], ids=str)
    def test_the_tiling_is_not_seen_in_the_values(self, case: Case, tiling: Tiling) -> None:
        """Tiles smaller and larger than a page, and a register limit, give the reference's values too."""
        assert_equals_reference(Run(case, tiling=tiling))

    @pytest.mark.parametrize("tiling", [Tiling(16, 4, 1, heads=16), Tiling(64, 8, 2, heads=64)], ids=str)
    def test_how_many_heads_share_a_tile_is_not_seen_in_the_values(self, tiling: Tiling) -> None:
        """Latent attention: one pass over the keys for all heads, or several."""
        assert_equals_reference(Run(replace(LATENT, heads=40), tiling=tiling))

    @pytest.mark.parametrize("page", [16, 64])
    @pytest.mark.parametrize("tiling", [None, Tiling(32, 4, 2, heads=64, held=True)], ids=str)
    def test_tiles_within_a_row(self, page: int, tiling: Tiling | None) -> None:
        """Latent attention: tiles whose keys are all alike and those of a border, each with a key that is not finite in
        one request; by pages and, where they are small, by keys; queries in either memory. One head has no stride."""
        case = replace(
            LATENT,
            sequences=(Sequence(1, 500, 300), Sequence(2, 257, 200), Sequence(1, 400, 500)),
            heads=20,
            page=page,
            num_programs=14,
            local_window=100,
            keys=((1, 100, 0, made.NAN), (2, 399, 0, made.INF)),
        )
        inputs = make_inputs(case, DEVICE)
        block, _, slot, _ = inputs.k_cache.stride()
        inputs.k_cache = inputs.k_cache.as_strided(inputs.k_cache.shape, (block, 0, slot, 1))
        assert_equals_reference(Run(case, inputs, tiling=tiling))

    def test_states_are_merged_in_several_steps(self) -> None:
        """A row over more programs than are merged at a time; the counters are left as they were."""
        case = replace(BASE, sequences=(Sequence(1, 1300, 700), Sequence(1, 90, 80)), num_programs=80, local_window=128)
        run = Run(case)
        assert_equals_reference(run)
        assert not run.workspace.arrivals.any()

    @pytest.mark.parametrize("num_programs", [1, 2, 7, 40])
    def test_the_split_is_not_seen_in_the_values(self, num_programs: int) -> None:
        """One program or more than there are tiles: the merge changes rounding only, and leaves no arrival behind."""
        run = Run(replace(MIXED, num_programs=num_programs))
        assert_equals_reference(run)
        assert not run.workspace.arrivals.any()

    def test_a_nonfinite_score_marks_its_heads_only(self) -> None:
        """NaN in KV head 1 marks query heads 2 and 3 of that row; the rest is as if it were not there."""
        run = Run(replace(BASE, keys=((0, 3, 1, float("nan")),)))
        clean = Run(BASE).out
        assert run.out[:, :, NUM_STATISTICS].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert torch.equal(run.out[0, :2], clean[0, :2])
        assert run.out[0, 2:, :NUM_STATISTICS].isnan().all()


class TestLatent:
    """Wide heads, as latent attention launches them."""

    def test_queries_in_two_parts(self) -> None:
        """As vLLM makes them: what was absorbed, and the rotary part, with strides of their own."""
        inputs = make_inputs(LATENT, DEVICE)
        whole = Run(LATENT, inputs)
        inputs.q = (inputs.q[..., :512].contiguous(), inputs.q[..., 512:])  # type: ignore[assignment]
        assert_equal(whole.out, Run(LATENT, inputs).out)

    def test_tokens_of_one_step_in_two_launches(self) -> None:
        """Rows of the first tokens by their token, the others by their place in the list; together they are all."""
        inputs = make_inputs(LATENT, DEVICE)
        both = Run(LATENT, inputs)
        listed = inputs.rows[:, ROW_QUERY].tolist()
        by_row = torch.stack([inputs.q[token] for token in listed[2 : int(inputs.num_rows)]])
        run = Run(LATENT, make_inputs(LATENT, DEVICE), tokens=(0, listed[2]))
        assert_equal(run.out[:2], both.out[:2])
        assert (run.out[2:] == UNWRITTEN).all()
        run.inputs.q, run.kept = by_row, {"tokens": (listed[2], 2**31 - 1), "first_row": 2}
        run.launch()
        assert_equal(run.out, both.out)
        for name in ("counts", "rows", "window_max"):
            assert torch.equal(getattr(run.accumulators, name), getattr(both.accumulators, name))

    def test_queries_and_outputs_of_traced_rows_are_kept(self) -> None:
        """Exactly, both parts of the queries and the narrower outputs, in their slot of one layer."""
        case = replace(LATENT, slots=(3, -1, 0, *[-1] * 10))
        kept = torch.full((5, 2, case.heads + 1, 600), UNWRITTEN, dtype=case.dtype, device=DEVICE)
        outputs = torch.full((5, case.heads, 512), UNWRITTEN, dtype=case.dtype, device=DEVICE)
        inputs = make_inputs(case, DEVICE)
        served = torch.randn(len(inputs.q), case.heads, 512, device=DEVICE).to(case.dtype)
        run = Run(case, inputs, queries=kept[:, 1, : case.heads, : case.head_size], output=served, outputs=outputs)
        expected, expected_outputs = torch.full_like(kept, UNWRITTEN), torch.full_like(outputs, UNWRITTEN)
        for slot, row in ((3, 0), (0, 2)):
            token = int(run.inputs.rows[row, ROW_QUERY])
            expected[slot, 1, : case.heads, : case.head_size] = inputs.q[token]
            expected_outputs[slot] = served[token]
        assert torch.equal(kept, expected)
        assert torch.equal(outputs, expected_outputs)

    def test_parts_that_do_not_fit(self) -> None:
        """Only the two parts that the kernel loads."""
        inputs = make_inputs(LATENT, DEVICE)
        inputs.q = (inputs.q[..., :256], inputs.q[..., 256:])  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"parts of q must be \[T, H, 512\] and \[T, H, 64\] of one type"):
            Run(LATENT, inputs)


class TestAccumulators:
    def test_counts_are_the_buckets_of_the_dense_rows(self) -> None:
        """Exactly, over two launches; every phase, head and statistic."""
        run = Run(MIXED)
        run.launch()
        assert torch.equal(run.accumulators.counts.cpu(), 2 * bucketed(run.out, run.phases, run.accumulators))

    def test_a_value_on_a_bound_belongs_to_the_bucket_below(self) -> None:
        """One key: entropy_ratio 0, top1_ratio 1 and effective_keys 1 are where `le` puts them."""
        run = Run(replace(BASE, sequences=(Sequence(1, 1, 1),)))
        counts = run.accumulators.counts.cpu()
        assert run.out[0, 0, INDEX["max_logit"]] != 0
        for name, value in (("entropy_ratio", 0.0), ("top1_ratio", 1.0), ("effective_keys", 1.0)):
            bucket = sum(value > bound for bound in STATISTICS[INDEX[name]].buckets)
            assert counts[0, :, INDEX[name]].sum(0).nonzero().tolist() == [[bucket]]

    def test_rows_sums_and_nonfinite(self) -> None:
        """rows counts every row, nonfinite those with a NaN or Inf score; sums leave them out."""
        case = replace(MIXED, keys=((0, 67, 0, float("nan")), (3, 0, 1, float("inf"))))
        run = Run(case)
        out, phases, acc = run.out, run.phases, run.accumulators
        for phase in (0, 1):
            of_phase = out[phases == phase]
            assert acc.rows.cpu()[:, phase].tolist() == [len(of_phase)] * case.heads
            assert torch.equal(acc.nonfinite.cpu()[:, phase], of_phase[..., NUM_STATISTICS].sum(0).long())
            sums = of_phase[..., :NUM_STATISTICS].double().nansum(0)
            torch.testing.assert_close(acc.sums.cpu()[:, phase], sums, rtol=1e-12, atol=1e-9)
        assert acc.nonfinite.sum() > 0

    def test_the_window_maximum_goes_to_the_slot_in_use(self) -> None:
        """Slot 1 holds the largest max_logit of each head and phase, negative ones too; the others are untouched."""
        run = Run(replace(MIXED, sequences=(Sequence(2, 9, 20), Sequence(1, 1, 0))))
        maxima = run.accumulators.window_max.cpu()
        assert (maxima[[0, 2]] == -torch.inf).all()
        for phase in (0, 1):
            assert torch.equal(maxima[1, :, phase], run.out[run.phases == phase][..., MAX_LOGIT].amax(0))
        assert (maxima[1] < 0).any()

    def test_a_maximum_of_minus_zero_counts(self) -> None:
        """q = 0 scores 0 or -0 everywhere: the window maximum is 0, not -inf."""
        run = Run(replace(BASE, q_magnitude=-0.0))
        assert (run.accumulators.window_max.cpu()[1, :, 1] == 0).all()


class TestAdapters:
    """Rows with the slot of an adapter in their phase, in a worker that has a layer with one head more."""

    SLOTS = 3
    STRIDE = MIXED.heads + 1

    def run(self, *marks: int) -> tuple[Run, dict[str, Tensor]]:
        """A launch with the rows' slots, and its accumulators as [A, heads and one more, ...]."""
        inputs = make_inputs(MIXED, DEVICE)
        inputs.rows[: int(inputs.num_rows), ROW_PHASE] |= torch.tensor(marks, dtype=torch.int32, device=DEVICE)
        many = make_accumulators(self.SLOTS * self.STRIDE, DEVICE)
        window_max = make_accumulators(MIXED.heads, DEVICE).window_max
        run = Run(MIXED, inputs, accumulators=replace(many, window_max=window_max, adapter_heads=self.STRIDE))
        names = ("counts", "sums", "rows", "nonfinite")
        return run, {
            name: array.view(self.SLOTS, self.STRIDE, *array.shape[1:])
            for name, array in ((name, getattr(run.accumulators, name).cpu()) for name in names)
        }

    def test_each_row_counts_in_its_slot_alone(self) -> None:
        """Slots add up to what there is without; each holds its own rows; what is uncounted stays so."""
        plain = Run(MIXED)
        slots = torch.arange(len(plain.out)) * 2 % self.SLOTS
        run, apart = self.run(*(slots << ROW_ADAPTER_SHIFT).tolist())
        assert torch.equal(run.out.nan_to_num(-1), plain.out.nan_to_num(-1))
        for name in ("counts", "rows", "nonfinite"):
            assert torch.equal(apart[name].sum(0)[: MIXED.heads], getattr(plain.accumulators, name).cpu())
        sums = plain.accumulators.sums.cpu()
        torch.testing.assert_close(apart["sums"].sum(0)[: MIXED.heads], sums, rtol=1e-12, atol=1e-9)
        assert torch.equal(run.accumulators.window_max, plain.accumulators.window_max)
        for slot in range(self.SLOTS):
            its = slots == slot
            counts = bucketed(run.out[its], run.phases[its], run.accumulators)
            assert counts.any()
            assert torch.equal(apart["counts"][slot, : MIXED.heads], counts)
            assert not apart["rows"][slot, MIXED.heads :].any()

    def test_rows_that_are_no_sample_count_in_no_slot(self) -> None:
        """ROW_UNCOUNTED beside a slot."""
        mark = ROW_UNCOUNTED | 2 << ROW_ADAPTER_SHIFT
        run, apart = self.run(*[mark] * len(Run(MIXED).out))
        assert not apart["rows"].any()
        assert (run.accumulators.window_max == -torch.inf).all()


class TestRowList:
    def test_an_empty_list_leaves_everything_as_it_is(self) -> None:
        """Zero rows: nothing is read but the count, nothing is written."""
        inputs = make_inputs(BASE, DEVICE)
        inputs.num_rows.zero_()
        run = Run(BASE, inputs)
        assert (run.dense == UNWRITTEN).all()
        assert not run.accumulators.rows.any()
        assert (run.accumulators.window_max == -torch.inf).all()

    def test_rows_behind_the_list_are_not_measured(self) -> None:
        """Entries from `num_rows` on, which hold rubbish, write nothing."""
        run = Run(MIXED)
        assert (run.dense[int(run.inputs.num_rows) :] == UNWRITTEN).all()

    @pytest.mark.parametrize(("case", "start", "count"), [(MIXED, 4, 6), (MIXED, 12, 1), (LATENT, 3, 0)])
    def test_a_list_that_begins_further_on(self, case: Case, start: int, count: int) -> None:
        """Layers have lists of their own in one memory: what is measured is what the same list gives at its begin."""
        inputs, moved = make_inputs(case, DEVICE), make_inputs(case, DEVICE)
        moved.rows[:count] = inputs.rows[start : start + count].clone()
        for one in (inputs, moved):
            one.num_rows.fill_(count)
        run = Run(case, inputs, list_start=torch.tensor([start], dtype=torch.int32, device=DEVICE))
        expected = Run(case, moved)
        assert_equal(run.dense, expected.dense)
        for name in ("counts", "rows", "window_max"):
            assert torch.equal(getattr(run.accumulators, name), getattr(expected.accumulators, name))
        assert (run.out != UNWRITTEN).all()

    def test_padding_rows_are_skipped(self) -> None:
        """A row of a sequence with query length 0 and length 0 counts nowhere; its neighbours do."""
        inputs = make_inputs(MIXED, DEVICE)
        rows = inputs.rows.cpu()
        rows[1] = torch.tensor(entry(inputs.query_start_loc.tolist()[2], 2, position=0, prompt_len=0))
        inputs.rows.copy_(rows)
        run = Run(MIXED, inputs)
        assert (run.out[1] == UNWRITTEN).all()
        assert (run.out[[0, 2]] != UNWRITTEN).any()
        assert run.accumulators.rows.sum() == (len(run.out) - 1) * MIXED.heads

    def test_traced_rows_are_in_the_ring_and_the_others_are_not(self) -> None:
        """Rows with a slot are written there as in the dense result; other slots stay as they were."""
        case = replace(BASE, slots=(3, -1, 0))
        # One layer of a [slots, layers, H, S + 1] ring.
        ring = torch.full((5, 2, case.heads, NUM_STATISTICS + 1), UNWRITTEN, device=DEVICE)
        run = Run(case, ring=ring[:, 1])
        assert torch.equal(ring[3, 1].cpu(), run.out[0])
        assert torch.equal(ring[0, 1].cpu(), run.out[2])
        assert (ring[[1, 2, 4]] == UNWRITTEN).all()
        assert (ring[:, 0] == UNWRITTEN).all()

    @pytest.mark.parametrize("case", [BASE, replace(BASE, head_size=80, heads=6, dtype=torch.float16)])
    def test_queries_of_traced_rows_are_kept(self, case: Case) -> None:
        """Exactly, in their slot of one layer; all other slots, layers and heads stay as they were."""
        case = replace(case, slots=(3, -1, 0))
        ring = torch.empty(5, case.heads, NUM_STATISTICS + 1, device=DEVICE)
        # [slots, layers, more heads, a larger head size]
        kept = torch.full((5, 2, case.heads + 1, 128), UNWRITTEN, dtype=torch.float32, device=DEVICE)
        run = Run(case, ring=ring, queries=kept[:, 1, : case.heads, : case.head_size])
        expected = torch.full_like(kept, UNWRITTEN)
        for slot, row in ((3, 0), (0, 2)):
            query = run.inputs.q[int(run.inputs.rows[row, ROW_QUERY])]
            expected[slot, 1, : case.heads, : case.head_size] = query.float()
        assert torch.equal(kept, expected)

    @pytest.mark.parametrize("size", [64, 48])
    @pytest.mark.parametrize(
        "case", [BASE, replace(BASE, heads=20, kv_heads=1, sequences=(Sequence(3, 20, 4),), dtype=torch.float16)]
    )
    def test_outputs_keys_and_values_of_traced_rows_are_kept(self, case: Case, size: int) -> None:
        """Exactly, in their slot of one layer, from tensors that are parts of wider ones; nothing else is written. V of
        another head size than K is not kept."""
        count = int(make_inputs(case, DEVICE).num_rows)
        case = replace(case, slots=(3, -1, 0, *[-1] * count)[:count])
        kept = Kept(case, size)
        run = Run(case, **kept.arguments)
        kept.check(run.inputs)

    def test_nothing_is_kept_without_a_slot(self) -> None:
        """Rows that are not traced leave the rings alone, and so does an empty list."""
        kept = Kept(BASE, 64)
        inputs = make_inputs(BASE, DEVICE)
        Run(BASE, inputs, **kept.arguments)
        inputs.num_rows.zero_()
        Run(BASE, inputs, **kept.arguments)
        assert (kept.outputs == UNWRITTEN).all()
        assert (kept.kept_kv == UNWRITTEN).all()

    def test_what_is_kept_does_not_need_the_ring(self) -> None:
        """Nor each other: launches of one layer take turns with and without, and each has what it asked for."""
        case = replace(BASE, slots=(3, -1, 0))
        run = Run(case)
        for names in (("output", "outputs"), (), ("key", "value", "kept_kv"), ("output", "outputs"), ("queries",)):
            kept = Kept(case, 64)
            queries = torch.full((5, case.heads, case.head_size), UNWRITTEN, dtype=case.dtype, device=DEVICE)
            run.kept = {
                name: tensor for name, tensor in (kept.arguments | {"queries": queries}).items() if name in names
            }
            run.launch()
            assert ((kept.outputs != UNWRITTEN).any() == ("outputs" in names)).all()
            assert ((kept.kept_kv != UNWRITTEN).any() == ("kept_kv" in names)).all()
            assert ((queries != UNWRITTEN).any() == ("queries" in names)).all()

    def test_uncounted_rows_are_measured_but_not_added(self) -> None:
        """Rows that are marked so have the same numbers, in the ring, too, and none in the accumulators."""
        case = replace(MIXED, keys=((0, 67, 0, float("nan")),))
        marked = [r % 2 == 0 for r in range(len(Run(case).out))]
        inputs, others = make_inputs(case, DEVICE), make_inputs(case, DEVICE)
        marks = torch.tensor([ROW_UNCOUNTED * mark for mark in marked], dtype=torch.int32, device=DEVICE)
        inputs.rows[: len(marked), ROW_PHASE] |= marks
        inputs.rows[0, ROW_SLOT] = 1
        # The same list without the marked rows.
        kept = others.rows[: len(marked)][[not mark for mark in marked]].clone()
        others.rows[: len(kept)] = kept
        others.num_rows.fill_(len(kept))
        ring = torch.full((2, case.heads, NUM_STATISTICS + 1), UNWRITTEN, device=DEVICE)
        run, without, plain = Run(case, inputs, ring=ring), Run(case, others), Run(case)
        torch.testing.assert_close(run.out, plain.out, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ring[1].cpu(), plain.out[0], rtol=0, atol=0, equal_nan=True)
        for name in ("counts", "rows", "nonfinite", "window_max"):
            expected = getattr(without.accumulators, name)
            assert torch.equal(expected, getattr(run.accumulators, name)), name
            assert not torch.equal(getattr(plain.accumulators, name), expected), name
        torch.testing.assert_close(run.accumulators.sums, without.accumulators.sums, rtol=1e-12, atol=1e-9)


class TestErrors:
    def test_a_head_size_over_576(self) -> None:
        """Names the shapes and the remedy."""
        with pytest.raises(ValueError, match=r"head size of at most 576 .* do not observe this layer"):
            Run(replace(BASE, head_size=592))

    def test_a_workspace_too_small(self) -> None:
        """Names what it must hold and what it holds."""
        inputs = make_inputs(BASE, DEVICE)
        with pytest.raises(ValueError, match="must hold 16 rows and 4 heads, got 8 and 4; make it larger"):
            row_stats(
                inputs.q, inputs.k_cache, inputs.block_table, inputs.query_start_loc, inputs.seq_lens, inputs.rows,
                inputs.num_rows, inputs.params, make_accumulators(4, DEVICE), RowStatsWorkspace(DEVICE, 8, 4),
            )  # fmt: skip

    def test_a_cache_not_contiguous_in_the_head(self) -> None:
        """K with a stride in its last dimension is refused."""
        inputs = make_inputs(BASE, DEVICE)
        inputs.k_cache = inputs.k_cache.repeat_interleave(2, 3)[..., ::2]
        with pytest.raises(ValueError, match="contiguous in their last dimension"):
            Run(BASE, inputs)

    def test_a_page_beyond_32_bit_offsets(self) -> None:
        """A slot stride that a page of 16 takes over 2^31 elements is refused, not wrapped around."""
        inputs = make_inputs(BASE, DEVICE)
        strides = (1, 1, 2**28, 1)
        inputs.k_cache = torch.empty_strided((1, 2, 16, 64), strides, dtype=torch.bfloat16, device="meta")
        with pytest.raises(ValueError, match="must span at most 2147483647 elements, got 4294967296"):
            Run(BASE, inputs)

    def test_rings_that_do_not_fit(self) -> None:
        """Names the tensors, what they must be and what they are."""
        kept = Kept(BASE, 64).arguments
        with pytest.raises(ValueError, match=r"output and outputs must end with \[4, 64\] and be of one type, got"):
            Run(BASE, **(kept | {"outputs": kept["outputs"][:, :3]}))
        with pytest.raises(ValueError, match=r"key and kept_kv must .* one type, .* torch.float32; pass a ring"):
            Run(BASE, **(kept | {"kept_kv": kept["kept_kv"].float()}))
        with pytest.raises(ValueError, match="value and kept_kv must be contiguous in their last dimension"):
            Run(BASE, **(kept | {"value": kept["value"].repeat_interleave(2, 2)[..., ::2]}))

    def test_no_rows(self) -> None:
        """A workspace for no rows is refused."""
        with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
            RowStatsWorkspace(DEVICE, 0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
class TestGraph:
    def test_replays_follow_the_device_memory(self) -> None:
        """Captured once with an empty list ; each replay measures what the list says then."""
        case = replace(MIXED, heads=8, head_size=128)
        full, thin = make_inputs(case, DEVICE), make_inputs(replace(case, rows=((0, 4), (3, 1), (1, 0))), DEVICE)
        inputs = replace(full, rows=full.rows.clone(), num_rows=torch.zeros_like(full.num_rows))
        run = Run(case, inputs)
        main_work, main_result = torch.randn(2, 2**20, device=DEVICE)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.add(main_work, 1, out=main_result)
            run.launch()
            torch.add(main_work, 3, out=main_result)
        graph.replay()
        assert (run.dense == UNWRITTEN).all()
        expected_rows = 0
        for source in (full, thin, full):
            inputs.rows.copy_(source.rows)
            inputs.num_rows.copy_(source.num_rows)
            run.dense.fill_(UNWRITTEN)
            graph.replay()
            assert_equals_reference(run)
            expected_rows += int(source.num_rows)
            assert (run.dense[int(source.num_rows) :] == UNWRITTEN).all()
            assert run.accumulators.rows.sum() == expected_rows * case.heads
        inputs.num_rows.zero_()
        graph.replay()
        assert run.accumulators.rows.sum() == expected_rows * case.heads

    def test_the_list_may_begin_elsewhere_in_each_replay(self) -> None:
        """Captured with an empty list at the begin: each replay measures the rows from where its list begins."""
        case = replace(MIXED, heads=8, head_size=128)
        inputs = make_inputs(case, DEVICE)
        inputs.num_rows.zero_()
        start = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        run = Run(case, inputs, list_start=start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.launch()
        for first, count in ((4, 6), (0, 0), (12, 1)):
            start.fill_(first)
            inputs.num_rows.fill_(count)
            run.dense.fill_(UNWRITTEN)
            graph.replay()
            moved = make_inputs(case, DEVICE)
            moved.rows[:count] = inputs.rows[first : first + count].clone()
            moved.num_rows.fill_(count)
            assert_equal(run.dense, Run(case, moved).dense)

    def test_what_is_kept_follows_the_device_memory(self) -> None:
        """Captured with no rows: each replay keeps the outputs, keys and values of the rows that have a slot then."""
        case = replace(MIXED, heads=8, head_size=128)
        inputs = make_inputs(case, DEVICE)
        kept, count = Kept(case, 128), int(inputs.num_rows)
        inputs.num_rows.zero_()
        run = Run(case, inputs, **kept.arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.launch()
        inputs.num_rows.fill_(count)
        for slots in ((), ((0, 4), (3, 0)), ((2, 2),)):
            inputs.rows[:count, ROW_SLOT] = -1
            for row, slot in slots:
                inputs.rows[row, ROW_SLOT] = slot
            for tensor in (kept.output, kept.key, kept.value):
                tensor.copy_(torch.randn_like(tensor))
            kept.outputs.fill_(UNWRITTEN)
            kept.kept_kv.fill_(UNWRITTEN)
            graph.replay()
            kept.check(inputs)

    def test_lengths_grow_between_replays(self) -> None:
        """A graph captured at short lengths measures long ones: loop bounds come from the device."""
        case = made.LARGE[0]
        inputs = make_inputs(case, DEVICE)
        lengths = inputs.seq_lens.clone()
        inputs.seq_lens.fill_(1)
        run = Run(case, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.launch()
        inputs.seq_lens.copy_(lengths)
        graph.replay()
        assert_equals_reference(run)

    def test_params_of_another_layer_take_another_variant(self) -> None:
        """Launches are remembered per layer: the same workspace serves a capped and a plain layer in turns."""
        plain, capped = make_inputs(BASE, DEVICE), make_inputs(replace(BASE, soft_cap=2.0), DEVICE)
        run = Run(BASE, plain)
        for inputs in (capped, plain, capped):
            run.inputs = inputs
            run.launch()
            assert_equals_reference(run)
        assert isinstance(plain.params, LayerParams)
