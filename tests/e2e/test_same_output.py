"""What is served does not change: greedy tokens with glassbox measuring every step equal those without it."""

from pathlib import Path
from typing import Any, Final

import pytest

from glassbox.core.cpu import serving_dtype
from tests.e2e.greedy_run import CHUNK, NUM_TOKENS
from tests.program import environment, run_program

pytestmark = pytest.mark.e2e

NUM_LAYERS, NUM_HEADS = 30, 9
PREFILL_ROWS: Final = 8
_CONFIG: Final = (
    "sample_rate: 1.0\n"
    f"sampling: {{max_rows_per_step: 4096, prefill_rows_per_request: {PREFILL_ROWS}}}\n"
    "export: {interval_s: 1}\n"
)


def run(model: Path, folder: Path, mode: str, **env: str) -> dict[str, Any]:
    """One batch through a vLLM of its own."""
    config = folder / "glassbox.yaml"
    config.write_text(_CONFIG)
    variables = environment(config, folder / "run", **env)
    result: dict[str, Any] = run_program(
        "e2e/greedy_run.py", [str(model), mode, serving_dtype()], variables, folder
    ).result
    return result


class TestGreedyTokens:
    """Eight prompts in one batch, 64 tokens each, chunked prefill and a shared prefix among them."""

    @pytest.mark.parametrize("mode", ["eager", "compiled"])
    def test_identical_with_and_without_glassbox(self, demo_model_path: Path, tmp_path: Path, mode: str) -> None:
        """Token for token, with every step measured, in eager mode and under torch.compile."""
        expected = run(demo_model_path, tmp_path, mode, VLLM_PLUGINS="")
        observed = run(demo_model_path, tmp_path, mode)

        assert max(expected["prompt_lens"]) > 3 * CHUNK, "a prompt must be prefilled in chunks"
        assert [len(tokens) for tokens in expected["tokens"]] == [NUM_TOKENS] * 8
        assert expected["measured"] == {"steps": 0, "sampled_steps": 0, "rows": 0}
        assert expected["tokens"] == observed["tokens"]
        counted = observed["measured"]
        assert counted["steps"] == counted["sampled_steps"] > NUM_TOKENS
        # The first token of an answer comes from the prompt's last row, the last one is never a query.
        prefill = sum(min(PREFILL_ROWS, length) for length in expected["prompt_lens"])
        least = (prefill - PREFILL_ROWS + 8 * (NUM_TOKENS - 1)) * NUM_LAYERS * NUM_HEADS
        most = (prefill + 8 * (NUM_TOKENS - 1)) * NUM_LAYERS * NUM_HEADS
        assert least <= counted["rows"] <= most, "rows of a cached prefix are not computed, all others are"
