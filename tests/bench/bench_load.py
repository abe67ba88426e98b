"""`vllm bench serve` as the client of a benchmark, and a model of random weights whose texts it can make.

Owns the arguments of vLLM's own benchmark and what is read of its results; needs no network.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SERVED_NAME: Final = "bench"


@dataclass(frozen=True)
class Shape:
    """Of the load: the most requests at once, and the tokens of each."""

    clients: int
    input_tokens: int
    output_tokens: int


def random_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model without weights, with a tokenizer that has a word for each token, so that texts keep their lengths."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir(exist_ok=True)
    # transformers takes a large vocabulary without its own version for a broken one of Mistral.
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    # No word is part of another: those of special tokens are looked for before the text is cut at spaces.
    words = [f"<{number}>" for number in range(config["vocab_size"])]
    special = dict(zip(("unk_token", "bos_token", "eos_token"), words, strict=False))
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special})
    )
    return folder


class Load:
    """`vllm bench serve`, each time in a process forked from this one: to start it anew takes seconds of all cores.

    Args:
        model: folder whose tokenizer makes the prompts.
        shape: of the load.
        folder: for its output.

    Raises:
        RuntimeError: vLLM's benchmark can't be imported; the message names what is missing and what to do.
    """

    def __init__(self, model: Path, shape: Shape, folder: Path) -> None:
        try:
            from vllm.benchmarks import serve
            from vllm.utils.argparse_utils import FlexibleArgumentParser
        except ImportError as error:
            raise RuntimeError(
                f"`vllm bench serve` can't be imported ({error}); pip install 'vllm[bench]' of the installed release"
            ) from error
        self._serve = serve
        self._parser = FlexibleArgumentParser()
        serve.add_cli_args(self._parser)
        self._model, self._shape, self._folder = model, shape, folder

    def words(self, url: str, rate: float, count: int, seed: int, result: Path) -> list[str]:
        """Arguments of `vllm bench serve`."""
        shape = self._shape
        return [
            "--backend", "openai", "--base-url", url, "--model", SERVED_NAME, "--tokenizer", str(self._model),
            "--dataset-name", "random", "--ignore-eos", "--temperature", "0", "--seed", str(seed),
            "--random-input-len", str(shape.input_tokens), "--random-output-len", str(shape.output_tokens),
            "--request-rate", str(rate), "--num-prompts", str(count), "--max-concurrency", str(shape.clients),
            "--num-warmups", "2", "--disable-tqdm", "--save-result", "--save-detailed",
            "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip

    def run(self, url: str, rate: float, count: int, seed: int) -> dict[str, Any]:
        """Returns what it saved, without texts.

        Args:
            url: of the server.
            rate: requests a second; infinite for all at once.
            count: requests.
            seed: of prompts and arrivals.

        Raises:
            RuntimeError: it failed, or requests did.
        """
        result, log = self._folder / "result.json", self._folder / "load.log"
        words = self.words(url, rate, count, seed, result)
        process = multiprocessing.get_context("fork").Process(target=self._child, args=(words, log))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        if process.exitcode != 0:
            tail_of_log = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"vllm bench serve ended with exit status {process.exitcode}:\n{tail_of_log}")
        found = json.loads(result.read_text())
        result.unlink()
        if found["completed"] != count:
            first = next((error for error in found["errors"] if error), "no error was reported")
            raise RuntimeError(f"all of {count} requests must be answered, {found['completed']} were; {first}")
        return {name: value for name, value in found.items() if name != "generated_texts"}

    def _child(self, words: Sequence[str], log: Path) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self._serve.main(self._parser.parse_args(list(words)))
        sys.stdout.flush()
