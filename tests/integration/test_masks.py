"""A model whose prompt tokens see each other, in vLLM: its rows are not measured as causal ones.

vLLM's own layer for that is put into the model of the demo, whose answers are then others.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.attached import plugin, running_observer
from tests.families.serving import glassbox_log

pytestmark = pytest.mark.integration

PROMPT, GENERATED, ROWS = 40, 6, 8
CONFIG = f"sample_rate: 1.0\nsampling: {{prefill_rows_per_request: {ROWS}}}\ncanary: {{interval_s: 1}}\n"


def test_bidirectional_prompts(demo_model_path: Path, tmp_path: Path) -> None:
    """Of a prompt its last row is as causal, the others are dropped and counted, and said at start and at the first.

    Decode rows are all there.
    """
    with glassbox_log() as log, plugin(tmp_path, CONFIG) as patch:
        from vllm import LLM, SamplingParams
        from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention
        from vllm.model_executor.models import llama

        patch.setattr(llama, "Attention", PrefillPrefixLMAttention)
        llm = LLM(
            str(demo_model_path),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            max_num_batched_tokens=256,
        )
        params = SamplingParams(temperature=0.0, max_tokens=GENERATED, ignore_eos=True)
        prompts: list[Any] = [{"prompt_token_ids": list(range(100 + n, 100 + n + PROMPT))} for n in range(2)]
        llm.generate(prompts, params, use_tqdm=False)
        observer = running_observer()
        rows = observer.measurer.copy(0.0).rows
        layers, heads, _ = rows.shape
        prefill, decode = rows.sum((0, 1)).tolist()
        assert (len(prompts), len(prompts) * (GENERATED - 1)) == (prefill / layers / heads, decode / layers / heads)
        assert len(prompts) * (ROWS - 1) * layers * heads == observer.counters.dropped_rows["mask"]
        assert 0 == observer.counters.canary_rows["failed"] < observer.counters.canary_rows["reproduced"]
        assert {} == observer._errors.counts()
        assert [
            line for line in log if "Rows of prompts whose tokens see keys behind their own are not measured" in line
        ]
        assert 1 == len([line for line in log if "left out of the histograms: prompt tokens that see keys" in line])
