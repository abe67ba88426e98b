"""The model of random weights: its tokenizer makes texts of as many tokens as were wanted."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.bench.bench_load import random_model


class TestRandomModel:
    def test_every_token_comes_back(self, tmp_path: Path) -> None:
        """From the text that they are decoded to: special ones are no part of others."""
        folder = random_model(tmp_path / "model", {"model_type": "llama", "vocab_size": 2500})
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokens = list(range(2500))
        assert tokens == tokenizer.encode(tokenizer.decode(tokens))
