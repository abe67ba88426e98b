"""Two GPUs: tensor-parallel ranks bring heads, pipeline stages layers; together they measure what one GPU does."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.parallel_engine import (
    HEADS,
    ParallelResult,
    ParallelSpec,
    assert_all_rows,
    assert_certified,
    assert_same_rows,
    prompts,
    random_llama,
    run_engine,
)

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.timeout(1200)]

LAYERS: Final = 8
_GPUS: Final = 2
# Ranks add up a row's products in another order than one GPU. Eight layers make 2e-3 of such a last digit in TF32, in
# which Triton multiplies float32 unless it is told otherwise, and 1e-5 in IEEE (both computed on a CPU).
_ENVIRONMENT: Final = {"TRITON_F32_DEFAULT": "ieee"}
CLOSE: Final = 2e-4
_ARGS: Final[dict[str, Any]] = {
    "max_model_len": 512,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 28,
}
_OVER: Final[dict[str, dict[str, Any]]] = {
    "one": {},
    "tp": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pp": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
}
# Backends with a type that both can take, with CUDA graphs.
_KINDS: Final[dict[str, dict[str, Any]]] = {
    "float32": {"dtype": "float32", "attention_backend": "TRITON_ATTN"},
    "bfloat16": {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ParallelResult]:
    """One GPU, TP 2 and PP 2, by type of numbers; all side by side."""
    import torch

    if torch.cuda.device_count() < _GPUS:
        pytest.skip(f"needs {_GPUS} CUDA devices")
    folder: Path = tmp_path_factory.mktemp("gpu-ranks")
    model = random_llama(folder / "model", layers=LAYERS, head_size=64)
    whole = ParallelSpec(str(model), prompts(), 6, out="")
    specs = {
        (kind, over): replace(whole, out=str(folder / f"{kind}-{over}"), llm_args={**_ARGS, **kind_args, **over_args})
        for kind, kind_args in _KINDS.items()
        for over, over_args in _OVER.items()
    }
    with ThreadPoolExecutor(len(specs)) as pool:
        running = {
            (kind, over): pool.submit(run_engine, spec, folder / f"{kind}-{over}-run", timeout_s=500, **_ENVIRONMENT)
            for (kind, over), spec in specs.items()
        }
        return {key: future.result() for key, future in running.items()}


@pytest.mark.parametrize("kind", _KINDS)
class TestPlaces:
    def test_tensor_parallel(self, engines: dict[tuple[str, str], ParallelResult], kind: str) -> None:
        """Each rank has all layers and half of the heads."""
        layers = list(range(LAYERS))
        assert engines[kind, "tp"].report["workers"] == [
            {"rank": 0, "layers": layers, "heads": [0, HEADS // 2]},
            {"rank": 1, "layers": layers, "heads": [HEADS // 2, HEADS]},
        ]

    def test_pipeline_parallel(self, engines: dict[tuple[str, str], ParallelResult], kind: str) -> None:
        """Each stage has all heads and half of the layers, by their index in the whole model; both are rank 0."""
        assert engines[kind, "pp"].report["workers"] == [
            {"rank": 0, "layers": list(range(LAYERS // 2)), "heads": [0, HEADS]},
            {"rank": 0, "layers": list(range(LAYERS // 2, LAYERS)), "heads": [0, HEADS]},
        ]


@pytest.mark.parametrize("over", ["tp", "pp"])
class TestNumbers:
    def test_float32(self, engines: dict[tuple[str, str], ParallelResult], over: str) -> None:
        """As many rows of each layer and head as on one GPU, with its values: counts by bucket, and sums."""
        assert_same_rows(engines["float32", "one"], engines["float32", over], CLOSE)

    def test_bfloat16_rows(self, engines: dict[tuple[str, str], ParallelResult], over: str) -> None:
        """In bfloat16 ranks round otherwise than one GPU, but serve and measure the same rows."""
        result = engines["bfloat16", over]
        assert result.report["tokens"] == engines["bfloat16", "one"].report["tokens"]
        assert result.arrays["rows"].shape[:2] == (LAYERS, HEADS)
        assert_all_rows(result)
        assert result.arrays["nonfinite"].sum() == 0


@pytest.mark.parametrize("over", _OVER)
@pytest.mark.parametrize("kind", _KINDS)
def test_certified(engines: dict[tuple[str, str], ParallelResult], kind: str, over: str) -> None:
    """Every rank has reproduced what it serves, in CUDA graphs, by the backend that was asked for."""
    assert_certified(engines[kind, over])
    assert engines[kind, over].report["backend"] == _KINDS[kind]["attention_backend"]
