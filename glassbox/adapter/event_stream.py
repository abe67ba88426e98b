"""The form in which vLLM streams an answer: events of `data: ` and JSON, the last one `[DONE]`; and ASGI's messages.

What is put into a stream (`http_reply.py`, `http_tags.py`) is a chunk more, without choices, as vLLM's usage chunk is.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

MEDIA_TYPE: Final = "text/event-stream"
DATA: Final = b"data: "
DONE: Final = b"data: [DONE]"
# Line breaks in a text are escaped in JSON, so nothing that a model says looks like these.
BREAK: Final = b"\n\n"
_CHUNK_MEMBERS: Final = ("id", "object", "created", "model")


def last_chunk(events: bytes) -> dict[str, Any] | None:
    """The chunk that the last of some events holds; None if that is none."""
    try:
        chunk = json.loads(events.rstrip().rpartition(DATA)[2])
    except ValueError:
        return None
    return chunk if isinstance(chunk, dict) and "choices" in chunk else None


def chunk_without_choices(chunk: Mapping[str, Any], **more: Any) -> bytes:
    """JSON of a further chunk of the same stream."""
    common = {name: chunk[name] for name in _CHUNK_MEMBERS if name in chunk}
    return json.dumps({**common, "choices": [], **more}, separators=(",", ":")).encode()
