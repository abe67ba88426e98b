"""The secret that webhooks are signed with, from its file: `whsec_` and base64, as Standard Webhooks has it.

Owns the form, and the advice on how to make one.
"""

import base64
import binascii
from pathlib import Path
from typing import Final

from glassbox.core.secret_file import SecretFileError, read_secret_file

_PREFIX: Final = b"whsec_"
# As the specification asks for.
_MIN_BYTES: Final = 24
_MAX_BYTES: Final = 64
_HOW: Final = 'make one with: (umask 077; echo "whsec_$(head -c 32 /dev/urandom | base64)" > FILE)'


def read_webhook_secret(path: Path) -> bytes:
    """The key of the signatures.

    Raises:
        SecretFileError: the file can't be used, or holds none; the message goes on from its name, without its content.
    """
    text = read_secret_file(path).strip()
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not text.startswith(_PREFIX) or not _MIN_BYTES <= len(key) <= _MAX_BYTES:
        raise SecretFileError(f"must hold whsec_ and the base64 of {_MIN_BYTES} to {_MAX_BYTES} bytes; {_HOW}")
    return key
