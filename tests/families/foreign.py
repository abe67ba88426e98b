"""Families that vLLM serves and transformers doesn't have: their checkpoints, tensor by tensor.

All are decoders as Llama is, whose tensors have other names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch


@dataclass(frozen=True)
class Names:
    """Of a checkpoint's tensors; `{}` stands for the layer.

    Attributes:
        architecture: vLLM's class.
        outside: embedding, last norm and head.
        attention: q, k, v and output.
        mlp: gate, up and down.
        norms: before attention and before the MLP.
        packed: the first of `attention` holds q, k and v, KV head by KV head; the next two are not there.
        norm_biases: norms have biases.
    """

    architecture: str
    outside: tuple[str, str, str]
    attention: tuple[str, str, str, str]
    mlp: tuple[str, str, str]
    norms: tuple[str, str]
    packed: bool = False
    norm_biases: bool = False


_LLAMA: Final = {
    "outside": ("model.embed_tokens", "model.norm", "lm_head"),
    "attention": tuple(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"),
    "mlp": tuple(f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "norms": ("model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"),
}
# By model type.
NAMES: Final[Mapping[str, Names]] = {
    "internlm2": Names(
        "InternLM2ForCausalLM",
        ("model.tok_embeddings", "model.norm", "output"),
        ("model.layers.{}.attention.wqkv", "", "", "model.layers.{}.attention.wo"),
        ("model.layers.{}.feed_forward.w1", "model.layers.{}.feed_forward.w3", "model.layers.{}.feed_forward.w2"),
        ("model.layers.{}.attention_norm", "model.layers.{}.ffn_norm"),
        packed=True,
    ),
    "internlm3": Names("InternLM3ForCausalLM", **_LLAMA),
    "minicpm": Names("MiniCPMForCausalLM", **_LLAMA),
    "orion": Names("OrionForCausalLM", **_LLAMA, norm_biases=True),
    "baichuan": Names("BaichuanForCausalLM", **_LLAMA),
    "exaone": Names(
        "ExaoneForCausalLM",
        ("transformer.wte", "transformer.ln_f", "lm_head"),
        tuple(f"transformer.h.{{}}.attn.attention.{name}_proj" for name in ("q", "k", "v", "out")),
        ("transformer.h.{}.mlp.c_fc_0", "transformer.h.{}.mlp.c_fc_1", "transformer.h.{}.mlp.c_proj"),
        ("transformer.h.{}.ln_1", "transformer.h.{}.ln_2"),
    ),
}


def write_checkpoint(model_type: str, settings: Mapping[str, Any], standard_deviation: float, folder: Path) -> str:
    """Write a random checkpoint in float32, and let transformers know the configuration; returns the architecture.

    Args:
        model_type: one of NAMES.
        settings: of the configuration.
        standard_deviation: of the matrices.
        folder: is made.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, PretrainedConfig

    names = NAMES[model_type]
    config_class = type(f"{model_type.title()}Config", (PretrainedConfig,), {"model_type": model_type})
    AutoConfig.register(model_type, config_class, exist_ok=True)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = config_class(
        **settings, architectures=[names.architecture], rope_parameters=rope, tie_word_embeddings=False
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * standard_deviation
        for name, shape in _matrices(names, config).items()
    }
    for norm in (names.outside[1], *(name.format(n) for n in range(config.num_hidden_layers) for name in names.norms)):
        tensors[f"{norm}.weight"] = torch.ones(config.hidden_size)
        if names.norm_biases:
            tensors[f"{norm}.bias"] = torch.zeros(config.hidden_size)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return names.architecture


def _matrices(names: Names, config: Any) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = hidden, hidden // config.num_attention_heads * config.num_key_value_heads
    heights = (q + 2 * kv, 0, 0, hidden) if names.packed else (q, kv, kv, hidden)
    shapes = {f"{name}.weight": (config.vocab_size, hidden) for name in (names.outside[0], names.outside[2])}
    for layer in range(config.num_hidden_layers):
        for name, height in zip(names.attention, heights, strict=True):
            if height:
                shapes[f"{name.format(layer)}.weight"] = (height, hidden)
        gate, up, down = (name.format(layer) for name in names.mlp)
        shapes |= {
            f"{gate}.weight": (inner, hidden),
            f"{up}.weight": (inner, hidden),
            f"{down}.weight": (hidden, inner),
        }
    return shapes
