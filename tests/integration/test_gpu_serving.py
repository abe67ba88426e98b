"""Ways of serving on a GPU with CUDA graphs: speculation, LoRA and FlashInfer are measured, certified and unchanged."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from glassbox.core.output_checks import LayerState
from tests.integration.gpu_engine import EngineSpec, measured_positions, model_path, run_engines, tokenized_text
from tests.integration.test_gpu_vllm import CONFIG, Result, assert_as_near_as_transformers, truth_sums

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.timeout(1200)]

LAYERS: Final = 30
_ADAPTER: Final = {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
WAYS: Final = ("ngram", "draft", "lora", "adapters", "flashinfer")


def _draft_model(model: Path, folder: Path) -> str:
    """A model of the same tokens whose drafts are all wrong."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def _adapter(model: Path, folder: Path) -> tuple[str, str]:
    """A random adapter of q and v, and the model with it merged in, which transformers runs."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    merged: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator, weights = torch.Generator().manual_seed(0), {}
    scale = _ADAPTER["lora_alpha"] / _ADAPTER["r"]  # type: ignore[operator]
    for number, layer in enumerate(merged.model.layers):
        for name in _ADAPTER["target_modules"]:  # type: ignore[attr-defined]
            weight = getattr(layer.self_attn, name).weight
            down = torch.randn(_ADAPTER["r"], weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = 0.02 * torch.randn(weight.shape[0], _ADAPTER["r"], generator=generator)
            down, up = down.bfloat16().float(), up.bfloat16().float()  # as vLLM loads them
            weight.data += scale * up @ down
            stem = f"base_model.model.model.layers.{number}.self_attn.{name}"
            weights |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **_ADAPTER}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged.save_pretrained(folder / "merged")
    return str(adapter), str(folder / "merged")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each way with glassbox and without it."""
    model, folder = model_path(), tmp_path_factory.mktemp("gpu")
    adapter, merged = _adapter(model, folder)
    text = tokenized_text(model)
    lengths = [3, 17, 700, 64, 250, 1, 128, 31]
    prompts = [text[7 * i : 7 * i + n] for i, n in enumerate(lengths)]
    max_tokens = [24 + 3 * i for i in range(len(lengths))]
    base = EngineSpec(str(model), prompts, max_tokens, out="", config=CONFIG, backend="FLASH_ATTN", v2_runner=None)
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    draft = {"method": "draft_model", "model": _draft_model(model, folder / "draft"), "num_speculative_tokens": 3}
    ways = {
        "ngram": replace(base, llm_args={"speculative_config": ngram}),
        "draft": replace(base, llm_args={"speculative_config": draft}),
        "lora": replace(base, adapter=adapter, llm_args={"enable_lora": True, "max_lora_rank": 8}),
        "flashinfer": replace(base, backend="FLASHINFER"),
    }
    # Every second one in the same batch; their rows are told apart.
    ways["adapters"] = replace(
        ways["lora"], adapted=[i % 2 == 1 for i in range(len(prompts))], config={**CONFIG, "adapters": {"max": 1}}
    )
    specs = {}
    for name, spec in ways.items():
        specs[name] = replace(spec, out=str(folder / name))
        specs[f"{name}-plain"] = replace(spec, out=str(folder / f"{name}-plain"), config=None)
    run_engines(specs, folder, at_once=len(specs))
    found = {name: Result(spec) for name, spec in specs.items()}
    found["lora-truth"] = Result(replace(specs["lora"], model=merged))
    return found


