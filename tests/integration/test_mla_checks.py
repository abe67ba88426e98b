"""Latent attention (MLA) in vLLM, in process: traces equal transformers', its output is reproduced, faults are found.

Every step is measured and checked. A prompt's rows can't be reproduced in latent space, so those of decoding are.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from glassbox import capture
from glassbox.core.output_checks import LayerState
from tests.attached import plugin
from tests.integration.checked_engine import CheckedEngine
from tests.integration.mla_models import LAYERS, VOCABULARY, save_mla_model
from tests.integration.test_traces import assert_equals_truth
from tests.integration.transformers_truth import EagerModel

pytestmark = pytest.mark.integration

FAULTY, HEAD = 1, 2


class LatentEngine(CheckedEngine):
    """Of a model with latent attention."""

    def __init__(self, model: Path, dtype: str) -> None:
        # vLLM's blocks are half as large as asked for here.
        super().__init__(model, dtype, layers=LAYERS, max_model_len=256, skip_tokenizer_init=True)
        self.serve([[1, 2, 3]], 1)  # vLLM warns once that it has no tokenizer

    def attention(self, layer: int) -> Any:
        return self.decoder(layer).self_attn.mla_attn.mla_attn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mla_model(tmp_path_factory.mktemp("model"), "deepseek_v3")


@pytest.fixture(scope="module")
def plugin_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugin(
        tmp_path_factory.mktemp("glassbox"),
        "sample_rate: 1.0\nrequests: {include_text: true}\nexport: {interval_s: 0.2}\n",
    ):
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, model: Path, plugin_environment: None) -> LatentEngine:
    return LatentEngine(model, request.param)


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (90, 41, 7)]


def test_traces_equal_transformers(engine: LatentEngine, model: Path, prompts: list[list[int]]) -> None:
    """Statistics, top positions, spans and whole rows of every layer and head, of prompts and of what follows them."""
    from vllm import SamplingParams

    if str(engine.llm.llm_engine.model_config.dtype) != "torch.float32":
        pytest.skip("the truth is in float32")
    found = capture(
        engine.llm,
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False),
        top_k=4,
        spans={"start": (0, 4), "middle": (3, 30)},
        rows=True,
    )
    eager = EagerModel(model, torch.float32)
    for (trace,) in found.traces:
        assert list(trace.layers) == list(range(LAYERS))
        assert trace.has_attention
        assert trace.decode().sum() == 5
        assert_equals_truth(trace, eager.attention(trace.token_ids.tolist()))


def test_everything_is_reproduced(
    engine: LatentEngine, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """All decode rows that are checked, while other requests' prompts are computed in the same steps."""
    found = engine.watch(lambda: [*engine.serve(prompts, 30), *engine.serve(prompts[:2] * 6, 12)], caplog)
    assert ([], [], {}, {}) == (found.said, found.failed, found.bypassed, found.errors)
    checks = engine.worker._canary.checks()
    assert [LayerState.CERTIFIED] * LAYERS == checks.state.tolist()
    assert 0 == found.counts["failed"]
    assert 100 * LAYERS < found.counts["reproduced"]
    assert 0 == checks.error_counts[:, 0].sum(), "rows of prompts are not checked"


def test_probation_ends(engine: LatentEngine, prompts: list[list[int]], caplog: pytest.LogCaptureFixture) -> None:
    """On an unknown vLLM the layers are observed from their first decode step on."""
    found = engine.watch(lambda: engine.serve(prompts, 12), caplog, probation=True)
    assert ([], {}) == (found.failed, found.bypassed)
    assert (found.rows[1] > 0).all()


def louder(impl: Any, original: Callable[..., Any], *args: Any) -> Any:
    output, lse = original(impl, *args)
    output[:, HEAD] *= 1.02
    return output, lse


def other_scale(impl: Any, original: Callable[..., Any], *args: Any) -> Any:
    """Scores are 3 % too large."""
    before = impl.scale
    impl.scale = before * 1.03
    try:
        return original(impl, *args)
    finally:
        impl.scale = before


def stale_latents(impl: Any, original: Callable[..., Any], q: Any, cache: Any, metadata: Any, layer: Any) -> Any:
    """The kernel reads a cache whose first block was written over."""
    cache = cache.clone()
    cache[metadata.decode.block_table[:, 0].long()] = 0.5
    return original(impl, q, cache, metadata, layer)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (louder, rf"head {HEAD}'s output is 1\.0[12]\d times what its keys and values give"),
        (other_scale, r"scores are 1\.0[234]\d times what queries and keys give"),
        (stale_latents, r"times what rounding in \w+ (explains|makes)"),
    ],
)
def test_a_broken_kernel_is_found(
    engine: LatentEngine,
    prompts: list[list[int]],
    fault: Callable[..., Any],
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its layer is named, and observed no more; the others are."""
    broken, original = engine.attention(FAULTY).impl, CPUMLAImpl.forward_mqa

    def forward_mqa(impl: Any, *args: Any) -> Any:
        return fault(impl, original, *args) if impl is broken else original(impl, *args)

    monkeypatch.setattr(CPUMLAImpl, "forward_mqa", forward_mqa)
    found = engine.watch(lambda: engine.serve(prompts, 40), caplog)
    assert [FAULTY] == found.failed
    assert {"not_reproduced": 1} == found.bypassed
    (line,) = [line for line in found.said if "not what its keys" in line]
    assert f"layer {FAULTY} (model.layers.{FAULTY}.self_attn.attn)" in line
    assert re.search(said, line), line
    assert [FAULTY] == np.flatnonzero(found.rows[1] == 0).tolist()
