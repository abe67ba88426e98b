"""Whole attention, top positions and span masses on a GPU equal the float64 reference: in Triton's interpreter without
one, compiled with one."""

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.interpreter import DEVICE, ON_GPU

# isort: split
from glassbox.core.rows import ROW_BATCH, ROW_QUERY
from glassbox.core.trace_arrays import NO_POSITION
from glassbox.kernels.layer_params import LayerParams
from glassbox.kernels.probe_answers import ProbeAnswers, Questions
from glassbox.kernels.reference.row_probe import row_probe_ref, span_mass_ref, top_k_ref
from glassbox.kernels.row_probe import ProbedLayers, row_probe
from tests.kernels.row_stats_cases import BASE, INF, LARGE, MIXED, NAN, Case, Inputs, Sequence, make_inputs
from tests.kernels.tolerances import ORACLE_FACTOR, SUM_ROUNDING, score_error

SPANS = ((0, 3), (2, 40), (30, 1000), (0, 0))
EPS16 = torch.finfo(torch.float16).eps

# The interpreter computes in numpy, which warns where the kernel means to reach infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def move_to_table_of(first: Inputs, inputs: Inputs) -> None:
    """Put a layer's pages where the block table of the first layer has them; pages of no sequence stay poisoned."""
    blocks = []
    for table in (first.block_table, inputs.block_table):
        owned = table[table < inputs.k_cache.shape[0]].tolist()
        blocks.append(owned + sorted(set(range(inputs.k_cache.shape[0])) - set(owned)))
    whole = inputs.k_cache if inputs.k_cache.element_size() > 1 else inputs.k_cache.view(torch.int8)
    whole[blocks[0]] = whole.clone()[blocks[1]]
    inputs.block_table = first.block_table


