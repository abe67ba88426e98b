"""Tiny random models with latent attention (MLA) that vLLM's CPU backend serves: its kernel knows 512 + 64 alone.

Their weights are large enough for attention that is not spread evenly.
"""

from pathlib import Path
from typing import Any, Final

import torch

LAYERS, HEADS, LATENT, ROTARY, NOPE, VALUE = 3, 4, 512, 64, 32, 48
VOCABULARY: Final = 512
_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": LAYERS,  # no layer has experts
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": VALUE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# As DeepSeek's own models have it. Without it vLLM 0.32 serves such models wrongly on a CPU: its rotary kernel takes
# the rotary part of a query, which is a strided view, for a contiguous tensor.
_YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def save_mla_model(folder: Path, family: str, **sizes: int) -> Path:
    """Write one of deepseek_v2, deepseek_v2_lora (compressed queries) and deepseek_v3, of other sizes if asked."""
    import transformers as hf

    torch.manual_seed(0)
    lora = None if family == "deepseek_v2" else 48
    config: dict[str, Any] = {**_SIZES, **sizes, "q_lora_rank": lora, "rope_parameters": dict(_YARN)}
    if family.startswith("deepseek_v2"):
        model: Any = hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**config))
    else:
        model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**config, n_group=1, topk_group=1))
    path = folder / family
    model.float().save_pretrained(path)
    return path
