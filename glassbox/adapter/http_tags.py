"""Tags of a response over HTTP: names of rules that applied to its request.

Owns where they are told. As long as the response has not begun, in a header: ASGI sends all headers first. A stream
begins before its request is measured, so there it is always too late for one: a stream of chunks gets one more before
its `[DONE]`, without choices, as vLLM's usage chunk is. Streams of named events tell nothing.
"""

from collections.abc import Awaitable
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

HEADER: Final = "x-glassbox-rules"
MEMBER: Final = "glassbox_rules"


class Tags:
    """The `send` of a request, and the tags of its response.

    Args:
        send: ASGI's.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._names: list[str] = []
        self._in_header: list[str] = []
        self._begun = self._is_stream = self._done = False
        self._last = b""  # chunk of a stream

    def add(self, name: str) -> bool:
        """Tag the response; False if it can't be told any more. From any thread."""
        # In this order: what was there when it began is in its header.
        self._names.append(name)
        return not self._begun or (self._is_stream and not self._done)

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message. Of a response without tags this costs a comparison or two."""
        if message["type"] == "http.response.start":
            return self._send(self._begin(message))
        if self._is_stream and message["type"] == "http.response.body":
            return self._send(self._chunk(message))
        return self._send(message)

    def _begin(self, message: Message) -> Message:
        self._begun = True
        headers = list(message.get("headers", ()))
        types = [value for name, value in headers if name.lower() == b"content-type"]
        self._is_stream = message["status"] == 200 and any(value.startswith(MEDIA_TYPE.encode()) for value in types)
        self._in_header = sorted(set(self._names))
        if not self._in_header:
            return message
        return {**message, "headers": [*headers, (HEADER.encode(), ", ".join(self._in_header).encode())]}

    def _chunk(self, message: Message) -> Message:
        body: bytes = message.get("body", b"")
        if DONE not in body:
            self._last = body or self._last
            return message
        self._done = True
        late = sorted(set(self._names) - set(self._in_header))
        before, _, rest = body.rpartition(DONE)
        chunk = last_chunk(before or self._last)
        if not late or chunk is None:
            return message
        text = chunk_without_choices(chunk, **{MEMBER: late})
        # What comes with the end stays the last, as a summary that the request has asked for (`http_reply.py`).
        return {**message, "body": DATA + text + BREAK + before + DONE + rest}
