"""Texts of token ids, for traces whose text may be shown (`requests.include_text`).

Owns finding and loading the served model's tokenizer, which happens at the first use and never without that setting.
Where it lies is told by the worker (`store/tokenizer_note.py`). Code that a model brings along is not run:
such a tokenizer gives no texts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from glassbox.core.logs import get_logger
from glassbox.store.tokenizer_note import read_source

logger = get_logger(__name__)

# Tokens before a text's first: what a piece looks like depends on what is before it.
_CONTEXT: Final = 8
# A character is at most four bytes, each of which may be a token.
_MOST_PIECES: Final = 8
_REPLACEMENT: Final = "\ufffd"


class Decoder(Protocol):
    """Makes text of token ids, special tokens included."""

    def __call__(self, ids: Sequence[int]) -> str: ...


class TokenTexts:
    """The texts of tokens; the tokenizer is loaded at the first call.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._decode: Decoder | None = None
        self._failed: bytes | None = None

    def decoder(self) -> Decoder | None:
        """The loaded tokenizer, None if there is none that can be loaded."""
        if self._decode is not None:
            return self._decode
        try:
            source = read_source(self._run_dir)
        except OSError:
            return None  # no worker has named it yet, or not a worker has
        if source == self._failed:
            return None
        try:
            self._decode = load(**json.loads(source))
        except Exception as error:  # whatever the libraries find wrong with it
            self._failed = source
            logger.warning("token texts are not shown, no tokenizer: %s: %s", type(error).__name__, error)
        return self._decode

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text per token; they add up to the whole. Empty if there is no tokenizer."""
        decode = self.decoder()
        return token_texts(decode, ids) if decode is not None else []


def load(tokenizer: str, revision: str | None) -> Decoder:
    """A decoder of what is on this machine; nothing is fetched.

    Raises:
        Exception: it isn't there, or needs code of its own.
    """
    file = Path(tokenizer) / "tokenizer.json"
    if not Path(tokenizer).is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(tokenizer, "tokenizer.json", revision=revision)
        file = Path(found) if isinstance(found, str) else file
    if file.is_file():
        # The fast library alone: transformers would bring seconds and hundreds of MB.
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(file))
        return lambda ids: str(fast.decode(list(ids), skip_special_tokens=False))
    from transformers import AutoTokenizer

    slow: Any = AutoTokenizer.from_pretrained(
        tokenizer, revision=revision, local_files_only=True, trust_remote_code=False
    )
    return lambda ids: str(slow.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(decode: Decoder, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character that several tokens make up is the last one's; the others have an empty text.
    """
    texts: list[str] = []
    begin, done = 0, 0  # ids[begin:done] is context whose text was given out
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[begin:done]), decode(ids[begin:end])
        whole = not now.endswith(_REPLACEMENT) or end - done >= _MOST_PIECES
        if whole and len(now) >= len(before):
            texts.append(now[len(before) :])
            done = end
            begin = max(done - _CONTEXT, 0)
        else:
            texts.append("")
    if texts and done < len(ids):
        texts[-1] = decode(ids[begin:])[len(decode(ids[begin:done])) :]
    return texts
