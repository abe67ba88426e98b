"""vLLM on a GPU with CUDA graphs: the accumulated statistics are transformers', the tokens are vLLM's own."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
from glassbox.core.statistics import INDEX, STATISTICS
from tests.integration.gpu_engine import (
    FAULTY_HEAD,
    FAULTY_LAYER,
    PREFILL_ROWS,
    EngineResult,
    EngineSpec,
    measured_positions,
    model_path,
    run_engines,
    tokenized_text,
)

pytestmark = [pytest.mark.gpu, pytest.mark.integration]

SINK_TOKENS, LOCAL_WINDOW = 4, 128
CONFIG: dict[str, Any] = {
    "sample_rate": 1.0,
    "sampling": {"max_rows_per_step": 256, "prefill_rows_per_request": PREFILL_ROWS},
    "statistics": {"sink_tokens": SINK_TOKENS, "local_window": LOCAL_WINDOW},
    "canary": {"interval_s": 1},
}
MAX_ADDED_BYTES = 64 << 20


class Result(EngineResult):
    """What one engine left behind of statistics."""

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(np.load(f"{self.spec.out}.npz"))

    @property
    def sequences(self) -> list[tuple[list[int], int]]:
        """(all tokens, prompt length) of each request."""
        tokens = self.report["tokens"]
        return [(prompt + answer, len(prompt)) for prompt, answer in zip(self.spec.prompts, tokens, strict=True)]


def _prompts(model: Path) -> tuple[list[list[int]], list[int]]:
    text = tokenized_text(model)
    lengths = [3, 17, 700, 64, 250, 1, 128, 31, 900, 5, 77, 300, 12, 40, 500, 9]
    prompts = [text[7 * i : 7 * i + n] for i, n in enumerate(lengths)]
    return prompts, [24 + 3 * i for i in range(len(lengths))]


def _variants(base: EngineSpec) -> dict[str, EngineSpec]:
    """All engines of this module, by name."""
    flash = replace(base, backend="FLASH_ATTN")
    triton = replace(base, backend="TRITON_ATTN")
    return {
        "flash": flash,
        "flash-plain": replace(flash, config=None),
        "flash-eager": replace(flash, eager=True),
        # In which vLLM's warm-up runs no attention.
        "flash-eager-v1": replace(flash, eager=True, v2_runner=False),
        "fp8-eager-v1": replace(flash, eager=True, v2_runner=False, kv_cache_dtype="fp8"),
        "flash-v1": replace(flash, v2_runner=False),
        "flash-v1-plain": replace(flash, v2_runner=False, config=None),
        "triton": triton,
        "triton-plain": replace(triton, config=None),
        "triton-float32": replace(triton, dtype="float32"),
        "auto": base,
        "custom": replace(base, backend="CUSTOM", config={**CONFIG, "attach": "custom"}),
        "fp8": replace(flash, kv_cache_dtype="fp8"),
        "flash-kernel": replace(flash, fault="kernel"),
        "flash-scale": replace(flash, fault="scale"),
        "flash-uncompiled": replace(flash, fault="compile"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Run all engines."""
    model, folder = model_path(), tmp_path_factory.mktemp("gpu")
    prompts, max_tokens = _prompts(model)
    base = EngineSpec(str(model), prompts, max_tokens, out="", config=CONFIG)
    specs = {name: replace(spec, out=str(folder / name)) for name, spec in _variants(base).items()}
    run_engines(specs, folder)
    return {name: Result(spec) for name, spec in specs.items()}


def truth_sums(result: Result, dtype: Any) -> np.ndarray:
    """[L, H, 2, S] sums that transformers gives for the rows that glassbox should have measured."""
    from tests.integration.transformers_truth import EagerModel

    model = EagerModel(Path(result.spec.model), dtype, device="cuda")
    total: np.ndarray | None = None
    for tokens, prompt_len in result.sequences:
        truth = model.truth(tokens, prompt_len, SINK_TOKENS, LOCAL_WINDOW)
        for phase, positions in enumerate(measured_positions(prompt_len, len(tokens))):
            for s, statistic in enumerate(STATISTICS):
                if statistic.decode_only and phase == 0:
                    continue
                values = truth.values[statistic.name]
                if total is None:
                    total = np.zeros((*values.shape[:2], 2, len(STATISTICS)))
                total[:, :, phase, s] += values[..., positions].sum(-1)
    assert total is not None
    return total


def mean_errors(result: Result, exact: np.ndarray) -> dict[str, float]:
    """Root mean square over layers, heads and phases of the error of the mean, per statistic."""
    rows = result.arrays["rows"].astype(np.float64)[..., None]
    difference = (result.arrays["sums"] - exact) / rows
    return {name: float(np.sqrt(np.mean(np.square(difference[..., i])))) for name, i in INDEX.items()}


