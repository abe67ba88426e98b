"""A request of a LoRA adapter in a real engine: its trace says so, and its rows are not the base model's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glassbox.adapter.offline_engine import deliver_ends
from glassbox.store.trace_record import RequestTrace
from tests.attached import attached_hook, plugin, running_observer

pytestmark = pytest.mark.integration

RANK = 4


def write_adapter(folder: Path, model: Path) -> Path:
    """An adapter of random weights for the queries of all layers, as peft writes it."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.1
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden, RANK, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "bias": "none", "base_model_name_or_path": ""}))
    return folder


def test_names_and_rows(demo_model_path: Path, tmp_path: Path) -> None:
    """Traces name the adapter; its rows are not the base model's."""
    with plugin(tmp_path, "sample_rate: 1.0\nexport: {interval_s: 600}\n"):
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        llm = LLM(
            str(demo_model_path),
            served_model_name="small",
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            enable_lora=True,
            max_lora_rank=8,
            seed=0,
        )
        poet = LoRARequest("poet", 1, str(write_adapter(tmp_path / "poet", demo_model_path)))
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args={"glassbox": "trace"})
        prompt: Any = {"prompt_token_ids": list(range(100, 110))}

        def trace(adapter: LoRARequest | None) -> RequestTrace:
            observer = running_observer()
            (output,) = llm.generate([prompt], params, use_tqdm=False, lora_request=adapter)
            deliver_ends(llm)
            found = {trace.request_id: trace for trace in observer.requests.ended()}
            return found[output.request_id].record()

        own, other = trace(None), trace(poet)
        assert (own.requested_model, own.adapter) == ("small", None)
        assert (other.requested_model, other.adapter) == ("poet", "poet")
        assert own.model_name == other.model_name == "small"
        assert own.positions.tolist() == other.positions.tolist()
        assert np.nanmax(np.abs(other.stats - own.stats)) > 0.1
        assert attached_hook().errors.counts() == {}
