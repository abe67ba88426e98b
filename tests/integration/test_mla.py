"""Latent attention (MLA) in vLLM: what is measured of it equals transformers' eager attention, row by row.

vLLM's CPU backend neither chunks prompts of such models nor caches prefixes; tests/integration/test_mla_rows.py has
rows that continue a cached context.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.attached import attached_hook, plugin
from tests.integration.mla_models import LAYERS, VOCABULARY, save_mla_model
from tests.integration.test_against_transformers import Engine, assert_rows_equal, expected_prefill_positions, truth_of
from tests.integration.transformers_truth import EagerModel

pytestmark = pytest.mark.integration

CONFIG = (
    "sample_rate: 1.0\n"
    "sampling: {max_rows_per_step: 4096, prefill_rows_per_request: 8}\n"
    "statistics: {sink_tokens: 4, local_window: 128}\n"
)
LENGTHS, TOKENS = (5, 180, 1, 70, 33), [12, 5, 8, 16, 10]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", autouse=True)
def plugin_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugin(tmp_path_factory.mktemp("glassbox"), CONFIG):
        yield


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v2_lora", "deepseek_v3"])
def test_every_statistic_of_every_row(family: str, tmp_path: Path) -> None:
    """Prefill and decode of five requests side by side, in float32; the tokens are those without glassbox."""
    model = save_mla_model(tmp_path, family)
    engine = Engine(model, "float32", skip_tokenizer_init=True)
    worker = attached_hook().worker
    assert worker is not None
    assert worker._facts.backend == "CPU_MLA"
    assert worker._facts.layers.indices == tuple(range(LAYERS))
    served = engine.serve(prompts(), TOKENS)
    eager = EagerModel(model, torch.float32)
    for one in served:
        positions = sorted(row.position for row in one.rows)
        assert positions == expected_prefill_positions(one.prompt_len) + list(
            range(one.prompt_len, len(one.tokens) - 1)
        )
        assert_rows_equal(one, truth_of(eager, one))
    assert {} == dict(worker._errors.counts())
    worker.observer.disarm()
    assert [one.tokens for one in served] == [one.tokens for one in engine.serve(prompts(), TOKENS)]
