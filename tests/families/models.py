"""Tiny random models of any family that transformers knows, written as a checkpoint that vLLM loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tests.families.family import Family

VOCABULARY: Final = 512
# The smallest head size that vLLM's kernels for CPUs have is 32.
COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Scores a few nats wide, so that no statistic is that of a uniform row.
_STANDARD_DEVIATION: Final = 0.15


def make_model(family: Family, folder: Path) -> nn.Module:
    """A causal model in float32 with eager attention; its checkpoint lies in the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {name: value for name, value in COMMON.items() if name not in family.without}
    config = AutoConfig.for_model(family.model_type, **{**common, **family.settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    _randomise(model)
    model.save_pretrained(folder)
    for module in model.modules():
        # vLLM's own decorator, which it puts on classes of transformers that it serves, and asks this of its objects.
        module.do_not_compile = True  # type: ignore[assignment]
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Give matrices and biases numbers that matter; norms, convolutions and what recurrences decay by stay."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "conv" not in name:
            parameter.normal_(0, _STANDARD_DEVIATION, generator=generator)
        elif name.endswith(".bias"):
            parameter.normal_(0, 0.1, generator=generator)