@pytest.mark.parametrize("way", WAYS)
class TestEachWay:
    def test_tokens_are_those_without_the_plugin(self, results: dict[str, Result], way: str) -> None:
        """Greedy, token for token, at sample rate 1.

        Of a batch that some of whose requests have an adapter, the others': vLLM 0.33 splits an adapter's product into
        64 parts (`get_lora_op_configs`), which are added in whatever order they come.
        """
        spec = results[way].spec
        exact = [i for i in range(len(spec.prompts)) if spec.adapted is None or not spec.adapted[i]]
        ours, plain = (results[name].report["tokens"] for name in (way, f"{way}-plain"))
        assert [ours[i] for i in exact] == [plain[i] for i in exact]

    def test_certified(self, results: dict[str, Result], way: str) -> None:
        """Every layer of the model, and none of a drafter, was reproduced; nothing went wrong."""
        report = results[way].report
        print(way, report["runner"], report["canary_rows"], max(report["worst_ratio"]))
        assert report["errors"] == {}
        assert report["layers"] == list(range(LAYERS))
        assert set(report["layer_states"]) == {LayerState.CERTIFIED}
        assert report["canary_rows"]["failed"] == 0

    def test_rows(self, results: dict[str, Result], way: str) -> None:
        """Prompts' rows once each; of answers one a token, but for those that came from accepted drafts."""
        result = results[way]
        positions = [measured_positions(prompt_len, len(tokens)) for tokens, prompt_len in result.sequences]
        prefill, decode = sum(len(p) for p, _ in positions), sum(len(d) for _, d in positions)
        rows = result.arrays["rows"]
        print(way, "decode rows", rows[..., 1].min(), rows[..., 1].max(), "of", decode)
        assert (rows[..., 0] == prefill).all()
        assert (rows[..., 1] == rows[0, 0, 1]).all()
        if way == "ngram":
            assert 0 < rows[0, 0, 1] <= decode
        else:
            assert rows[0, 0, 1] == decode
        assert result.arrays["nonfinite"].sum() == 0


@pytest.mark.parametrize("way", ["draft", "lora-truth", "flashinfer"])
def test_values(results: dict[str, Result], way: str) -> None:
    """As near to float32 transformers as transformers in bfloat16 is, within a factor of two."""
    assert_as_near_as_transformers(results[way])


class TestAdapters:
    """Statistics by LoRA adapter: the kernel adds to the slots of a batch's requests."""

    def test_slots_are_the_whole(self, results: dict[str, Result]) -> None:
        """Base model, adapter and others add up to the totals; the others have nothing."""
        arrays = results["adapters"].arrays
        for name in ("counts", "rows", "nonfinite"):
            np.testing.assert_array_equal(arrays[f"adapter_{name}"].sum(0), arrays[name].sum((0, 1)))
        np.testing.assert_allclose(arrays["adapter_sums"].sum(0), arrays["sums"].sum((0, 1)), rtol=1e-9, atol=1e-6)
        assert arrays["adapter_rows"].shape == (3, 2)
        assert arrays["adapter_rows"][2].sum() == 0

    @pytest.mark.parametrize("adapted", [False, True])
    def test_each_slot_is_its_models(self, results: dict[str, Result], adapted: bool) -> None:
        """Its rows exactly, and its means as near to float32 transformers of its model as bfloat16 is, twice over."""
        import torch

        whole = results["adapters"]
        assert whole.spec.adapted is not None
        model = results["lora-truth"].spec.model if adapted else whole.spec.model
        part = _Part(replace(whole.spec, model=model), whole, adapted)
        exact = truth_sums(part, torch.float32)
        places = exact.shape[0] * exact.shape[1]
        positions = [measured_positions(prompt_len, len(tokens)) for tokens, prompt_len in part.sequences]
        rows = np.array([sum(len(of[phase]) for of in positions) for phase in (0, 1)])
        np.testing.assert_array_equal(whole.arrays["adapter_rows"][int(adapted)], rows * places)
        near = (truth_sums(part, torch.bfloat16) - exact) / rows[:, None]
        ours = (whole.arrays["adapter_sums"][int(adapted)] - exact.sum((0, 1))) / (rows[:, None] * places)
        theirs = np.sqrt(np.square(near).mean((0, 1)))  # of a place: that of the mean over all is smaller still
        print("adapted" if adapted else "base", np.abs(ours).round(6).tolist(), theirs.round(6).tolist())
        assert (np.abs(ours) <= 2 * theirs).all()


@dataclass(frozen=True)
class _Part(Result):
    """Those requests of an engine that asked for its adapter, or those that did not."""

    whole: Result
    adapted: bool

    @property
    def sequences(self) -> list[tuple[list[int], int]]:
        asked = self.whole.spec.adapted or []
        return [one for one, adapted in zip(self.whole.sequences, asked, strict=True) if adapted is self.adapted]


def test_flashinfer_is_what_ran(results: dict[str, Result]) -> None:
    """Not another backend in its place."""
    assert results["flashinfer"].report["backend"] == "FLASHINFER"
