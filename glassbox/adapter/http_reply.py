"""A further field in an answer over HTTP: how it gets into one that is whole, and into one that is streamed.

Owns the places. A whole answer is a JSON object, which gets one member more. A stream of chunks gets it in its last one
before `[DONE]`: the usage chunk, if the client asked for that, else one of that chunk's form, whose `choices` are
empty. A stream of named events gets it in the event that ends it. Whatever is no such answer passes as it is: errors,
compressed bodies, streams that fail. It knows ASGI and the formats of the APIs, whose clients take unknown fields
(vLLM's `metrics` is one), and nothing of vLLM's code; what the field says is its caller's.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from glassbox.adapter.event_stream import (
    BREAK,
    DATA,
    DONE,
    MEDIA_TYPE,
    Message,
    Send,
    chunk_without_choices,
    last_chunk,
)
from glassbox.core.logs import get_logger, log_once

logger = get_logger(__name__)

# Waits for the field's value, which is JSON; None: there is none.
Field = Callable[[], Awaitable[bytes | None]]

_JSON: Final = "application/json"
_NO_CHOICES: Final = b'"choices":[]'
_LAST_EVENTS: Final = (b"event: message_stop\n", b"event: response.completed\n", b"event: response.incomplete\n")


class Reply:
    """The `send` of a request: passes messages on, and from the moment that it has a field, adds that.

    Attributes:
        field: what tells the value of the field; None as long as the request has not asked for it.

    Args:
        send: ASGI's.
        name: of the field.
    """

    def __init__(self, send: Send, name: str) -> None:
        self._send, self._name = send, name
        self._start: Message | None = None
        self._held = False
        self._amend: Callable[[Message], Awaitable[None]] | None = None
        self.field: Field | None = None

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message. Of a request that has not asked this costs no more than two comparisons."""
        if message["type"] == "http.response.start":
            self._start = message
            return self._begin(message) if self.field is not None else self._send(message)
        if self.field is None or message["type"] != "http.response.body":
            return self._send(message)
        return self._body(message)

    async def _begin(self, message: Message) -> None:
        # The length of a whole answer is known later; a stream has begun before its request reaches the engine.
        self._held = _kind(message) == _JSON
        if not self._held:
            await self._send(message)

    async def _body(self, message: Message) -> None:
        if self._amend is None:
            self._amend = self._choose()
        await self._amend(message)

    def _choose(self) -> Callable[[Message], Awaitable[None]]:
        assert self._start is not None  # ASGI: a body has a start
        kind = _kind(self._start)
        if self._held:
            return _Whole(self._send, self._start, self._name, self._value)
        if kind == MEDIA_TYPE:
            return _Stream(self._send, self._name, self._value)
        if self._start["status"] == 200:
            log_once(
                logger,
                logging.WARNING,
                "answer",
                "A request asked for %s in its answer, which is neither JSON nor a stream of events, or is compressed "
                "by a middleware, so it gets none; the trace is there all the same",
                self._name,
            )
        return self._send

    async def _value(self) -> bytes | None:
        try:
            return None if self.field is None else await self.field()
        except Exception as error:  # the answer is there, whatever becomes of what is said about it
            log_once(logger, logging.ERROR, "field", "No %s in an answer: %s", self._name, repr(error)[:500])
            return None


def _kind(start: Message) -> str:
    """Media type of a good answer; empty of one that is not to be touched."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    if start["status"] != 200 or headers.get(b"content-encoding", b"identity") != b"identity":
        return ""
    return headers.get(b"content-type", b"").split(b";")[0].strip().decode("latin-1")


def with_member(text: bytes, name: str, value: bytes) -> bytes:
    """A JSON object with one member more, and every byte of the others as it was; what is no object stays as it is."""
    stripped = text.strip()
    if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
        return text
    comma = b"" if stripped[1:-1].strip() == b"" else b","
    return b"%s%s%s:%s}" % (stripped[:-1], comma, json.dumps(name).encode(), value)


class _Whole:
    """Of a whole answer the start is held back, for its length changes."""

    def __init__(self, send: Send, start: Message, name: str, field: Field) -> None:
        self._send, self._start, self._name, self._field = send, start, name, field
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body, value = b"".join(self._parts), await self._field()
        if value is not None:
            body = with_member(body, self._name, value)
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})


class _Stream:
    """Of a stream nothing is held back but a usage chunk, until what follows it, and the end."""

    def __init__(self, send: Send, name: str, field: Field) -> None:
        self._send, self._name, self._field = send, name, field
        self._last = b""  # chunk with choices
        self._usage: Message | None = None
        self._added = False

    async def __call__(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        if self._added:
            await self._send(message)
        elif body.startswith(DONE) or BREAK + DONE in body:
            await self._before_done(message, body)
        elif body.startswith(_LAST_EVENTS):
            self._added = True
            await self._send({**message, "body": await self._in_event(body)})
        else:
            await self._pass(message, body)

    async def _pass(self, message: Message, body: bytes) -> None:
        await self._send_usage()
        if body.startswith(DATA):
            self._last = body
            if _NO_CHOICES in body and body.endswith(BREAK) and message.get("more_body", False):
                self._usage = message
                return
        await self._send(message)

    async def _send_usage(self) -> None:
        usage, self._usage = self._usage, None
        if usage is not None:
            await self._send(usage)

    async def _before_done(self, message: Message, body: bytes) -> None:
        self._added = True
        before, _, rest = body.rpartition(DONE)
        last = before or self._last
        chunk = last_chunk(last) if last.startswith(DATA) else None
        value = None if chunk is None or "error" in chunk else await self._field()
        if value is not None and self._usage is not None:
            usage, self._usage = self._usage["body"], None
            text = with_member(usage.removeprefix(DATA), self._name, value)
            await self._send({**message, "body": DATA + text + BREAK, "more_body": True})
        elif value is not None and chunk is not None:
            text = with_member(chunk_without_choices(chunk), self._name, value)
            before += DATA + text + BREAK
        await self._send_usage()
        await self._send({**message, "body": before + DONE + rest})

    async def _in_event(self, body: bytes) -> bytes:
        head, mark, data = body.partition(b"\n" + DATA)
        event, _, rest = data.partition(BREAK)
        value = await self._field() if mark else None
        if value is None:
            return body
        try:
            parsed = json.loads(event)
            if isinstance(parsed["response"], dict):  # as the client gets it whole
                parsed["response"][self._name] = json.loads(value)
                event = json.dumps(parsed, separators=(",", ":"), ensure_ascii=False).encode()
        except (ValueError, KeyError):
            event = with_member(event, self._name, value)
        return head + mark + event + BREAK + rest
