"""Ranks in Ray's workers, which inherit nothing from the process that starts them: they measure as those of `mp` do.

vLLM refuses Ray on its platform for CPUs (`ValueError: current platform cpu does not support ray.`) for the lack of a
name of the devices, which a platform plugin of the test's gives (ray_platform.py). Executors, actors and how variables
get to them are vLLM's and Ray's own.
"""

import socket
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

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
from tests.integration.ray_engine import RANKS
from tests.serving import require_tool

pytest.importorskip("ray", reason="needs Ray, which vLLM's wheels for CPUs come without: pip install ray")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ARGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.2,
    "tensor_parallel_size": RANKS,
}
NAMESPACES = ("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture(scope="module")
def mp(tmp_path_factory: pytest.TempPathFactory) -> ParallelResult:
    """What two ranks in processes that vLLM forks measure."""
    folder = tmp_path_factory.mktemp("mp")
    args = {**ARGS, "distributed_executor_backend": "mp"}
    model, options = random_llama(folder / "model"), {"glassbox": "trace"}
    spec = ParallelSpec(str(model), prompts(), 4, str(folder / "forked"), args, options)
    return run_engine(spec, folder / "run", **ENVIRONMENT)


class TestRay:
    # vLLM's newer executor gives its workers the driver's whole environment, the older one what has a listed prefix.
    @pytest.fixture(scope="class", params=["1", "0"], ids=["newer executor", "older executor"])
    @classmethod
    def ray(
        cls, request: pytest.FixtureRequest, mp: ParallelResult, tmp_path_factory: pytest.TempPathFactory
    ) -> ParallelResult:
        """The same requests with two of Ray's workers; glassbox chooses the run directory, in the first process."""
        folder = tmp_path_factory.mktemp("ray")
        args = {**ARGS, "distributed_executor_backend": "ray"}
        return run_engine(
            replace(mp.spec, out=str(folder / "ray"), llm_args=args),
            folder / "run",
            timeout_s=600,
            program="integration/ray_engine.py",
            prefix=(require_tool("unshare", "util-linux"), *NAMESPACES),
            GLASSBOX_RUN_DIR="",
            XDG_RUNTIME_DIR=str(folder),
            VLLM_USE_RAY_V2_EXECUTOR_BACKEND=request.param,
            **ENVIRONMENT,
        )

    def test_both_ranks_are_in_the_run_directory(self, ray: ParallelResult) -> None:
        """Each left its heads where the driver looks, and names the host that it is on."""
        assert ray.report["workers"] == [
            {"rank": rank, "layers": list(range(LAYERS)), "heads": [rank * HEADS // RANKS, (rank + 1) * HEADS // RANKS]}
            for rank in range(RANKS)
        ]
        assert ray.report["hosts"] == [socket.gethostname()] * RANKS

    def test_they_measure_what_forked_ones_do(self, mp: ParallelResult, ray: ParallelResult) -> None:
        """All steps, as the YAML of the driver says, so that each rank has read it; each row with the same values."""
        assert_same_rows(mp, ray, close=1e-4)
        assert_certified(ray)

    def test_a_trace_has_the_heads_of_both(self, mp: ParallelResult, ray: ParallelResult) -> None:
        """What a client asks for reaches Ray's workers, and their parts become one."""
        for number in range(len(mp.spec.prompts)):
            forked, of_ray = (result.trace(number) for result in (mp, ray))
            np.testing.assert_array_equal(of_ray["positions"], forked["positions"])
            np.testing.assert_allclose(of_ray["stats"], forked["stats"], rtol=1e-4, atol=1e-4)
            assert of_ray["stats"].shape[1:3] == (LAYERS, HEADS)