class Group:
    """Layers of one KV-cache group, each a case of its own over the same sequences, and the queries kept of them."""

    def __init__(self, case: Case, *changes: dict[str, Any], seed: int = 0) -> None:
        self.case = case
        self.inputs = [make_inputs(replace(case, **change), DEVICE, 10 * seed + i) for i, change in enumerate(changes)]
        for i, inputs in enumerate(self.inputs):
            move_to_table_of(self.inputs[0], inputs)
            inputs.params = replace(inputs.params, scale=inputs.params.scale * (1 + i / 4))
        first = self.inputs[0]
        row_list = first.rows[: int(first.num_rows)]
        starts, lengths = first.query_start_loc.tolist(), first.seq_lens.tolist()
        tokens, self.batch = row_list[:, ROW_QUERY], row_list[:, ROW_BATCH].tolist()
        self.positions = [
            lengths[b] - starts[b + 1] + token for token, b in zip(tokens.tolist(), self.batch, strict=True)
        ]
        self.rows = torch.tensor(list(zip(self.batch, self.positions, strict=True)), dtype=torch.int32, device=DEVICE)
        place = (len(self.rows), len(changes), case.heads)
        # The ring has more slots than there are rows, and what the others hold must not matter.
        ring = torch.full((place[0] + 2, *place[1:], case.head_size), NAN).to(case.dtype).to(DEVICE)
        self.queries = ring[: place[0]]
        for i, inputs in enumerate(self.inputs):
            # torch can't index FP8 on a CPU
            self.queries[:, i] = inputs.q.float()[tokens.long()].to(case.dtype)
        spans = [[(start + r, end + r) for start, end in SPANS] for r in range(place[0])]
        self.spans = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
        self.chosen = torch.rand(place, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.6

    @property
    def layers(self) -> ProbedLayers:
        return ProbedLayers.of([i.k_cache for i in self.inputs], [i.params for i in self.inputs], self.case.heads)

    def probe(self, **options: Any) -> ProbeAnswers[Tensor]:
        launch = {name: options.pop(name) for name in ("scratch_bytes",) if name in options}
        return row_probe(
            self.queries, self.layers, self.inputs[0].block_table, self.rows, self.questions(**options), **launch
        )

    def questions(self, **options: Any) -> Questions[Tensor]:
        """By default 5 top positions, and 64 keys of the attention of every row."""
        defaults: dict[str, Any] = {"top_k": 5, "kept_attention": range(len(self.rows)), "max_attention_keys": 64}
        return Questions(positions=self.positions, spans=self.spans, chosen=self.chosen, **(defaults | options))

    def operands(self, row: int, layer: int) -> tuple[Tensor, Tensor, LayerParams]:
        """float64 query [H, D] and keys [n, Hkv, D] with their quantisation factors in them."""
        inputs = self.inputs[layer]
        q, keys, p = self.queries[row, layer].cpu().double(), inputs.keys[self.batch[row]].double(), inputs.params
        if p.q_scale is not None:
            q = q * p.q_scale.cpu().double()
        if p.k_scale is not None:
            keys = keys * p.k_scale.cpu().double().view(1, -1, 1)
        return q, keys, p

    def expected(self, row: int, layer: int) -> Tensor:
        """float64 [H, position + 1]."""
        q, keys, p = self.operands(row, layer)
        return row_probe_ref(
            q, keys, self.positions[row], scale=p.scale, sliding_window=p.sliding_window,
            chunk_size=p.chunk_size, soft_cap=p.soft_cap,
            alibi_slopes=None if p.alibi_slopes is None else p.alibi_slopes.cpu(),
            sinks=None if p.sinks is None else p.sinks.cpu(),
        )  # fmt: skip

    def tolerance(self, row: int, layer: int, expected: Tensor) -> float:
        """Of a mass: twice the error of plain float32 torch, and rounding."""
        q, keys, p = self.operands(row, layer)
        position = self.positions[row]
        keys = keys[: position + 1].repeat_interleave(len(q) // keys.shape[1], 1)
        raw = p.scale * torch.einsum("hd,nhd->hn", q.float(), keys.float())
        score = p.soft_cap * torch.tanh(raw / p.soft_cap) if p.soft_cap else raw
        age = position - torch.arange(position + 1)
        if p.alibi_slopes is not None:
            score = score - p.alibi_slopes.cpu()[:, None] * age
        score[:, age >= (p.sliding_window or INF)] = -INF
        score[:, age > position % (p.chunk_size or position + 1)] = -INF
        if p.sinks is not None:
            score = torch.cat([score, p.sinks.cpu().float()[:, None]], -1)
        torch_error = (torch.softmax(score, -1)[:, : position + 1] - expected).abs().nan_to_num(0.0).max()
        magnitude = p.scale * float(torch.einsum("hd,nhd->hn", q.abs(), keys.abs()).nan_to_num(0.0, 0.0).max())
        if p.alibi_slopes is not None:
            magnitude += float(p.alibi_slopes.max()) * position
        # Half of a soft cap's formula is the cap itself.
        return ORACLE_FACTOR * float(torch_error) + 2 * score_error(magnitude + (p.soft_cap or 0.0)) + SUM_ROUNDING


def assert_near(actual: Tensor, expected: Tensor, tolerance: float | Tensor, what: str) -> None:
    """Within the tolerance, and NaN in the same places."""
    assert actual.shape == expected.shape, what
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN stands elsewhere"
    excess = ((actual.double() - expected).abs() - tolerance).nan_to_num(0.0, neginf=0.0)
    assert not (excess > 0).any(), f"{what}: {float(excess.max()):.3g} over the tolerance"


def assert_top_k(positions: Tensor, mass: Tensor, expected: Tensor, visible: int, tolerance: float) -> None:
    """Of one row and head."""
    count = 0 if expected.isnan().any() else min(len(positions), visible)
    assert len(set(positions[:count].tolist())) == count
    assert (positions[count:] == NO_POSITION).all()
    assert (mass[count:] == 0).all()
    if count:
        assert int(positions[:count].min()) >= len(expected) - visible
        # Which of two nearly equal keys comes first is rounding; their masses are what they are.
        best = torch.tensor(top_k_ref(expected, count)[1], dtype=torch.float64)
        assert_near(mass[:count], best, tolerance, "top masses")
        assert_near(mass[:count], expected[positions[:count].long()], tolerance, "masses at the top positions")


def assert_answers(group: Group, answers: ProbeAnswers, max_attention_keys: int = 64) -> None:
    """Everything that was asked, against the reference; every row is a kept row."""
    a = [t.cpu() for t in (answers.topk_positions, answers.topk_mass, answers.span_mass, answers.chosen_sum)]
    topk_positions, topk_mass, span_mass, chosen_sum = a
    chosen, spans = group.chosen.cpu(), group.spans.tolist()
    assert [topk_positions.dtype, topk_mass.dtype, span_mass.dtype] == [torch.int32, torch.float32, torch.float32]
    assert chosen_sum.shape == (len(group.rows), max(group.positions) + 1)
    for r, position in enumerate(group.positions):
        total, total_tolerance = torch.zeros(chosen_sum.shape[1], dtype=torch.float64), 0.0
        kept = answers.attention[r].cpu()
        assert kept.dtype == torch.float16
        for i, inputs in enumerate(group.inputs):
            expected = group.expected(r, i)
            tolerance = group.tolerance(r, i, expected)
            p = inputs.params
            visible = min(position % (p.chunk_size or position + 1) + 1, p.sliding_window or position + 1)
            for head in range(group.case.heads):
                assert_top_k(topk_positions[r, i, head], topk_mass[r, i, head], expected[head], visible, tolerance)
            for s, (start, end) in enumerate(spans[r]):
                wanted = torch.tensor([span_mass_ref(of_head, start, end) for of_head in expected])
                wanted[expected[:, 0].isnan()] = NAN
                assert_near(span_mass[r, i, :, s], wanted, tolerance, f"span {s} of row {r}, layer {i}")
            last = expected[:, -max_attention_keys:]
            half = EPS16 * last.abs() + 2.0**-25  # half of the smallest step
            assert_near(kept[i], last, tolerance + half, f"row {r}, layer {i}")
            total[: position + 1] += expected[chosen[r, i]].sum(0)
            total_tolerance += tolerance * int(chosen[r, i].sum())
        if total.isnan().any():
            total[:] = NAN
        assert_near(chosen_sum[r], total, total_tolerance, f"chosen sum of row {r}")


LONG = replace(BASE, name="long", sequences=(Sequence(1, 700, 20), Sequence(1, 5, 5), Sequence(1, 320, 300)), page=24)
CASES: tuple[tuple[Case, tuple[dict[str, Any], ...]], ...] = (
    (MIXED, ({}, {})),
    (replace(BASE, name="one-key", sequences=(Sequence(1, 1, 1), Sequence(1, 1, 0))), ({}, {"sinks": False})),
    (replace(BASE, name="fp16-hnd", dtype=torch.float16, layout="hnd"), ({}, {})),
    (replace(BASE, name="fp32", dtype=torch.float32), ({}, {})),
    (replace(MIXED, name="windows"), ({"sliding_window": 33}, {}, {"sliding_window": 1})),
    (replace(MIXED, name="chunks"), ({"chunk_size": 33}, {}, {"sliding_window": 7}, {"chunk_size": 5})),
    (LONG, ({}, {"sliding_window": 100})),
    (replace(BASE, name="soft-caps", q_magnitude=4.0), ({"soft_cap": 5.0}, {}, {"soft_cap": 30.0})),
    (replace(BASE, name="alibi", alibi=True), ({}, {})),
    (replace(BASE, name="sinks", sinks=True), ({}, {"sliding_window": 16})),
    (
        replace(MIXED, name="all", sinks=True, alibi=True, dtype=torch.float16),
        ({"soft_cap": 8.0, "sliding_window": 40}, {"sliding_window": 7}),
    ),
    (replace(BASE, name="mha-d80", heads=3, kv_heads=3, head_size=80), ({}, {})),
    (replace(BASE, name="gqa7-d96", heads=14, head_size=96), ({}, {})),
    (replace(BASE, name="gqa16-d128", heads=16, kv_heads=1, head_size=128, page=32), ({}, {})),
    (replace(BASE, name="mqa20-d128", heads=20, kv_heads=1, head_size=128, page=64), ({}, {})),
    (replace(BASE, name="d256-page24", head_size=256, page=24), ({}, {})),
    (replace(BASE, name="page-256", page=256), ({}, {})),
    (replace(BASE, name="latent", heads=20, kv_heads=1, head_size=576), ({}, {})),
    (replace(BASE, name="latent-320-fp8", heads=4, kv_heads=1, head_size=320, kv_dtype=torch.float8_e4m3fn), ({}, {})),
    (replace(BASE, name="fp8-e4m3", kv_dtype=torch.float8_e4m3fn), ({"k_scale": 0.7}, {"k_scale": (2.0, 0.5)})),
    (replace(BASE, name="fp8-e5m2", kv_dtype=torch.float8_e5m2, dtype=torch.float16), ({"k_scale": (0.5, 1.5)}, {})),
    (
        replace(BASE, name="fp8-q", kv_dtype=torch.float8_e4m3fn, dtype=torch.float8_e4m3fn, page=24),
        ({"q_scale": 0.5, "k_scale": 2.0}, {"q_scale": 1.5}),
    ),
)


class TestAgainstReference:
    @pytest.mark.parametrize(("case", "changes"), CASES, ids=[case.name for case, _ in CASES])
    def test_every_answer(self, case: Case, changes: tuple[dict[str, Any], ...]) -> None:
        """Error <= 2 x float32 torch's error + rounding; rows of several sequences in layers that differ."""
        group = Group(case, *changes)
        assert_answers(group, group.probe())

    @settings(max_examples=25)
    @given(st.data())
    def test_any_group(self, data: st.DataObject) -> None:
        """Random lengths, rows, shapes and features."""
        lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
        sequences = tuple(Sequence(data.draw(st.integers(1, min(n, 3))), n, n) for n in lengths)
        kv_heads = data.draw(st.integers(1, 2))
        case = Case(
            "random",
            sequences,
            heads=kv_heads * data.draw(st.integers(1, 16)),
            kv_heads=kv_heads,
            head_size=data.draw(st.sampled_from([64, 80, 96, 128])),
            page=data.draw(st.sampled_from([8, 16, 20, 48, 64, 128])),
            dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
            alibi=data.draw(st.booleans()),
            sinks=data.draw(st.booleans()),
        )
        layer = st.fixed_dictionaries(
            {
                "sliding_window": st.sampled_from([None, 1, 9, 70]),
                "soft_cap": st.sampled_from([0.0, 4.0]),
                "k_scale": st.sampled_from([None, 0.5]),
            }
        )
        group = Group(case, *data.draw(st.lists(layer, min_size=1, max_size=3)), seed=data.draw(st.integers(0, 99)))
        assert_answers(group, group.probe())

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
    @pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
    def test_long_and_many_rows(self, case: Case) -> None:
        """The same over the whole GPU, in several chunks."""
        first = make_inputs(case, "cpu").rows
        listed = case.rows or tuple((int(b), 0) for b in first[:, ROW_BATCH].tolist() if b >= 0)
        group = Group(replace(case, rows=listed[:: max(len(listed) // 8, 1)]), {}, {"sliding_window": 300}, {})
        assert_answers(group, group.probe(max_attention_keys=4096, scratch_bytes=4 << 20), max_attention_keys=4096)


class TestQuestions:
    def test_more_top_positions_than_keys(self) -> None:
        """Every visible key has its mass, in float32; behind them there is nothing."""
        group = Group(replace(MIXED, sinks=True), {}, {"sliding_window": 20})
        answers = group.probe(top_k=150)
        assert answers.topk_mass.shape == (len(group.rows), 2, group.case.heads, 150)
        assert_answers(group, answers)

    def test_nothing_asked(self) -> None:
        """No top positions, no spans, nothing chosen and no rows: the results have no width, or are 0."""
        group = Group(BASE, {}, {})
        group.spans, group.chosen = group.spans[:, :0], torch.zeros_like(group.chosen)
        answers = group.probe(top_k=0, kept_attention=())
        assert [answers.topk_positions.shape[3], answers.topk_mass.shape[3], answers.span_mass.shape[3]] == [0, 0, 0]
        assert answers.chosen_sum.shape == (3, 130)
        assert not answers.chosen_sum.any()
        assert answers.attention == ()

    def test_no_rows(self) -> None:
        """Zero rows have zero answers."""
        group = Group(BASE, {})
        group.queries, group.rows, group.positions = group.queries[:0], group.rows[:0], []
        group.spans, group.chosen = group.spans[:0], group.chosen[:0]
        answers = group.probe()
        assert answers.topk_mass.shape == (0, 1, group.case.heads, 5)
        assert answers.chosen_sum.shape == (0, 0)

    def test_spans_of_each_row(self) -> None:
        """Rows have spans of their own; what lies behind a row's position has no mass, an empty span has none."""
        group = Group(replace(BASE, sinks=True), {}, {})
        group.spans = torch.tensor(
            [[(5, 9), (0, 0)], [(0, 1), (7, 200)], [(100, 10**9), (129, 131)]], dtype=torch.int32, device=DEVICE
        )
        answers = group.probe()
        assert_answers(group, answers)
        assert (answers.span_mass[0, :, :, 1] == 0).all()
        assert (answers.span_mass[1, :, :, 1] == 0).all()

    @pytest.mark.parametrize("max_attention_keys", [1, 37, 1000])
    def test_some_rows_are_kept(self, max_attention_keys: int) -> None:
        """In the order asked, the last keys up to the own position, as in a probe that keeps all."""
        group = Group(BASE, {}, {"sliding_window": 8})
        kept = group.probe(kept_attention=(2, 0), max_attention_keys=max_attention_keys).attention
        whole = group.probe(max_attention_keys=1000).attention
        assert [row.shape[2] for row in whole] == [37, 1, 130]
        for row, of_whole in zip(kept, (whole[2], whole[0]), strict=True):
            assert torch.equal(row, of_whole[..., -max_attention_keys:])

    @pytest.mark.parametrize("scratch_bytes", [1, 1 << 24])
    def test_rows_to_be_summed(self, scratch_bytes: int) -> None:
        """Whole, in float32 and by position; a head without an answer has none at the keys that its row sees."""
        group = Group(BASE, {"keys": ((2, 128, 1, NAN),)}, {"sliding_window": 8}, {"sliding_window": 8})
        group.inputs[2].k_cache[group.inputs[2].block_table[2, 128 // BASE.page], 1, 128 % BASE.page, 0] = NAN
        received = group.probe(received=(2, 1), scratch_bytes=scratch_bytes).received
        for found, row in zip(received, (2, 1), strict=True):
            assert found.dtype == torch.float32
            assert found.shape == (3, 4, group.positions[row] + 1)
            for layer in range(2):
                expected = group.expected(row, layer)
                assert_near(found[layer].cpu(), expected, group.tolerance(row, layer, expected), f"row {row}")
        bad = received[0][2, 2:].cpu()
        assert bad[:, -8:].isnan().all()
        assert (bad[:, :-8] == 0).all()

    def test_chunks_are_not_seen(self) -> None:
        """Chunks of layers, and of rows, give the same answers; only sums over layers round in another order."""
        group = Group(replace(MIXED, sinks=True), {}, {"sliding_window": 9}, {"soft_cap": 3.0})
        whole = group.probe()
        one_layer = 4 * len(group.rows) * group.case.heads * 192
        for scratch_bytes in (1, one_layer // 3, one_layer, 2 * one_layer):
            parts = group.probe(scratch_bytes=scratch_bytes)
            for name in ("topk_positions", "topk_mass", "span_mass"):
                # Reductions on a GPU may be cut in another way.
                tolerance = SUM_ROUNDING if ON_GPU else 0.0
                torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=tolerance)
            for part, of_whole in zip(parts.attention, whole.attention, strict=True):
                assert torch.equal(part, of_whole)
            assert_answers(group, parts)

    def test_a_chunk_holds_what_fits(self) -> None:
        """The scores of a launch take at most the given bytes, unless one row of one layer takes more."""
        group = Group(BASE, {}, {}, {})
        one = 4 * group.case.heads * 192
        for scratch_bytes, expected in ((1, one), (2 * one, 2 * one), (3 * one, 3 * one), (7 * one, 6 * one)):
            with Operations() as seen:
                group.probe(scratch_bytes=scratch_bytes)
            assert max(seen.softmax_bytes) == expected
            assert sum(seen.softmax_bytes) == 9 * one


class TestNotFinite:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("soft_cap", [0.0, 5.0])
    def test_a_bad_key_spoils_its_heads_only(self, value: float, soft_cap: float) -> None:
        """In one layer, KV head and sequence: no positions, NaN masses; everything else is as if it were not there."""
        case = replace(BASE, soft_cap=soft_cap, alibi=True, sinks=True)
        group, clean = Group(case, {}, {"keys": ((0, 3, 1, value),)}), Group(case, {}, {})
        answers, without = group.probe(), clean.probe()
        assert_answers(group, answers)
        bad = torch.zeros(3, 2, 4, dtype=torch.bool)
        bad[0, 1, 2:] = True
        assert torch.equal(answers.span_mass.isnan().all(-1).cpu(), bad)
        assert torch.equal((answers.topk_positions == NO_POSITION).all(-1).cpu(), bad)
        for name in ("topk_positions", "topk_mass", "span_mass"):
            assert torch.equal(getattr(answers, name)[~bad], getattr(without, name)[~bad]), name

    @pytest.mark.parametrize("picked", [True, False])
    def test_only_a_chosen_head_spoils_the_sum(self, picked: bool) -> None:
        """A row's sum is NaN if one of its chosen heads has a bad score, and is untouched by the others."""
        group = Group(BASE, {}, {"keys": ((0, 3, 1, NAN),)})
        group.chosen[:] = True
        group.chosen[0, 1, 2] = False
        group.chosen[0, 1, 3] = picked
        answers = group.probe()
        assert_answers(group, answers)
        assert answers.chosen_sum.isnan().any(-1).tolist() == [picked, False, False]

    def test_a_bad_key_that_is_not_visible(self) -> None:
        """Before the window or behind the own position it is not read."""
        case = replace(MIXED, rows=((0, 0), (1, 0)), sliding_window=20)
        bad = {"keys": ((0, 66, 0, NAN), (0, 45, 1, INF), (1, 108, 0, NAN))}
        group = Group(case, bad, bad)
        assert group.positions == [65, 128]
        answers = group.probe()
        assert not answers.span_mass.isnan().any()
        assert_answers(group, answers)

    def test_a_product_that_overflows(self) -> None:
        """q.k is finite and its product with the scale is not: the head is bad, also where a soft cap would hide it."""
        group = Group(replace(BASE, dtype=torch.float32, soft_cap=5.0), {})
        group.inputs[0].params = replace(group.inputs[0].params, scale=3e38)
        answers = group.probe()
        assert answers.span_mass.isnan().all()
        assert (answers.topk_positions == NO_POSITION).all()


class TestMemory:
    @pytest.mark.parametrize("page", [16, 24])
    def test_pages_before_the_window(self, page: int) -> None:
        """vLLM may have taken them away: what the block table says of them is not followed."""
        case = replace(BASE, page=page, sequences=(Sequence(1, 130, 10),), sliding_window=20)
        group = Group(case, {}, {})
        group.inputs[0].block_table[0, : 110 // page] = 2**30  # following it is an illegal access
        assert_answers(group, group.probe())

    def test_addresses_beyond_32_bits(self) -> None:
        """Pages 2^31 elements apart from the first; memory between them is never touched."""
        case = replace(BASE, sequences=(Sequence(1, 40, 10),), kv_dtype=torch.float8_e4m3fn)
        group, far = Group(case, {}), Group(case, {})
        cache = far.inputs[0].k_cache
        num_blocks, kv_heads, page, head_size = cache.shape
        stride = 2**29
        memory = torch.empty((num_blocks - 1) * stride + kv_heads * page * head_size, dtype=torch.int8, device=DEVICE)
        moved = memory.as_strided(cache.shape, (stride, page * head_size, head_size, 1))
        moved[:] = cache.view(torch.int8)
        assert int(far.inputs[0].block_table[0, :3].max()) * stride >= 2**31
        far.inputs[0].k_cache = moved.view(torch.float8_e4m3fn)
        assert torch.equal(far.probe().topk_mass, group.probe().topk_mass)

    def test_addresses_that_are_not_aligned(self) -> None:
        """Caches at any element's address are read as they are."""
        group = Group(BASE, {}, {})
        for inputs in group.inputs:
            shape = inputs.k_cache.shape
            memory = torch.empty(inputs.k_cache.numel() + 1, dtype=inputs.k_cache.dtype, device=DEVICE)
            moved = memory[1:].view(shape)
            moved[:] = inputs.k_cache
            inputs.k_cache = moved
        assert group.layers.alignment == 2
        assert_answers(group, group.probe())

    def test_alignment(self) -> None:
        """As far as all addresses go, but not over 16 bytes."""
        assert Group(BASE, {}, {}).layers.alignment == 16


class Operations(TorchDispatchMode):
    """Sees every torch operation: which ones need the device's answer, and how large the softmax is."""

    # Reading a number, and results whose size depends on values.
    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.softmax_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING or (name.startswith("index") and self._is_boolean(args)):
            self.waiting.append(name)
        if name == "_softmax":
            self.softmax_bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_boolean(args: tuple) -> bool:
        indices = args[1] if len(args) > 1 and isinstance(args[1], Items) else ()
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


class TestNeverWaits:
    def test_no_operation_needs_an_answer_of_the_device(self) -> None:
        """No number is read back and no result's size depends on values, whatever is asked."""
        group = Group(replace(MIXED, alibi=True, sinks=True, soft_cap=5.0), {}, {"keys": ((0, 3, 1, NAN),)})
        layers = group.layers
        with Operations() as seen:
            row_probe(
                group.queries, layers, group.inputs[0].block_table, group.rows,
                group.questions(top_k=200, kept_attention=(0, 3), max_attention_keys=50, received=(1, 3)),
                scratch_bytes=1 << 14,
            )  # fmt: skip
        assert seen.waiting == []
        assert len(seen.softmax_bytes) > 1

    @pytest.mark.gpu
    @pytest.mark.skipif(not ON_GPU, reason="there is nothing to wait for")
    def test_the_driver_is_not_asked_to_wait(self) -> None:
        """torch's own watch over synchronising calls finds none."""
        group = Group(replace(MIXED, sinks=True), {}, {})
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                row_probe(
                    group.queries, group.layers, group.inputs[0].block_table, group.rows,
                    group.questions(kept_attention=(0, 3), max_attention_keys=50, received=(1, 3)),
                )  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")


class TestErrors:
    def test_no_layers(self) -> None:
        """Says how many there must be."""
        with pytest.raises(ValueError, match="caches must be one per layer and at least one, got 0 for 0 layers"):
            ProbedLayers.of([], [], 4)

    @pytest.mark.parametrize(
        "change", [{"kv_dtype": torch.float16}, {"layout": "hnd"}, {"page": 32}, {"head_size": 80}, {"kv_heads": 4}]
    )
    def test_caches_that_differ(self, change: dict[str, Any]) -> None:
        """Another dtype, layout or shape can't be read by the same launch; another number of blocks can."""
        inputs = [make_inputs(case, DEVICE) for case in (BASE, replace(BASE, **change))]
        with pytest.raises(ValueError, match=r"caches must have .* of the first, .* at 1; probe such layers by them"):
            ProbedLayers.of([i.k_cache for i in inputs], [i.params for i in inputs], 4)
        cache, params = inputs[0].k_cache, inputs[0].params
        assert len(ProbedLayers.of([cache, cache[:-1]], [params] * 2, 4).key_pointers) == 2

    @pytest.mark.parametrize("name", ["alibi", "sinks"])
    def test_a_feature_of_some_layers_only(self, name: str) -> None:
        """ALiBi and learned sinks are of all layers or of none."""
        inputs = [make_inputs(case, DEVICE) for case in (replace(BASE, **{name: True}), BASE)]
        with pytest.raises(ValueError, match=rf"{name}\w* must be \[4\] in all layers or None in all, got .*None"):
            ProbedLayers.of([i.k_cache for i in inputs], [i.params for i in inputs], 4)

    def test_shapes_the_kernel_does_not_do(self) -> None:
        """Names the shape and the remedy."""
        params = LayerParams(scale=1.0)
        with pytest.raises(ValueError, match=r"head size of at most 576 .* do not probe these layers"):
            ProbedLayers.of([torch.empty(1, 2, 16, 592)], [params], 4)
        with pytest.raises(ValueError, match=r"KV heads that divide the 4 query heads"):
            ProbedLayers.of([torch.empty(1, 3, 16, 64)], [params], 4)
        with pytest.raises(ValueError, match="contiguous in their last dimension"):
            ProbedLayers.of([torch.empty(1, 2, 16, 128)[..., ::2]], [params], 4)
        wide = torch.empty_strided((1, 2, 16, 64), (2**33, 2**32, 2**28, 1), device="meta")
        with pytest.raises(ValueError, match="must span at most 2147483647 elements, got 4294967296"):
            ProbedLayers.of([wide], [params], 4)

    @pytest.mark.parametrize("name", ["queries", "rows", "spans", "chosen"])
    def test_arguments_of_other_rows(self, name: str) -> None:
        """Names the argument, what it must be and what it is."""
        group = Group(BASE, {}, {})
        setattr(group, name, getattr(group, name)[:2])
        with pytest.raises(ValueError, match=rf"{name} must be \[3, .*\] .* 3 positions, got \[2, .*\]"):
            group.probe()

    def test_queries_not_contiguous_in_the_head(self) -> None:
        """A stride in the last dimension is refused."""
        group = Group(BASE, {}, {})
        group.queries = group.queries.repeat_interleave(2, 3)[..., ::2]
        with pytest.raises(ValueError, match="must be contiguous in their last dimension"):
            group.probe()