def assert_as_near_as_transformers(result: Result) -> None:
    """Of an engine in bfloat16: its errors are at most twice those of transformers in bfloat16."""
    import torch

    exact = truth_sums(result, torch.float32)
    rows = result.arrays["rows"].astype(np.float64)[..., None]
    yardstick = (truth_sums(result, torch.bfloat16) - exact) / rows
    for statistic, ours in mean_errors(result, exact).items():
        theirs = float(np.sqrt(np.mean(np.square(yardstick[..., INDEX[statistic]]))))
        print(f"{Path(result.spec.out).name} {statistic}: rms error of the mean {ours:.3g}, transformers' {theirs:.3g}")
        assert ours <= 2 * theirs, statistic


OBSERVED = (
    "flash",
    "flash-eager",
    "flash-eager-v1",
    "flash-v1",
    "triton",
    "triton-float32",
    "auto",
    "custom",
    "fp8",
    "fp8-eager-v1",
)


class TestCounts:
    """Every row is counted once, whatever the graph mode, runner and backend."""

    @pytest.mark.parametrize("name", OBSERVED)
    def test_rows_are_exactly_those_served(self, results: dict[str, Result], name: str) -> None:
        """Padding, warm-up and captures add nothing; replays miss nothing."""
        result = results[name]
        assert result.report["errors"] == {}
        positions = [measured_positions(prompt_len, len(tokens)) for tokens, prompt_len in result.sequences]
        expected = [sum(len(p) for p, _ in positions), sum(len(d) for _, d in positions)]
        rows = result.arrays["rows"]
        assert rows.shape[0] == 30
        np.testing.assert_array_equal(rows, np.broadcast_to(expected, rows.shape))
        assert result.arrays["nonfinite"].sum() == 0
        for i, statistic in enumerate(STATISTICS):
            counted = result.arrays["counts"][..., i, :].sum(-1)
            if statistic.decode_only:
                assert (counted[..., 0] == 0).all()
                np.testing.assert_array_equal(counted[..., 1], rows[..., 1])
            else:
                np.testing.assert_array_equal(counted, rows)

    def test_backends_and_runners_are_those_asked_for(self, results: dict[str, Result]) -> None:
        """The inner backend's own name is reported, and both model runners were used."""
        assert results["flash"].report["backend"] == "FLASH_ATTN"
        assert results["triton"].report["backend"] == "TRITON_ATTN"
        assert results["custom"].report["backend"] == results["auto"].report["backend"]
        assert results["flash"].report["runner"] == "vllm.v1.worker.gpu.model_runner"
        assert results["flash-v1"].report["runner"] == "vllm.v1.worker.gpu_model_runner"


class TestWarmUp:
    """What steps launch is compiled before them."""

    @pytest.mark.parametrize("name", OBSERVED)
    def test_no_step_waits_for_the_compiler(self, results: dict[str, Result], name: str) -> None:
        """Whatever vLLM's own warm-up has run."""
        assert [] == results[name].report["late_kernels"]


class TestValues:
    """As near to float32 transformers as transformers in the same arithmetic is, within a factor of two."""

    @pytest.mark.parametrize("name", ["flash", "flash-eager", "flash-v1", "triton", "custom"])
    def test_bfloat16(self, results: dict[str, Result], name: str) -> None:
        """bfloat16 weights and cache, CUDA graphs on (but for the eager one)."""
        assert_as_near_as_transformers(results[name])

    def test_float32(self, results: dict[str, Result]) -> None:
        """float32 weights and cache: the means of every layer and head as near as the rows are on the CPU.

        Triton attention multiplies float32 in TF32 (11 bits), so the hidden states differ from transformers' by more
        than rounding; means over the rows of a head are compared, at the tolerances of the CPU test.
        """
        import torch

        result = results["triton-float32"]
        rows = result.arrays["rows"].astype(np.float64)[..., None]
        expected = truth_sums(result, torch.float32) / rows
        measured = result.arrays["sums"] / rows
        error = {name: np.abs(measured - expected)[..., i].max() for name, i in INDEX.items()}
        print("float32", {name: f"{value:.2g}" for name, value in error.items()})
        for name in ("entropy_ratio", "top1_ratio", "sink_ratio", "local_ratio", "lookback_ratio"):
            assert error[name] <= 1e-3, name
        for name in ("max_logit", "effective_keys", "distance_tokens", "self_logprob"):
            i = INDEX[name]
            np.testing.assert_allclose(measured[..., i], expected[..., i], rtol=2e-3, atol=2e-3, err_msg=name)

    def test_fp8_cache_is_read_with_its_scale(self, results: dict[str, Result]) -> None:
        """K in FP8 changes the statistics a little, a forgotten scale or a wrong type would by far more."""
        fp8, bf16 = results["fp8"], results["flash"]
        means = [r.arrays["sums"].sum((0, 1, 2)) / r.arrays["rows"].sum() for r in (fp8, bf16)]
        for name in ("entropy_ratio", "top1_ratio", "sink_ratio", "local_ratio"):
            assert means[0][INDEX[name]] == pytest.approx(means[1][INDEX[name]], rel=0.05), name

    def test_graphs_equal_eager_mode(self, results: dict[str, Result]) -> None:
        """Where both modes generated the same tokens, counts are the same; values differ by rounding."""
        graphs, eager = results["flash"], results["flash-eager"]
        np.testing.assert_array_equal(graphs.arrays["rows"], eager.arrays["rows"])
        if graphs.report["tokens"] == eager.report["tokens"]:
            rows = graphs.arrays["rows"][..., None]
            difference = np.abs(graphs.arrays["sums"] - eager.arrays["sums"]) / rows
            for name in ("entropy_ratio", "top1_ratio", "sink_ratio", "local_ratio"):
                assert difference[..., INDEX[name]].max() < 0.02, name


