"""Messages are found in the prompt whatever a chat template does around them, and refused where they can't be."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from glassbox.core.trace_options import MessageSpan, OptionError, Span
from glassbox.processes.api_server.message_spans import resolve

Template = Callable[[list[Any]], str | None]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Hello there"},
]


def text_of(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def chatml(messages: list[Any]) -> str:
    """A system message of its own if there is none; texts trimmed."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Default."}, *messages]
    return "".join(f"<s>{m['role']}\n{text_of(m).strip()}<e>\n" for m in messages) + "<s>assistant\n"


def words(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens are runs of letters with the blank before them, and all other characters one by one."""
    found = [match.span() for match in re.finditer(r" ?\w+|\W", text)]
    return [hash(text[a:b]) % 50_000 for a, b in found], found


def find(
    *wanted: MessageSpan, chat: Sequence[Any] = CHAT, template: Template = chatml, ids: list[int] | None = None
) -> dict[str, str]:
    """The text that the found tokens stand for, by name of the span."""

    async def render(messages: list[Any]) -> str | None:
        return template(messages)

    async def tokenize(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return words(text)

    text = template(list(chat)) or ""
    true_ids, offsets = words(text)
    spans = asyncio.run(resolve(wanted, chat, true_ids if ids is None else ids, render, tokenize))
    assert all(isinstance(span, Span) for span in spans)
    return {span.name: text[offsets[span.start][0] : offsets[span.end - 1][1]] for span in spans}


class TestResolve:
    def test_every_message(self) -> None:
        """Each index gives its own text, without the template's words around it."""
        found = find(*(MessageSpan(f"m{i}", i) for i in range(4)))
        assert {"m0": "Be brief.", "m1": "Hello there", "m2": "Hi", "m3": "Hello there"} == found

    def test_equal_texts_are_told_apart(self) -> None:
        """Two messages say the same; the last one's tokens come after the third message's."""

        async def render(messages: list[Any]) -> str:
            return chatml(messages)

        async def tokenize(text: str) -> tuple[list[int], list[tuple[int, int]]]:
            return words(text)

        wanted = [MessageSpan("first", 1), MessageSpan("third", 2), MessageSpan("last", -1)]
        first, third, last = asyncio.run(resolve(wanted, CHAT, words(chatml(CHAT))[0], render, tokenize))
        assert first.end < third.start < third.end < last.start

    def test_a_default_system_message_counts_as_none(self) -> None:
        """The template writes one of its own: index 0 is still the client's first message."""
        assert {"user": "Hello there"} == find(MessageSpan("user", 0), chat=CHAT[1:])

    def test_texts_that_are_trimmed(self) -> None:
        """What the template leaves of a text is found."""
        chat = [{"role": "user", "content": "\n  Why?  \n"}, CHAT[2]]
        assert {"question": "Why?"} == find(MessageSpan("question", 0), chat=chat)

    def test_a_list_of_texts(self) -> None:
        """All its parts are the message."""
        chat = [{"role": "user", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]}]
        assert {"all": "One. Two."} == find(MessageSpan("all", 0), chat=chat)

    def test_escaped_texts(self) -> None:
        """A template that writes JSON: the escaped text is found, quotes around it are not."""

        def as_json(messages: list[Any]) -> str:
            return json.dumps(messages)

        chat = [{"role": "user", "content": 'Say "no"\n'}]
        assert {"user": 'Say \\"no\\"\\n'} == find(MessageSpan("user", 0), chat=chat, template=as_json)

    def test_a_token_that_holds_more_than_the_text(self) -> None:
        """It counts as the text's."""

        def joined(messages: list[Any]) -> str:
            return "".join(f"begin{text_of(m)}end " for m in messages)

        assert {"a": "beginonetwoend"} == find(
            MessageSpan("a", 0), chat=[{"role": "user", "content": "onetwo"}], template=joined
        )


class TestRefusals:
    @pytest.mark.parametrize("index", [4, -5])
    def test_an_index_out_of_range(self, index: int) -> None:
        """The error says how many messages there are."""
        with pytest.raises(
            OptionError, match=rf"glassbox_spans u must name one of the 4 messages, 0 to 3, got {index}"
        ):
            find(MessageSpan("u", index))

    @pytest.mark.parametrize("content", [None, [{"type": "image_url", "image_url": {"url": "x"}}], []])
    def test_a_message_without_text(self, content: Any) -> None:
        """Images and calls of tools have no tokens of text."""
        chat = [CHAT[1], {"role": "assistant", "content": content}]

        def template(messages: list[Any]) -> str:
            return "".join(str(m["content"]) for m in messages)

        with pytest.raises(OptionError, match="must name messages of text, got 1, which is not"):
            find(MessageSpan("x", 1), chat=chat, template=template)

    def test_an_empty_text(self) -> None:
        """It has no token."""
        chat = [CHAT[0], {"role": "user", "content": "  "}]
        with pytest.raises(OptionError, match="u must name a message with text, got 1, which has none"):
            find(MessageSpan("u", 1), chat=chat)

    def test_a_message_that_is_left_out(self) -> None:
        """The template drops all but the last message."""
        with pytest.raises(OptionError, match="the chat template writes once, got 0"):
            find(MessageSpan("u", 0), template=lambda messages: f"<{text_of(messages[-1])}>")

    def test_a_message_that_is_written_twice(self) -> None:
        """Which of the two is meant can't be told."""
        with pytest.raises(OptionError, match="the chat template writes once, got 1"):
            find(MessageSpan("u", 1), template=lambda messages: chatml(messages) * 2)

    def test_a_message_that_changes_what_is_around_it(self) -> None:
        """The template looks into the text."""

        def counting(messages: list[Any]) -> str:
            return "".join(f"{len(text_of(m))}: {text_of(m)}\n" for m in messages)

        with pytest.raises(OptionError, match="don't change what the chat template writes around them, got 1"):
            find(MessageSpan("u", 1), template=counting)

    def test_a_prompt_of_other_tokens(self) -> None:
        """The prompt was cut: positions in the text are not those of the prompt."""
        with pytest.raises(OptionError, match="can be traced back to its text"):
            find(MessageSpan("u", 1), ids=[1, 2, 3])

    def test_a_model_without_a_text(self) -> None:
        """Some chats are made of tokens directly."""
        with pytest.raises(OptionError, match="need a text-only chat and a chat template of text"):
            find(MessageSpan("u", 1), template=lambda _: None)
