"""Tiny random models of any family, written as a checkpoint that vLLM loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from tests.families import foreign
from tests.families.family import HEADS, Family, Task

VOCABULARY: Final = 512
# The smallest head size that vLLM's kernels for CPUs have is 32.
COMMON: Final[Mapping[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# One second.
SAMPLING_RATE: Final = 16_000
AUDIO: Final = np.sin(np.arange(SAMPLING_RATE) / 7).astype(np.float32)
# Scores a few nats wide, so that no statistic is that of a uniform row.
_STANDARD_DEVIATION: Final = 0.15


def make_checkpoint(family: Family, folder: Path) -> tuple[str, nn.Module | None]:
    """Write a checkpoint in float32.

    Args:
        family: whose.
        folder: is made.

    Returns:
        the architecture, and the model with eager attention; None if transformers doesn't have it.
    """
    common = {name: value for name, value in COMMON.items() if name not in family.without}
    settings = {**common, **family.settings}
    if family.model_type in foreign.NAMES:
        return foreign.write_checkpoint(family.model_type, settings, _STANDARD_DEVIATION, folder), None
    model: Any = _make_model(family, settings)
    if family.task is Task.EMBED:
        _write_tokenizer(folder)
    elif family.task is Task.TRANSCRIBE:
        _write_processor(folder)
    model.save_pretrained(folder)
    return model.config.architectures[0], model


def _make_model(family: Family, settings: Mapping[str, Any]) -> nn.Module:
    import transformers as hf

    config = hf.AutoConfig.for_model(family.model_type, **settings)
    auto: Any = {
        Task.GENERATE: hf.AutoModelForCausalLM,
        Task.EMBED: hf.AutoModel,
        Task.TRANSCRIBE: hf.AutoModelForSpeechSeq2Seq,
        Task.TRANSLATE: hf.AutoModelForSeq2SeqLM,
    }[family.task]
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    _randomise(model)
    for module in model.modules():
        # vLLM's own decorator, which it puts on classes of transformers that it serves, and asks this of its objects.
        module.do_not_compile = True
    return model


def _write_tokenizer(folder: Path) -> None:
    """One word a token; vLLM asks for it before it pools, and doesn't use it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0")
    tokenizer.save_pretrained(folder)


def _write_processor(folder: Path) -> None:
    """For two seconds of audio."""
    from transformers import WhisperProcessor, WhisperTokenizer

    special = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
    words = [*special, *(f"w{number}" for number in range(len(special), VOCABULARY))]
    tokenizer = WhisperTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    WhisperProcessor(_feature_extractor(), tokenizer).save_pretrained(folder)


def _feature_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80, chunk_length=2)


def audio_features() -> Tensor:
    """AUDIO as a model hears it."""
    features: Tensor = _feature_extractor()(AUDIO, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    return features


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Give matrices and biases numbers that matter; norms, convolutions and what recurrences decay by stay."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "conv" not in name:
            parameter.normal_(0, _STANDARD_DEVIATION, generator=generator)
        elif name.endswith(".bias"):
            parameter.normal_(0, 0.1, generator=generator)