class TestChecks:
    """What is served is reproduced, in and outside of CUDA graphs, and only what is broken is not."""

    @pytest.mark.parametrize("name", OBSERVED)
    def test_healthy(self, results: dict[str, Result], name: str) -> None:
        """Every layer is certified, by rows of both phases, and none was ever in doubt."""
        report = results[name].report
        print(name, report["canary_rows"], np.array(report["error_counts"]).tolist(), max(report["worst_ratio"]))
        assert set(report["layer_states"]) == {LayerState.CERTIFIED}
        assert report["canary_rows"]["failed"] == 0
        assert (np.array(report["error_counts"]).sum(1) > 0).all()
        assert max(report["worst_ratio"]) < 0.8

    @pytest.mark.parametrize("name", ["flash-kernel", "flash-scale"])
    def test_broken(self, results: dict[str, Result], name: str) -> None:
        """The layer is named and not observed any more; the others are."""
        report = results[name].report
        print(name, report["canary_rows"], report["worst_ratio"][FAULTY_LAYER], report["worst_head"][FAULTY_LAYER])
        failed = [layer for layer, state in enumerate(report["layer_states"]) if state == LayerState.FAILED]
        assert failed == [FAULTY_LAYER]
        assert report["layers_bypassed"].get("not_reproduced") == 1
        if name == "flash-kernel":
            assert report["worst_head"][FAULTY_LAYER] == FAULTY_HEAD
        rows = results[name].arrays["rows"].sum((1, 2))
        assert rows[FAULTY_LAYER] < 0.2 * rows[FAULTY_LAYER + 1]

    def test_cache_error(self, results: dict[str, Result]) -> None:
        """bfloat16 gives back what was stored; e4m3 has three mantissa bits."""
        assert np.abs(results["flash"].report["kv_error"]).max() == 0
        error = np.array(results["fp8"].report["kv_error"])
        print("fp8", error.min(), error.max(), np.max(results["fp8"].report["kv_saturated"]))
        assert (error > 0.01).all()
        assert (error < 0.1).all()


class TestServing:
    """What is served stays as it is."""

    @pytest.mark.parametrize(
        ("observed", "plain"),
        [("flash", "flash-plain"), ("triton", "triton-plain"), ("flash-v1", "flash-v1-plain")],
    )
    def test_tokens_are_those_without_the_plugin(self, results: dict[str, Result], observed: str, plain: str) -> None:
        """Greedy, token for token, at sample rate 1."""
        assert results[observed].report["tokens"] == results[plain].report["tokens"]

    def test_a_kernel_that_cannot_be_compiled(self, results: dict[str, Result]) -> None:
        """Warm-up and serving go on without it, token for token; it is counted at each layer, and never captured."""
        uncompiled = results["flash-uncompiled"]
        assert uncompiled.report["tokens"] == results["flash-plain"].report["tokens"]
        assert {"observe"} == set(uncompiled.report["errors"])
        assert uncompiled.report["errors"]["observe"] >= len(uncompiled.report["layers"])
        assert not uncompiled.arrays["rows"].any()

    def test_memory(self, results: dict[str, Result]) -> None:
        """Allocated on the device, against the same engine without the plugin."""
        added = results["flash"].report["allocated"] - results["flash-plain"].report["allocated"]
        reserved = results["flash"].report["reserved"] - results["flash-plain"].report["reserved"]
        print(f"allocated +{added / 2**20:.1f} MiB, reserved +{reserved / 2**20:.1f} MiB")
        assert 0 < added <= MAX_ADDED_BYTES
        assert reserved <= MAX_ADDED_BYTES
