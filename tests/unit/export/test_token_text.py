"""Texts of tokens add up to the whole, and are there only with a tokenizer that runs no foreign code."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.export.token_text import TokenTexts, load, token_texts
from glassbox.store.tokenizer_note import write_source
from tests.export_samples import logged

tokenizers = pytest.importorskip("tokenizers", reason="comes with vLLM")


def make_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer as GPT-2's, whose tokens are bytes and a few pairs of them."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(alphabet))}
    merges = [("h", "e"), ("Ġ", "t"), ("Ã", "©")]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model"))


class TestTokenTexts:
    @settings(max_examples=100, deadline=None)
    @given(text=st.text(max_size=40))
    def test_they_add_up(self, folder: Path, text: str) -> None:
        """One text per token, together the decoded whole."""
        ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        texts = token_texts(load(str(folder), None), ids)
        assert len(ids) == len(texts)
        assert text == "".join(texts)

    def test_a_character_of_several_tokens(self, folder: Path) -> None:
        """It is its last token's."""
        ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a🗼b").ids
        assert ["a", "", "", "", "🗼", "b"] == token_texts(load(str(folder), None), ids)

    def test_broken_characters(self, folder: Path) -> None:
        """Bytes that are no text (a cut answer) don't hold up what comes after them."""
        whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        half = whole.encode("🗼").ids[:2]
        texts = token_texts(load(str(folder), None), half * 6 + whole.encode("end").ids)
        assert "end" == "".join(texts)[-3:]


class TestSource:
    def test_nothing_is_loaded_before_the_first_use(self, tmp_path: Path, folder: Path) -> None:
        """Nor without a source; it may come later."""
        texts = TokenTexts(tmp_path)
        assert [] == texts([1])
        write_source(tmp_path, str(folder), None)
        assert 1 == len(texts([1]))

    def test_a_tokenizer_that_is_not_there(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """No texts, and one line in the log."""
        write_source(tmp_path, str(tmp_path / "absent"), None)
        texts = TokenTexts(tmp_path)
        assert [] == texts([1])
        assert [] == texts([1])
        (line,) = logged(caplog.records)
        assert line.startswith("token texts are not shown, no tokenizer")
