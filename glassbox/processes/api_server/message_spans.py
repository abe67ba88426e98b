"""From a chat's messages to the token ranges in which their texts stand.

Owns the search. A chat template may do with a message what it likes (trim it, wrap it, put a default before it), so
the place of a text is not computed but looked up: the chat is rendered once more with the message replaced by a word
that occurs nowhere else, and what stands around that word must stand around the text in the real prompt. It knows
nothing of vLLM: rendering and tokenizing are passed in.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from glassbox.core.trace_options import SPANS_KEY, MessageSpan, OptionError, Span

# One more rendering of the chat per span; the prompt is tokenized once.
Render = Callable[[list[Any]], Awaitable[str | None]]
# Token ids of a text, and of each token the range of characters, end exclusive.
Tokenize = Callable[[str], Awaitable[tuple[Sequence[int], Sequence[tuple[int, int]]] | None]]

_REMEDY: Final = "give token positions (name=start:end) instead"


async def resolve(
    wanted: Sequence[MessageSpan],
    messages: Sequence[Any],
    prompt_token_ids: Sequence[int] | None,
    render: Render,
    tokenize: Tokenize,
) -> list[Span]:
    """Token ranges of the texts of messages, without what the template writes around them.

    A token that holds the end of a text and something else counts as the text's.

    Args:
        wanted: names and message indices; a negative index counts from the last message.
        messages: as the client sent them.
        prompt_token_ids: of the prompt that the engine gets, None if it is not (only) tokens.
        render: the chat template's text for messages; None if it makes none.
        tokenize: as the engine does it; None if the tokenizer can't tell characters.

    Raises:
        OptionError: an index is out of range, a message has no text, or its tokens can't be told.
    """
    chosen = {span.name: _index(span, len(messages)) for span in wanted}
    text = await render(list(messages))
    if text is None or prompt_token_ids is None:
        raise OptionError(f"{SPANS_KEY} by message need a text-only chat and a chat template of text; {_REMEDY}")
    tokens = await tokenize(text)
    if tokens is None or list(tokens[0]) != list(prompt_token_ids):
        raise OptionError(
            f"{SPANS_KEY} by message need a prompt whose tokens can be traced back to its text, which this one's "
            f"can't (cut prompts, some tokenizers); {_REMEDY}"
        )
    ranges: dict[int, tuple[int, int]] = {}
    for index in set(chosen.values()):
        begin, end = await _characters(index, messages, text, render)
        ranges[index] = _tokens(begin, end, tokens[1])
    for name, index in chosen.items():
        if ranges[index][0] >= ranges[index][1]:
            raise OptionError(f"{SPANS_KEY} {name} must name a message with text, got {index}, which has none")
    return [Span(name, *ranges[index]) for name, index in chosen.items()]


def placed(span: MessageSpan, places: Sequence[int | None]) -> MessageSpan:
    """The same message, as the chat counts it that an API has made of a request.

    Args:
        span: as the client counts its messages.
        places: of each of these its index in the chat; None if it is not one message there.

    Raises:
        OptionError: there is no such message, or it is not one there.
    """
    index = _index(span, len(places))
    place = places[index]
    if place is None:
        raise OptionError(
            f"{SPANS_KEY} {span.name} must name a message that is one message of the chat too, got {span.message}, "
            f"which is none or several there (results of tools, system messages amid others); {_REMEDY}"
        )
    return MessageSpan(span.name, place)


def _index(span: MessageSpan, count: int) -> int:
    index = span.message + count if span.message < 0 else span.message
    if not 0 <= index < count:
        raise OptionError(
            f"{SPANS_KEY} {span.name} must name one of the {count} messages, 0 to {count - 1}, got {span.message}; "
            "-1 is the last one"
        )
    return index


async def _characters(index: int, messages: Sequence[Any], text: str, render: Render) -> tuple[int, int]:
    """Where the text of message `index` stands in the rendered `text`."""
    # Letters and digits only: a template may escape others (tojson).
    word = f"glassbox{secrets.token_hex(16)}"
    marked = await render([*messages[:index], _with_text(messages[index], index, word), *messages[index + 1 :]])
    if marked is None or marked.count(word) != 1:
        raise OptionError(
            f"{SPANS_KEY} must name messages whose text the chat template writes once, got {index}; {_REMEDY}"
        )
    before, after = marked.split(word)
    begin, end = len(before), len(text) - len(after)
    if begin > end or not text.startswith(before) or not text.endswith(after):
        raise OptionError(
            f"{SPANS_KEY} must name messages that don't change what the chat template writes around them, got "
            f"{index}; {_REMEDY}"
        )
    return begin, end


def _with_text(message: Any, index: int, text: str) -> Mapping[str, Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return {**message, "content": text}
    if isinstance(content, Sequence) and content and all(_is_text(part) for part in content):
        return {**message, "content": [{"type": "text", "text": text}]}
    raise OptionError(f"{SPANS_KEY} must name messages of text, got {index}, which is not; {_REMEDY}")


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") in {"text", "input_text"})


def _tokens(begin: int, end: int, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First token that overlaps the characters, and the one after the last."""
    inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > begin]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
