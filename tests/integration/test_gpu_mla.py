"""Latent attention (MLA) on a GPU with CUDA graphs: statistics are transformers', tokens are vLLM's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
from glassbox.core.statistics import INDEX
from tests.integration.gpu_engine import (
    FAULTY_HEAD,
    FAULTY_LATENT_LAYER,
    EngineSpec,
    TracedResult,
    measured_positions,
    run_engines,
)
from tests.integration.mla_models import LAYERS, VOCABULARY, save_mla_model
from tests.integration.test_gpu_vllm import CONFIG, Result, assert_as_near_as_transformers

pytestmark = [pytest.mark.gpu, pytest.mark.integration]

# DeepSeek's own sizes of a head; backends are particular about them.
SIZES: dict[str, int] = {
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
OBSERVED = ("triton", "triton-eager", "triton-eager-v1", "triton-v1", "flash", "auto", "fp8")


def _prompts() -> tuple[list[list[int]], list[int]]:
    import torch

    generator = torch.Generator().manual_seed(5)
    lengths = [3, 17, 700, 64, 250, 1, 128, 31, 900, 5, 77, 300]
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return prompts, [24 + 3 * i for i in range(len(lengths))]


def _variants(base: EngineSpec) -> dict[str, EngineSpec]:
    triton, flash = replace(base, backend="TRITON_MLA"), replace(base, backend="FLASH_ATTN_MLA")
    return {
        "triton": triton,
        "triton-plain": replace(triton, config=None),
        "triton-eager": replace(triton, eager=True),
        "triton-eager-v1": replace(triton, eager=True, v2_runner=False),
        "triton-v1": replace(triton, v2_runner=False),
        "flash": flash,
        "flash-plain": replace(flash, config=None),
        "auto": base,
        "fp8": replace(triton, kv_cache_dtype="fp8"),
        "triton-kernel": replace(triton, fault="latent kernel"),
        # The third comes in two chunks; none ends with a chunk of one token, whose query would be absorbed.
        "triton-whole": replace(
            triton,
            prompts=[base.prompts[i] for i in (3, 4, 2)],
            max_tokens=[8, 9, 10],
            extra_args=[{"glassbox": "trace", "glassbox_prompt": "all", "glassbox_spans": ["head=0:4"]}] * 3,
            config={**CONFIG, "requests": {"max_trace_mb": 256, "max_active_mb": 1024}},
        ),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Run all engines."""
    folder = tmp_path_factory.mktemp("gpu")
    model = save_mla_model(folder, "deepseek_v3", **SIZES)
    prompts, max_tokens = _prompts()
    llm_args: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 1024}
    base = EngineSpec(str(model), prompts, max_tokens, out="", config=CONFIG, llm_args=llm_args)
    specs = {name: replace(spec, out=str(folder / name)) for name, spec in _variants(base).items()}
    run_engines(specs, folder)
    return {name: Result(spec) for name, spec in specs.items()}


@pytest.mark.parametrize("name", OBSERVED)
def test_rows_are_exactly_those_served(results: dict[str, Result], name: str) -> None:
    """Chunked prompts, decoding beside them, padding and captures: each row once in each layer and head."""
    result = results[name]
    assert result.report["errors"] == {}
    assert Path(result.spec.out).name == name
    positions = [measured_positions(prompt_len, len(tokens)) for tokens, prompt_len in result.sequences]
    expected = [sum(len(p) for p, _ in positions), sum(len(d) for _, d in positions)]
    rows = result.arrays["rows"]
    assert rows.shape[:2] == (LAYERS, SIZES["num_attention_heads"])
    np.testing.assert_array_equal(rows, np.broadcast_to(expected, rows.shape))
    assert result.arrays["nonfinite"].sum() == 0


@pytest.mark.parametrize("name", [*OBSERVED, "triton-whole"])
def test_no_step_waits_for_the_compiler(results: dict[str, Result], name: str) -> None:
    """Nor does one with a prompt, where vLLM's warm-up runs none or no attention at all, or one that is traced."""
    assert [] == results[name].report["late_kernels"]


