"""Rows of latent attention (MLA) over a cache that vLLM's backend has written, without an engine: prompts in chunks,
behind cached prefixes, beside rows of decoding requests. Their statistics are those of the materialised heads.
"""

from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.attention.mla_forward import latent_forward
from glassbox.adapter.attention.mla_view import latent_view_of
from glassbox.core.errors import ErrorCounter
from glassbox.core.rows import ROW_DECODE
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.kernels.reference.row_probe import row_probe_ref
from glassbox.kernels.reference.row_stats import row_stats_ref
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.contract import AskedPrompt, BatchTables, MeasuredLayers, StepLayers
from glassbox.measure.cpu_measurer import CpuMeasurer
from glassbox.processes.worker.traces.active import ActiveTrace
from glassbox.processes.worker.traces.traced_step import TracedPrompt, TracedStep
from glassbox.store.trace_record import TraceOptions
from tests.kernels.row_lists import entry
from tests.kernels.tolerances import assert_two_oracles
from tests.trace_samples import make_host

pytestmark = pytest.mark.integration

LATENT, ROTARY, NOPE, HEADS, BLOCK, BLOCKS = 512, 64, 32, 4, 16, 40
NAME: Final = "model.layers.0.self_attn.attn"
# Tokens of this step and of the whole sequence, and the prompt's length. vLLM orders them so that those which it
# decodes, one token each, come first; a preempted request that is resumed is prefilled, answers included.
SEQUENCES: Final = ((1, 71, 40), (1, 18, 17), (30, 90, 200), (7, 7, 7), (5, 60, 56))
DECODED: Final = 2
# Rows by sequence and token of the step.
ROWS: Final = ((0, 0), (1, 0), (2, 0), (2, 17), (2, 29), (3, 6), (4, 1), (4, 4))


class VllmLayer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


class Step:
    """One step of a layer, with everything that vLLM gives an observed impl."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(4)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.weights = normal(HEADS, NOPE, LATENT) * LATENT**-0.5
        self.scale = (NOPE + ROTARY) ** -0.5
        # Its constructor wants a whole configuration; what writes a cache reads nothing of it.
        self.impl: Any = object.__new__(CPUMLAImpl)
        vars(self.impl).update(
            scale=self.scale,
            kv_cache_dtype="auto",
            num_kv_heads=1,
            supports_quant_query_input=False,
            glassbox_view=None,
        )
        cache = torch.full((BLOCKS, BLOCK, LATENT + ROTARY), torch.nan, dtype=dtype)
        self.layer: Any = VllmLayer(
            layer_name=NAME, impl=self.impl, kv_cache=cache, num_heads=HEADS, kv_lora_rank=LATENT,
            qk_nope_head_dim=NOPE, qk_rope_head_dim=ROTARY, W_UK_T=self.weights, _k_scale=torch.ones(()),
            _k_scale_float=1.0,
        )  # fmt: skip
        self.impl.glassbox_finder = CacheFinder(dtype, BLOCKS)
        needed = [-(-length // BLOCK) for _, length, _ in SEQUENCES]
        order = torch.randperm(BLOCKS, generator=generator).int()
        self.table = torch.zeros(len(SEQUENCES), max(needed), dtype=torch.int32)
        self.latents = []
        for b, (_, length, _) in enumerate(SEQUENCES):
            self.table[b, : needed[b]] = order[sum(needed[:b]) :][: needed[b]]
            latent, rotary = normal(length, LATENT), normal(length, ROTARY)
            self.latents.append((latent, rotary))
            position = torch.arange(length)
            slots = self.table[b, position // BLOCK].long() * BLOCK + position % BLOCK
            self.impl.do_kv_cache_update(latent, rotary.unsqueeze(1), cache, slots, "auto", torch.ones(()))
        self.starts = np.cumsum([0, *(tokens for tokens, _, _ in SEQUENCES)])
        self.q = normal(int(self.starts[-1]), HEADS, NOPE + ROTARY) * 2
        self.positions = [SEQUENCES[b][1] - SEQUENCES[b][0] + token for b, token in ROWS]
        self.rows = np.array(
            [
                entry(int(self.starts[b]) + token, b, position, SEQUENCES[b][2])
                for (b, token), position in zip(ROWS, self.positions, strict=True)
            ],
            dtype=np.int32,
        )

    @property
    def tables(self) -> BatchTables:
        lens = torch.tensor([length for _, length, _ in SEQUENCES], dtype=torch.int32)
        return BatchTables(self.table, torch.from_numpy(self.starts).int(), lens, object())

    def measure(self, native: bool, traced: TracedStep | None = None) -> Tensor:
        """[R, H, NUM_STATISTICS + 1]."""
        accumulators = Accumulators(1, HEADS, "cpu")
        added: list[Tensor] = []
        layers = MeasuredLayers(accumulators, {NAME: 0}, sink_tokens=4, local_window=8)
        measurer = CpuMeasurer(layers, errors=ErrorCounter(SimpleNamespace(error=pytest.fail)), native=native)  # type: ignore[arg-type]
        measurer._add = lambda layers, stats, *_: added.append(torch.from_numpy(stats.copy()))
        measurer.on_build([NAME], self.tables)
        measurer.begin(self.rows, StepLayers(frozenset({0}), frozenset({0})), traced, None)
        # Of the first tokens vLLM has absorbed the queries itself.
        nope, rotary = self.q[:DECODED].split([NOPE, ROTARY], dim=-1)
        absorbed = (torch.einsum("thp,hpl->thl", nope, self.weights), rotary)
        forward = latent_forward(self.layer, absorbed, torch.zeros(DECODED, HEADS, LATENT), self.q[DECODED:])
        view = latent_view_of(self.impl, self.layer, forward, self.layer.kv_cache)
        measurer.after_attention(view, forward, self.layer.kv_cache, None)  # type: ignore[arg-type]
        measurer.finish()
        (stats,) = added
        return stats[0]

    def magnitude(self) -> float:
        """Largest sum of |scale q_d k_d| over the elements of absorbed queries and latent vectors."""
        nope, rotary = self.q.split([NOPE, ROTARY], dim=-1)
        absorbed = torch.einsum("thp,hpl->thl", nope, self.weights)
        largest = 0.0
        for latent, of_keys in self.latents:
            products = torch.einsum("thl,nl->thn", absorbed.abs(), latent.abs())
            products += torch.einsum("thr,nr->thn", rotary.abs(), of_keys.abs())
            largest = max(largest, float(products.max()))
        return self.scale * largest

    def keys(self, dtype: torch.dtype) -> list[Tensor]:
        """Of the heads, of each sequence, [n, H, NOPE + ROTARY]."""
        keys = []
        for latent, rotary in self.latents:
            of_heads = torch.einsum("nl,hpl->nhp", latent.to(dtype), self.weights.to(dtype))
            keys.append(torch.cat([of_heads, rotary.to(dtype)[:, None].expand(-1, HEADS, -1)], dim=-1))
        return keys

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Of heads of which K was made, in that precision."""
        return row_stats_ref(
            self.q[[int(self.starts[b]) + token for b, token in ROWS]].to(dtype), self.keys(dtype), self.positions,
            request=[b for b, _ in ROWS],
            phase=[ROW_DECODE if p >= SEQUENCES[b][2] else 0 for (b, _), p in zip(ROWS, self.positions, strict=True)],
            prompt_len=[SEQUENCES[b][2] for b, _ in ROWS], scale=self.scale, local_window=8, dtype=dtype,
        )  # fmt: skip


