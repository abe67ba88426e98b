"""Layers of a pipeline stage have their index in the whole model; what is on other stages is not there."""

from pathlib import Path

import pytest

from tests.integration.stage_models import LAYERS
from tests.program import environment, run_program

pytestmark = pytest.mark.integration


def test_indices_go_on(tmp_path: Path) -> None:
    """vLLM's own models, of which each stage builds its part and puts placeholders for the rest.

    CPU engines have no pipeline stages; engines with two are in test_gpu_ranks.py.
    """
    env = environment(run_dir=tmp_path / "run", OMP_NUM_THREADS="1")
    stages = run_program("integration/stage_models.py", [str(tmp_path)], env, tmp_path).result
    for model, (first, second) in stages.items():
        indices = [index for _, index in first], [index for _, index in second]
        assert sorted(indices[0] + indices[1]) == list(range(LAYERS)), model
        assert min(indices[1]) == len(indices[0]), model
        assert [name for name, _ in second] == [f"model.layers.{index}.self_attn.attn" for index in indices[1]], model