def test_backends_are_those_asked_for(results: dict[str, Result]) -> None:
    """The inner backend's own name is reported."""
    assert results["triton"].report["backend"] == "TRITON_MLA"
    assert results["flash"].report["backend"] == "FLASH_ATTN_MLA"
    assert results["auto"].report["backend"].endswith("MLA")


@pytest.mark.parametrize("name", ["triton", "triton-eager", "triton-v1", "flash"])
def test_bfloat16(results: dict[str, Result], name: str) -> None:
    """As near to float32 transformers as transformers in bfloat16 is, within a factor of two."""
    assert_as_near_as_transformers(results[name])


@pytest.mark.parametrize("name", OBSERVED)
def test_healthy(results: dict[str, Result], name: str) -> None:
    """Every layer is certified by decode rows, and none was ever in doubt."""
    report = results[name].report
    print(name, report["canary_rows"], np.array(report["error_counts"]).tolist(), max(report["worst_ratio"]))
    assert set(report["layer_states"]) == {LayerState.CERTIFIED}
    assert report["canary_rows"]["failed"] == 0
    assert max(report["worst_ratio"]) < 0.8


def test_whole_prompts(results: dict[str, Result]) -> None:
    """Keys of heads are made of the cache: as near to transformers as its own bfloat16, within a factor of two."""
    import torch

    from tests.integration.transformers_truth import EagerModel, whole_truth

    result = TracedResult(results["triton-whole"].spec)
    assert result.report["errors"] == {}
    path = Path(result.spec.model)
    exact, rounded = (EagerModel(path, dtype, device="cuda") for dtype in (torch.float32, torch.bfloat16))
    squares: dict[str, list[np.ndarray]] = {}
    for _, (trace,), tokens in result.asked():
        assert (trace.notes, trace.truncated) == ((), False)
        assert trace.positions.tolist() == list(range(len(tokens) - 1))
        np.testing.assert_allclose(trace.received.sum(-1), len(tokens) - 1, rtol=1e-4)
        np.testing.assert_allclose(
            trace.span_mass[..., 0], trace.stats[..., INDEX["sink_ratio"]], rtol=0, atol=1e-4
        )  # the span is the sink's
        true, yardstick = whole_truth(exact, tokens), whole_truth(rounded, tokens)
        length = np.sqrt(np.arange(len(tokens) - 1, 0, -1))  # of a random walk of the rows that add up
        for name, found, of_truth in (
            ("previous_mass", np.moveaxis(trace.previous_mass, 0, 2)[..., 1:], lambda one: one.previous[..., 1:]),
            (
                "self_mass",
                np.exp(np.moveaxis(trace.stats[..., INDEX["self_logprob"]], 0, 2)),
                lambda one: np.exp(one.self_logprob),
            ),
            ("received", trace.received / length, lambda one, length=length: one.received / length),
        ):
            for whose, values in (("ours", found), ("theirs", of_truth(yardstick))):
                difference = (values - of_truth(true)).astype(np.float64)
                squares.setdefault(f"{name} {whose}", []).append(np.square(difference).ravel())
    rms = {name: float(np.sqrt(np.concatenate(parts).mean())) for name, parts in squares.items()}
    print("whole prompts", {name: f"{value:.3g}" for name, value in rms.items()})
    for name in ("previous_mass", "self_mass", "received"):
        assert rms[f"{name} ours"] <= 2 * rms[f"{name} theirs"], name


def test_a_broken_kernel(results: dict[str, Result]) -> None:
    """Its layer and head are named, and the layer is not observed any more."""
    report = results["triton-kernel"].report
    failed = [layer for layer, state in enumerate(report["layer_states"]) if state == LayerState.FAILED]
    assert failed == [FAULTY_LATENT_LAYER]
    assert report["worst_head"][FAULTY_LATENT_LAYER] == FAULTY_HEAD


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_tokens_are_those_without_the_plugin(results: dict[str, Result], name: str) -> None:
    """Greedy, token for token, at sample rate 1."""
    assert results[name].report["tokens"] == results[f"{name}-plain"].report["tokens"]
