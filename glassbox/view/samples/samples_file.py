"""The file of samples: lines of JSON, each with what a model is asked and whether it is a positive.

Owns the format and its checks. A line has

prompt: text, or a list of token ids; or messages: of a chat, as the OpenAI API takes them.
answer: text; if it is given, it is measured as it stands there, else the model answers.
label: true or false (1 or 0); null or left out if it isn't known.
spans: names of parts of the prompt whose attention is wanted. A text that stands in the prompt once, [start, end] in
    token positions, or {"message": i} for the text of a message of the chat (-1 is the last).
group: text; samples of a group belong together, and are never divided between training and test.
id: text; without it the number of the line.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from glassbox.core.json_fields import FieldError, parse_json
from glassbox.core.trace_options import MAX_SPANS, SPANS_KEY, OptionError, parse_options
from glassbox.signals.features import ANSWER
from glassbox.view.input_file import open_file
from glassbox.view.measured import ViewError

MAX_FILE_BYTES: Final = 4 << 30
MAX_LINE_BYTES: Final = 16 << 20
MAX_SAMPLES: Final = 1_000_000
_MAX_ID: Final = 256
_MAX_TOKEN_ID: Final = 2**31 - 1
_FIELDS: Final = ("prompt", "messages", "answer", "label", "spans", "group", "id")
_REMEDY: Final = "docs/probes.md has the format"
# What stands for any span when a name's rule is asked for.
_ANYWHERE: Final = "0:1"


@dataclass(frozen=True)
class SpanPlace:
    """A named part of a prompt; exactly one of the others is set.

    Attributes:
        name: of the span.
        text: that stands in the prompt once.
        tokens: first position and exclusive end.
        message: index of a chat's message.
    """

    name: str
    text: str | None = None
    tokens: tuple[int, int] | None = None
    message: int | None = None


@dataclass(frozen=True)
class Sample:
    """One line; either `prompt` or `messages` is set. See the module."""

    index: int
    id: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[Mapping[str, Any], ...] | None
    answer: str | None
    label: bool | None
    group: str | None
    spans: tuple[SpanPlace, ...]


@dataclass(frozen=True)
class SamplesFile:
    """All lines, and the digest of the file (SHA-256)."""

    samples: tuple[Sample, ...]
    digest: str


def read_samples(path: Path) -> SamplesFile:
    """Read and check the whole file.

    Raises:
        ViewError: it can't be read, is empty or too long, or a line breaks a rule; the message says which.
    """
    samples: list[Sample] = []
    digest = hashlib.sha256()
    names: dict[str, int] = {}
    for number, line in _lines(path, digest):
        try:
            sample = _sample(len(samples), number, parse_json(line))
            if sample.id in names:
                raise FieldError(f"id must be of one sample, got {sample.id!r} as in line {names[sample.id]}")
        except FieldError as error:
            raise ViewError(f"{path}, line {number}: {error}; {_REMEDY}") from None
        names[sample.id] = number
        samples.append(sample)
        if len(samples) > MAX_SAMPLES:
            raise ViewError(f"{path} must have at most {MAX_SAMPLES:,} samples; divide it")
    if not samples:
        raise ViewError(f"{path} must have samples, but is empty; {_REMEDY}")
    return SamplesFile(tuple(samples), digest.hexdigest())


def _lines(path: Path, digest: Any) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of each line that isn't blank."""
    with open_file(path, MAX_FILE_BYTES, "name a file of samples, a line of JSON each") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ViewError(f"{path}, line {number}: must have at most {MAX_LINE_BYTES >> 20} MB; shorten it")
            digest.update(line)
            if line.strip():
                yield number, line


def _sample(index: int, number: int, value: Any) -> Sample:
    if not isinstance(value, dict):
        raise FieldError(f"the line must be a mapping, got {_shown(value)}")
    for name in value:
        if name not in _FIELDS:
            raise FieldError(f"{name[:_MAX_ID]!r} must be one of {', '.join(_FIELDS)}")
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise FieldError("a sample must have either prompt or messages")
    return Sample(
        index=index,
        id=_text("id", value.get("id"), _MAX_ID) or str(number),
        prompt=None if prompt is None else _prompt(prompt),
        messages=None if messages is None else _messages(messages),
        answer=_text("answer", value.get("answer"), MAX_LINE_BYTES),
        label=_label(value.get("label")),
        group=_text("group", value.get("group"), _MAX_ID),
        spans=_spans(value.get("spans")),
    )


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value:
        return value
    is_tokens = isinstance(value, list) and value
    if is_tokens and all(type(one) is int and 0 <= one <= _MAX_TOKEN_ID for one in value):
        return tuple(value)
    raise FieldError(f"prompt must be a text or a list of token ids, got {_shown(value)}")


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    is_chat = isinstance(value, list) and value
    if is_chat and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in value):
        return tuple(value)
    raise FieldError(f"messages must be a list of mappings with a role, got {_shown(value)}")


def _text(name: str, value: Any, most: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        raise FieldError(f"{name} must be a text of 1 to {most} characters, got {_shown(value)}")
    return value


def _label(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int and value in {0, 1}:
        return bool(value)
    raise FieldError(f"label must be true or false (1 or 0), or null if it isn't known, got {_shown(value)}")


def _spans(value: Any) -> tuple[SpanPlace, ...]:
    if value is None:
        return ()
    # One is kept for an answer that is given.
    if not isinstance(value, dict) or len(value) >= MAX_SPANS:
        raise FieldError(f"spans must be a mapping of at most {MAX_SPANS - 1} names, got {_shown(value)}")
    if ANSWER in value:
        raise FieldError(f"spans must not have the name {ANSWER!r}, which is that of the answer; rename it")
    return tuple(_span(name, place) for name, place in value.items())


def _span(name: str, place: Any) -> SpanPlace:
    found: SpanPlace | None = None
    if isinstance(place, str) and place:
        found = SpanPlace(name, text=place)
    elif isinstance(place, list) and len(place) == 2 and all(type(one) is int for one in place):
        found = SpanPlace(name, tokens=(place[0], place[1]))
    elif isinstance(place, dict) and list(place) == ["message"] and type(place["message"]) is int:
        found = SpanPlace(name, message=place["message"])
    if found is None:
        rule = 'must be a text of the prompt, [start, end] in tokens, or {"message": index}'
        raise FieldError(f"spans {name[:_MAX_ID]!r} {rule}, got {_shown(place)}")
    where = _ANYWHERE if found.tokens is None else f"{found.tokens[0]}:{found.tokens[1]}"
    try:
        parse_options({"glassbox": "trace", SPANS_KEY: [f"{name}={where}"]})
    except OptionError as error:
        raise FieldError(str(error).removeprefix("glassbox_")) from None
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
