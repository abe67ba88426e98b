"""Requests of LoRA adapters in a real engine: traces say so, and their rows are counted apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glassbox.adapter.offline_engine import deliver_ends
from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.core.statistics import NUM_BUCKETS, STATISTICS
from glassbox.store.merge import merge
from glassbox.store.trace_record import RequestTrace
from tests.attached import attached_hook, plugin, running_observer
from tests.integration.row_recorder import RowRecorder

pytestmark = pytest.mark.integration

RANK = 4


def write_adapter(folder: Path, model: Path, seed: int = 0) -> Path:
    """An adapter of random weights for the queries of all layers, as peft writes it."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed)
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
    """Traces name the adapter, whose rows are not the base model's; statistics tell adapters apart, up to a limit."""
    with plugin(tmp_path, "sample_rate: 1.0\nadapters: {max: 2}\nexport: {interval_s: 600}\n"):
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        llm = LLM(
            str(demo_model_path),
            served_model_name="small",
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=8,
            enable_lora=True,
            max_lora_rank=8,
            max_loras=3,
            enable_prefix_caching=False,
            seed=0,
        )
        poet, coder, third = (
            LoRARequest(name, number, str(write_adapter(tmp_path / name, demo_model_path, number)))
            for number, name in enumerate(("poet", "coder", "third"), 1)
        )
        traced = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args={"glassbox": "trace"})
        prompt: Any = {"prompt_token_ids": list(range(100, 110))}

        def trace(adapter: LoRARequest | None) -> RequestTrace:
            observer = running_observer()
            (output,) = llm.generate([prompt], traced, use_tqdm=False, lora_request=adapter)
            deliver_ends(llm)
            found = {trace.request_id: trace for trace in observer.requests.ended()}
            return found[output.request_id].record()

        own, other = trace(None), trace(poet)
        assert (own.requested_model, own.adapter) == ("small", None)
        assert (other.requested_model, other.adapter) == ("poet", "poet")
        assert own.model_name == other.model_name == "small"
        assert own.positions.tolist() == other.positions.tolist()
        assert set(own.phases.tolist()) == set(other.phases.tolist()) == {0}
        assert np.nanmax(np.abs(other.stats - own.stats)) > 0.1

        before, recorder = by_adapter(), RowRecorder()
        # All in the same steps, of different lengths.
        of_each = [None, poet, None, coder, third, poet]
        outputs = llm.generate(
            [{"prompt_token_ids": list(range(100, 105 + 3 * n))} for n in range(len(of_each))],
            [SamplingParams(temperature=0, max_tokens=3 + n, ignore_eos=True) for n in range(len(of_each))],
            use_tqdm=False,
            lora_request=of_each,
        )
        assert_counted(before, recorder, dict(zip((output.request_id for output in outputs), of_each, strict=True)))
        assert attached_hook().errors.counts() == {}


def by_adapter() -> dict[str, dict[str, np.ndarray]]:
    """What the worker's snapshot has of each adapter, which must add up to its totals."""
    worker = attached_hook().worker
    assert worker is not None
    snapshot = worker.snapshot()
    assert snapshot.by_adapter is not None
    for name in ("counts", "rows", "nonfinite"):
        total = getattr(snapshot, name).sum((0, 1))
        np.testing.assert_array_equal(getattr(snapshot.by_adapter, name).sum(0), total)
    (engine,) = merge([snapshot])
    assert engine.by_adapter is not None
    return {
        label: {name: getattr(engine.by_adapter, name)[at] for name in CUMULATIVE_ARRAYS}
        for at, (label,) in enumerate(engine.by_adapter.labels)
    }


def assert_counted(before: dict[str, Any], recorder: RowRecorder, adapters: dict[str, Any]) -> None:
    """Each adapter got the recorded rows of its requests, and nothing else."""
    after, rows = by_adapter(), recorder.take()
    assert list(after) == ["base", "poet", "coder", "other"]
    slots = {None: "base", "poet": "poet", "coder": "coder", "third": "other"}
    for label, now in after.items():
        nothing = {name: np.zeros_like(array) for name, array in now.items()}
        came = {name: now[name] - before.get(label, nothing)[name] for name in now}
        for phase in (0, 1):
            stats = np.stack(
                [
                    row.stats
                    for row in rows
                    if row.phase == phase and slots[adapter_of(row.request_id, adapters)] == label
                ]
            )
            assert came["rows"][phase] == np.prod(stats.shape[:3])
            assert came["nonfinite"][phase] == 0
            for s, statistic in enumerate(STATISTICS):
                values = stats[..., s].ravel()
                values = values[~np.isnan(values)]
                buckets = np.bincount(np.searchsorted(np.float32(statistic.buckets), values), minlength=NUM_BUCKETS)
                np.testing.assert_array_equal(came["counts"][phase, s], buckets)
                np.testing.assert_allclose(came["sums"][phase, s], values.astype(float).sum(), rtol=1e-9, atol=1e-9)


def adapter_of(request_id: str, adapters: dict[str, Any]) -> str | None:
    """By vLLM's internal id, which is the external one, or begins with it."""
    external = request_id if request_id in adapters else request_id.rpartition("-")[0]
    adapter = adapters[external]
    return None if adapter is None else str(adapter.lora_name)
