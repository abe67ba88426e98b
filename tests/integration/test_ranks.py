"""Tensor-parallel ranks on a CPU: each measures and certifies its own heads, together they are the model's."""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
from glassbox.signals.probe import ProbeFeature
from tests import probe_samples
from tests.integration.parallel_engine import (
    HEADS,
    LAYERS,
    ParallelResult,
    ParallelSpec,
    assert_certified,
    assert_same_rows,
    prompts,
    random_llama,
    run_engine,
)
from tests.integration.ranks_engine import BROKEN_HEAD, BROKEN_LAYER, BROKEN_RANK, RANKS
from tests.program import environment, run_program

pytestmark = pytest.mark.integration

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SIGNALS = ["spectral", "asymmetry", "cyclic", "rauq"]
# Heads of the first rank and of the second, and what needs the heads of both.
FEATURES = (
    ProbeFeature("answer_entropy_ratio_L0_H1", mean=0.6, scale=0.5, coefficient=1.0),
    ProbeFeature("prompt_top1_ratio_L3_H6", mean=0.3, scale=0.5, coefficient=-1.0),
    ProbeFeature("spectral_sv_entropy_L2_H7", mean=1.0, scale=0.5, coefficient=0.5),
    ProbeFeature("asymmetry_G_L1_H5", mean=0.5, scale=0.5, coefficient=0.5),
    ProbeFeature("rauq_score", mean=2.0, scale=4.0, coefficient=0.5),
)
ONE_PROCESS_LESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # each imports vLLM for seconds


class TestTwoRanks:
    @pytest.fixture(scope="class")
    @classmethod
    def engines(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParallelResult]:
        """One rank and two, side by side, on the same tokens."""
        folder = tmp_path_factory.mktemp("ranks")
        args: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 256,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.2,
        }
        model = random_llama(folder / "model")
        # Whole prompts are measured beside the sample, which stays what it is.
        options = {"glassbox": "trace", "glassbox_prompt": "all", "glassbox_signals": SIGNALS}
        probe = str(probe_samples.write(folder, features=FEATURES))
        one = ParallelSpec(str(model), prompts(), 4, str(folder / "one"), args, options, probe)
        parallel = {**args, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        specs = {"one": one, "two": replace(one, out=str(folder / "two"), llm_args=parallel)}
        with ThreadPoolExecutor() as pool:
            running = {
                name: pool.submit(
                    run_engine, spec, folder / f"{name}-run", timeout_s=600, **ONE_THREAD, **ONE_PROCESS_LESS
                )
                for name, spec in specs.items()
            }
            return {name: future.result() for name, future in running.items()}

    def test_the_ranks_share_out_the_heads(self, engines: dict[str, ParallelResult]) -> None:
        """Each has all layers and half of the heads."""
        layers = list(range(LAYERS))
        assert engines["one"].report["workers"] == [{"rank": 0, "layers": layers, "heads": [0, HEADS]}]
        assert engines["two"].report["workers"] == [
            {"rank": 0, "layers": layers, "heads": [0, HEADS // 2]},
            {"rank": 1, "layers": layers, "heads": [HEADS // 2, HEADS]},
        ]

    def test_together_they_measure_what_one_does(self, engines: dict[str, ParallelResult]) -> None:
        """Every head in its place in the whole model, each row once, with the values that one rank gives."""
        assert_same_rows(engines["one"], engines["two"], close=1e-4)

    def test_a_trace_of_both(self, engines: dict[str, ParallelResult]) -> None:
        """All arrays of a request are those that one rank gives: each head in its place, its answer's rows, too."""
        for number, prompt in enumerate(prompts()):
            whole, merged = (engines[name].trace(number) for name in ("one", "two"))
            assert list(range(len(prompt) + 3)) == whole["positions"].tolist()
            assert ([], []) == (whole["notes"].tolist(), merged["notes"].tolist())
            assert whole.keys() == merged.keys()
            for name, values in whole.items():
                if values.dtype.kind == "f":
                    size = np.nanmax(np.abs(values), initial=1e-3)
                    np.testing.assert_allclose(merged[name], values, rtol=1e-3, atol=1e-4 * size, err_msg=name)
                else:
                    np.testing.assert_array_equal(merged[name], values, err_msg=name)
            for name in ("received", "received_squares", "keys", "queries", "singular_values", "logprobs"):
                assert np.isfinite(whole[name]).all(), name
                assert whole[name].size, name

    def test_a_probe_of_both(self, engines: dict[str, ParallelResult]) -> None:
        """The exporter scores the ranks' traces as one: heads of both, and numbers over all heads of the request."""
        of_one, of_two = (engines[name].report["scores"] for name in ("one", "two"))
        assert len(prompts()) == len(of_one) == len(of_two)
        for whole, merged in zip(of_one, of_two, strict=True):
            scores = [summary["probes"]["drift"] for summary in (whole, merged)]
            assert [0, 0] == [score["missing"] for score in scores]
            assert 0.01 < scores[0]["score"] < 0.99
            assert pytest.approx(scores[0]["score"], abs=1e-4) == scores[1]["score"]
            assert set(SIGNALS) == whole["signals"].keys() == merged["signals"].keys()
            for name, signal in whole["signals"].items():
                assert ("refused" in signal, "refused" in merged["signals"][name]) == (False, False)
                for value, number in signal["values"].items():
                    there = merged["signals"][name]["values"][value]
                    assert _flat(number) == pytest.approx(_flat(there), rel=1e-3, abs=1e-4), f"{name}.{value}"
        assert 1e-3 < np.ptp([summary["probes"]["drift"]["score"] for summary in of_one]), "it tells requests apart"

    def test_both_certify(self, engines: dict[str, ParallelResult]) -> None:
        """A layer is certified if every rank has reproduced its heads; nothing failed."""
        for engine in engines.values():
            assert_certified(engine)


def _flat(number: Any) -> list[float]:
    """Mean, least and largest of a value by layer and head; or one of the request."""
    return [number[part] for part in ("mean", "min", "max")] if isinstance(number, dict) else [number]


@pytest.mark.slow
def test_one_of_three(tmp_path: Path) -> None:
    """A rank with a broken kernel: its layer, its head in the whole model, its rank and host; all else is certified."""
    config = tmp_path / "glassbox.yaml"
    config.write_text("sample_rate: 1.0\nexport: {interval_s: 1}\n")
    env = environment(config, tmp_path / "run", **ONE_THREAD)
    found = run_program("integration/ranks_engine.py", [str(tmp_path / "plugin")], env, tmp_path, timeout_s=600).result
    assert found["ranks"] == RANKS
    assert found["errors"] == {}
    head = BROKEN_RANK * 3 + BROKEN_HEAD
    assert found["wrong"] == [[BROKEN_LAYER, head, BROKEN_RANK, socket.gethostname()]]
    failed = [layer for layer, state in enumerate(found["states"]) if state != LayerState.CERTIFIED]
    assert failed == [BROKEN_LAYER]
