"""With several tensor-parallel ranks each certifies its own heads, and a broken one is named."""

import socket
from pathlib import Path

import pytest

from glassbox.core.output_checks import LayerState
from tests.integration.ranks_engine import BROKEN_HEAD, BROKEN_LAYER, BROKEN_RANK, RANKS
from tests.program import environment, run_program

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # a minute, and three workers


def test_one_of_three(tmp_path: Path) -> None:
    """Its layer, its head in the whole model, its rank and host; all else is certified."""
    config = tmp_path / "glassbox.yaml"
    config.write_text("sample_rate: 1.0\nexport: {interval_s: 1}\n")
    env = environment(config, tmp_path / "run", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    found = run_program("integration/ranks_engine.py", [str(tmp_path / "plugin")], env, tmp_path, timeout_s=600).result
    assert found["ranks"] == RANKS
    assert found["errors"] == {}
    head = BROKEN_RANK * 3 + BROKEN_HEAD
    assert found["wrong"] == [[BROKEN_LAYER, head, BROKEN_RANK, socket.gethostname()]]
    failed = [layer for layer, state in enumerate(found["states"]) if state != LayerState.CERTIFIED]
    assert failed == [BROKEN_LAYER]
