"""Parts of the names of files in the run directory, made of what clients and models are called.

Owns how such a text is made harmless, and the digests that keep files of different requests apart.
"""

import hashlib
import json
import re
from typing import Final

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.]")
_DIGITS: Final = 32


def clean(text: str) -> str:
    """A text without anything that a file system or a name's dashes take for more than a letter."""
    return _UNSAFE.sub("_", text)


def request_digest(internal_id: str, client: str | None) -> str:
    """Tells a client's request from others, whichever worker it is on; nothing of either can be read from it."""
    return _digest(f"{client or ''}/{internal_id}".encode("utf-8", "surrogatepass"))


def key_digest(key: tuple[str, str, str | None]) -> str:
    """Likewise of an engine's request: engine, internal id, client.

    With the client: where vLLM's ids are the clients', two of them may choose the same.
    """
    return _digest(json.dumps(key).encode())


def _digest(whole: bytes) -> str:
    return hashlib.sha256(whole).hexdigest()[:_DIGITS]
