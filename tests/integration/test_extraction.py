"""Rows of labelled samples from a real model: what stands in them is what a trace of the same request says."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from glassbox import Extractor, capture
from glassbox.adapter.offline_engine import OfflineEngine, greedy_params
from glassbox.signals.features import features
from glassbox.view.samples.feature_table import SampleRow
from glassbox.view.samples.samples_file import Sample, SpanPlace
from tests.attached import plugin

pytestmark = pytest.mark.integration

PLAIN = Sample(0, "1", "The capital of France is", None, None, True, None, ())
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour of the sky."})


@pytest.fixture(scope="module")
def llm(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineEngine]:
    given = replace(PLAIN, answer="x")
    with plugin(tmp_path_factory.mktemp("glassbox"), Extractor.config([given])):
        yield Extractor.load_engine(
            str(demo_model_path), {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 64, "seed": 0}
        )


def extract(llm: OfflineEngine, *samples: Sample, max_tokens: int = 4) -> list[SampleRow]:
    return Extractor(llm, max_tokens=max_tokens).rows([replace(one, index=i) for i, one in enumerate(samples)])


def test_a_row_is_what_a_trace_says(llm: OfflineEngine) -> None:
    """With spans by text, by position and by message, found where they stand."""
    spans = (SpanPlace("country", text=" France"), SpanPlace("start", tokens=(0, 2)))
    chat = Sample(1, "2", None, CHAT, None, False, "g", (SpanPlace("user", message=-1), SpanPlace("sky", text="sky")))
    plain, asked = extract(llm, replace(PLAIN, spans=spans), chat)
    assert (True, None, None, 5, 4) == (
        plain.label,
        plain.group,
        plain.problem,
        plain.prompt_tokens,
        plain.answer_tokens,
    )
    assert (False, "g", None) == (asked.label, asked.group, asked.problem)
    captured = capture(llm, [PLAIN.prompt], greedy_params(4), spans={"country": (3, 4), "start": (0, 2)}, timeout_s=120)
    assert captured.outputs[0].outputs[0].text == plain.answer
    assert features(captured.traces[0][0]) == pytest.approx(dict(plain.features), rel=1e-4, abs=1e-5)
    text = llm.get_tokenizer().apply_chat_template([dict(m) for m in CHAT], tokenize=False, add_generation_prompt=True)
    tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
    # Every word of that message is its own token there.
    words = llm.get_tokenizer().encode(CHAT[1]["content"])
    begin = next(i for i in range(len(tokens)) if tokens[i : i + len(words)] == words)
    sky = begin + words.index(llm.get_tokenizer().encode(" sky")[0])
    captured = capture(
        llm,
        [{"prompt_token_ids": tokens}],
        greedy_params(4),
        spans={"user": (begin, begin + len(words)), "sky": (sky, sky + 1)},
        timeout_s=120,
    )
    assert features(captured.traces[0][0]) == pytest.approx(dict(asked.features), rel=1e-4, abs=1e-5)


def test_a_given_answer_is_measured_as_if_it_had_been_generated(llm: OfflineEngine) -> None:
    """The same tokens have the same features, but for those that only generated ones have."""
    (generated,) = extract(llm, PLAIN, max_tokens=8)
    tokenizer = llm.get_tokenizer()
    # The last generated token is never an input and has no row; given ones all have.
    shorter = tokenizer.decode(tokenizer.encode(generated.answer)[:7])
    (given,) = extract(llm, replace(PLAIN, answer=shorter))
    assert (5, 7, shorter) == (given.prompt_tokens, given.answer_tokens, given.answer)
    expected = {name: value for name, value in generated.features.items() if "lookback_ratio" not in name}
    assert expected == pytest.approx(dict(given.features), rel=1e-3, abs=1e-4)


def test_what_can_not_be_asked_is_said(llm: OfflineEngine) -> None:
    """In its row; the others are measured."""
    rows = extract(
        llm,
        replace(PLAIN, prompt="word " * 200),
        replace(PLAIN, prompt="twice twice", spans=(SpanPlace("a", text="twice"),)),
        replace(PLAIN, spans=(SpanPlace("a", message=0),)),
        replace(PLAIN, prompt=(1, 2, 3), spans=(SpanPlace("a", text="b"),)),
        Sample(0, "5", None, CHAT, None, None, None, (SpanPlace("a", message=7),)),
        PLAIN,
    )
    wanted = [
        "must have 1 to 127 tokens with its answer, got 20",
        "the span a must be a text that stands in the prompt once, it does 2 times",
        "spans by message need messages",
        "spans by text need a prompt of text",
        "a must name one of the 2 messages, 0 to 1, got 7",
    ]
    for row, message in zip(rows, wanted, strict=False):
        assert message in (row.problem or "")
        assert not row.features
    assert (None, 4) == (rows[5].problem, rows[5].answer_tokens)
