"""Triton kernels are compiled to programs for GPUs, without one; and only in warm-up, whatever steps bring."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.kernels.absent_gpu import SHARED_MEMORY, AbsentGpu, absent_gpu

# isort: split
from glassbox.core.errors import ErrorCounter
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels.cached_layers import CachedLayers, ProbedLayers
from glassbox.kernels.probe_answers import Questions
from glassbox.kernels.row_keep import Compiled, row_keep
from glassbox.kernels.row_output import row_output
from glassbox.kernels.row_probe import row_probe
from glassbox.kernels.row_stats import LayerAccumulators, RowStatsWorkspace, row_stats, row_stats_layers
from glassbox.measure.contract import AskedPrompt, Forward, LatentForward
from glassbox.measure.gpu_prompts import GpuPrompts
from tests.kernels.inputs_layer import InputsLayer
from tests.kernels.row_stats_cases import FP8, Case, Inputs, Sequence, make_accumulators, make_inputs

BASE: Final = Case(
    "bfloat16", (Sequence(1, 37, 20), Sequence(40, 70, 100)), heads=8, kv_heads=2, head_size=128, rows=((0, 0), (1, 4))
)
LATENT: Final = replace(BASE, name="latent", heads=16, kv_heads=1, head_size=576, page=64)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> AbsentGpu:
    return absent_gpu(monkeypatch, 90)


class Rows:
    """A layer's launch as `GpuMeasurer` makes it: with everything that is kept of traced rows.

    Args:
        case: of the layer.
        layers, local: of the worker, and which of them it is.
    """

    def __init__(self, case: Case, layers: int = 2, local: int = 1) -> None:
        self.case, self.inputs = case, make_inputs(case, "cpu")
        self.workspace = RowStatsWorkspace("cpu", case.max_rows, case.heads)
        self.accumulators = make_accumulators(case.heads, "cpu")
        place, tokens = (12, layers, case.heads), len(self.inputs.q)
        model = torch.bfloat16 if case.dtype in FP8 else case.dtype
        value_size = 512 if case.head_size > 256 else case.head_size
        kv = torch.zeros(2, tokens, case.kv_heads, case.head_size, dtype=model)
        self.starts = torch.zeros(layers, dtype=torch.int32)
        self.kept: dict[str, Tensor | None] = {
            "ring": torch.zeros(*place, NUM_STATISTICS + 1)[:, local],
            "previous": torch.zeros(place)[:, local],
            "queries": torch.zeros(*place, case.head_size, dtype=case.dtype)[:, local],
            "output": torch.zeros(tokens, case.heads, value_size, dtype=model),
            "outputs": torch.zeros(*place, value_size, dtype=model)[:, local],
            "list_start": self.starts[local:],
        }
        if case.head_size <= 256:
            kept_kv = torch.zeros(12, layers, 2, case.kv_heads, case.head_size, dtype=model)[:, local]
            self.kept |= {"key": kv[0], "value": kv[1], "kept_kv": kept_kv}

    def launch(self, **more: Any) -> None:
        i = self.inputs
        row_stats(
            i.q, i.k_cache, i.block_table, i.query_start_loc, i.seq_lens, i.rows, i.num_rows, i.params,
            self.accumulators, self.workspace, **(self.kept | more),
        )  # fmt: skip


class KeptLaunches:
    """Few rows of two layers, kept and measured at once, as `KeptRows` launches them.

    Args:
        case: of the layers.
        few: so many rows have room.
    """

    def __init__(self, case: Case, few: int = 16) -> None:
        self.rows, self.few = Rows(case, layers=3), few
        self.compiled: Compiled = {}
        self.workspace = self.rows.workspace
        self.queries = torch.zeros(few, 3, case.heads, case.head_size, dtype=case.dtype)

    def keep(self, local: int = 1, **more: Any) -> None:
        i, kept = self.rows.inputs, {name: one for name, one in self.rows.kept.items() if name not in NOT_KEPT}
        row_keep(
            i.q, i.rows, i.num_rows, self.queries[:, local], like=i.k_cache, compiled=self.compiled, **(kept | more)
        )  # fmt: skip

    def measure(self, *places: int) -> None:
        """In these layers."""
        i, a, case = self.rows.inputs, self.rows.accumulators, self.rows.case
        of_all = (torch.stack([one] * 3) for one in (a.counts, a.sums, a.rows, a.nonfinite))
        row_stats_layers(
            self.queries,
            ProbedLayers.of([i.k_cache] * len(places), [i.params] * len(places), case.heads),
            torch.tensor(places, dtype=torch.int32),
            i.block_table, i.query_start_loc, i.seq_lens, i.rows, i.num_rows, i.params,
            LayerAccumulators(*of_all, torch.stack([a.window_max] * 3, 1), a.window_slot, a.bounds), self.workspace,
            ring=torch.zeros(12, 3, case.heads, NUM_STATISTICS + 1), previous=torch.zeros(12, 3, case.heads),
            list_start=self.rows.starts,
        )  # fmt: skip


NOT_KEPT: Final = ("ring", "previous")


def queries_of(case: Case, inputs: Inputs) -> Tensor:
    """[R, L, H, D] of two rows in one layer."""
    return inputs.q[:2].unsqueeze(1)


def probe(case: Case, rows: Tensor | None = None) -> None:
    """What traced rows are asked, of two rows in one layer."""
    i = make_inputs(case, "cpu")
    rows = torch.tensor([[0, 36], [1, 34]], dtype=torch.int32) if rows is None else rows
    row_probe(
        queries_of(case, i), ProbedLayers.of([i.k_cache], [i.params], case.heads), i.block_table, rows,
        Questions(
            positions=rows[:, 1].tolist(), spans=torch.zeros(2, 0, 2, dtype=torch.int32),
            chosen=torch.ones(2, 1, case.heads, dtype=torch.bool), top_k=1, kept_attention=(), max_attention_keys=64,
        ),
    )  # fmt: skip


def check(case: Case, rows: Tensor | None = None) -> None:
    """The outputs of two rows in one layer."""
    i = make_inputs(case, "cpu")
    rows = torch.tensor([[0, 36], [1, 34]], dtype=torch.int32) if rows is None else rows
    wide = case.head_size > 256
    values = i.k_cache[..., :512] if wide else i.k_cache
    model = torch.bfloat16 if case.dtype in FP8 else case.dtype
    outputs = torch.zeros(2, 1, case.heads, values.shape[3], dtype=model)
    kept_kv = None if wide else torch.zeros(2, 1, 2, case.kv_heads, case.head_size, dtype=model)
    row_output(
        queries_of(case, i), outputs, CachedLayers.of([i.k_cache], [values], [i.params], case.heads), i.block_table,
        rows, kept_kv,
    )  # fmt: skip


class PromptLayer(InputsLayer):
    """A layer that whole prompts are asked of."""

    def __init__(self, case: Case) -> None:
        super().__init__(make_inputs(case, "cpu"), case.heads, case.head_size)

    @property
    def forward(self) -> Forward | LatentForward:
        return Forward(self.inputs.q, None, None, None)


class LatentPromptLayer(PromptLayer):
    """Likewise with latent attention: 128 elements of a head without position, and 64 with."""

    @property
    def forward(self) -> LatentForward:
        def absorb(plain: Tensor) -> tuple[Tensor, Tensor]:
            return plain.new_zeros(*plain.shape[:2], 512), plain[..., 128:]

        def head_keys(vectors: Tensor, heads: Tensor) -> Tensor:
            return vectors.new_zeros(len(heads), len(vectors), 192)

        plain = torch.zeros(40, self.num_heads, 192, dtype=torch.bfloat16)
        return LatentForward(None, None, plain, absorb, head_keys)


class Prompts:
    """Whole prompts of one layer."""

    def __init__(self, layer: PromptLayer) -> None:
        self.layer, self.errors = layer, ErrorCounter(logging.getLogger("test"))
        self.prompts = GpuPrompts(torch.device("cpu"), 4, 16, self.errors)

    def compile(self) -> None:
        self.prompts.compile(self.layer, self.layer.forward, self.layer.keys())
        assert {} == self.errors.counts()

    def measure(self, **change: Any) -> None:
        asked = AskedPrompt(
            batch=1, token=0, num_rows=16, position=32, local_layers=frozenset({0}), heads=(0, 1, 5),
            spans=np.zeros((0, 2), dtype=np.int32), grams=False, kept=False, keys_from=0,
        )  # fmt: skip
        self.prompts.begin([replace(asked, **change)])
        self.prompts.measure(0, self.layer, self.layer.forward, self.layer.keys(), self.layer.tables())
        assert {} == self.errors.counts()


MANY: Final = replace(LATENT, name="latent, 128 heads", heads=128)
FP8_CACHE: Final = replace(BASE, name="FP8 cache", kv_dtype=FP8[0], k_scale=(0.5, 2.0))
LARGE: Final = replace(
    BASE, name="large heads, all terms", head_size=256, dtype=torch.float16, soft_cap=8.0, alibi=True, sinks=True,
    sliding_window=33,
)  # fmt: skip
SMALL: Final = replace(BASE, name="14 heads of 64", heads=14, head_size=64)
LARGE_PLAIN: Final = replace(LARGE, name="large heads, those terms that are kept", sinks=False)


class TestPrograms:
    """Each kernel becomes a program that fits the GPU, if need be by another tiling."""

    @pytest.mark.parametrize(
        ("capability", "case"),
        [*((90, case) for case in (BASE, FP8_CACHE, LARGE, LATENT, MANY)), *((80, case) for case in (BASE, LATENT))],
        ids=lambda one: one.name if isinstance(one, Case) else f"sm_{one}",
    )
    def test_row_stats(self, monkeypatch: pytest.MonkeyPatch, capability: int, case: Case) -> None:
        gpu = absent_gpu(monkeypatch, capability)
        Rows(case).launch()
        assert_fits(gpu, "_row_stats_kernel")

    @pytest.mark.parametrize(
        ("capability", "case", "few"),
        [(80, BASE, 16), (90, BASE, 16), (90, BASE, 256), (90, SMALL, 16), (90, LARGE_PLAIN, 16)],
        ids=lambda one: one.name if isinstance(one, Case) else str(one),
    )
    def test_kept_rows(self, monkeypatch: pytest.MonkeyPatch, capability: int, case: Case, few: int) -> None:
        gpu = absent_gpu(monkeypatch, capability)
        kept = KeptLaunches(replace(case, max_rows=few), few)
        kept.keep()
        kept.measure(0, 2)
        assert_fits(gpu, "_row_keep_kernel", "_row_stats_kernel")

    @pytest.mark.parametrize("case", [BASE, LATENT], ids=lambda case: case.name)
    def test_row_probe(self, hopper: AbsentGpu, case: Case) -> None:
        probe(case)
        assert_fits(hopper, "_row_probe_kernel")

    @pytest.mark.parametrize("case", [BASE, LATENT], ids=lambda case: case.name)
    def test_row_output(self, hopper: AbsentGpu, case: Case) -> None:
        check(case)
        assert_fits(hopper, "_row_output_kernel")

    @pytest.mark.parametrize(
        ("capability", "layer", "case"),
        [
            *((capability, PromptLayer, case) for capability in (80, 90) for case in (BASE, LARGE)),
            (90, LatentPromptLayer, LATENT),
        ],
        ids=["sm_80", "sm_80-large", "sm_90", "sm_90-large", "sm_90-latent"],
    )
    def test_prompt_rows(
        self, monkeypatch: pytest.MonkeyPatch, capability: int, layer: type[PromptLayer], case: Case
    ) -> None:
        """With sums of squares, too."""
        gpu = absent_gpu(monkeypatch, capability)
        Prompts(layer(case)).compile()
        assert_fits(gpu, "_prompt_rows_kernel", "_received_kernel", "_span_mass_kernel", "_received_kernel")


def assert_fits(gpu: AbsentGpu, *kernels: str) -> None:
    """These were compiled last, fit, and compute as on the GPUs on which they were measured."""
    last = gpu.compiled[-len(kernels) :]
    assert list(kernels) == [one.kernel for one in last]
    assert all(one.fused for one in last)
    assert max(one.shared for one in last) <= SHARED_MEMORY[gpu.capability]


class TestSteps:
    """What differs between steps, requests and layers takes the programs of warm-up: a step that waited for the
    compiler would be seconds late, and a capture in which it loads a program may end."""

    def test_rows(self, hopper: AbsentGpu) -> None:
        """Of another layer: other places in the memory that layers share, strides and windows."""
        Rows(BASE, local=0).launch()
        known = len(hopper.compiled)
        other = Rows(BASE, layers=3, local=2)
        i = other.inputs
        i.rows = torch.zeros(i.rows.numel() + 1, dtype=torch.int32)[1:].view_as(i.rows)
        i.num_rows = torch.ones(2, dtype=torch.int32)[1:]
        i.block_table = torch.zeros(2, 17, dtype=torch.int32)[:, 1:]
        i.params = replace(i.params, sliding_window=16)
        other.launch(sink_tokens=1, local_window=16, tokens=(1, 16))
        assert known == len(hopper.compiled)

    def test_kept_rows(self, hopper: AbsentGpu) -> None:
        """Other layers, and more of them; another step's queries at other places, and as many as a graph has."""
        kept = KeptLaunches(BASE)
        kept.keep()
        kept.measure(1)
        known = len(hopper.compiled)
        kept.rows.inputs.q = torch.zeros(50, 3 * BASE.heads, BASE.head_size, dtype=BASE.dtype)[
            3:, BASE.heads : 2 * BASE.heads
        ]
        kept.queries = kept.queries.clone()
        kept.keep(local=2, list_start=kept.rows.starts[1:])
        kept.measure(2, 0, 1)
        kept.workspace = RowStatsWorkspace("cpu", BASE.max_rows, BASE.heads)  # knows nothing of it
        kept.compiled = {}
        kept.keep(local=0)
        kept.measure(0, 1)
        assert known == len(hopper.compiled)

    def test_latent_rows(self, hopper: AbsentGpu) -> None:
        """Of prompts, whose queries are absorbed for each row by itself."""
        case = replace(LATENT, heads=8)
        Rows(case).launch(first_row=0, tokens=(0, 40))
        known = len(hopper.compiled)
        for first_row, tokens in ((1, (1, 2)), (16, (16, 4096))):
            Rows(case).launch(first_row=first_row, tokens=tokens)
        assert known == len(hopper.compiled)

    @pytest.mark.parametrize("latent", [False, True], ids=["plain", "latent"])
    def test_prompts(self, hopper: AbsentGpu, *, latent: bool) -> None:
        """Any number of rows, keys, heads and spans, at any place of the batch."""
        prompts = Prompts(LatentPromptLayer(LATENT) if latent else PromptLayer(BASE))
        prompts.compile()
        known = len(hopper.compiled)
        prompts.measure()
        prompts.measure(num_rows=1, position=0, heads=(0,))
        prompts.measure(token=3, num_rows=17, position=1, batch=0, squares=True)
        prompts.measure(spans=np.array([(0, 16)], dtype=np.int32), heads=(7,))
        prompts.measure(spans=np.array([(1, 2)] * 16, dtype=np.int32), squares=True, num_rows=37)
        assert known == len(hopper.compiled)

    def test_a_prompt_that_ends_in_a_graph(self, hopper: AbsentGpu) -> None:
        """Its queries lie among those of all layers."""
        prompts = Prompts(PromptLayer(BASE))
        prompts.compile()
        known = len(hopper.compiled)
        kept = torch.zeros(12, 3, BASE.heads, BASE.head_size, dtype=BASE.dtype)
        prompts.measure(num_rows=1)
        prompts.prompts.measure_kept(0, 0, prompts.layer, kept[5:6, 1], prompts.layer.tables())
        assert {} == prompts.errors.counts()
        assert known == len(hopper.compiled)

    @pytest.mark.parametrize("ask", [probe, check])
    def test_what_rows_are_asked(self, hopper: AbsentGpu, ask: Callable[..., None]) -> None:
        """As many rows as there are, wherever they stand."""
        ask(BASE)
        known = len(hopper.compiled)
        for rows in ([[0, 0], [0, 1]], [[1, 33], [1, 16]]):
            ask(BASE, torch.tensor(rows, dtype=torch.int32))
        assert known == len(hopper.compiled)
