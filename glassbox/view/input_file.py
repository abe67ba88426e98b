"""Opens what a user names to be read: only files, and without waiting for whoever writes to a pipe."""

from pathlib import Path
from typing import BinaryIO

from glassbox.core.files import open_regular
from glassbox.view.measured import ViewError


def open_file(path: Path, max_bytes: int, remedy: str) -> BinaryIO:
    """A file, to be read.

    Args:
        max_bytes: a larger one is refused.
        remedy: what the message ends with.

    Raises:
        ViewError: it isn't there, can't be read, is no regular file or too large.
    """
    try:
        return open_regular(path, max_bytes)
    except OSError as error:
        raise ViewError(f"can't read {path}: {error.strerror}; {remedy}") from None
