"""Tensor-parallel ranks on a CPU: each measures and certifies its own heads, together they are the model's."""

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
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
        options = {"glassbox": "trace", "glassbox_prompt": "all", "glassbox_signals": ["spectral", "cyclic", "rauq"]}
        one = ParallelSpec(str(model), prompts(), 4, str(folder / "one"), args, options)
        parallel = {**args, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        specs = {"one": one, "two": replace(one, out=str(folder / "two"), llm_args=parallel)}
        with ThreadPoolExecutor() as pool:
            running = {
                name: pool.submit(run_engine, spec, folder / f"{name}-run", **ONE_THREAD, **ONE_PROCESS_LESS)
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
            for name in ("received", "keys", "queries", "singular_values", "logprobs"):
                assert np.isfinite(whole[name]).all(), name
                assert whole[name].size, name

    def test_both_certify(self, engines: dict[str, ParallelResult]) -> None:
        """A layer is certified if every rank has reproduced its heads; nothing failed."""
        for engine in engines.values():
            assert_certified(engine)


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
