"""GGUF to a safetensors folder: `python -m glassbox.cli.demo.convert GGUF TARGET DTYPE`. Used by `demo_model.py`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, target: Path, dtype: str) -> None:
    """Write `gguf`, dequantised to `dtype`, to the new folder `target`, and check what was written.

    Raises:
        RuntimeError: the folder's tokenizer lacks the chat template or doesn't give text back.
    """
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain now; with this entry, which not every transformers sets, vLLM would look for a
    # GGUF loader.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    _check_tokenizer(target)


def _check_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The capital of France is Paris."
    if (back := tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)) != text:
        raise RuntimeError(f"the tokenizer must give text back, got {back!r} for {text!r}")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    if not (isinstance(chat, str) and text in chat and chat.endswith("assistant\n")):
        raise RuntimeError(f"the chat template must end with the assistant's turn, got {chat!r}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