@pytest.mark.parametrize("native", [True, False])
def test_every_statistic_of_rows_in_any_part_of_a_step(native: bool) -> None:
    """Error <= 2 x float32 torch's error + rounding of the products' float32 sums, which are of 512 + 64 elements."""
    step = Step(torch.float32)
    measured, expected, same_dtype = step.measure(native), step.reference(torch.float64), step.reference(torch.float32)
    assert measured.shape == (len(ROWS), HEADS, NUM_STATISTICS + 1)
    assert_two_oracles(measured, expected, same_dtype, step.magnitude(), 200)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16(native: bool) -> None:
    """The absorbed queries are rounded to the model's type, as those that vLLM absorbs are: by 2^-9 of a score."""
    step = Step(torch.bfloat16)
    measured, expected = step.measure(native).double(), step.reference(torch.float64)
    error = (measured - expected).nan_to_num(0.0)
    # Scores of 2 sqrt(96) products of size 1: a mass moves by at most twice the error of a score.
    masses = [INDEX[name] for name in ("top1_ratio", "sink_ratio", "local_ratio")]
    assert float(error[..., masses].abs().max()) < 0.02
    assert torch.equal(measured.isnan(), expected.isnan())


@pytest.mark.parametrize("native", [True, False])
def test_all_rows_of_a_prompt(native: bool) -> None:
    """A chunk of 30 tokens behind 60 others: attention of the heads whose K was made, and what it sums to."""
    step, sequence = Step(torch.float32), 2
    num_rows, length, prompt_len = SEQUENCES[sequence]
    trace = ActiveTrace(
        make_host((0,), HEADS, head_size=LATENT + ROTARY), "a", why="opt_in", options=TraceOptions(prompt="all"),
        traceparent=None, prompt_len=prompt_len, local_layers=(0,), head_columns=(0, 1, 3),
    )  # fmt: skip
    asked = AskedPrompt(
        sequence, int(step.starts[sequence]), num_rows, length - num_rows, frozenset({0}), (0, 1, 3),
        np.zeros((0, 2), dtype=np.int32), grams=False, kept=False, keys_from=0,
    )  # fmt: skip
    nobody = np.arange(0)
    of_list = step.measure(native, TracedStep([], step.rows, nobody, 1, HEADS, [TracedPrompt(trace, asked)]))
    np.testing.assert_array_equal(step.measure(native), of_list)
    record = trace.record()
    assert list(range(60, 90)) == record.positions.tolist()
    keys, received = step.keys(torch.float64)[sequence], np.zeros((HEADS, length))
    for row, position in enumerate(record.positions.tolist()):
        p = row_probe_ref(step.q[asked.token + row], keys, position, scale=step.scale).numpy()
        np.testing.assert_allclose(record.previous_mass[row, 0], p[[0, 1, 3], -2], rtol=0, atol=1e-4)
        top = record.stats[row, 0, :, INDEX["top1_ratio"]]
        np.testing.assert_allclose(top, p[[0, 1, 3]].max(-1), rtol=0, atol=1e-4)
        received[:, : position + 1] += p
    np.testing.assert_allclose(record.received[0], received[[0, 1, 3]], rtol=1e-3, atol=1e-3)
